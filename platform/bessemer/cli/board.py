"""`bessemer board`: the report of all runs, live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.runs import RootOption

__all__ = ["board"]


def board(
    root: RootOption = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 6006,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any other than this machine's own makes a token necessary.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="BESSEMER_BOARD_TOKEN", help="Token to ask for; made up where one is needed.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show all runs in a browser and keep the page up to date while they train, until Ctrl-C.

    It reads the journals and changes nothing. Choose runs to see their report, side by side.
    """
    from bessemer.errors import MachineError

    try:
        from bessemer.tracking.board import serve
    except ImportError:
        raise MachineError("bessemer board needs Starlette and uvicorn: pip install 'bessemer[board]'") from None

    def ready(address: str) -> None:
        typer.echo(f"board: {address}   (Ctrl-C ends it)")
        if open_page:
            import webbrowser

            webbrowser.open(address)

    serve(root, host, port, token, ready)
