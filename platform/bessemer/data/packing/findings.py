"""What packing finds wrong with a source, told all at once so that a person can fix it all at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from bessemer.data.fields import KINDS
from bessemer.data.packing.prepare import MODES, Prepared, Rules
from bessemer.errors import DataError

__all__ = ["Findings", "declare"]

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
        self._modes: dict[str, dict[str, _Group]] = {}
        """By field."""
        self._sizes: dict[tuple[int, int], _Group] = {}

    def refuse(self, name: str, error: ValueError) -> None:
        """Take note of why a sample could not be prepared."""
        self._unusable.add(f"{name}: {error}")

    def see(self, name: str, prepared: Prepared, field: str = "images") -> None:
        """Take note of one file of a sample."""
        if prepared.mode:
            self._modes.setdefault(field, {}).setdefault(prepared.mode, _Group()).add(name)
            self._sizes.setdefault((prepared.width, prepared.height), _Group()).add(name)

    def merge(self, other: Findings) -> None:
        """Take over what was found in another part of the source."""
        self._unusable.merge(other._unusable)
        for name, modes in other._modes.items():
            for mode, group in modes.items():
                self._modes.setdefault(name, {}).setdefault(mode, _Group()).merge(group)
        for size, group in other._sizes.items():
            self._sizes.setdefault(size, _Group()).merge(group)

    def as_clean(self) -> dict[str, Any]:
        """What :meth:`clean` makes the same findings of, where nothing is wrong."""
        modes = {
            field: (mode, group.count, group.examples)
            for field, found in self._modes.items()
            for mode, group in found.items()
        }
        return {"modes": modes, "resolution": self.resolution}

    @classmethod
    def clean(cls, modes: Mapping[str, tuple[str, int, list[str]]], resolution: int | None) -> Findings:
        """Findings of pictures of one size, and of one mode in each field."""
        findings = cls()
        for name, (mode, count, examples) in modes.items():
            findings._modes[name] = {mode: _Group(count, list(examples))}
        if resolution is not None:
            count, examples = next((count, examples) for _, count, examples in modes.values())
            findings._sizes[resolution, resolution] = _Group(count, list(examples))
        return findings

    @property
    def faulty(self) -> bool:
        """Whether :meth:`raise_faults` would raise."""
        return bool(self._unusable.count) or bool(self._differing) or self._sizes_differ

    @property
    def resolution(self) -> int | None:
        """Edge length that all pictures have; None where there are none."""
        return next((width for width, _ in self._sizes), None)

    def channels(self, field: str) -> int:
        """Colour channels that all pictures of a field have."""
        (mode,) = self._modes[field]
        return 3 if mode == "RGB" else 1

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
        for name in self._differing:
            of = f" of {name}" if len(self._modes) > 1 else ""
            faults.append(
                f"colour modes{of} differ from RGB or from each other:{_list(self._modes[name])}\n  All must be RGB, "
                f"or all L (grey). Convert them: --mode RGB, or --mode L (transparency is laid over white)."
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
    def _differing(self) -> list[str]:
        """Fields with several colour modes, or with one that cannot be stored."""
        return [field for field, modes in self._modes.items() if len(modes) > 1 or any(m not in MODES for m in modes)]

    @property
    def _sizes_differ(self) -> bool:
        return len(self._sizes) > 1 or any(width != height for width, height in self._sizes)


def declare(rules: Rules, findings: Findings, endings: Collection[str]) -> dict[str, Any]:
    """What the manifest says of the samples.

    Args:
        rules: by which they were packed.
        findings: without faults.
        endings: field and ending of the files, such as `images.jpg`.
    """
    size = findings.resolution
    if rules.kind in ("audio", "bits"):
        encoding = "wav" if rules.kind == "audio" else "npy"
        only = {"name": rules.kind, "shape": [rules.count], "encoding": encoding, "rate": rules.rate}
        return {"kind": rules.kind, "fields": [only]}
    fields: list[dict[str, Any]] = []
    for name in KINDS[rules.kind]:
        stored = KINDS[rules.kind][0] if rules.kind == "domains" else name
        kinds = {ending.partition(".")[2] for ending in endings if ending.startswith(f"{stored}.")}
        encoding = next(iter(kinds)) if len(kinds) == 1 else "mixed"
        channels = findings.channels(stored)
        if rules.kind == "images":
            return {"resolution": size, "channels": channels, "encoding": encoding}
        frames = [rules.count] if rules.kind == "clips" else []
        fields.append({"name": name, "shape": [*frames, channels, size, size], "encoding": encoding, "rate": None})
    return {"kind": rules.kind, "fields": fields}


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
