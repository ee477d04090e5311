"""The manifest: what a packed data set is, and the hashes that prove it.

``manifest.json`` lies beside the shards and is written last, so a directory that has one is whole.
"""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bessemer.data.fields import KINDS, FieldRecord, Kind
from bessemer.errors import DataError
from bessemer.files import write_atomically

__all__ = ["MANIFEST", "FileRecord", "Manifest", "Packing", "ShardRecord", "data_hash"]

MANIFEST = "manifest.json"

# Plain names only: a manifest from elsewhere must not lead outside its directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=2**48)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class FileRecord(_Record):
    """A file of the data set."""

    name: FileName
    bytes: Count
    sha256: Sha256


class ShardRecord(FileRecord):
    """A WebDataset tar."""

    samples: Count


class Packing(_Record):
    """Where the samples came from and what was done to them. Of these, size, resize and mode enter the hash."""

    source: str
    """Folder, archive or word as it was given."""
    size: int | None
    """Edge length asked for; unset where the images were taken as they are."""
    resize: Literal["none", "lanczos", "box", "bicubic"]
    """Filter after the centre-crop to a square; `none` crops only."""
    mode: Literal["RGB", "L"] | None
    """Colour mode asked for; transparency is laid over white."""
    labels: str = "folders"
    """Where the classes come from: `folders`, `none`, `source` where it holds them beside the images, or a file."""
    split: str | None
    """Split that was taken, where the source has splits."""
    splits: list[str]
    """Splits of the source."""
    limit: int | None
    """Images per class at most."""
    passed_through: Annotated[int, Field(ge=0)]
    """Images stored byte for byte as they were in the source."""
    ignored: dict[str, int]
    """Files of the source that are no images, by ending."""


