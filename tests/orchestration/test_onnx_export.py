"""ONNX models of samplers, run with ONNX Runtime beside PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bessemer.errors import CheckpointError, MachineError, RunError, SpecError
from bessemer.evaluation.sampling import prepare
from bessemer.nn.latents import normal_latents
from bessemer.orchestration import onnx_export
from bessemer.orchestration.onnx_export import export_onnx
from bessemer.systems.adversarial.biggan import BigGAN
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, load_snapshot, sampled_state, save_snapshot

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = {"generator_width": 4, "discriminator_width": 4, "latent_dim": 8, "shared_dim": 3}
SYSTEMS = {
    "biggan": ("biggan", "tiny32", SMALL),
    "biggan-deep": ("biggan-deep", "deep32", {**SMALL, "classes": 10, "generator_depth": 1}),
    "one class": ("biggan", "cifar10", {"generator_width": 2, "discriminator_width": 2, "classes": 1}),
    "clips": ("dvdgan", "tiny16", {"generator_width": 2, "discriminator_width": 2, "classes": 10}),
}


def snapshot(directory: Path, name: str, preset: str, fields: Mapping[str, Any]) -> Path:
    system = build(name, preset, fields)
    system.init_weights(torch.Generator().manual_seed(1))
    classes = [str(i) for i in range(system.config.classes)]
    config = system.config.model_dump(mode="json")
    info = SnapshotInfo(name, config, 12_800, {"half_life_kimg": 10.0}, 3, "abc", classes, [5] * len(classes))
    save_snapshot(directory, sampled_state(system), info)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("which", SYSTEMS)
def test_images_are_those_of_pytorch(tmp_path: Path, which: str) -> None:
    """`sample` draws the same latents here as in PyTorch, and ONNX Runtime makes the same images of them."""
    directory, out = snapshot(tmp_path / "snapshot", *SYSTEMS[which]), tmp_path / "sampler.onnx"
    metadata = export_onnx(directory, out, truncation=0.8)

    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    assert {p.key: p.value for p in model.metadata_props} == metadata
    system, info = load_snapshot(directory)
    assert metadata["bessemer.weights_sha256"] == info.weights_sha256
    assert json.loads(metadata["bessemer.config"]) == info.config
    assert (metadata["bessemer.kimg"], metadata["bessemer.truncation"]) == ("12.8", "0.8")
    conditional = which != "one class"
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("latents", ["batch", *system.latent_shapes["latents"]], "tensor(float)"),
        *([("labels", ["batch"], "tensor(int64)")] if conditional else []),
    ]
    assert session.get_outputs()[0].shape == ["batch", *system.sample_shape]

    prepare(system, info.class_counts, seed=info.seed, truncation=0.8, device="cpu")
    for count in (1, 2, 5):
        labels = torch.arange(count) if conditional else torch.zeros(count, dtype=torch.int64)
        expected = system.sample(labels, torch.Generator().manual_seed(count), 0.8)
        z = normal_latents((count, *system.latent_shapes["latents"]), torch.Generator().manual_seed(count), 0.8)
        feed = {"latents": z.numpy(), **({"labels": labels.numpy()} if conditional else {})}
        (images,) = session.run(None, feed)
        assert expected.std() > 0.05
        torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-5, rtol=0)


class DrawsByItself(BigGAN):
    """Has no latents."""

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {}


class FixedBatch(BigGAN):
    """Makes a constant of the batch size."""

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:
        images = super().generate(latents, labels, truncation)
        return images.view(len(images), *images.shape[1:])


def as_system(monkeypatch: pytest.MonkeyPatch, cls: type[BigGAN]) -> None:
    monkeypatch.setattr("bessemer.systems.snapshot.rebuild", lambda name, config: cls(cls.Config(**config)))


def test_a_system_without_latents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = snapshot(tmp_path / "snapshot", *SYSTEMS["biggan"])
    as_system(monkeypatch, DrawsByItself)
    with pytest.raises(SpecError, match=r"--format onnx: biggan has no sampler from latents .* use --format snapshot"):
        export_onnx(directory, tmp_path / "x.onnx")


@pytest.mark.slow
def test_what_does_not_hold_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch size that became a constant, other images, a place that is not there."""
    directory, out = snapshot(tmp_path / "snapshot", *SYSTEMS["one class"]), tmp_path / "x.onnx"
    with monkeypatch.context() as patch:
        as_system(patch, FixedBatch)
        with pytest.raises(RuntimeError, match="batch"):
            export_onnx(directory, out)
    with pytest.raises(RunError, match=r"--out .*missing/x\.onnx: there is no directory"):
        export_onnx(directory, tmp_path / "missing" / "x.onnx")
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)
    with pytest.raises(CheckpointError, match=r"differ from PyTorch's by .*nothing was written"):
        export_onnx(directory, out)
    assert not out.exists()


def test_missing_packages_and_weights_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = snapshot(tmp_path / "snapshot", *SYSTEMS["biggan"])
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "LARGEST", 1000)
        with pytest.raises(MachineError, match=r"do not fit into one ONNX file"):
            export_onnx(directory, tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MachineError, match=r"package onnxscript is missing; .*bessemer\[onnx\]"):
        export_onnx(directory, tmp_path / "x.onnx")
