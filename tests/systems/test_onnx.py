"""Samplers with several latents as ONNX models: StyleGAN2 has noise for every layer, NVAE for every group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bessemer.evaluation.sampling import prepare
from bessemer.systems.autoencoding.nvae import NVAE
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, load_snapshot, sampled_state, save_snapshot

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

STYLEGAN2 = {"resolution": 16, "latent_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 16, "classes": 10}
SMALL = {"width": 4, "groups": (2, 1), "latent_channels": 2, "flows": 1, "standing_passes": 2, "standing_batch": 4}
CASES: dict[str, tuple[str, str, dict[str, Any], float | None]] = {
    "stylegan2": ("stylegan2", "tiny32", STYLEGAN2, 0.7),
    "stylegan2 with classes": ("stylegan2", "tiny32", {**STYLEGAN2, "conditional": True}, 0.7),
    "nvae": ("nvae", "tiny32", {**SMALL, "resolution": 16}, None),
    "nvae in black and white": ("nvae", "tiny28", SMALL, 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_pytorch(tmp_path: Path, case: str) -> None:
    from bessemer.orchestration.onnx_export import export_onnx

    name, preset, fields, truncation = CASES[case]
    system = build(name, preset, fields)
    system.init_weights(torch.Generator().manual_seed(1))
    if isinstance(system, NVAE):  # whose images would be nearly grey before training
        torch.nn.init.constant_(system.vae.image[1].log_gain, 2.0)  # type: ignore[arg-type]
    config = system.config.model_dump(mode="json")
    classes = [str(i) for i in range(system.config.classes)]
    info = SnapshotInfo(name, config, 0, {"half_life_kimg": 10.0}, 3, "abc", classes, [5] * len(classes))
    save_snapshot(tmp_path / "snapshot", sampled_state(system), info)
    metadata = export_onnx(tmp_path / "snapshot", tmp_path / "x.onnx", truncation=truncation)
    assert json.loads(metadata["bessemer.truncation"]) == truncation
    assert ("the mean of p(x | z)" in metadata["bessemer.images"]) == system.draws_pixels

    system, info = load_snapshot(tmp_path / "snapshot")
    prepare(system, info.class_counts, seed=info.seed, truncation=truncation, device="cpu")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    assert set(system.latent_shapes) <= names
    for count in (1, 3):
        labels, g = torch.arange(count) % len(classes), torch.Generator().manual_seed(count)
        latents = {k: torch.randn(count, *shape, generator=g) for k, shape in system.latent_shapes.items()}
        feed = {k: t.numpy() for k, t in latents.items()} | ({"labels": labels.numpy()} if "labels" in names else {})
        with torch.no_grad():
            expected = system.generate(latents, labels, truncation)
        if not system.draws_pixels:
            assert torch.equal(system.sample(labels, torch.Generator().manual_seed(count), truncation), expected)
        (images,) = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.05
