"""Class labels from files: json (StyleGAN's ``dataset.json`` too) and csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from bessemer.errors import DataError

__all__ = ["class_order", "match_labels", "parse_labels"]

_FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_id", "path", "name", "id")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")


def parse_labels(name: str, data: bytes) -> dict[str, str] | None:
    """File names and their classes; None where the file says that there are none.

    json is ``{"labels": [["00000/img0.png", 3], ...]}`` as StyleGAN's tool writes it, with null for no labels;
    the pairs may be an object, ``{"a.png": "cat"}``, and may stand alone. csv has two columns, file and label, or a
    header that names them among others.

    Raises:
        DataError: names the entry, and the rule.
    """
    if PurePosixPath(name).suffix.lower() == ".csv":
        return _from_csv(name, data)
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is no JSON ({error}); labels are a .json or .csv file") from None
    if isinstance(content, dict) and "labels" in content:
        content = content["labels"]
    if content is None:
        return None
    pairs = list(content.items()) if isinstance(content, dict) else content
    found: dict[str, str] = {}
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], int | str)
            and not isinstance(pair[1], bool)
        ):
            raise DataError(
                f"{name}: {_short(pair)} is no label; labels are pairs of a file and a class, which is an integer or "
                f'text: {{"labels": [["a.png", 3], ...]}}'
            )
        _add(found, name, pair[0], str(pair[1]))
    return found


def _from_csv(name: str, data: bytes) -> dict[str, str]:
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name} is no csv file in UTF-8 ({error})") from None
    file_column, label_column = 0, 1
    if rows:
        header = [cell.strip().lower() for cell in rows[0]]
        files = [at for at, cell in enumerate(header) if cell in _FILE_COLUMNS]
        labels = [at for at, cell in enumerate(header) if cell in _LABEL_COLUMNS]
        if files and labels:
            file_column, label_column = files[0], labels[0]
            rows = rows[1:]
    found: dict[str, str] = {}
    for row in rows:
        if len(row) <= max(file_column, label_column):
            raise DataError(
                f"{name}: the row {_short(row)} has {len(row)} cells; rows are file,label, or the first row names the "
                f"columns: file and label"
            )
        _add(found, name, row[file_column].strip(), row[label_column].strip())
    return found


def _add(found: dict[str, str], name: str, file: str, label: str) -> None:
    if not label or not label.isprintable():
        raise DataError(f"{name}: {_short(file)} has the class {label!r}; a class is a number or printable text")
    if found.setdefault(file, label) != label:
        raise DataError(f"{name}: {_short(file)} has two classes, {found[file]} and {label}; keep one of them")


def match_labels(
    name: str, labels: dict[str, str], folder: PurePosixPath, images: Iterable[PurePosixPath]
) -> dict[PurePosixPath, str]:
    """The class of each image.

    Args:
        name: of the label file, for messages.
        labels: as :func:`parse_labels` found them.
        folder: where the label file lies in the source; its names are relative to this, or to the source.
        images: paths in the source.

    Raises:
        DataError: there are images without a label; names some.
    """
    known = {PurePosixPath(file): label for file, label in labels.items()}
    found: dict[PurePosixPath, str] = {}
    missing = []
    for image in images:
        near = image.relative_to(folder) if image.is_relative_to(folder) else image
        # Competition csv files leave the ending out.
        tried = (near, image, near.with_suffix(""), image.with_suffix(""))
        label = next((known[path] for path in tried if path in known), None)
        if label is None:
            missing.append(image)
        else:
            found[image] = label
    if missing:
        shown = ", ".join(map(str, sorted(missing)[:5]))
        raise DataError(
            f"{name} has no label for {len(missing)} of {len(found) + len(missing)} images: {shown}"
            f"{', ...' if len(missing) > 5 else ''}; add them, or remove these images. Its names are relative to the "
            f"folder it lies in, such as {next(iter(labels), 'a/1.png')!r}"
        )
    return found


def class_order(names: Iterable[str]) -> list[str]:
    """Classes in the order of their labels: by number where all are numbers, so that class 10 comes after 9."""
    distinct = set(names)
    # Only numbers as they are usually written: "01" and "1" would be equal.
    if all(name.isascii() and name.isdigit() and (name == "0" or name[0] != "0") for name in distinct):
        return sorted(distinct, key=int)
    return sorted(distinct)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
