"""`bessemer quickstart`: the whole path once, on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bessemer.orchestration.run_directory import RunDirectory

__all__ = ["quickstart"]

_SIZE = 32


def quickstart(
    data: Annotated[
        str,
        typer.Argument(
            help="`digits` (scikit-learn's handwritten digits, no download), or a folder or archive "
            "(tar, tar.xz, tar.zst, zip) of class/name.jpg|png."
        ),
    ] = "digits",
    job: Annotated[
        Path | None,
        typer.Option(
            help="Job file that is trained. Default: jobs/quickstart.yaml for digits, jobs/quickstart-images.yaml else."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Directory that holds the runs.")] = Path("runs"),
    datasets: Annotated[Path, typer.Option(help="Directory that holds packed data sets.")] = Path("datasets"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the job. Repeatable."),
    ] = None,
) -> None:
    """Pack a data set, train a small BigGAN on it with two workers, and show what came out.

    On two cores digits take less than ten minutes, images of your own about fifteen. Prints where the report, the
    sample grid, the run and its MLflow page are. The last line gives the first metric of the job before and after
    training.
    """
    from bessemer.cli.train import say_where, train_run
    from bessemer.orchestration.preflight import preflight, with_absolute_paths
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.spec.load import load_job

    job = job or Path("jobs") / ("quickstart.yaml" if data == "digits" else "quickstart-images.yaml")
    packed = datasets / Path(data).name.split(".")[0]
    spec = with_absolute_paths(load_job(job, [f"data.path={packed}", *(set_ or ())]))
    say_where(spec)
    _pack(data, packed)
    preflight(spec, runs)
    run = RunDirectory.create(runs, spec)
    train_run(run)
    _summary(run)


def _pack(data: str, packed: Path) -> None:
    """Pack `data` unless an earlier quickstart did.

    Raises:
        DataError: another source was packed there.
    """
    from bessemer.cli.data import pack
    from bessemer.data.manifest import MANIFEST, Manifest
    from bessemer.errors import DataError

    if (packed / MANIFEST).is_file():
        source = Manifest.load(packed).packing.source
        if Path(source).resolve() != Path(data).resolve():
            raise DataError(f"{packed}: was packed from {source}, not {data}; delete it, or name another --datasets.")
        typer.echo(f"data set {packed} is there already; delete it to pack it anew", err=True)
        return
    pack(data, packed, size=_SIZE, mode="RGB")


def _summary(run: RunDirectory) -> None:
    from bessemer.errors import EvaluationError
    from bessemer.tracking.journal import read_journal
    from bessemer.tracking.mlflow_store import how_to_open

    spec = run.job()
    records = read_journal(run.path / "journal.jsonl")
    grids = [r["path"] for r in records if r["kind"] == "samples"]
    lines = [
        ("report", _relative(run.path / "report.html")),
        ("samples", _relative(run.path / grids[-1]) if grids else "none"),
        ("run", _relative(run.path)),
    ]
    if spec.tracking.mlflow:
        lines.append(("MLflow", how_to_open(spec.tracking.uri, _relative(run.runs_root))))
    for name, value in lines:
        typer.echo(f"{name:8} {value}")
    if not spec.evaluation.metrics:
        raise EvaluationError("evaluation.metrics: is empty, so there is nothing to compare; set kid_efflite0.")
    metric = spec.evaluation.metrics[0]
    values = [r["value"] for r in records if r["kind"] == "evaluation" and r["metric"] == metric]
    typer.echo(f"quickstart ok: {metric} {values[0]:.3f} -> {values[-1]:.3f}, report {lines[0][1]}")


def _relative(path: Path) -> str:
    """As a person would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
