"""The model registry: real snapshots in a real MLflow store, found again by alias and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bessemer.cli.register import register as register_command
from bessemer.errors import CheckpointError, TrackingError
from bessemer.spec.job import TrackingSpec
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, load_snapshot, sampled_state, save_snapshot
from bessemer.tracking.mlflow_mirror import MlflowMirror, register_run, replay

pytestmark = [
    pytest.mark.slow,
    # MLflow's own use of SQLAlchemy; Python hides it from people, pytest does not.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]


def snapshot(run: Any, nimg: int, kid: float | None = None, **protocol: Any) -> dict[str, torch.Tensor]:
    """A snapshot of random weights at a point of the run, evaluated unless `kid` is None; its tensors."""
    system = build("vae", "tiny8", {"channels": 1})
    system.init_weights(torch.Generator().manual_seed(nimg))
    info = SnapshotInfo(
        "vae", system.config.model_dump(mode="json"), nimg, {"half_life_kimg": 1}, 0, "d4", ["a|b"], [9]
    )
    tensors = {name: tensor.clone() for name, tensor in sampled_state(system).items()}
    written = save_snapshot(run.path / "snapshots" / f"kimg-{nimg / 1000:010.3f}", tensors, info)
    if kid is not None:
        run.evaluate(nimg, kid, weights_sha256=written.weights_sha256, **protocol)
    return tensors


def store(database: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{database}")


def loaded(client: Any, alias: str, place: Path, model: str = "quickstart") -> tuple[Any, str, dict[str, Any]]:
    """Version with an alias, its model card, and its tensors as they come back."""
    version = client.get_model_version_by_alias(model, alias)
    folder = version.source.split("/artifacts/")[1]
    directory = Path(client.download_artifacts(version.run_id, folder, str(place)))
    assert {path.name for path in directory.iterdir()} == {"weights.safetensors", "snapshot.json", "README.md"}
    system, _ = load_snapshot(directory)
    return version, (directory / "README.md").read_text(), sampled_state(system)


def test_newest_and_best_are_found_by_alias(make_run: Any, database: Path, tmp_path: Path) -> None:
    run = make_run("one").whole()
    tensors = {nimg: snapshot(run, nimg, kid) for nimg, kid in ((50_000, 0.05), (60_000, 0.02), (70_000, 0.03))}
    entries = register_run(run.path)
    assert [(one.snapshot, one.aliases) for one in entries] == [
        ("kimg-000070.000", ("latest",)), ("kimg-000060.000", ("best",))
    ]  # fmt: skip
    client = store(database)
    for alias, nimg, value in (("latest", 70_000, "0.03"), ("best", 60_000, "0.02")):
        version, card, back = loaded(client, alias, tmp_path)
        assert back.keys() == tensors[nimg].keys()
        assert all(torch.equal(back[name], tensors[nimg][name]) for name in back)
        assert f"| kid\\_efflite0 | {value} | 0.01 |" in card
        assert "generated images 500; real images 500; reference abc" in card
        assert version.tags["bessemer.nimg"] == str(nimg)
        assert version.run_id == replay(run.path)
    assert register_run(run.path) == entries  # nothing is there twice
    assert len(client.search_model_versions("name = 'quickstart'")) == 2


def test_best_moves_to_what_is_better_by_the_same_protocol_alone(
    make_run: Any, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, worse, other, better = (make_run(name) for name in ("first", "worse", "other", "better"))
    client, found = store(database), []
    for run, value, protocol in ((first, 0.3, {}), (worse, 0.4, {}), (other, 0.1, {"samples": 50}), (better, 0.2, {})):
        snapshot(run, 1000, value, **protocol)
        register_command(str(run.path))
        best, latest = (client.get_model_version_by_alias("quickstart", alias) for alias in ("best", "latest"))
        assert latest.tags["bessemer.value"] == str(value)
        found.append(best.tags["bessemer.value"])
    assert found == ["0.3", "0.3", "0.3", "0.2"]
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "quickstart version 1: kimg-000001.000 (best, latest)"
    assert said.err.splitlines() == [
        "best stays where it is: version 1 has 0.3",
        "best stays where it is: version 1 was measured by another protocol",
    ]


@pytest.mark.parametrize(("status", "versions"), [("FINISHED", 1), ("KILLED", 0)])
def test_the_mirror_registers_what_has_finished(make_run: Any, database: Path, status: Any, versions: int) -> None:
    run = make_run("one").whole()
    snapshot(run, 40_000)  # not evaluated, or not any more
    spec = TrackingSpec(uri="sqlite:///mlflow.db", experiment="tests", registry=True)
    mirror = MlflowMirror(run.path, spec, run.path.parent, interval=0.02)
    mirror.start()
    assert mirror.stop(status, timeout=120)
    found = store(database).search_model_versions("name = 'quickstart'")
    assert [one.tags["bessemer.nimg"] for one in found] == ["40000"] * versions


def test_what_cannot_be_registered_is_named(make_run: Any, database: Path) -> None:
    run = make_run("one").whole()
    with pytest.raises(TrackingError, match="has no snapshot to register"):
        register_run(run.path)
    snapshot(run, 1000)
    (run.path / "snapshots" / "kimg-000001.000" / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        register_run(run.path)
