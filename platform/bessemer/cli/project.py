"""`bessemer project`: the latent of an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.locate import RunArgument, class_index, run_directory, snapshot_directory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["project"]


def project(
    run: RunArgument,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file; its centre is cut out and resized.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write: the image, and what was found.")] = Path(
        "projection.png"
    ),
    latent: Annotated[
        Path | None, typer.Option(help="File for w and the noise of every layer, as safetensors.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the search; the paper takes 1000.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    class_name: Annotated[str | None, typer.Option("--class", help="Class of the image, by name.")] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Snapshot, such as kimg-000012.800. Default: the newest.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: a GPU if there is one.")] = None,
) -> None:
    """Find the w and the noise whose image is nearest to IMAGE, by pixels at many scales (StyleGAN2, appendix D)."""
    from bessemer.orchestration.run_directory import RunDirectory

    place = snapshot_directory(RunDirectory.open(run_directory(run)).path, snapshot)

    import torch

    from bessemer.errors import DataError, MachineError, SpecError
    from bessemer.evaluation.grid import save_png, tile
    from bessemer.evaluation.sampling import to_uint8
    from bessemer.systems.adversarial.stylegan2 import StyleGAN2
    from bessemer.systems.adversarial.stylegan2_latents import project as search
    from bessemer.systems.snapshot import load_snapshot
    from bessemer.training.rng import generator

    system, info = load_snapshot(place, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not isinstance(system, StyleGAN2):
        raise SpecError(f"{run}: {system.name} has no space W to project into; stylegan2 has.")
    label = 0 if class_name is None else class_index(info, class_name)
    where = next(system.generator.parameters()).device
    try:
        pixels = _read(image, system.config.resolution, system.config.channels)
    except (OSError, ValueError) as e:
        raise DataError(f"{image}: {e}; give an image file.") from None
    target = torch.from_numpy(pixels).to(where).permute(2, 0, 1) / 127.5 - 1
    system.generator.requires_grad_(False)
    found = search(system, target, generator(where, seed, "project"), label=label, steps=steps)
    try:
        save_png(out, tile(to_uint8(torch.stack([target, found.image])).cpu().numpy(), 2))
        if latent is not None:
            from safetensors.torch import save_file

            noise = {f"noise_{i}": n.cpu() for i, n in enumerate(found.noise)}
            save_file({"w": found.w.cpu().contiguous(), **noise}, latent)
    except OSError as e:
        raise MachineError(f"{e.filename or out}: cannot be written ({e.strerror}); choose another place.") from None
    typer.echo(
        f"{out}: the image, and the nearest; distance {found.start:.4g} -> {found.distance:.4g} in {steps} steps"
    )


def _read(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels [size, size, channels] of an image file, as `bessemer data pack` would store them."""
    import numpy as np

    from bessemer.data.packing.prepare import Rules, prepare
    from bessemer.data.reading.decode import decode_into

    prepared = prepare(path.read_bytes(), Rules(size, "lanczos", "L" if channels == 1 else "RGB"))
    pixels = np.empty((size, size, channels), dtype=np.uint8)
    decode_into(prepared.data, pixels)
    return pixels
