"""The command line: one thin file per verb group."""

__all__ = ["main"]


def main() -> None:
    """Entry point of the `bessemer` command."""
    from bessemer.cli.app import run

    run()
