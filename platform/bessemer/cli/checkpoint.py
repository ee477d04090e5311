"""`bessemer checkpoint`: list, verify and export the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bessemer.cli.locate import RunArgument, run_directory

if TYPE_CHECKING:
    from bessemer.training.checkpoint_files import CheckpointInfo

__all__ = ["app"]

app = typer.Typer(help="List, verify and export the checkpoints of a run.", no_args_is_help=True, rich_markup_mode=None)

Format = Literal["snapshot", "onnx"]
RunOrUrl = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Run directory, the run's name below runs/, or the URL to which it was uploaded."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _describe(run: str, *, content: bool = False) -> list[CheckpointInfo]:
    """The checkpoints of a run, here or in a store; with `content`, every byte of them is read."""
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.stores.opening import is_url, open_store
    from bessemer.training.checkpoint_files import all_checkpoints, describe
    from bessemer.training.remote_checkpoints import RemoteCheckpoints

    if is_url(run):
        remote = RemoteCheckpoints(open_store(run))
        return [remote.describe(name, files, content=content) for name, files in remote.listing().items()]
    paths = all_checkpoints(RunDirectory.open(run_directory(run)).checkpoints)
    return [describe(path, content=content) for path in paths]


@app.command("ls")
def list_checkpoints(run: RunOrUrl, as_json: Json = False) -> None:
    """List the checkpoints of a run, oldest first. Checks that all files are there in full length, not their bytes."""
    from dataclasses import asdict

    from bessemer.cli.output import echo_json, human_bytes, table

    found = _describe(run)
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
def verify(run: RunOrUrl, as_json: Json = False) -> None:
    """Check every byte of a run's checkpoints against their manifests; exit with 1 if something is damaged."""
    from dataclasses import asdict

    from bessemer.cli.output import echo_json

    found = _describe(run, content=True)
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