class Manifest(_Record):
    """A packed data set. Frozen; :meth:`load` checks that its parts agree and that its hash is right."""

    version: Literal[1] = 1
    hash: Sha256
    """Identity of the data: sha256 over shape, classes, file hashes and the rules of packing."""
    resolution: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    """Height and width in pixels, where a sample is one image."""
    channels: Literal[1, 3] | None = None
    """Likewise."""
    encoding: Literal["jpg", "png", "mixed"] | None = None
    """How the images are stored, likewise."""
    kind: Kind = "images"
    """What a sample is."""
    fields: list[FieldRecord] | None = None
    """What a batch holds, where that is not one image."""
    classes: Annotated[list[str], Field(min_length=1)]
    """Class names; a label is an index into them. Of the kind `domains`, its two domains."""
    class_counts: list[Count]
    samples: Count
    packing: Packing
    index: FileRecord
    shards: Annotated[list[ShardRecord], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_fields(self) -> Manifest:
        plain = (self.resolution, self.channels, self.encoding)
        if self.kind == "images":
            if None in plain or self.fields is not None:
                raise ValueError("a data set of images has resolution, channels and encoding, and no fields")
            return self
        names = [one.name for one in self.fields or []]
        if plain != (None, None, None) or tuple(names) != KINDS[self.kind]:
            raise ValueError(
                f"a data set of {self.kind} has the fields {', '.join(KINDS[self.kind])} in place of resolution, "
                f"channels and encoding; there are {', '.join(names) or 'none'}"
            )
        if len({tuple(one.shape[-2:]) for one in self.batch_fields}) > 1:
            raise ValueError("its fields differ in size")
        if self.kind == "domains":
            if len(self.classes) != 2 or len({tuple(one.shape) for one in self.batch_fields}) > 1:
                raise ValueError(f"two domains of one shape are the classes; there are {', '.join(self.classes)}")
            if self.class_counts[0] not in accumulate(shard.samples for shard in self.shards):
                raise ValueError("a shard holds images of both domains")
        return self

    @model_validator(mode="after")
    def _check_agreement(self) -> Manifest:
        if len(self.class_counts) != len(self.classes) or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes with {len(self.class_counts)} counts, or a class twice")
        if sum(self.class_counts) != self.samples:
            raise ValueError(f"class_counts add up to {sum(self.class_counts)}, samples is {self.samples}")
        if sum(shard.samples for shard in self.shards) != self.samples:
            raise ValueError(
                f"the shards hold {sum(shard.samples for shard in self.shards)} samples, samples is {self.samples}"
            )
        names = [self.index.name, *(shard.name for shard in self.shards)]
        if len(set(names)) != len(names) or MANIFEST in names:
            raise ValueError("two files have the same name")
        if (expected := data_hash(self.model_dump())) != self.hash:
            raise ValueError(f"hash is {self.hash[:12]}..., the content gives {expected[:12]}...: it was edited")
        return self

    @property
    def facts(self) -> dict[str, int]:
        """What a system's configuration takes from the data.

        `classes`, and of pictures `resolution` and `channels`, of the targets of pairs `target_channels`, of clips
        `frames`, of sound `samples` and `rate`, of bits `bits`.
        """
        facts: dict[str, int] = {}
        for one in self.batch_fields:
            if one.name in ("images", "clips"):
                facts |= {"resolution": one.shape[-1], "channels": one.shape[-3]}
            if one.name == "clips":
                facts["frames"] = one.shape[0]
            elif one.name == "targets":
                facts["target_channels"] = one.shape[0]
            elif one.name == "audio":
                facts |= {"samples": one.shape[0], "rate": one.rate or 0}
            elif one.name == "bits":
                facts["bits"] = one.shape[0]
        return {**facts, "classes": 1 if self.kind == "domains" else len(self.classes)}

    @property
    def sampled_classes(self) -> dict[str, int]:
        """Name -> images of each class that generated images can have: of two domains, the second alone."""
        counts = dict(zip(self.classes, self.class_counts, strict=True))
        return {self.classes[1]: self.class_counts[1]} if self.kind == "domains" else counts

    @property
    def batch_fields(self) -> list[FieldRecord]:
        """What a batch holds, the main field first."""
        if self.fields is not None:
            return self.fields
        assert self.resolution is not None
        assert self.channels is not None
        assert self.encoding is not None
        shape = [self.channels, self.resolution, self.resolution]
        return [FieldRecord(name="images", shape=shape, encoding=self.encoding)]

    @property
    def sample_fields(self) -> list[FieldRecord]:
        """What each sample in the shards holds: of two domains, an image of one of them."""
        return self.batch_fields[:1] if self.kind == "domains" else self.batch_fields

    @property
    def members(self) -> int:
        """Records of the index for each sample: its files, without the label."""
        return sum(one.members for one in self.sample_fields)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all samples, decoded."""
        return self.samples * sum(one.stored_bytes for one in self.sample_fields)

    @property
    def files(self) -> set[str]:
        """Names of all files of the data set."""
        return {MANIFEST, self.index.name, *(shard.name for shard in self.shards)}

    @classmethod
    def parse(cls, data: bytes, source: Path | str) -> Manifest:
        """Read a manifest from the bytes of its file.

        Raises:
            DataError: names the field, the value and the rule.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            given = "" if first["type"] in ("json_invalid", "value_error") else f" (found {_shorten(first['input'])})"
            raise DataError(
                f"{source}: {field + ': ' if field else ''}{first['msg']}{given}; this is not a whole data set "
                f"manifest: copy it again from where it was packed, or pack anew with `bessemer data pack`"
            ) from None

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a packed data set.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = Path(directory) / MANIFEST
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            what = "has no manifest.json, so it is no packed data set" if directory.is_dir() else "does not exist"
            raise DataError(f"data set {directory} {what}; pack one: bessemer data pack SOURCE {directory}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
        return cls.parse(data, path)

    def save(self, directory: Path) -> None:
        """Write ``manifest.json``, aside first and renamed when it is on the disk."""
        data = json.dumps(_declared(self.model_dump()), indent=1, ensure_ascii=False).encode() + b"\n"
        write_atomically(Path(directory) / MANIFEST, lambda file: file.write(data))


def data_hash(fields: dict[str, Any]) -> str:
    """Hash of the data that a manifest describes: the same images packed from elsewhere have the same."""
    content = {key: value for key, value in _declared(fields).items() if key != "hash"}
    content["packing"] = {key: content["packing"][key] for key in ("size", "resize", "mode")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _declared(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what does not apply: sets of images are written, and hashed, as before there were others."""
    plain = fields.get("kind", "images") == "images"
    return {key: value for key, value in fields.items() if value is not None and not (plain and key == "kind")}


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
