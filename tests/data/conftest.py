"""Small data sets with known pixels."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset


def draw(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    """A smooth random picture, so that JPEG keeps something of it."""
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 256, (4, 4, bands), dtype=np.uint8)
    return Image.fromarray(coarse if bands > 1 else coarse[..., 0], mode=None).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def write_tree(root: Path, classes: int = 3, per_class: int = 20) -> Path:
    """``class0/00.jpg``, ``class0/01.png``, ...: 16x16 RGB, every other one JPEG."""
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            kind, ending = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
            (folder / f"{number:02d}.{ending}").write_bytes(encode(draw(1000 * label + number), kind))
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in 3 classes; not to be changed."""
    return write_tree(tmp_path_factory.mktemp("tree") / "images")


@pytest.fixture(scope="session")
def packed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree, packed into several shards; not to be changed."""
    destination = tmp_path_factory.mktemp("packed") / "set"
    manifest = pack(tree, destination, shard_bytes=40 << 10)
    assert len(manifest.shards) > 3
    return destination


@pytest.fixture
def dataset(packed: Path) -> ShardedDataset:
    return ShardedDataset.open(packed)


@pytest.fixture(name="draw", scope="session")
def _draw() -> Callable[..., Image.Image]:
    return draw


@pytest.fixture(name="encode", scope="session")
def _encode() -> Callable[..., bytes]:
    return encode


@pytest.fixture(name="write_tree")
def _write_tree() -> Callable[..., Path]:
    return write_tree


@pytest.fixture(scope="session")
def truth(packed: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, C, H, W] and labels [n], read from the shards by tarfile and PIL alone."""
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for shard in sorted(packed.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".cls"):
                    labels.append(int(file.read()))
                else:
                    pixels.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    return np.stack(pixels), np.array(labels)
