"""A tiny class-conditional system, a data set in memory, a stand-in for the Inception weights, workers as threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from bessemer.evaluation import weights
from bessemer.files import file_sha256
from bessemer.systems.contract import Clock, OptimizerDefaults, System, SystemConfig, Update

CLASS_COUNTS = [30, 60, 10]


class Painter(nn.Module):
    """Smooth random patterns with one mean colour per class."""

    def __init__(self, config: SystemConfig) -> None:
        super().__init__()
        self.config = config
        self.colour = nn.Parameter(torch.linspace(-0.5, 0.5, config.classes * config.channels))
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("standing", torch.zeros(()))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        size, channels = self.config.resolution, self.config.channels
        pattern = self.norm(z).reshape(-1, 1, 4, 4)
        pattern = nn.functional.interpolate(pattern, (size, size), mode="bilinear")
        colour = self.colour.reshape(-1, channels)[labels][:, :, None, None]
        return torch.tanh(colour + 0.4 * pattern + self.standing)


class ToySystem(System):
    name: ClassVar[str] = "toy"
    family: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = "none"
    Config: ClassVar[type[SystemConfig]] = SystemConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": {"resolution": 16}}

    def __init__(self, config: SystemConfig) -> None:
        self.config = config
        self.painter = Painter(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"painter": self.painter}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {"painter": OptimizerDefaults()}

    def updates(self, clock: Clock) -> Sequence[Update]:
        return []

    def init_weights(self, generator: Generator) -> None:
        pass

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("painter",)

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        z = torch.randn(len(labels), 16, generator=generator)
        return self.painter(z if truncation is None else z.clamp(-truncation, truncation), labels)

    def prepare_sampling(
        self,
        labels: Tensor,
        generator: Generator,
        truncation: float | None = None,
    ) -> None:
        self.painter.standing.copy_(labels.float().mean() / 20 + torch.rand((), generator=generator) / 50)


@dataclass
class Info:
    class_counts: list[int] = field(default_factory=lambda: CLASS_COUNTS)
    class_names: list[str] = field(default_factory=lambda: ["a", "b", "c"])
    ema: dict[str, Any] = field(default_factory=lambda: {"half_life_kimg": 10.0, "rampup": 0.05})
    weights_sha256: str = "5a"


@dataclass
class Manifest:
    hash: str
    classes: tuple[str, ...] = ("a", "b", "c")


class MemoryData:
    """Images in memory with the interface that evaluation asks for; counts what is read."""

    def __init__(self, images: NDArray[np.uint8], name: str = "memory") -> None:
        self.images, self.manifest, self.reads = images, Manifest(name), 0
        self.labels = np.arange(len(images)) % 3

    def __len__(self) -> int:
        return len(self.images)

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        self.reads += len(ids)
        return self.images[ids]

    def read_fields(self, ids: NDArray[np.int64]) -> dict[str, NDArray[np.uint8]]:
        return {"images": self.read(ids)}


@pytest.fixture
def toy() -> Callable[..., ToySystem]:
    def make(channels: int = 3, classes: int = 3) -> ToySystem:
        return ToySystem(SystemConfig(resolution=16, channels=channels, classes=classes))

    return make


@pytest.fixture
def info() -> type[Info]:
    return Info


@pytest.fixture
def memory_data() -> Callable[..., MemoryData]:
    """``memory_data(count, channels, size)``: stripes of random direction and width, which are no noise."""

    def make(count: int, channels: int = 3, size: int = 16) -> MemoryData:
        rng = np.random.default_rng(count)
        y, x = np.mgrid[:size, :size] / size
        angle, width, phase = rng.uniform(0, 3, (3, count, 1, 1))
        stripes = np.sin(2 * np.pi * (1 + width) * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        colour = rng.uniform(40, 127, (count, channels, 1, 1))
        return MemoryData((128 + colour * stripes[:, None]).astype(np.uint8))

    return make


@dataclass
class Threads:
    rank: int
    size: int
    gather: Callable[[Any], list[Any]]
    sum: Callable[[Tensor], Tensor]


@pytest.fixture
def workers() -> Callable[[int, Callable[[int, Any], Any]], list[Any]]:
    """``workers(world, work)`` runs ``work(rank, group)`` in threads and returns the results by rank."""

    def run(world: int, work: Callable[[int, Any], Any]) -> list[Any]:
        barrier = threading.Barrier(world, timeout=60)
        box: list[Any] = [None] * world
        results: list[Any] = [None] * world

        def one(rank: int) -> None:
            def gather(value: Any) -> list[Any]:
                box[rank] = value
                barrier.wait()
                gathered = list(box)
                barrier.wait()
                return gathered

            def add_up(tensor: Tensor) -> Tensor:
                return tensor.copy_(torch.stack(gather(tensor.clone())).sum(0))

            try:
                results[rank] = work(rank, Threads(rank, world, gather, add_up))
            except BaseException as e:
                results[rank] = e
                barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


class _Layers(nn.Module):
    """32 features of the image, then zeros up to the 2048 that clean-fid insists on."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(32, 3, 20, 20, generator=generator) / 20)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(torch.conv2d(x, self.weight, stride=20))
        return nn.functional.pad(maps.mean((2, 3)), (0, 2016))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()
        self.output = nn.Linear(2048, 1008)
        with torch.no_grad():
            self.output.weight.copy_(torch.randn(1008, 2048, generator=torch.Generator().manual_seed(4)) * 8)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=True)
        features = self.layers((x - 128) / 128)
        return features if return_features else self.output(features).softmax(1)


@pytest.fixture(scope="session")
def standin_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TorchScript with the interface of the published Inception weights; computes something else, and fast."""
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch.jit.script(_Network().eval()).save(str(path))
    return path


@pytest.fixture
def standin(standin_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in, found and accepted as if it were the published file."""
    monkeypatch.setenv("BESSEMER_INCEPTION", str(standin_file))
    own = replace(weights.WEIGHTS["inception"], sha256=file_sha256(standin_file))
    monkeypatch.setitem(weights.WEIGHTS, "inception", own)
    return standin_file


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a VGG-16 of random weights, and random weights of its channels, as they are published."""
    directory = tmp_path_factory.mktemp("lpips")
    draws, state, before = torch.Generator().manual_seed(5), {}, 3
    widths = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
    for layer, width in (widths | dict.fromkeys((17, 19, 21, 24, 26, 28), 512)).items():
        state[f"features.{layer}.weight"] = torch.randn(width, before, 3, 3, generator=draws) * (2 / 9 / before) ** 0.5
        state[f"features.{layer}.bias"] = torch.randn(width, generator=draws) / 10
        before = width
    torch.save(state, directory / "vgg16-397923af.pth")
    linear = {
        f"lin{stage}.model.1.weight": torch.rand(1, width, 1, 1, generator=draws)
        for stage, width in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(linear, directory / "vgg.pth")
    return directory


@pytest.fixture
def lpips(lpips_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The random files, found and accepted as if they were the published ones."""
    for name in ("vgg16", "lpips"):
        monkeypatch.setenv(weights.WEIGHTS[name].variable, str(lpips_files))
        own = replace(weights.WEIGHTS[name], sha256=file_sha256(lpips_files / weights.WEIGHTS[name].files[0]))
        monkeypatch.setitem(weights.WEIGHTS, name, own)
    return lpips_files


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "cache"))
    for file in weights.WEIGHTS.values():
        monkeypatch.delenv(file.variable, raising=False)
