"""`bessemer extractors`: networks whose features metrics compare, and their weights."""

from __future__ import annotations

from typing import Annotated

import typer

from bessemer.evaluation.names import EXTRACTORS

__all__ = ["app", "get", "list_extractors"]

app = typer.Typer(help="Show the extractors of metrics; fetch their weights.", no_args_is_help=True)


@app.callback()
def _extractors() -> None:
    """Show the extractors of metrics; fetch their weights."""


@app.command("list")
def list_extractors(json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the extractors, and which have their weights on this machine."""
    from bessemer.cli.output import echo_json, table
    from bessemer.errors import EvaluationError
    from bessemer.evaluation.extractors import get_extractor

    rows = []
    for name, meaning in EXTRACTORS.items():
        row: dict[str, object] = {
            "name": name,
            "meaning": meaning,
            "dimension": None,
            "weights_sha256": None,
            "missing": None,
        }
        try:
            extractor = get_extractor(name)
        except EvaluationError as e:
            row["missing"] = str(e)
        else:
            row |= {"dimension": extractor.dimension or None, "weights_sha256": extractor.weights_sha256}
        rows.append(row)
    if json:
        echo_json(rows)
        return
    table(
        ("extractor", "dimension", "weights", "what it is"),
        [
            (
                row["name"],
                row["dimension"],
                "missing" if row["missing"] else str(row["weights_sha256"] or "none")[:12],
                row["meaning"],
            )
            for row in rows
        ],
    )


@app.command()
def get(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="inception, inception-pytorch, or vgg16 and lpips, which go together.")
    ],
    source: Annotated[
        str | None, typer.Option(help="Another address of the same file, such as a mirror or file:///...")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print name, file and sha256 as JSON.")] = False,
) -> None:
    """Download published weights into the cache, whole and with the right hash or not at all.

    Nothing else ever downloads weights. Several processes may ask at once: one downloads.
    """
    from bessemer.cli.output import echo_json
    from bessemer.evaluation.weights import check_weights, fetch

    path = fetch(name, source)
    if json:
        echo_json({"name": name, "file": path, "sha256": check_weights(name, path)})
    else:
        typer.echo(path)
