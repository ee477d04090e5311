"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bessemer.spec.job import CheckpointSpec
from bessemer.training.checkpoint_files import nimg_of

__all__ = ["expendable"]


def expendable(
    sound: Sequence[Path],
    newest: Path,
    spec: CheckpointSpec,
    scores: Mapping[int, float] | None = None,
    undecided: Collection[int] = (),
) -> list[Path]:
    """Checkpoints that no policy of the job wants.

    Args:
        sound: complete checkpoints that are not known to be damaged, oldest first. Others neither count nor are
            deleted: with a damaged one as the last, `keep_last` 1 would leave nothing to resume from.
        newest: the one that was just written. It stays even where the image clock went back behind older ones.
        spec: the policies: the last ones, the first of each stretch of `keep_every_kimg`, the best by a metric.
        scores: images seen -> value of the metric `keep_best`, lower is better.
        undecided: images seen where an evaluator has yet to say: the best may be among them.
    """
    kept: set[Path] = {newest, *sound[-spec.keep_last :]}
    kept |= _first_of_each_stretch(sound, spec.keep_every_kimg)
    scored = [p for p in sound if nimg_of(p) in (scores or {})]
    if spec.keep_best is not None and scored:
        kept.add(min(scored, key=lambda p: (scores or {})[nimg_of(p)]))
    if spec.keep_best is not None:
        kept |= {p for p in sound if nimg_of(p) in undecided}
    return [p for p in sound if p not in kept]


def _first_of_each_stretch(sound: Collection[Path], every_kimg: float | None) -> set[Path]:
    """The first checkpoint at or after each multiple of `every_kimg`. Those before the first multiple are nobody's."""
    first: dict[int, Path] = {}
    if every_kimg is not None:
        for path in sound:
            stretch = int(nimg_of(path) // (every_kimg * 1000))
            if stretch > 0:
                first.setdefault(stretch, path)
    return set(first.values())
