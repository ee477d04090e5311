"""Copies of tensors in host memory, and writing them as safetensors while training goes on.

The copy lies in one buffer that is used again for the next checkpoint, because first touches of fresh memory cost
more than the copy itself, and its bytes go to the file as they are: `safetensors.torch.save_file` would copy each
tensor once more, and hold the interpreter lock meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy"]

# https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK = 4 << 20


class HostCopy:
    """A set of named tensors at one moment: chosen by :meth:`choose`, copied by :meth:`copy` over the moment before."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._kinds: list[tuple[str, torch.dtype, torch.Size]] | None = None
        self._places: list[Tensor] = []
        self._sources: list[tuple[str, Tensor]] = []
        self._computed: torch.cuda.Event | None = None
        self._header = b""
        self._bytes = 0

    def choose(self, tensors: Mapping[str, Tensor]) -> None:
        """What to copy: `tensors` as they are after all that was queued on the device by now.

        They must not change before :meth:`copy` is over.
        """
        self._sources = list(tensors.items())
        self._computed = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._computed.record()

    @torch.no_grad()
    def copy(self) -> None:
        """Copy what was chosen, in any thread. Returns when the tensors may change again."""
        # Larger elements first, so that every tensor is aligned to its elements.
        order = sorted(self._sources, key=lambda item: (-item[1].element_size(), item[0]))
        kinds = [(name, tensor.dtype, tensor.shape) for name, tensor in order]
        if kinds != self._kinds:
            self._arrange(kinds, pinned=self._computed is not None)
        sources = [tensor for _, tensor in order]
        if self._computed is not None:  # beside what the device computes meanwhile
            stream = torch.cuda.Stream(next(tensor.device for tensor in sources if tensor.is_cuda))  # type: ignore[no-untyped-call]
            stream.wait_event(self._computed)
            with torch.cuda.stream(stream):
                torch._foreach_copy_(self._places, sources, non_blocking=True)
            stream.synchronize()
        elif sources:
            torch._foreach_copy_(self._places, sources)
        self._sources = []

    def _arrange(self, kinds: list[tuple[str, torch.dtype, torch.Size]], *, pinned: bool) -> None:
        """Find a place in the buffer for each tensor, and write the header that says where it is."""
        header: dict[str, Any] = {}
        at = 0
        for name, dtype, shape in kinds:
            end = at + shape.numel() * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._bytes = len(text).to_bytes(8, "little") + text, at
        self._places = []
        self._reserve(at, pinned=pinned)
        for name, dtype, shape in kinds:
            start, end = header[name]["data_offsets"]
            self._places.append(self._buffer[start:end].view(dtype).view(shape))
        self._kinds = kinds

    def _reserve(self, size: int, *, pinned: bool) -> None:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # never hold the old one and the new one at once
            self._buffer = torch.empty(math.ceil(size / 64) * 64, dtype=torch.uint8, pin_memory=pinned)

    def write(self, path: Path) -> dict[str, Any]:
        """Write the copy to a new file and force it to the disk. Other threads run meanwhile.

        Returns:
            The file's entry of the manifest: `bytes` and `sha256`, of what was meant to be written.

        Raises:
            OSError: with the file's name.
        """
        digest = hashlib.sha256()
        data = memoryview(self._buffer.numpy())[: self._bytes]  # type: ignore[arg-type]
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                _write_all(fd, memoryview(self._header), digest)
                for start in range(0, self._bytes, _BLOCK):
                    _write_all(fd, data[start : start + _BLOCK], digest)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(path)) from None
        return {"bytes": len(self._header) + self._bytes, "sha256": digest.hexdigest()}


def _write_all(fd: int, block: memoryview, digest: Any) -> None:
    digest.update(block)
    while block:
        block = block[os.write(fd, block) :]
