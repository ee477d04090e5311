import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bessemer.errors import CheckpointError, SpecError
from bessemer.systems.contract import System
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, load_snapshot, newest_snapshot, save_snapshot, snapshot_dirs

FIELDS = {"generator_width": 2, "discriminator_width": 2, "latent_dim": 8, "shared_dim": 3, "standing_batch": 2}


def _system() -> System:
    system = build("biggan", "tiny32", FIELDS)
    system.init_weights(torch.Generator().manual_seed(1))
    system.prepare_sampling(torch.arange(4), torch.Generator().manual_seed(2))
    for network in system.networks().values():
        network.eval()
    return system


def _save(system: System, directory: Path) -> SnapshotInfo:
    tensors = {
        f"{name}.{key}": tensor
        for name in system.sampled_networks
        for key, tensor in system.networks()[name].state_dict().items()
    }
    info = SnapshotInfo(
        system=system.name,
        config=system.config.model_dump(mode="json"),
        nimg=12_800,
        ema={"half_life_kimg": 10.0, "rampup": 0.05},
        seed=3,
        data_hash="abc",
        class_names=[str(i) for i in range(10)],
        class_counts=[5] * 10,
    )
    return save_snapshot(directory, tensors, info)


def _samples(system: System) -> Tensor:
    return system.sample(torch.arange(4), torch.Generator().manual_seed(7), 0.8)


def test_round_trip_draws_the_same_samples(tmp_path: Path) -> None:
    system = _system()
    written = _save(system, tmp_path / "snapshots" / "kimg-000012.800")
    _save(system, tmp_path / "snapshots" / "kimg-000006.400")
    assert [p.name for p in snapshot_dirs(tmp_path)] == ["kimg-000006.400", "kimg-000012.800"]
    loaded, info = load_snapshot(newest_snapshot(tmp_path))
    assert info == written
    assert info.nimg == 12_800
    assert loaded.config == system.config
    assert not any(loaded.networks()[name].training for name in loaded.sampled_networks)
    assert torch.equal(_samples(loaded), _samples(system))
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["kimg-000006.400", "kimg-000012.800"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    system = _system()
    first = _save(system, tmp_path / "kimg-000000.000")
    with torch.no_grad():
        next(system.networks()["generator"].parameters()).add_(1)
    second = _save(system, tmp_path / "kimg-000000.000")
    assert first.weights_sha256 != second.weights_sha256
    assert load_snapshot(tmp_path / "kimg-000000.000")[1] == second


def test_damage_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "kimg-000012.800"
    _save(_system(), directory)
    weights = directory / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: missing or damaged .*another snapshot"):
        load_snapshot(directory)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_snapshot(directory)


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no snapshot yet"):
        newest_snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="not a snapshot"):
        load_snapshot(tmp_path)
    directory = tmp_path / "kimg-000012.800"
    _save(_system(), directory)
    info = json.loads((directory / "snapshot.json").read_text())
    (directory / "snapshot.json").write_text(json.dumps({**info, "surprise": 1}))
    with pytest.raises(CheckpointError, match=r"not a snapshot .*surprise"):
        load_snapshot(directory)
    (directory / "snapshot.json").write_text(json.dumps({**info, "system": "bigga"}))
    with pytest.raises(SpecError, match="Did you mean 'biggan'"):
        load_snapshot(directory)
