"""`bessemer doctor`: what this machine has, lacks, and the command that mends it."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["doctor"]

_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "missing": typer.colors.RED}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine: versions, devices, memory, disk, ports, extractors, and how to get what is missing.

    Ends with exit code 1 when something that Bessemer needs is missing; warnings alone end with 0.
    """
    from dataclasses import asdict

    from bessemer.cli.checks import CHECKS, Finding
    from bessemer.cli.output import echo_json

    findings: list[Finding] = []
    for check in CHECKS:
        for finding in check():
            findings.append(finding)
            if not json:
                _show(finding.state, finding.name, finding.found, finding.fix)
    missing = sum(finding.state == "missing" for finding in findings)
    warnings = sum(finding.state == "warn" for finding in findings)
    if json:
        echo_json({"ok": not missing, "findings": [asdict(finding) for finding in findings]})
    else:
        typer.echo(f"{len(findings)} checks: {missing} missing, {warnings} warnings")
    raise typer.Exit(1 if missing else 0)


def _show(state: str, name: str, found: str, fix: str | None) -> None:
    typer.echo(f"{typer.style(state.ljust(7), fg=_COLOURS[state])}  {name:<32}  {found}")
    if fix:
        typer.echo(f"{'':<7}  {'':<32}  fix: {fix}")
