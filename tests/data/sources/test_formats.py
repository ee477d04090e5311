"""Sources that are no image files: arrays, CIFAR, MNIST, Parquet, shards of others, label files."""

import contextlib
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from bessemer.data.manifest import Manifest
from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.sources.arrays import numpy_arrays
from bessemer.data.sources.source import open_source
from bessemer.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 10, 2] * 4)


def packed(source: Path, **options: Any) -> tuple[Manifest, list[tuple[str, bytes]]]:
    """The manifest, and (class, pixels [H, W, C]) of all samples, sorted."""
    destination = source.parent / "packed"
    manifest = pack(source, destination, **options)
    with ShardedDataset.open(destination) as dataset:
        images = dataset.read(np.arange(len(dataset))).transpose(0, 2, 3, 1)
        return manifest, sorted(
            (manifest.classes[label], image.tobytes()) for label, image in zip(dataset.labels, images, strict=True)
        )


def expected(images: np.ndarray, labels: Any = None) -> list[tuple[str, bytes]]:
    names = ["all"] * len(images) if labels is None else [str(label) for label in labels]
    return sorted((name, image.tobytes()) for name, image in zip(names, images, strict=True))


# NumPy


@pytest.mark.parametrize(
    ("images", "stored"),
    [
        (GREY, GREY),
        (GREY[..., None], GREY),
        (GREY[:, None], GREY),
        (COLOUR, COLOUR),
        (np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)), COLOUR),
    ],
    ids=["NHW", "NHW1", "N1HW", "NHWC", "NCHW"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(images: np.ndarray, stored: np.ndarray, save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "set.npz", images=images, labels=LABELS)
    manifest, found = packed(tmp_path / "set.npz")
    assert found == expected(stored, LABELS)
    assert manifest.classes == ["0", "2", "10"]
    assert (manifest.packing.labels, manifest.channels) == ("source", 1 if stored is GREY else 3)


def test_names_and_splits_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "keras.npz", x_train=COLOUR, y_train=LABELS[:, None], x_test=COLOUR[:3], y_test=LABELS[:3])
    manifest, found = packed(tmp_path / "keras.npz")
    assert found == expected(COLOUR, LABELS)
    assert (manifest.packing.split, manifest.packing.splits) == ("train", ["test", "train"])
    _, found = packed(tmp_path / "keras.npz", split="all", overwrite=True)
    assert found == expected(np.concatenate([COLOUR, COLOUR[:3]]), [*LABELS, *LABELS[:3]])
    np.savez(tmp_path / "plain.npz", COLOUR, LABELS)
    assert packed(tmp_path / "plain.npz", overwrite=True)[1] == expected(COLOUR, LABELS)


def test_npy_with_and_without_labels(tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "images.npy", COLOUR)
    assert packed(folder)[1] == expected(COLOUR)
    np.save(folder / "labels.npy", LABELS)
    assert packed(folder, overwrite=True)[1] == expected(COLOUR, LABELS)
    np.save(tmp_path / "cats.npy", GREY)
    assert packed(tmp_path / "cats.npy", overwrite=True)[1] == expected(GREY)


