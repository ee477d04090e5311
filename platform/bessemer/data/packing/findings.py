"""What packing finds wrong with a source, told all at once so that a person can fix it all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bessemer.data.packing.prepare import MODES, Prepared
from bessemer.errors import DataError

__all__ = ["Findings"]

_EXAMPLES = 5


@dataclass
class _Group:
    """Images that have something in common: how many, and the first few names."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)

    def merge(self, other: _Group) -> None:
        self.count += other.count
        self.examples = [*self.examples, *other.examples][:_EXAMPLES]


class Findings:
    """Collects faults over the images of a source, or of a part of it."""

    def __init__(self) -> None:
        self._unusable = _Group()
        self._modes: dict[str, _Group] = {}
        self._sizes: dict[tuple[int, int], _Group] = {}

    def see(self, name: str, prepared: Prepared | ValueError) -> None:
        """Take note of one image, or of why it could not be prepared."""
        if isinstance(prepared, ValueError):
            self._unusable.add(f"{name}: {prepared}")
            return
        self._modes.setdefault(prepared.mode, _Group()).add(name)
        self._sizes.setdefault((prepared.width, prepared.height), _Group()).add(name)

    def merge(self, other: Findings) -> None:
        """Take over what was found in another part of the source."""
        self._unusable.merge(other._unusable)
        for mode, group in other._modes.items():
            self._modes.setdefault(mode, _Group()).merge(group)
        for size, group in other._sizes.items():
            self._sizes.setdefault(size, _Group()).merge(group)

    def as_clean(self) -> dict[str, Any]:
        """What :meth:`clean` makes the same findings of, where nothing is wrong."""
        (mode, group), (resolution,) = next(iter(self._modes.items())), {width for width, _ in self._sizes}
        return {"mode": mode, "resolution": resolution, "count": group.count, "examples": group.examples}

    @classmethod
    def clean(cls, mode: str, resolution: int, count: int, examples: list[str]) -> Findings:
        """Findings of images of one mode and size."""
        findings = cls()
        findings._modes[mode] = _Group(count, list(examples))
        findings._sizes[resolution, resolution] = _Group(count, list(examples))
        return findings

    @property
    def faulty(self) -> bool:
        """Whether :meth:`raise_faults` would raise."""
        return bool(self._unusable.count) or self._modes_differ or self._sizes_differ

    @property
    def resolution(self) -> int:
        """Edge length that all images have."""
        ((width, _),) = self._sizes
        return width

    @property
    def mode(self) -> str:
        """Colour mode that all images have."""
        (mode,) = self._modes
        return mode

    def raise_faults(self, source: str, images: int) -> None:
        """Raise one DataError that lists every kind of fault with examples and the fix; nothing if all is well.

        Args:
            source: its name.
            images: number of images in all.
        """
        faults = []
        if self._unusable.count:
            more = self._unusable.count - len(self._unusable.examples)
            lines = [*self._unusable.examples, *([f"... and {more} more"] if more else [])]
            faults.append(
                f"{self._unusable.count} of {images} images cannot be used:\n"
                + "\n".join(f"    {line}" for line in lines)
                + "\n  Every image must decode whole: remove these files, or put undamaged ones in their place."
            )
        if self._modes_differ:
            faults.append(
                f"colour modes differ from RGB or from each other:{_list(self._modes)}\n  All images must be RGB, or "
                f"all L (grey). Convert them: --mode RGB, or --mode L (transparency is laid over white)."
            )
        if self._sizes_differ:
            smallest = min(min(size) for size in self._sizes)
            shown = {f"{width}x{height}": group for (width, height), group in self._sizes.items()}
            faults.append(
                f"sizes differ, or are not square:{_list(shown)}\n  All images must be square and of one size. "
                f"Centre-crop and resize them: --size {smallest} (or another size)."
            )
        if faults:
            listed = "\n".join(f"- {fault}" for fault in faults)
            raise DataError(f"{source} cannot be packed as it is.\n{listed}")

    @property
    def _modes_differ(self) -> bool:
        return len(self._modes) > 1 or any(mode not in MODES for mode in self._modes)

    @property
    def _sizes_differ(self) -> bool:
        return len(self._sizes) > 1 or any(width != height for width, height in self._sizes)


def _list(groups: Mapping[str, _Group]) -> str:
    """Groups with counts and examples, the largest first."""
    ordered = sorted(groups.items(), key=lambda item: (-item[1].count, item[0]))
    lines = [
        f"\n    {group.count} {name}: {', '.join(group.examples[:3])}{', ...' if group.count > 3 else ''}"
        for name, group in ordered[:_EXAMPLES]
    ]
    if len(ordered) > _EXAMPLES:
        lines.append(f"\n    ... and {len(ordered) - _EXAMPLES} more kinds")
    return "".join(lines)
