"""What is typed: ``tailrace doctor`` and ``tailrace clean``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from tailrace.cli.show import read, sheet, stdout


def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="What `device: cuda` needs, in its place.")] = False,
) -> None:
    """Say what this machine lacks, and the command that mends it."""
    from tailrace.cli.doctor import Finding, examine
    from tailrace.cli.gpu_doctor import examine_gpus

    def mark(finding: Finding) -> Text:
        return Text("ok", "green") if finding.ok else Text("missing" if finding.needed else "optional", "yellow")

    findings = examine_gpus() if gpu else examine()
    columns = {
        "": mark,
        "what": lambda finding: finding.what,
        "found": lambda finding: finding.found,
        "remedy": lambda finding: "" if finding.ok else finding.remedy,
    }
    read(stdout(), sheet(findings, columns, words=4))
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(1)


def clean() -> None:
    """End processes and containers and remove files that a crashed run left; runs in progress are not touched."""
    from tailrace.harness.servers.guardian import sweep

    read(stdout(), *(sweep() or ["nothing to clean"]))
