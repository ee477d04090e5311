"""The sampler of a snapshot as one ONNX file: latents and classes in, images out.

Latents are inputs, so that how they are drawn and truncated stays with the caller. The batch size is open. What the
model is stands in its `metadata_props`, under names that begin with `bessemer.`.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bessemer import __version__
from bessemer.errors import CheckpointError, MachineError, RunError, SpecError
from bessemer.evaluation.sampling import prepare
from bessemer.files import write_atomically
from bessemer.systems.contract import System
from bessemer.systems.snapshot import load_snapshot

__all__ = ["BATCH", "LARGEST", "TOLERANCE", "export_onnx"]

BATCH = "batch"
"""Name of the open dimension."""
TOLERANCE = 1e-4
"""Largest difference to PyTorch's images, which lie in [-1, 1], with which a model is handed out."""
LARGEST = (1 << 31) - (1 << 20)
"""Bytes of weights that fit into a file of Protocol Buffers beside the graph."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Sampler(nn.Module):
    """What is exported: :meth:`System.generate` as a module with the latents in order, and labels if there are any."""

    def __init__(self, system: System, truncation: float | None) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: system.networks()[name] for name in system.sampled_networks})
        self._generate, self._truncation = system.generate, truncation
        self._names = list(system.latent_shapes)
        self._conditional = system.config.classes > 1

    def forward(self, *inputs: Tensor) -> Tensor:
        latents = inputs[: len(self._names)]
        first = latents[0]
        labels = inputs[-1] if self._conditional else torch.zeros_like(first.flatten(1)[:, 0], dtype=torch.int64)
        return self._generate(dict(zip(self._names, latents, strict=True)), labels, self._truncation)


def export_onnx(snapshot: Path, out: Path, *, truncation: float | None = None) -> dict[str, str]:
    """Write the sampler of a snapshot to `out`, after its images were compared with those of PyTorch.

    Inputs: the system's latents by name, [batch, ...] float32, standard normal; `labels` [batch] int64 where the
    system has classes. Output: `images` [batch, C, H, W] float32 in [-1, 1]; of a system that draws pixels the mean
    of p(x | z).

    Args:
        snapshot: directory of the snapshot.
        out: file to write; replaced if it exists.
        truncation: at which it will be sampled: standing statistics are renewed for it, as evaluations do; the caller
            truncates the latents.

    Returns:
        The metadata that was written.

    Raises:
        SpecError: the system has no sampler from latents to images.
        MachineError: a package is missing, or the model is too large for one file.
        CheckpointError: the snapshot is damaged, or the exported model does not give PyTorch's images.
        RunError: `out` cannot be written.
    """
    _require_packages()
    import onnx

    if not out.parent.is_dir():
        raise RunError(f"--out {out}: there is no directory {out.parent}; make it, or choose another place.")
    system, info = load_snapshot(snapshot)
    if not system.latent_shapes:
        why = "it makes samples from inputs" if system.given else "its samples are drawn step by step"
        raise SpecError(
            f"--format onnx: {system.name} has no sampler from latents alone ({why}), and that is what is written; "
            "use --format snapshot."
        )
    networks = [system.networks()[name] for name in system.sampled_networks]
    size = sum(t.nbytes for network in networks for t in network.state_dict().values())
    if size > LARGEST:
        raise MachineError(
            f"--format onnx: {size / 1e9:.3g} GB of weights do not fit into one ONNX file, which ends at 2 GiB; use "
            "--format snapshot."
        )
    prepare(system, info.class_counts, seed=info.seed, truncation=truncation, device="cpu")
    sampler = _Sampler(system, truncation).eval()
    names = [*system.latent_shapes, *(["labels"] if system.config.classes > 1 else [])]
    with _quiet():
        model = _model(sampler, _inputs(system, 3), names)
    onnx.helper.set_model_props(model, metadata := _metadata(system, info, truncation))
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString(deterministic=True)
    _compare(content, sampler, system, names)
    try:
        write_atomically(out, lambda file: file.write(content))
    except OSError as e:
        raise RunError(f"--out {out}: cannot be written ({e.strerror or e}); choose another place.") from None
    return metadata


def _require_packages() -> None:
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise MachineError(
                f"--format onnx: package {e.name or name} is missing; install it with: pip install 'bessemer[onnx]'"
            ) from None


def _inputs(system: System, count: int) -> list[Tensor]:
    """Latents, and labels if there are classes, of `count` images."""
    draws = torch.Generator().manual_seed(count)
    latents = [torch.randn(count, *shape, generator=draws) for shape in system.latent_shapes.values()]
    if system.config.classes == 1:
        return latents
    return [*latents, torch.randint(system.config.classes, (count,), generator=draws)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and messages of torch's exporter to ourselves: they speak of its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _model(sampler: nn.Module, inputs: list[Tensor], names: list[str]) -> Any:
    """The ONNX model, its batch size open."""
    batch = torch.export.Dim(BATCH)
    with torch.no_grad():
        # Exported first: torch.onnx.export alone would fix the batch size silently where it cannot be left open.
        program = torch.export.export(sampler, tuple(inputs), dynamic_shapes=(tuple({0: batch} for _ in inputs),))
        exported = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["images"], verbose=False, external_data=False
        )
    assert exported is not None
    model = exported.model_proto
    (symbol,) = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = BATCH
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]  # traces of Python code on the exporting machine
    return model


def _metadata(system: System, info: Any, truncation: float | None) -> dict[str, str]:
    values = {
        "version": __version__,
        "system": info.system,
        "config": info.config,
        "paper": system.paper,
        "kimg": info.nimg / 1000,
        "ema": info.ema,
        "seed": info.seed,
        "data_hash": info.data_hash,
        "weights_sha256": info.weights_sha256,
        "class_names": info.class_names,
        "truncation": truncation,
        "latents": "standard normal",
        "images": "[-1, 1], the mean of p(x | z)" if system.draws_pixels else "[-1, 1]",
    }
    return {f"bessemer.{k}": v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in values.items()}


def _compare(content: bytes, sampler: nn.Module, system: System, names: list[str]) -> None:
    """Draw with both, at batch sizes that the export has not seen."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for count in (1, 4):
        inputs = _inputs(system, count)
        feed: Mapping[str, Any] = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        with torch.no_grad():
            ours = sampler(*inputs)
        difference = (torch.from_numpy(session.run(None, feed)[0]) - ours).abs().max().item()
        if not difference <= TOLERANCE:  # also where it is NaN
            raise CheckpointError(
                f"--format onnx: images of the exported model differ from PyTorch's by {difference:.2g}, more than "
                f"{TOLERANCE:g}; nothing was written. Use --format snapshot, and report this."
            )
