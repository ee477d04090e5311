"""Inception-v3 of 2015-12-05: the network that the word FID means, run as clean-fid runs it.

The weights (96 MB of TorchScript, from NVIDIA) are brought by the person who wants `fid`: nothing here downloads
them. Their hash is checked before they are loaded, so `fid` is never computed with something else.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import check_images, exact_arithmetic
from bessemer.evaluation.files import cache_dir
from bessemer.evaluation.resize import resize_bicubic
from bessemer.files import file_sha256

__all__ = ["INCEPTION_SHA256", "INCEPTION_URL", "Inception", "find_weights"]

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Hash of the published file; k-diffusion pins the same."""
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
"""Where the published file lives."""

_FILE: Final = "inception-2015-12-05.pt"
_SIZE: Final = 299


class Inception:
    """The extractor `inception`; see :class:`bessemer.evaluation.extractors.Extractor`."""

    name: Final = "inception"
    dimension: Final = 2048
    preprocessing: Final = "clean-fid-bicubic-299,(x-128)/128"

    def __init__(self, weights: Path, device: torch.device) -> None:
        try:
            from cleanfid.inception_torchscript import InceptionV3W
        except ImportError as e:
            raise EvaluationError(
                f"extractor inception: package {e.name} is missing; install it with: pip install 'bessemer[evaluation]'"
            ) from None
        self.weights_sha256 = file_sha256(weights)
        if self.weights_sha256 != INCEPTION_SHA256:
            raise EvaluationError(
                f"extractor inception: {weights} has sha256 {self.weights_sha256}, but `fid` is defined by "
                f"{INCEPTION_SHA256}; the file is damaged or another network. Fetch it again from {INCEPTION_URL}"
            )
        self._device = device
        with warnings.catch_warnings():  # torch deprecates TorchScript, but the published weights are nothing else
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            self._network: Any = InceptionV3W(str(weights.parent), download=False, resize_inside=False).to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        check_images(images)
        with exact_arithmetic(self._device):
            x = resize_bicubic(images.to(self._device), _SIZE).expand(-1, 3, -1, -1)
            found: Tensor = self._network(x.contiguous())
        return found.float()


def find_weights() -> Path:
    """The weights file: from ``BESSEMER_INCEPTION`` (the file or its directory), the cache, or clean-fid's place.

    Raises:
        EvaluationError: it is in none of these places.
    """
    cache = cache_dir() / "weights"
    said = os.environ.get("BESSEMER_INCEPTION")
    if said:
        path = Path(said).expanduser()
        path = path / _FILE if path.is_dir() else path
        if path.is_file() and path.name == _FILE:
            return path
        raise EvaluationError(
            f"BESSEMER_INCEPTION: {said} is not a file {_FILE} nor a directory that holds it; "
            f"correct the variable, or unset it and put the file into {cache}"
        )
    for directory in (cache, Path("/tmp")):  # noqa: S108 - where clean-fid keeps it; the hash is checked
        if (directory / _FILE).is_file():
            return directory / _FILE
    raise EvaluationError(
        f"extractor inception: {_FILE} is not on this machine. Fetch it from {INCEPTION_URL} and put it into {cache}, "
        "or name its place in BESSEMER_INCEPTION. Without it, use kid_efflite0 or fd_efflite0, which work offline."
    )
