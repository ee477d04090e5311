"""`bessemer sample`: a grid of images from a run's newest snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.locate import RunArgument, run_directory, snapshot_directory

__all__ = ["sample"]


def sample(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")] = Path("grid.png"),
    rows: Annotated[int, typer.Option(min=1, max=64, help="Rows and columns; one class per row.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the latents.")] = 0,
    truncation: Annotated[
        float | None, typer.Option(min=0.001, help="Truncation of the latents: smaller is safer and less varied.")
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="Draw this class only, by name.")] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Snapshot, such as kimg-000012.800. Default: the newest.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: a GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was drawn, and where it is, as JSON.")] = False,
) -> None:
    """Draw a grid of images with the averaged weights. The same seed gives the same latents at every snapshot."""
    from bessemer.orchestration.run_directory import RunDirectory

    place = snapshot_directory(RunDirectory.open(run_directory(run)).path, snapshot)

    import torch

    from bessemer.errors import MachineError, SpecError
    from bessemer.evaluation.grid import sample_grid, save_png
    from bessemer.systems.snapshot import load_snapshot, read_snapshot_info

    label = None
    if class_name is not None:
        names = read_snapshot_info(place).class_names
        if class_name not in names:
            import difflib

            near = difflib.get_close_matches(class_name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise SpecError(f"--class {class_name}: the data set has no such class.{hint} Classes: {shown or 'none'}.")
        label = names.index(class_name)
    system, info = load_snapshot(place, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    grid = sample_grid(system, info.class_counts, rows, seed, truncation, label=label)
    try:
        save_png(out, grid)
    except OSError as e:
        raise MachineError(f"{out}: cannot be written ({e.strerror}); choose another place with --out.") from None
    if json:
        from bessemer.cli.output import echo_json

        facts = {"file": out, "rows": rows, "nimg": info.nimg, "weights_sha256": info.weights_sha256}
        echo_json({**facts, "seed": seed, "truncation": truncation, "class": class_name})
    else:
        typer.echo(f"{out}: {rows} x {rows} images at {info.nimg / 1000:g} kimg")
