"""Weights that people bring: where they are looked for, and how the published ones are fetched when asked for."""

from __future__ import annotations

import fcntl
import os
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.files import cache_dir, file_sha256, write_atomically

__all__ = ["WEIGHTS", "WeightsFile", "check_weights", "fetch", "find_weights", "read_state"]


@dataclass(frozen=True)
class WeightsFile:
    """A file of published weights."""

    name: str
    """Of the extractors that read it."""
    variable: str
    """Environment variable that names the file or its directory."""
    files: tuple[str, ...]
    """Names under which it is looked for in the cache and in a directory."""
    source: str
    """Where it is published."""
    sha256: str = ""
    """Its hash, or the beginning of it; empty where several files will do."""
    instead: str = "kid_efflite0 or fd_efflite0"
    """Metrics that do without."""

    @property
    def directory(self) -> Path:
        """Where the file belongs."""
        return cache_dir() / "weights"


WEIGHTS: Final[dict[str, WeightsFile]] = {
    "inception": WeightsFile(
        "inception",
        "BESSEMER_INCEPTION",
        ("inception-2015-12-05.pt",),
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",  # k-diffusion pins the same
    ),
    "inception-pytorch": WeightsFile(
        "inception-pytorch",
        "BESSEMER_INCEPTION_PYTORCH",
        ("pt_inception-2015-12-05-6726825d.pth",),
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "dinov2": WeightsFile(
        "dinov2",
        "BESSEMER_DINOV2",
        tuple(f"dinov2_vit{size}14_pretrain.pth" for size in "lbs"),
        "https://github.com/facebookresearch/dinov2 (FD of DINOv2 means ViT-L/14: dinov2_vitl14_pretrain.pth)",
    ),
    "clip": WeightsFile(
        "clip",
        "BESSEMER_CLIP",
        ("ViT-L-14.pt", "ViT-B-16.pt", "ViT-B-32.pt"),
        "https://github.com/openai/CLIP (clip/clip.py lists the files)",
    ),
    "vgg16": WeightsFile(
        "vgg16",
        "BESSEMER_VGG16",
        ("vgg16-397923af.pth",),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
        "ppl-zend_efflite0, or PSNR and SSIM of pairs",
    ),
    "lpips": WeightsFile(
        "lpips",
        "BESSEMER_LPIPS",
        ("vgg.pth", "weights-vgg16-lpips.pth"),
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",  # of PyPI's package lpips 0.1.4
        "ppl-zend_efflite0, or PSNR and SSIM of pairs",
    ),
}
"""Extractor -> its weights."""


def find_weights(name: str) -> Path:
    """The weights file of an extractor: from its variable, the cache, or, for Inception, where clean-fid keeps it.

    Raises:
        EvaluationError: it is in none of these places.
    """
    wanted = WEIGHTS[name]
    said = os.environ.get(wanted.variable)
    if said:
        path = Path(said).expanduser()
        inside = [path / file for file in wanted.files if (path / file).is_file()]
        if path.is_dir() and inside:
            return inside[0]
        if path.is_file():
            return path
        raise EvaluationError(
            f"{wanted.variable}: {said} is no file, nor a directory that holds {' or '.join(wanted.files)}; correct "
            f"the variable, or unset it and put the file into {wanted.directory}"
        )
    for directory in (wanted.directory, Path("/tmp")):  # noqa: S108 - where clean-fid keeps it; the hash is checked
        for file in wanted.files:
            if (directory / file).is_file() and (wanted.sha256 or directory == wanted.directory):
                return directory / file
    how = f"Fetch it with `bessemer extractors get {name}`, or from" if wanted.sha256 else "Fetch it from"
    raise EvaluationError(
        f"extractor {name}: {' or '.join(wanted.files)} is not on this machine. {how} {wanted.source} and put it into "
        f"{wanted.directory}, or name its place in {wanted.variable}. Without it, use {wanted.instead}, which work "
        "offline."
    )


def check_weights(name: str, path: Path) -> str:
    """The file's sha256.

    Raises:
        EvaluationError: it is not the published file.
    """
    wanted, found = WEIGHTS[name], file_sha256(path)
    if not found.startswith(wanted.sha256):
        raise EvaluationError(
            f"extractor {name}: {path} has sha256 {found}, but the metric is defined by {wanted.sha256}; the file is "
            f"damaged or another network. Fetch it again from {wanted.source}"
        )
    return found


def fetch(name: str, source: str | None = None) -> Path:
    """Download published weights into the cache: whole, with the right hash, or not at all.

    One process downloads and the others wait for it; a file that is there already is checked and kept.

    Args:
        name: key of :data:`WEIGHTS`.
        source: another address of the same file, such as a mirror.

    Raises:
        EvaluationError: there is no one file to fetch, the address does not answer, or what it sends is another file.
    """
    wanted = WEIGHTS.get(name)
    if wanted is None or not wanted.sha256:
        known = ", ".join(key for key, file in WEIGHTS.items() if file.sha256)
        where = f" Choose a file from {wanted.source} and put it into {wanted.directory}." if wanted else ""
        raise EvaluationError(f"extractor {name}: there is no single file to fetch; fetched are {known}.{where}")
    path = wanted.directory / wanted.files[0]
    address = source or wanted.source
    if not address.startswith(("https://", "http://", "file://")):
        raise EvaluationError(f"--source {address}: is no address; write https://, http:// or file://.")
    wanted.directory.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up when the file is closed, however this process ends
        if path.is_file() and file_sha256(path).startswith(wanted.sha256):
            return path

        def download(file: BinaryIO) -> None:
            with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310 - the scheme is checked above
                while block := answer.read(1 << 20):
                    file.write(block)
            file.flush()
            check_weights(name, Path(file.name))

        try:
            write_atomically(path, download)
        except (urllib.error.URLError, OSError) as e:
            raise EvaluationError(
                f"extractor {name}: {address} cannot be fetched ({e}); fetch it elsewhere and put it into "
                f"{wanted.directory}"
            ) from None
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, a state dict of torch.save, or TorchScript. Runs no code of the file.

    Raises:
        EvaluationError: it is none of these.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if _is_torchscript(path):
            import warnings

            with warnings.catch_warnings():  # torch deprecates TorchScript, but CLIP's weights are published in it
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
                module: Any = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
            return dict(module.state_dict())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch's readers raise whatever a damaged file makes them raise
        raise EvaluationError(f"{path}: no weights can be read from it ({type(e).__name__}: {e})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise EvaluationError(f"{path}: is no state dict; save one with torch.save(model.state_dict(), ...)")
    return state


def _is_torchscript(path: Path) -> bool:
    return zipfile.is_zipfile(path) and any(
        name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()
    )
