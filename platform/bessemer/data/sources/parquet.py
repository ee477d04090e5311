"""Sources in Parquet files with the bytes of images, as the Hugging Face hub has them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from bessemer.data.sources.archives import ExtentFiles, Files, FolderFiles
from bessemer.errors import DataError, MachineError
from bessemer.files import write_atomically

__all__ = ["open_parquet"]

_IMAGE = ("image", "img", "images", "bytes", "data", "jpg", "png")
_LABEL = ("label", "labels", "fine_label", "class", "target", "cls")
_SPLIT = re.compile(r"(train|test|validation|val|valid)(?![a-z])")


def open_parquet(
    name: str, files: Files, paths: list[PurePosixPath], spool: Path
) -> tuple[ExtentFiles, dict[PurePosixPath, str] | None, list[str] | None]:
    """Copy the images of Parquet files into one file that gives random access.

    The images are a column of bytes, or of a struct with the field `bytes` (Hugging Face's `Image`); a column of
    integers or text named `label`, `labels`, `fine_label`, `class` or `target` holds the classes. A file name that
    starts with a split (`train-00000-of-00002.parquet`) says which one it is.

    Returns:
        The images; the class of each, or None; the names of the classes in their order where the file has them.

    Raises:
        DataError: a file is damaged, or has no column of images; names the columns that it has.
        MachineError: pyarrow is not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError:
        raise MachineError(
            "a Parquet file is read by pyarrow, which is not installed: pip install 'bessemer[parquet]'"
        ) from None
    extents: dict[PurePosixPath, tuple[int, int, int]] = {}
    labels: dict[PurePosixPath, str] = {}
    order: list[str] | None = None

    def copy(file: IO[bytes]) -> None:
        nonlocal order
        offset = 0
        for path in sorted(paths):
            split = _SPLIT.match(path.name)
            folder = PurePosixPath(split[1] if split else "") / ("" if len(paths) == 1 else path.stem)
            try:
                source: Any = (
                    files.folder / path if isinstance(files, FolderFiles) else arrow.BufferReader(files.read(path))
                )
                table = arrow.parquet.ParquetFile(source)
                image, label = _columns(f"{name}: {path}", table.schema_arrow)
                names = _class_names(table.schema_arrow, label)
                for number, (data, found) in enumerate(_rows(table, image, label)):
                    if not isinstance(data, bytes) or (label is not None and found is None):
                        missing = label if isinstance(data, bytes) else image
                        raise DataError(f"{name}: {path}: row {number} has no {missing}; remove the row")
                    file.write(data)
                    member = folder / f"{number:08d}{_ending(data)}"
                    extents[member] = (0, offset, len(data))
                    offset += len(data)
                    if label is not None:
                        labels[member] = _class(f"{name}: {path}: row {number}", found, names)
            except (arrow.ArrowException, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise DataError(f"{name}: {path}: this Parquet file is damaged ({error}); copy it again") from None
            order = names or order

    write_atomically(spool, copy)
    return ExtentFiles([spool], extents, stamp=files.part(paths).stamp()), labels or None, order


def _columns(name: str, schema: Any) -> tuple[str, str | None]:
    """The columns of images and of labels."""
    import pyarrow as arrow

    def binary(kind: Any) -> bool:
        return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))

    def holds_bytes(kind: Any) -> bool:
        if arrow.types.is_struct(kind):
            return any(kind.field(at).name == "bytes" and binary(kind.field(at).type) for at in range(kind.num_fields))
        return binary(kind)

    images = [field.name for field in schema if holds_bytes(field.type)]
    images = images if len(images) < 2 else [known for known in _IMAGE if known in images][:1]
    if not images:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)[:300]
        raise DataError(
            f"{name} has no column of images, which is bytes or a struct with the field bytes and is named "
            f"{' or '.join(_IMAGE[:3])}; its columns are {found}"
        )
    for known in _LABEL:
        if known in schema.names:
            kind = schema.field(known).type
            if arrow.types.is_integer(kind) or arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
                return images[0], known
    return images[0], None


def _rows(table: Any, image: str, label: str | None) -> Iterator[tuple[object, object]]:
    for batch in table.iter_batches(batch_size=256, columns=[image, *([label] if label else [])]):
        images = batch.column(image).to_pylist()
        labels = batch.column(label).to_pylist() if label else [None] * len(images)
        for data, found in zip(images, labels, strict=True):
            yield (data.get("bytes") if isinstance(data, dict) else data), found


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """Names of the classes, where Hugging Face's `datasets` left them in the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(one, str) for one in names) else None


def _class(row: str, label: object, names: list[str] | None) -> str:
    if not isinstance(label, int) or names is None:
        return str(label)
    if not 0 <= label < len(names):
        raise DataError(f"{row} has label {label} of {len(names)} classes; correct it")
    return names[label]


def _ending(data: bytes) -> str:
    """The loader of sources goes by endings; the decoder later goes by the bytes alone."""
    return ".jpg" if data[:2] == b"\xff\xd8" else ".png"
