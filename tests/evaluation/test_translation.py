"""Samples made from inputs: which inputs, what their outputs are compared with, and the sheet that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn

from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.errors import EvaluationError
from bessemer.evaluation.evaluate import compare_images, evaluate_system
from bessemer.evaluation.grid import translation_sheet
from bessemer.evaluation.images import ImageFiles, field_images, open_images
from bessemer.evaluation.inputs import Inputs
from bessemer.evaluation.speed import measure_speed
from bessemer.systems.contract import Batch, Clock, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.translating import TranslationSystem

SIZE, METRICS = 16, ["l1", "psnr", "ssim"]


class Negative(TranslationSystem):
    """Grey images become their negative in colour, under a little noise."""

    name: ClassVar[str] = "negative"
    family: ClassVar[str] = "translation"
    paper: ClassVar[str] = "none"
    Config: ClassVar[type[SystemConfig]] = SystemConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": {"resolution": SIZE}}
    takes: ClassVar[tuple[str, ...]] = ("images", "targets")

    def __init__(self, config: SystemConfig, noise: float = 0.1, last: str = "targets") -> None:
        self.config, self.noise, self.gain = config, noise, nn.Linear(1, 1, bias=False)
        self.takes = ("images", last)  # type: ignore[misc]
        nn.init.constant_(self.gain.weight, -1.0)

    def networks(self) -> dict[str, nn.Module]:
        return {"gain": self.gain}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {"gain": OptimizerDefaults()}

    def updates(self, clock: Clock) -> Sequence[Update]:
        return []

    def init_weights(self, generator: Generator) -> None:
        pass

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("gain",)

    def sample_for(self, batch: Batch, generator: Generator, truncation: float | None = None) -> Tensor:
        x = batch.images.expand(-1, 3, -1, -1) * self.gain.weight
        return x + self.noise * torch.randn(x.shape, generator=generator)


def negative(noise: float = 0.1, last: str = "targets", channels: int = 1) -> Negative:
    return Negative(SystemConfig(resolution=SIZE, channels=channels), noise, last)


def drawings(count: int, channels: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    """[count, SIZE, SIZE, channels] stripes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    angle, phase = rng.uniform(0, 3, (2, count, 1, 1, channels))
    return (128 + 100 * np.sin(9 * (np.cos(angle) * x[..., None] + np.sin(angle) * y[..., None]) + phase)).astype("u1")


