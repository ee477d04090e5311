"""`bessemer sample`: a sheet of samples from a run's snapshot, at one truncation or several, or of mixed styles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.locate import RunArgument, class_index, run_directory, snapshot_directory
from bessemer.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bessemer.evaluation.grid import Sheet
    from bessemer.systems.contract import System
    from bessemer.systems.translating import TranslationSystem

__all__ = ["numbers", "sample"]


def numbers(text: str, option: str) -> list[int]:
    """Indices such as ``0-3,7``.

    Raises:
        SpecError: it is not written so; names the option.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise SpecError(
                f"{option} {text}: {part.strip()!r} is neither a number nor a range; write such as 0-3 or 0-3,7."
            )
        found += range(int(first), int(last if dash else first) + 1)
    return found


def sample(
    run: RunArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="PNG file to write; clips also go into a GIF beside it, sound into a WAV file."
        ),
    ] = Path("grid.png"),
    rows: Annotated[int, typer.Option(min=1, max=64, help="Rows, one class in each; images have as many columns.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the latents.")] = 0,
    truncation: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001,
            help="Truncation of the latents: smaller is safer and less varied. More than once: a row for each, of the "
            "same latents.",
        ),
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="Draw this class only, by name.")] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Of StyleGAN2: give the images at the left the styles of those above in these layers, such as 0-3 for "
            "pose and shape.",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Of systems that translate: a packed data set, folder or archive of images to translate. Default: "
            "those that evaluations translate.",
        ),
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Snapshot, such as kimg-000012.800. Default: the newest.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: a GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was drawn, and where it is, as JSON.")] = False,
) -> None:
    """Draw a sheet of samples with the averaged weights. The same seed gives the same latents at every snapshot.

    Systems that translate show a line of inputs, one of outputs, and one of targets where there are any.
    """
    from bessemer.orchestration.run_directory import RunDirectory

    layers = None if mix is None else numbers(mix, "--mix")
    truncations = truncation or []
    if layers is not None and len(truncations) > 1:
        raise SpecError("--mix: draws one grid, at one truncation; give --truncation once.")
    directory = RunDirectory.open(run_directory(run))
    place = snapshot_directory(directory.path, snapshot)

    import torch

    from bessemer.data.fields import NOUNS
    from bessemer.errors import MachineError
    from bessemer.evaluation.grid import Sheet, sample_grid, truncation_sheet
    from bessemer.systems.snapshot import load_snapshot, read_snapshot_info
    from bessemer.systems.translating import TranslationSystem

    label = None if class_name is None else class_index(read_snapshot_info(place), class_name)
    system, info = load_snapshot(place, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    one = truncations[0] if truncations else None
    if isinstance(system, TranslationSystem):
        for option, value in {"--truncation": truncation, "--class": class_name, "--mix": mix}.items():
            if value:
                raise SpecError(f"{option}: {system.name} translates images; leave {option} out.")
        job = directory.job()
        sheet = _translated(system, inputs or job.evaluation.held_out or job.data.path, rows, seed)
    elif inputs is not None:
        raise SpecError(f"--inputs {inputs}: {system.name} draws from noise and translates nothing; leave it out.")
    elif layers is not None:
        sheet = Sheet({"images": _mixed(system, rows, seed, layers, label or 0, one)}, rows + 1)
    elif len(truncations) > 1:
        sheet = truncation_sheet(system, info.class_counts, rows, truncations, seed, label=label)
    else:
        sheet = sample_grid(system, info.class_counts, rows, seed, one, label=label)
    try:
        written = sheet.save(out)
    except OSError as e:
        raise MachineError(f"{out}: cannot be written ({e.strerror}); choose another place with --out.") from None
    if json:
        from bessemer.cli.output import echo_json

        facts = {"file": out, "files": written, "rows": rows, "nimg": info.nimg, "weights_sha256": info.weights_sha256}
        echo_json({**facts, "seed": seed, "truncation": truncations, "mixed_layers": layers, "class": class_name})
    else:
        (field, samples), names = next(iter(sheet.fields.items())), " and ".join(map(str, written))
        shape = f"{len(samples) // sheet.columns} x {sheet.columns}"
        typer.echo(f"{names}: {shape} {NOUNS.get(field, 'images')} at {info.nimg / 1000:g} kimg")


def _translated(system: TranslationSystem, place: str, columns: int, seed: int) -> Sheet:
    from bessemer.evaluation.grid import translation_sheet
    from bessemer.evaluation.images import open_images

    with open_images(place) as images:
        return translation_sheet(system, images, columns, seed)


def _mixed(
    system: System, rows: int, seed: int, layers: list[int], label: int, truncation: float | None
) -> NDArray[np.uint8]:
    """Images of :func:`~bessemer.systems.adversarial.stylegan2_latents.mix_styles`, row by row, as pixels."""
    from bessemer.evaluation.sampling import to_uint8
    from bessemer.systems.adversarial.stylegan2 import StyleGAN2
    from bessemer.systems.adversarial.stylegan2_latents import mix_styles
    from bessemer.training.rng import generator

    if not isinstance(system, StyleGAN2):
        raise SpecError(f"--mix: {system.name} has no styles to mix; stylegan2 has.")
    count = system.generator.synthesis.num_ws
    if wrong := [i for i in layers if i >= count]:
        raise SpecError(
            f"--mix: layers {wrong} are not there; at {system.config.resolution} pixels they are 0 to {count - 1}."
        )
    device = next(system.generator.parameters()).device
    draws = generator(device, seed, "mix")
    images = mix_styles(system, rows, rows, layers, draws, label=label, truncation=truncation)
    pixels: NDArray[np.uint8] = to_uint8(images.flatten(0, 1)).cpu().numpy()
    return pixels
