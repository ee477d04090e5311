"""`bessemer mlflow`: MLflow's page of all runs, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["mlflow"]


def mlflow(
    runs: Annotated[Path, typer.Option(help="Directory that holds the runs.")] = Path("runs"),
    uri: Annotated[
        str, typer.Option(help="MLflow's store: `tracking.uri` of the jobs. A relative sqlite path starts at RUNS.")
    ] = "sqlite:///mlflow.db",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of this machine to serve the page on.")] = 5000,
) -> None:
    """Serve MLflow's page of the runs on this machine, until Ctrl-C.

    Only this machine can open it (it binds to 127.0.0.1). Where `tracking.uri` is an MLflow server already, open
    that instead.
    """
    import os

    from bessemer.tracking.mlflow_store import page_of, server_command, store_to_serve

    command, settings = server_command(store_to_serve(uri, runs), port)
    typer.echo(f"MLflow: {page_of(f'http://127.0.0.1:{port}')}   (Ctrl-C ends it)")
    # In this process's place, so that signals reach the server itself.
    os.execve(command[0], command, {**os.environ, **settings})  # noqa: S606
