"""`bessemer checkpoint`: list, verify and export the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bessemer.cli.locate import RunArgument, run_directory

__all__ = ["app"]

app = typer.Typer(help="List, verify and export the checkpoints of a run.", no_args_is_help=True, rich_markup_mode=None)

Format = Literal["snapshot", "onnx"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls")
def list_checkpoints(run: RunArgument, as_json: Json = False) -> None:
    """List the checkpoints of a run, oldest first. Checks that all files are there in full length, not their bytes."""
    from dataclasses import asdict

    from bessemer.cli.output import echo_json, human_bytes, table
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.training.checkpoint_files import all_checkpoints, describe

    found = [describe(path) for path in all_checkpoints(RunDirectory.open(run_directory(run)).checkpoints)]
    if as_json:
        echo_json([asdict(info) for info in found])
        return
    table(
        ("CHECKPOINT", "KIMG", "SIZE", "WORKERS", "ZERO", "STATE"),
        [
            (i.name, i.kimg, human_bytes(i.bytes), i.workers, i.zero_stage, "damaged" if i.damage else "complete")
            for i in found
        ],
    )


@app.command()
def verify(run: RunArgument, as_json: Json = False) -> None:
    """Check every byte of a run's checkpoints against their manifests; exit with 1 if something is damaged."""
    from dataclasses import asdict

    from bessemer.cli.output import echo_json
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.training.checkpoint_files import all_checkpoints, describe

    paths = all_checkpoints(RunDirectory.open(run_directory(run)).checkpoints)
    found = [describe(path, content=True) for path in paths]
    if as_json:
        echo_json([asdict(info) for info in found])
    else:
        for info in found:
            typer.echo(f"{info.name}  {info.damage or 'ok'}")
    if any(info.damage for info in found):
        raise typer.Exit(1)


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the snapshot, or ONNX file to write.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint, such as kimg-000012.800. Default: the newest undamaged one.")
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="All averaged weights, or the sampler alone.")
    ] = "snapshot",
    truncation: Annotated[
        float | None, typer.Option(min=0.001, help="With onnx: truncation at which the model will be sampled.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the averaged weights of a checkpoint: as a snapshot (safetensors, and JSON that says what they are), or as
    an ONNX model from latents and classes to images.
    """
    import tempfile
    from dataclasses import asdict

    from bessemer.cli.output import echo_json
    from bessemer.errors import SpecError
    from bessemer.orchestration.export import choose_checkpoint, export_snapshot
    from bessemer.orchestration.run_directory import RunDirectory

    if format_ == "snapshot" and truncation is not None:
        raise SpecError("--truncation: a snapshot holds for any truncation; remove it, or add --format onnx.")
    directory = RunDirectory.open(run_directory(run))
    chosen = choose_checkpoint(directory, checkpoint)
    if format_ == "snapshot":
        info = export_snapshot(directory, chosen, out)
        written = asdict(info)
    else:
        from bessemer.orchestration.onnx_export import export_onnx

        with tempfile.TemporaryDirectory() as aside:
            info = export_snapshot(directory, chosen, Path(aside) / chosen.name)
            written = export_onnx(Path(aside) / chosen.name, out, truncation=truncation)
    if as_json:
        echo_json({"path": out, **written})
    else:
        typer.echo(f"{out}: {info.system} at {info.nimg / 1000:g} kimg")