def test_transparent_pixels_need_a_mode(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", RNG.integers(0, 256, (2, 8, 8, 4), dtype=np.uint8))
    with pytest.raises(DataError, match="2 RGBA: 0000000"):
        packed(tmp_path / "x.npy")
    assert packed(tmp_path / "x.npy", mode="RGB")[0].channels == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": COLOUR.astype(np.float32)}, r"images is float32 \[12, 8, 8, 3\]; images are uint8"),
        ({"images": COLOUR.reshape(12, -1)}, r"images is uint8 \[12, 192\]"),
        ({"images": COLOUR, "labels": LABELS[:5]}, r"labels is int64 \[5\] for 12 images"),
        ({"images": COLOUR, "labels": LABELS * 0.5}, "labels is float64"),
        ({"pictures": COLOUR}, r"has the arrays pictures; none is named as images are"),
        ({"images": COLOUR, "data": COLOUR}, "could both be the images"),
        ({"images": np.asfortranarray(COLOUR)}, "Fortran order; save it in C order"),
    ],
)
def test_wrong_arrays_are_named(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        packed(tmp_path / "set.npz")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    np.savez(tmp_path / "set.npz", images=bomb)
    with pytest.raises(DataError, match="holds Python objects, which could run code and are never loaded"):
        packed(tmp_path / "set.npz")
    np.savez(tmp_path / "labels.npz", images=COLOUR[:1], labels=bomb)
    with pytest.raises(DataError, match="holds Python objects"):
        packed(tmp_path / "labels.npz")
    cifar = tmp_path / "cifar-10-batches-py"
    cifar.mkdir()
    for name in ("data_batch_1", "batches.meta"):
        (cifar / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(DataError, match=r"Python version of CIFAR: pickles, .* Take the binary version"):
        packed(cifar)
    assert not (tmp_path / "exploded").exists()


# CIFAR and MNIST


def cifar_files(folder: Path, fine: bool = False) -> tuple[Path, np.ndarray, list[int]]:
    folder.mkdir()
    images = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = [1, 0, 1, 2, 0, 2]
    records = [
        bytes([7, label] if fine else [label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(images, labels, strict=True)
    ]
    if fine:
        (folder / "train.bin").write_bytes(b"".join(records[:4]))
        (folder / "test.bin").write_bytes(b"".join(records[4:]))
        (folder / "fine_label_names.txt").write_text("wolf\napple\ncat\n")
        (folder / "coarse_label_names.txt").write_text("x\n" * 20)
    else:
        (folder / "data_batch_1.bin").write_bytes(b"".join(records[:2]))
        (folder / "data_batch_2.bin").write_bytes(b"".join(records[2:4]))
        (folder / "test_batch.bin").write_bytes(b"".join(records[4:]))
        (folder / "batches.meta.txt").write_text("wolf\napple\ncat\n\n")
    return folder, images, labels


@pytest.mark.parametrize("fine", [False, True], ids=["cifar10", "cifar100"])
@pytest.mark.parametrize("archive", [False, True], ids=["folder", "tar.gz"])
def test_cifar(fine: bool, archive: bool, tmp_path: Path) -> None:
    source, images, labels = cifar_files(tmp_path / "cifar", fine)
    if archive:
        with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
            tar.add(source, "cifar-batches-bin")
        source = tmp_path / "cifar.tar.gz"
    names = ["wolf", "apple", "cat"]
    manifest, found = packed(source)
    assert found == expected(images[:4], [names[label] for label in labels[:4]])
    assert (manifest.packing.split, manifest.packing.splits, manifest.resolution) == ("train", ["test", "train"], 32)
    assert packed(source, split="test", overwrite=True)[1] == expected(images[4:], ["wolf", "cat"])


def test_a_damaged_cifar(tmp_path: Path) -> None:
    source, _, _ = cifar_files(tmp_path / "cifar")
    data = (source / "data_batch_2.bin").read_bytes()
    (source / "data_batch_2.bin").write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"data_batch_2\.bin: 6145 bytes are no whole number of records of 3073"):
        packed(source)
    (source / "data_batch_2.bin").write_bytes(b"\x63" + data[1:])
    with pytest.raises(DataError, match=r"data_batch_2\.bin: label 99, but there are names of 3 classes"):
        packed(source)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_mnist(zipped: bool, tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split, count in (("train", 12), ("t10k", 5)):
        for name, array in (("images-idx3", GREY[:count]), ("labels-idx1", LABELS[:count].astype(np.uint8))):
            data = idx_bytes(array)
            path = folder / f"{split}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    manifest, found = packed(folder)
    assert found == expected(GREY, LABELS)
    assert (manifest.channels, manifest.packing.split, manifest.packing.splits) == (1, "train", ["test", "train"])
    assert packed(folder, split="test", overwrite=True)[1] == expected(GREY[:5], LABELS[:5])


# Parquet


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "hub"
    folder.mkdir()
    features = {"label": {"names": ["wolf", "apple"], "_type": "ClassLabel"}}
    for split, rows in (("train-00000-of-00002", (0, 4)), ("train-00001-of-00002", (4, 8)), ("test-00000", (8, 12))):
        images = [{"bytes": png(COLOUR[row]), "path": None} for row in range(*rows)]
        table = arrow.table({"image": images, "label": [row % 2 for row in range(*rows)]})
        info = json.dumps({"info": {"features": features}})
        arrow.parquet.write_table(table.replace_schema_metadata({"huggingface": info}), folder / f"{split}.parquet")
    return folder


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_parquet(hugging_face: Path) -> None:
    manifest, found = packed(hugging_face)
    assert found == expected(COLOUR[:8], ["wolf", "apple"] * 4)
    assert manifest.classes == ["wolf", "apple"]
    assert (manifest.packing.split, manifest.packing.passed_through) == ("train", 8)
    _, found = packed(hugging_face / "test-00000.parquet", overwrite=True)
    assert found == expected(COLOUR[8:], ["wolf", "apple"] * 2)


def test_a_damaged_or_foreign_parquet(hugging_face: Path, tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet

    path = hugging_face / "test-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"test-00000\.parquet: this Parquet file is damaged"):
        packed(path)
    arrow.parquet.write_table(arrow.table({"text": ["a"], "n": [1]}), path)
    with pytest.raises(DataError, match=r"has no column of images, .* its columns are text \(string\), n \(int64\)"):
        packed(path)
    arrow.parquet.write_table(arrow.table({"image": [png(COLOUR[0])], "label": arrow.array([None], "int64")}), path)
    with pytest.raises(DataError, match="row 0 has no label"):
        packed(path)


# Shards and label files


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    with wds.ShardWriter(str(folder / "x-%04d.tar"), maxcount=5, verbose=0) as writer:
        for row in range(12):
            writer.write({"__key__": f"sample{row}", "png": png(COLOUR[row]), "cls": int(LABELS[row]), "txt": "hi"})
    manifest, found = packed(folder)
    assert found == expected(COLOUR, LABELS)
    assert (manifest.packing.labels, manifest.packing.ignored) == ("source", {".txt": 12})
    assert packed(folder / "x-0000.tar", overwrite=True)[1] == expected(COLOUR[:5], LABELS[:5])
    shard = folder / "x-0001.tar"
    shard.write_bytes(shard.read_bytes()[:4096])
    with pytest.raises(DataError, match=r"x-0001\.tar: byte \d+, after"):
        packed(folder, overwrite=True)


def test_shards_without_labels_are_one_class(packed_without_labels: Path) -> None:
    assert packed(packed_without_labels)[0].classes == ["all"]


@pytest.fixture
def packed_without_labels(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in range(3):
                data = png(COLOUR[3 * number + row])
                info = tarfile.TarInfo(f"{row}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_a_shard_with_a_missing_label(packed_without_labels: Path) -> None:
    with tarfile.open(packed_without_labels / "0.tar", "a") as tar:
        info = tarfile.TarInfo("0.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"3"))
    with pytest.raises(DataError, match=r"0\.tar/1\.png has no label beside it"):
        packed(packed_without_labels)


def stylegan(folder: Path, labels: object) -> Path:
    for row in range(4):
        path = folder / "00000" / f"img{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(COLOUR[row]))
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_the_labels_of_stylegans_dataset_json(tmp_path: Path) -> None:
    labels = [[f"00000/img{row}.png", int(LABELS[row])] for row in range(4)]
    source = stylegan(tmp_path / "set", labels)
    manifest, found = packed(source)
    assert found == expected(COLOUR[:4], LABELS[:4])
    assert manifest.packing.labels == "dataset.json"
    (source / "dataset.json").write_text('{"labels": null}')
    assert packed(source, overwrite=True)[1] == expected(COLOUR[:4])
    assert packed(source, labels="folders", overwrite=True)[0].classes == ["00000"]
    assert packed(source, labels="none", overwrite=True)[0].packing.labels == "none"


def test_labels_in_a_csv_file(tmp_path: Path) -> None:
    source = stylegan(tmp_path / "set", None)
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"00000/img{row}.png,c{row}\n" for row in range(4)))
    manifest, found = packed(source, labels=tmp_path / "labels.csv")
    assert found == expected(COLOUR[:4], ["c0", "c1", "c2", "c3"])
    assert manifest.packing.labels == "labels.csv"
    with pytest.raises(DataError, match=r"--labels nothing\.csv: cannot be read"):
        packed(source, labels="nothing.csv", overwrite=True)


# Any bytes


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, images=GREY[:2], labels=LABELS[:2])
    return file.getvalue()


def npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, GREY[:2])
    return file.getvalue()


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)


@pytest.mark.parametrize("data", [npz_bytes(), npy_bytes()], ids=["npz", "npy"])
@example(changes=[(2612, 1)], length=None)  # the directory places an array before the start of the file
@given(changes=CHANGES, length=st.none() | st.integers(0, 900))
def test_any_change_to_arrays_is_a_data_error_or_images(
    data: bytes, changes: list[tuple[int, int]], length: int | None
) -> None:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    with contextlib.suppress(DataError):
        for array in numpy_arrays("x", io.BytesIO(bytes(changed[:length]))):
            for piece in array.pieces:
                assert piece.dtype == np.uint8
                assert piece.ndim == 4


FILES = {
    "cifar/data_batch_1.bin": bytes(3073),
    "cifar/batches.meta.txt": b"a\nb\n",
    "train-images-idx3-ubyte": idx_bytes(GREY[:2]),
    "train-labels-idx1-ubyte": idx_bytes(LABELS[:2].astype(np.uint8)),
    "x.parquet": b"PAR1\x15\x04\x15\x10PAR1",
}


@given(
    content=st.dictionaries(st.sampled_from(sorted(FILES)), st.binary(max_size=60) | st.none(), min_size=1),
    changes=CHANGES,
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_files_are_a_source_or_a_data_error(
    content: dict[str, bytes | None], changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, given_bytes in content.items():
        data = bytearray(FILES[name] if given_bytes is None else given_bytes)
        for place, value in changes:
            if data:
                data[place % len(data)] = value
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_bytes(data)
    with contextlib.suppress(DataError), open_source(folder / "in", spool_folder=folder) as source:
        for entry in source.entries:
            assert isinstance(entry.path, PurePosixPath)
            assert source.files.read(entry.path) is not None
