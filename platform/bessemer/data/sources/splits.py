"""Splits of a data set: `train`, `test` and the like as top folders, of which one is taken."""

from __future__ import annotations

from bessemer.data.sources.pairs import Parts
from bessemer.errors import DataError, some

__all__ = ["take_split"]

SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
"""Top folders with these names are splits of one data set, not classes."""
_DEFAULT = ("train", "training")


def take_split(name: str, relative: Parts, split: str | None) -> tuple[Parts, str | None, list[str]]:
    """Strip common top folders and choose the split.

    Args:
        name: of the source, for messages.
        relative: file -> parts of its path below the source.
        split: the split to take, `all`, or None for the one that is for training.

    Returns:
        The files that are taken with the parts below their split; the split that was taken, if any; all splits.

    Raises:
        DataError: there is no such split, or none that is obviously for training.
    """
    while True:
        tops = sorted({parts[0] for parts in relative.values()})
        shallow = min(len(parts) for parts in relative.values())
        if shallow >= 2 and SPLITS.issuperset(top.lower() for top in tops):
            break
        if len(tops) == 1 and shallow >= 3:
            relative = {path: parts[1:] for path, parts in relative.items()}
            continue
        if split is not None:
            raise DataError(
                f"--split {split}: {name} has no splits; its top folders are {some(tops)}, splits are named "
                f"{', '.join(sorted(SPLITS))}. Leave --split out to take all images"
            )
        return relative, None, []
    if split is None:
        default = [top for top in tops if top.lower() in _DEFAULT]
        if len(tops) > 1 and len(default) != 1:
            raise DataError(f"{name} has the splits {', '.join(tops)}; choose: --split {tops[0]}, or --split all")
        split = default[0] if default else tops[0]
    if split == "all":
        # The split stays in the key, so that equal names in two splits remain two images.
        return {path: (*parts[1:-1], f"{parts[0]}-{parts[-1]}") for path, parts in relative.items()}, "all", tops
    if split not in tops:
        raise DataError(f"--split {split}: {name} has the splits {', '.join(tops)}; choose one of them, or all")
    return {path: parts[1:] for path, parts in relative.items() if parts[0] == split}, split, tops
