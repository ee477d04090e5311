"""Sources whose images belong together: pairs, by the names of files or folders, and two domains.

The words for both sides of a pair are those in use: ``x.input.jpg`` and ``x.target.jpg`` beside each other, or the
folders ``input/x.jpg`` and ``target/x.jpg``, or ``A`` and ``B`` as the data sets of Pix2Pix have them. Domains are two
class folders, or ``trainA`` and ``trainB`` as CycleGAN's data sets have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from bessemer.errors import DataError, some

__all__ = ["Parts", "are_domains", "are_pairs", "pair", "without_domain_words"]

Parts = dict[PurePosixPath, tuple[str, ...]]
"""Path in the source -> its parts, without what is left out of keys."""

_SIDES = {
    **dict.fromkeys(("input", "inputs", "image", "images", "source", "a"), 0),
    **dict.fromkeys(("target", "targets", "b"), 1),
}
_DOMAIN = re.compile(r"(train|test|val)(A|B)")


def are_pairs(paths: Iterable[PurePosixPath]) -> bool:
    """Whether every name says which side of a pair it is, in words that mean nothing else: ``x.input.jpg``."""
    return all(_word(path) in ("input", "target", "images", "targets") for path in paths)


def are_domains(paths: Iterable[PurePosixPath]) -> bool:
    """Whether the images lie in ``trainA``, ``trainB`` and so on."""
    return all(any(_DOMAIN.fullmatch(part) for part in path.parts[:-1]) for path in paths)


def pair(name: str, images: Iterable[PurePosixPath]) -> tuple[Parts, dict[PurePosixPath, list[PurePosixPath]]]:
    """Find what belongs together.

    Args:
        name: of the source, for messages.
        images: all of them.

    Returns:
        The inputs with the parts of their names that both sides share, and both images of each pair.

    Raises:
        DataError: an image is no side of a pair, or has no other side, or two.
    """
    sides: tuple[dict[tuple[str, ...], PurePosixPath], ...] = ({}, {})
    odd: list[str] = []
    for path in sorted(images):
        found = _side(path)
        if found is None:
            odd.append(str(path))
            continue
        side, key = found
        if (other := sides[side].setdefault(key, path)) != path:
            raise DataError(
                f"{name}: {other} and {path} are both the {('input', 'target')[side]} of one pair; keep one of them"
            )
    if odd:
        raise DataError(
            f"{name}: {len(odd)} images are neither inputs nor targets ({some(odd)}); pairs are x.input.jpg and "
            f"x.target.jpg, or input/x.jpg and target/x.jpg (also A and B)"
        )
    lonely = [str(sides[0].get(key) or sides[1][key]) for key in sorted(sides[0].keys() ^ sides[1].keys())]
    if lonely:
        raise DataError(
            f"{name}: {len(lonely)} images have no other half ({some(lonely)}); every input has a target of the same "
            f"name: add it, or remove the image"
        )
    return {path: key for key, path in sides[0].items()}, {
        sides[0][key]: [sides[0][key], sides[1][key]] for key in sides[0]
    }


def without_domain_words(relative: Mapping[PurePosixPath, tuple[str, ...]]) -> Parts:
    """``trainA/x.jpg`` as ``train/A/x.jpg``: a split and a domain."""
    return {path: tuple(word for part in parts for word in _words(part)) for path, parts in relative.items()}


def _words(folder: str) -> tuple[str, ...]:
    match = _DOMAIN.fullmatch(folder)
    return (folder,) if match is None else (match[1], match[2])


def _word(path: PurePosixPath) -> str:
    """What stands between the last two dots of a name: ``input`` of ``x.input.jpg``."""
    return path.stem.rpartition(".")[2].lower() if "." in path.stem else ""


def _side(path: PurePosixPath) -> tuple[int, tuple[str, ...]] | None:
    """Which side of a pair, and the name that both sides share, without its ending."""
    folders = list(path.parts[:-1])
    if (side := _SIDES.get(_word(path))) is not None:
        return side, (*folders, path.stem.rpartition(".")[0])
    places = [place for place, part in enumerate(folders) if part.lower() in _SIDES]
    if len(places) != 1:
        return None
    side = _SIDES[folders.pop(places[0]).lower()]
    return side, (*folders, path.stem)
