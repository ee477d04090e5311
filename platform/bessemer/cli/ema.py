"""`bessemer ema`: averages of the weights besides the one that a run samples from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.locate import RunArgument, run_directory

__all__ = ["app"]

app = typer.Typer(name="ema", help="Averages of the weights, of any width, after the run.", no_args_is_help=True)


@app.callback()
def _ema() -> None:
    pass


@app.command(short_help="Make an average of any width from those that a run stored.")
def reconstruct(
    run: RunArgument,
    sigma_rel: Annotated[
        float, typer.Option("--sigma-rel", min=0.01, max=0.28, help="Width of the average as a share of the run.")
    ],
    at: Annotated[float | None, typer.Option(help="Moment in kimg, a stored one. Default: the last.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Snapshot directory to write.")] = Path("snapshot"),
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Reconstruct a power-function average and write it as a snapshot, for `bessemer sample RUN --snapshot OUT`.

    The run must have stored averages (ema.profiles in its job). The residual says how far the reconstructed profile is
    from the wanted one, as a share of its length: well below 0.1 is good; widths between the stored ones do best.
    """
    from dataclasses import replace

    from bessemer.cli.output import echo_json
    from bessemer.errors import MachineError
    from bessemer.evaluation.sampling import recompute_batch_norm
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.systems.snapshot import is_snapshot, sampled_state, save_snapshot, system_of
    from bessemer.training.ema_store import reconstruct as reconstruct_average

    directory = RunDirectory.open(run_directory(run))
    job = directory.job()
    if out.exists() and not is_snapshot(out):
        raise MachineError(f"{out}: exists and is no snapshot, so it is not replaced; choose another place with --out.")
    found = reconstruct_average(directory.path / "ema", sigma_rel, None if at is None else round(at * 1000))
    for reason in found.skipped:
        typer.echo(f"left out: {reason}", err=True)
    tensors, made = found.tensors, found.info
    if job.ema.batch_norm == "recomputed":
        system = system_of(made, tensors)
        recompute_batch_norm(system, made.class_counts, seed=job.seed, device="cpu")
        tensors, made = sampled_state(system), replace(made, ema={**made.ema, "batch_norm": "recomputed"})
    try:
        info = save_snapshot(out.absolute(), tensors, made)
    except OSError as e:
        raise MachineError(f"{out}: cannot be written ({e.strerror}); choose another place with --out.") from None
    if json:
        echo_json({"path": out, "nimg": info.nimg, **info.ema, "weights_sha256": info.weights_sha256})
        return
    typer.echo(
        f"{out}: sigma_rel {sigma_rel:g} at {info.nimg / 1000:g} kimg from {info.ema['reconstructed_from']} stored "
        f"averages, residual {info.ema['residual']:g}"
    )