def write(folder: Path, pictures: NDArray[np.uint8]) -> Path:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 grey drawings; the target is the negative in colour, its red 20 brighter."""
    folder = tmp_path_factory.mktemp("translation")
    inputs = drawings(40)
    write(folder / "source" / "input", inputs)
    write(folder / "source" / "target", np.repeat(255 - inputs, 3, axis=3) + np.array([20, 0, 0], dtype=np.uint8))
    pack(folder / "source", folder / "pairs", kind="pairs", shard_bytes=20 << 10)
    return folder / "pairs"


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 drawings in colour, and 12 others."""
    folder = tmp_path_factory.mktemp("translation")
    write(folder / "source" / "trainA", drawings(30, 3, seed=1))
    write(folder / "source" / "trainB", drawings(12, 3, seed=2) // 2)
    pack(folder / "source", folder / "domains", kind="domains")
    return folder / "domains"


def stored(place: Path, field: int = 0) -> NDArray[np.uint8]:
    with ShardedDataset.open(place) as dataset:
        return list(dataset.read_fields(np.arange(len(dataset))).values())[field]


def test_fields_of_a_data_set_are_sets_of_images(pairs: Path, domains: Path) -> None:
    with ShardedDataset.open(pairs) as dataset:
        inputs, targets = (field_images(dataset, name) for name in ("images", "targets"))
        ids = np.array([7, 3, 7])
        assert np.array_equal(inputs.read(ids), stored(pairs)[ids])
        assert np.array_equal(targets.read(ids), stored(pairs, 1)[ids])
        assert len({dataset.manifest.hash, inputs.manifest.hash, targets.manifest.hash}) == 3
        with pytest.raises(EvaluationError, match="has the fields images, targets and no others"):
            field_images(dataset, "others")
    with ShardedDataset.open(domains) as dataset:
        first, second = (field_images(dataset, name) for name in ("images", "others"))
        assert (len(first), len(second)) == (30, 12)
        assert np.array_equal(np.concatenate([first.read(np.arange(30)), second.read(np.arange(12))]), stored(domains))
        assert (first.manifest.classes, second.manifest.classes) == (("A",), ("B",))
        assert dataset.manifest.sampled_classes == {"B": 12}


def test_inputs_are_a_fixed_choice_with_their_targets(pairs: Path, domains: Path) -> None:
    with ShardedDataset.open(pairs) as dataset:
        inputs = Inputs(negative(), dataset, 15)
        whole, part = inputs.batch(slice(0, 15), "cpu"), inputs.batch(slice(4, 6), "cpu")
        assert len(inputs) == 15
        assert torch.equal(whole.images[4:6], part.images)
        # The pair stayed one: by its making, the target is the negative.
        torch.testing.assert_close(whole["targets"][:, 1:], -whole.images.expand(-1, 2, -1, -1))
        assert len(np.unique(whole.images.numpy(), axis=0)) == 15
        assert Inputs(negative(), dataset, 99).hash == Inputs(negative(), dataset, 40).hash != inputs.hash
        with pytest.raises(
            EvaluationError, match=r"inputs: images of shape \[1, 16, 16\], but negative was trained on"
        ):
            Inputs(negative(channels=3), dataset, 15)
    with ShardedDataset.open(domains) as dataset:
        batch = (inputs := Inputs(negative(last="others", channels=3), dataset, 99)).batch(slice(0, 30), "cpu")
        assert len(inputs) == 30
        assert torch.equal(batch["others"][:12], batch["others"][12:24]), "those of the smaller domain come again"
        assert not inputs.labels.any()


def test_metrics_of_targets_are_those_of_each_output_with_its_own_target(pairs: Path, info: Any) -> None:
    with ShardedDataset.open(pairs) as dataset:
        found = {r.metric: r for r in evaluate_system(negative(0.0), info(), dataset, METRICS, samples=99)}
    # Red is 20 of 255 off, green and blue not at all, but for rounding 127.5.
    assert found["l1"].value == pytest.approx(20 / 255 / 3, rel=1e-6)
    assert found["psnr"].value == pytest.approx(10 * np.log10(255**2 / (400 / 3)), rel=1e-6)
    assert 0.9 < found["ssim"].value < 1
    assert [found[name].higher_is_better for name in METRICS] == [False, True, True]
    assert all(record.samples == 40 for record in found.values())
    with ShardedDataset.open(pairs) as dataset:
        [noisy] = evaluate_system(negative(0.5), info(), dataset, ["l1"], samples=99)
        assert noisy.value > 2 * found["l1"].value
        assert noisy.reference_hash == found["l1"].reference_hash
        with pytest.raises(EvaluationError, match="metric l1: compares translations with their targets, and negative"):
            evaluate_system(negative(last="others"), info(), dataset, ["l1"], samples=9)
        with pytest.raises(EvaluationError, match="40 of 40 hold NaN"):
            evaluate_system(negative(float("nan")), info(), dataset, ["ssim"], samples=99)


def test_outputs_are_compared_with_targets_whatever_the_number_of_workers(
    pairs: Path, info: Any, workers: Any, tmp_path: Path
) -> None:
    found = []
    for world in (1, 3):

        def work(rank: int, group: Any, world: int = world) -> list[Any]:
            with ShardedDataset.open(pairs) as dataset:
                cache, many = tmp_path / f"{world}-{rank}", {"samples": 99, "seed": 2, "group": group}
                system, asked = negative(), ["psnr", "fd_pixels", "l1", "ssim"]
                return evaluate_system(system, info(), dataset, asked, batch_size=32, cache_dir=cache, **many)

        found.append(workers(world, work))
    assert found[1][1:] == [[], []]
    assert [r.metric for r in found[0][0]] == ["psnr", "fd_pixels", "l1", "ssim"]
    assert [r.value for r in found[1][0]] == pytest.approx([r.value for r in found[0][0]], rel=1e-9)
    distance = found[0][0][1]
    assert (distance.samples, distance.reference_samples) == (40, 40)
    assert distance.balance.startswith("inputs ")


def test_the_distance_is_to_the_target_domain_and_inputs_may_be_held_out(
    domains: Path, info: Any, tmp_path: Path
) -> None:
    system = negative(0.0, "others", channels=3)
    options = {"samples": 30, "real": 12}
    with ShardedDataset.open(domains) as dataset:
        [own] = evaluate_system(system, info(), dataset, ["kid_pixels"], cache_dir=tmp_path / "a", **options)
        outputs = write(tmp_path / "outputs", np.moveaxis(255 - stored(domains)[:30], 1, -1))
        others = write(tmp_path / "others", np.moveaxis(stored(domains)[30:], 1, -1))
        with open_images(outputs) as a, open_images(others) as b:
            [expected] = compare_images(a, b, ["kid_pixels"], cache_dir=tmp_path / "b")
        assert own.value == pytest.approx(expected.value, rel=1e-6)
        with open_images(write(tmp_path / "held", drawings(20, 3, seed=9))) as held:
            assert isinstance(held, ImageFiles)
            [other] = evaluate_system(
                system, info(), dataset, ["kid_pixels"], held_out=held, cache_dir=tmp_path / "a", **options
            )
    assert other.samples == 20
    assert other.value != own.value
    assert other.balance != own.balance
    assert other.reference_hash == own.reference_hash


def test_a_sheet_shows_inputs_above_outputs_above_targets(pairs: Path) -> None:
    system = negative(0.0)
    with ShardedDataset.open(pairs) as dataset:
        sheet = translation_sheet(system, dataset, 7).picture
        batch = Inputs(system, dataset, 49).batch(slice(0, 14), "cpu")
        assert np.array_equal(sheet, translation_sheet(system, dataset, 7).picture)
        assert translation_sheet(system, dataset, 1).picture.shape == (3 * SIZE, SIZE, 3), "one band at least"
    assert sheet.shape == (6 * SIZE, 7 * SIZE, 3), "two bands of three lines fit into seven"
    lines = sheet.reshape(6, SIZE, 7, SIZE, 3).transpose(0, 2, 4, 1, 3)
    x, y = (np.rint((batch[name].numpy() + 1) * 127.5) for name in ("images", "targets"))
    for band in range(2):
        of = slice(7 * band, 7 * band + 7)
        assert np.array_equal(lines[3 * band], np.repeat(x[of], 3, axis=1)), "grey stands as colour"
        assert np.array_equal(lines[3 * band + 1], np.repeat(255 - x[of], 3, axis=1))
        assert np.array_equal(lines[3 * band + 2], y[of])


def test_few_inputs_leave_black(tmp_path: Path) -> None:
    with open_images(write(tmp_path / "few", drawings(2))) as images:
        sheet = translation_sheet(negative(0.0), images, 4).picture
    assert sheet.shape == (2 * SIZE, 4 * SIZE, 3), "there are no targets"
    assert sheet[:, : 2 * SIZE].any()
    assert not sheet[:, 2 * SIZE :].any()


def test_speed_needs_no_data(info: Any) -> None:
    [record] = measure_speed(negative(), info(), ["samples_per_s"], batch_size=4)
    assert record.value > 0


def test_nothing_is_drawn_without_an_input() -> None:
    with pytest.raises(NotImplementedError, match="negative makes samples from inputs"):
        negative().sample(torch.zeros(1, dtype=torch.int64), torch.Generator())
