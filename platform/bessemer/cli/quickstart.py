"""`bessemer quickstart`: the whole path once, on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    job: Annotated[Path, typer.Option(help="Job file that is trained.")] = Path("jobs/quickstart.yaml"),
    runs: Annotated[Path, typer.Option(help="Directory that holds the runs.")] = Path("runs"),
    datasets: Annotated[Path, typer.Option(help="Directory that holds packed data sets.")] = Path("datasets"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the job. Repeatable."),
    ] = None,
) -> None:
    """Pack a data set, train a small BigGAN on it with two workers, and show what came out.

    Prints where the report, the sample grid, the run and its MLflow page are. The last line gives the first
    metric of the job before and after training.
    """
    from bessemer.cli.train import train_run
    from bessemer.orchestration.launch import preflight, with_absolute_paths
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.spec.load import load_job

    packed = datasets / Path(data).name.split(".")[0]
    spec = with_absolute_paths(load_job(job, [f"data.path={packed}", *(set_ or ())]))
    _pack(data, packed)
    preflight(spec, runs)
    run = RunDirectory.create(runs, spec)
    train_run(run)
    _summary(run)


def _pack(data: str, packed: Path) -> None:
    """Pack `data` unless an earlier quickstart did."""
    if (packed / "manifest.json").is_file():
        typer.echo(f"data set {packed} is there already; delete it to pack it anew", err=True)
        return
    from bessemer.cli.data import pack

    pack(data, packed, size=_SIZE, mode="RGB")


def _summary(run: object) -> None:
    from bessemer.errors import EvaluationError
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.tracking.journal import read_journal
    from bessemer.tracking.mlflow_store import resolve_uri, ui_command

    assert isinstance(run, RunDirectory)
    spec = run.job()
    records = read_journal(run.path / "journal.jsonl")
    grids = [r["path"] for r in records if r["kind"] == "samples"]
    lines = [
        ("report", str(run.path / "report.html")),
        ("samples", str(run.path / grids[-1]) if grids else "none"),
        ("run", str(run.path)),
    ]
    if spec.tracking.mlflow:
        lines.append(("MLflow", ui_command(resolve_uri(spec.tracking.uri, run.runs_root))))
    for name, value in lines:
        typer.echo(f"{name:8} {value}")
    if not spec.evaluation.metrics:
        raise EvaluationError("evaluation.metrics: is empty, so there is nothing to compare; set kid_efflite0.")
    metric = spec.evaluation.metrics[0]
    values = [r["value"] for r in records if r["kind"] == "evaluation" and r["metric"] == metric]
    report = _relative(run.path / "report.html")
    typer.echo(f"quickstart ok: {metric} {values[0]:.3f} -> {values[-1]:.3f}, report {report}")


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
