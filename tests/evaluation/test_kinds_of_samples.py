"""Sheets of clips and of sound: a picture of all samples, and a file that plays."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tests.evaluation.conftest import MemoryData, ToySystem
from torch import Generator, Tensor

from bessemer.data.pictures import pictures
from bessemer.data.reading.batches import as_numbers
from bessemer.errors import EvaluationError, SpecError
from bessemer.evaluation.evaluate import evaluate_system
from bessemer.evaluation.grid import Sheet, columns_of, sample_grid
from bessemer.evaluation.likelihood import evaluate_likelihood
from bessemer.evaluation.sampling import to_stored
from bessemer.orchestration.worker import _check_metrics
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import BaseConfig, Batch, System, SystemConfig
from bessemer.systems.likelihood import LikelihoodSystem


class ClipConfig(SystemConfig):
    frames: int = 12


class Clips(ToySystem):
    """Frames of one colour that brighten from -1 to 1."""

    takes: ClassVar[tuple[str, ...]] = ("clips",)

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        t, c, h, w = self.sample_shape
        return torch.linspace(-1, 1, t).view(1, t, 1, 1, 1).expand(len(labels), t, c, h, w)


class SoundConfig(BaseConfig):
    samples: int = 4000
    rate: int = 8000


class Sound(ToySystem, LikelihoodSystem):
    """Sines of 1000 Hz; all values of 16 bits are as likely as each other."""

    takes: ClassVar[tuple[str, ...]] = ("audio",)
    likelihood_protocol = "16 bits"

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        moment = torch.arange(self.config.samples) / self.config.rate
        return torch.sin(2000 * torch.pi * moment).expand(len(labels), -1)

    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:
        audio = batch["audio"].double()
        assert torch.equal(audio * 32768, (audio * 32768).round())
        assert 0.5 < audio.abs().max() <= 1
        return torch.full((len(audio),), -audio.shape[1] * 16 * torch.log(torch.tensor(2.0)).item()).double()


def made(kind: type[ToySystem], config: BaseConfig) -> ToySystem:
    system = kind(SystemConfig(resolution=16, classes=3))
    system.config = config
    return system


@pytest.fixture
def clips() -> ToySystem:
    return made(Clips, ClipConfig(resolution=16, classes=3))


@pytest.fixture
def sound() -> ToySystem:
    return made(Sound, SoundConfig(classes=3))


def test_clips_are_a_picture_and_an_animation(clips: ToySystem, tmp_path: Path) -> None:
    sheet = sample_grid(clips, [1, 1, 1], 3)
    assert sheet.columns == 1
    assert sheet.picture.shape == (3 * 16, 8 * 16, 3)  # 8 frames of 12
    picture, animation = sheet.save(tmp_path / "new" / "sheet.png")
    with Image.open(picture) as image:
        assert np.array_equal(np.asarray(image), sheet.picture)
    with Image.open(animation) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.info["loop"] == 0
    assert [frame.shape for frame in frames] == [(32, 32, 3)] * 12  # 3 clips in a square
    levels = np.array([int(frame[0, 0, 0]) for frame in frames])
    assert np.abs(levels - np.linspace(0, 255, 12)).max() <= 2
    assert all((frame[16:, 16:] == 0).all() for frame in frames)  # there is no fourth


def test_sound_is_a_picture_and_a_file_that_plays(sound: ToySystem, tmp_path: Path) -> None:
    sheet = sample_grid(sound, [1, 1, 1], 4)
    assert sheet.columns == 2
    assert sheet.picture.shape == (4 * 128, 2 * 256, 1)
    _, played = sheet.save(tmp_path / "sheet.png")
    with wave.open(str(played)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8000)
        values = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(8, 4000 + 2000)
    assert np.array_equal(values[:, :4000], sheet.fields["audio"])
    assert not values[:, 4000:].any()
    assert values[0, :4000].max() == 32767


def test_a_spectrogram_is_brightest_where_the_sound_is() -> None:
    """Rows from 0 at the bottom to 4000 Hz at the top."""
    moment = np.arange(8000) / 8000
    sweep = np.where(moment < 0.5, np.sin(2 * np.pi * 1000 * moment), 0.01 * np.sin(2 * np.pi * 3000 * moment))
    (picture,) = pictures({"audio": (32767 * sweep[None]).astype(np.int16)})
    wave_part, frequencies = picture[0, :64], picture[0, 64:].astype(int)
    first, second = frequencies[:, 60], frequencies[:, 200]
    assert abs((63 - first.argmax() + 0.5) / 64 * 4000 - 1000) < 70
    assert abs((63 - second.argmax() + 0.5) / 64 * 4000 - 3000) < 70
    assert 245 <= first.max() <= 255
    assert first.max() - second.max() == pytest.approx(40 / 80 * 255, abs=6)  # a hundredth is 40 dB less
    assert (wave_part[:, 60] == 0).sum() > 60 > 3 > (wave_part[:, 200] == 0).sum()


@pytest.mark.parametrize(
    ("shapes", "columns"),
    [
        ({"images": (3, 32, 32)}, 6),
        ({"images": (3, 32, 32), "targets": (1, 32, 32)}, 6),
        ({"clips": (2, 3, 32, 32)}, 3),
        ({"clips": (48, 3, 64, 64)}, 1),
        ({"audio": (16000,)}, 3),
    ],
)
def test_wide_samples_have_fewer_columns(shapes: dict[str, tuple[int, ...]], columns: int) -> None:
    assert columns_of(shapes, 6) == columns
    fields = {k: np.zeros((6 * columns, *s), np.int16 if k == "audio" else np.uint8) for k, s in shapes.items()}
    height, width, _ = Sheet(fields, columns, 8000).picture.shape
    assert width <= max(2 * height, 8 * 64)


@pytest.mark.parametrize(("name", "dtype"), [("images", np.uint8), ("audio", np.int16), ("bits", np.uint8)])
def test_what_is_stored_comes_back(name: str, dtype: type) -> None:
    info = np.iinfo(dtype)
    values = np.arange(2) if name == "bits" else np.arange(info.min, info.max + 1)
    stored = torch.from_numpy(values.astype(dtype))
    numbers = as_numbers(name, stored)
    assert numbers.dtype == torch.float32
    assert -1 <= numbers.min() < numbers.max() <= 1
    assert torch.equal(to_stored(name, numbers), stored)
    assert torch.equal(to_stored(name, torch.full((2,), 1.0)), stored[-1:].expand(2))


def test_likelihoods_of_sound_are_bits_per_sample(sound: ToySystem, info) -> None:
    data = MemoryData(np.random.default_rng(0).integers(-32768, 32768, (40, 4000)).astype(np.int16))
    data.read_fields = lambda ids: {"audio": data.read(ids)}  # type: ignore[method-assign]
    [record] = evaluate_likelihood(sound, info(), data, ["bits_per_dim"], samples=40)
    assert record.value == pytest.approx(16, rel=1e-6)
    with pytest.raises(EvaluationError, match=r"has \{'audio': \(4000,\)\}, and toy takes \{'audio': \(3000,\)\}"):
        evaluate_likelihood(made(Sound, SoundConfig(samples=3000)), info(), data, ["bits_per_dim"], samples=40)


def test_sound_has_no_features(sound: ToySystem, info, tmp_path: Path) -> None:
    data = MemoryData(np.zeros((8, 4000), np.int16))
    with pytest.raises(EvaluationError, match="pixels: sees images and clips"):
        evaluate_system(sound, info(), data, ["kid_pixels"], samples=8, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("metric", "kind", "message"),
    [
        ("fdframes_pixels", "clips", None),
        ("fdsteps_efflite0", "clips", None),
        (
            "kid_pixels",
            "clips",
            r"kid_pixels compares images, and data is of clips; use fdframes_pixels or fdsteps_pix",
        ),
        ("fdsteps_pixels", "images", r"fdsteps_pixels compares clips, and data is of images; leave it out"),
        ("fdsteps_pixels", "audio", r"fdsteps_pixels compares clips, and data is of audio; leave it out"),
        ("kid_pixels", "audio", r"kid_pixels compares images, and data is of audio"),
        ("bits_per_dim", "clips", r"bits_per_dim needs a likelihood, and toy has none"),
    ],
)
def test_jobs_are_held_to_the_metrics_of_their_kind(clips: System, metric: str, kind: str, message: str | None) -> None:
    job = JobSpec.model_validate(
        {
            "name": "x",
            "system": {"name": "toy", "preset": "tiny"},
            "data": {"path": "data"},
            "training": {"total_kimg": 1, "batch_size": 8, "slice_size": 8},
            "evaluation": {"metrics": [metric]},
        }
    )
    if message is None:
        _check_metrics(job, clips, kind)
        return
    with pytest.raises(SpecError, match=message):
        _check_metrics(job, clips, kind)
