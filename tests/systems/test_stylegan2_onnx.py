"""StyleGAN2's sampler as an ONNX model: latents and the noise of every layer are its inputs."""

from pathlib import Path

import pytest
import torch

from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, load_snapshot, sampled_state, save_snapshot

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {"resolution": 16, "latent_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 16}


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [False, True])
def test_images_are_those_of_pytorch(tmp_path: Path, conditional: bool) -> None:
    from bessemer.orchestration.onnx_export import export_onnx

    system = build("stylegan2", "tiny32", {**SMALL, "conditional": conditional, "classes": 10})
    system.init_weights(torch.Generator().manual_seed(1))
    config = system.config.model_dump(mode="json")
    classes = [str(i) for i in range(10)]
    info = SnapshotInfo("stylegan2", config, 0, {"half_life_kimg": 10.0}, 3, "abc", classes, [5] * 10)
    save_snapshot(tmp_path / "snapshot", sampled_state(system), info)
    export_onnx(tmp_path / "snapshot", tmp_path / "x.onnx", truncation=0.7)

    system, _ = load_snapshot(tmp_path / "snapshot")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    assert set(system.latent_shapes) <= names
    for count in (1, 3):
        labels, g = torch.arange(count), torch.Generator().manual_seed(count)
        feed = {k: torch.randn(count, *shape, generator=g).numpy() for k, shape in system.latent_shapes.items()}
        feed |= {"labels": labels.numpy()} if "labels" in names else {}
        expected = system.sample(labels, torch.Generator().manual_seed(count), 0.7)
        (images,) = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.05
