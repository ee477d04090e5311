import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.errors import EvaluationError, SpecError
from bessemer.evaluation.images import open_images
from bessemer.evaluation.lpips import get_lpips
from bessemer.evaluation.reconstruction import compare_pairs, psnr, ssim


def pair(size: int = 14, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, channels, size, size))
    y = (x + rng.normal(0, 30, x.shape)).clip(0, 255)
    return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y.astype(np.uint8))


def test_psnr_is_its_definition() -> None:
    x, y = pair()
    for i, found in enumerate(psnr(x, y)):
        error = np.mean([(int(a) - int(b)) ** 2 for a, b in zip(x[i].flatten(), y[i].flatten(), strict=True)])
        assert found == pytest.approx(10 * math.log10(255**2 / error), rel=1e-12)
    assert psnr(x, x).isinf().all()


def test_ssim_is_that_of_the_paper() -> None:
    x, y = pair(13)
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    window /= window.sum()
    found = ssim(x, y)
    for n in range(3):
        values = []
        for c in range(2):
            for i in range(3):
                for j in range(3):
                    a, b = (s[n, c, i : i + 11, j : j + 11].double().numpy() for s in (x, y))
                    ma, mb = (window * a).sum(), (window * b).sum()
                    va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                    cov = (window * (a - ma) * (b - mb)).sum()
                    c1, c2 = 6.5025, 58.5225
                    values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
        assert found[n] == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(x, x) == pytest.approx(1)


def save(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_sets_are_compared_pair_by_pair(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 200, (size, 16, 3), dtype=np.uint8) for size in (16, 12, 16, 12, 16)]
    changed = [*images[:1], *(i + np.uint8(n + 3) for n, i in enumerate(images[1:]))]
    a, b = save(tmp_path / "a", changed), save(tmp_path / "b", images)
    with open_images(a) as x, open_images(b) as y:
        found = compare_pairs(x, y, batch_size=3)
    assert (found.pairs, found.equal) == (5, 1)
    assert found.psnr == pytest.approx(np.mean([20 * math.log10(255 / d) for d in (3, 4, 5, 6)]))
    assert 0.9 < found.ssim < 1
    result = CliRunner().invoke(app, ["compare-sets", str(a), str(b), "--paired", "--json"], catch_exceptions=False)
    assert json.loads(result.output)["ssim"] == pytest.approx(found.ssim)
    with pytest.raises(SpecError, match="--real: does not go with --paired"):
        CliRunner().invoke(app, ["compare-sets", str(a), str(b), "--paired", "--real", "3"], catch_exceptions=False)


def test_lpips_is_added_where_it_is_asked_for(lpips: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 200, (24, 24, 3), dtype=np.uint8) for _ in range(3)]
    a, b = save(tmp_path / "a", [i + np.uint8(9) for i in images]), save(tmp_path / "b", images)
    command = ["compare-sets", str(a), str(b), "--paired"]
    found = json.loads(CliRunner().invoke(app, [*command, "--lpips", "--json"], catch_exceptions=False).output)
    x, y = (
        torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in ([i + np.uint8(9) for i in images], images)
    )
    assert found["lpips"] == pytest.approx(float(get_lpips().distance(x, y).mean()), rel=1e-5)
    assert found["lpips_sha256"] == get_lpips().weights_sha256
    assert json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).output)["lpips"] is None
    header = CliRunner().invoke(app, [*command, "--lpips"], catch_exceptions=False).output.splitlines()[0]
    assert header.split() == ["psnr", "ssim", "lpips", "pairs", "equal", "pairs"]
    with pytest.raises(SpecError, match="--lpips: is a distance of two images; add --paired"):
        CliRunner().invoke(app, [*command[:3], "--lpips"], catch_exceptions=False)


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    flat = [np.zeros((16, 16, 3), dtype=np.uint8)]
    a, b, c = (
        save(tmp_path / name, images)
        for name, images in (("a", flat), ("b", flat * 2), ("c", [np.zeros((16, 12, 3), dtype=np.uint8)]))
    )
    with open_images(a) as x, open_images(b) as y, open_images(c) as z:
        with pytest.raises(EvaluationError, match="1 and 2 cannot be paired"):
            compare_pairs(x, y)
        with pytest.raises(EvaluationError, match=r"number 0 is \[3, 16, 16\] in the one set and \[3, 16, 12\]"):
            compare_pairs(x, z)
    with pytest.raises(EvaluationError, match="must be uint8 of one shape"):
        psnr(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    small = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(EvaluationError, match="smaller than its window"):
        ssim(small, small)
