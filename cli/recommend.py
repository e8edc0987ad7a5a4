"""What is typed: ``tailrace recommend``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tailrace.cli.show import Form, Points, TableOrJson, show


def recommend(
    run: Annotated[
        Path, typer.Argument(help="A run of the frameworks that are to choose from, on your model and traffic.")
    ],
    need: Annotated[
        list[str] | None,
        typer.Option(help="hosted, scale-to-zero, canary, python-pipeline or one-model; may be given again."),
    ] = None,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Say which framework to take, why, and what the second choice would cost.

    First what decides before any figure does (--need), then the figures of the run: within its objective, then goodput per
    device where its interval settles it, then p99.
    """
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.records.store import RunFolder
    from tailrace.harness.run.registry import all_adapters
    from tailrace.tuner.recommend import recommend as decide

    answer = decide(summarise(RunFolder.open(run)), all_adapters(), need or [])
    framework = Text(answer.framework or "nothing that was measured", style="bold")
    show(form, asdict(answer), [framework, Points(answer.reasons)])
