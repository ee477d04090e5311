"""`bessemer schema`: the JSON Schema of job files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["schema"]


def schema(
    out: Annotated[
        Path | None, typer.Option("--out", help="Write to this file instead of the terminal.", dir_okay=False)
    ] = None,
) -> None:
    """Print the JSON Schema of job files: every field, its type, default and meaning.

    Editors complete and check job files with it: put `# yaml-language-server: $schema=job.schema.json`
    on the first line of a job and write the schema beside it.
    """
    import json

    from bessemer.cli.output import echo_json, write_text
    from bessemer.spec.load import job_schema

    if out is None:
        echo_json(job_schema())
    else:
        write_text(out, json.dumps(job_schema(), indent=2) + "\n")
        typer.echo(str(out))
