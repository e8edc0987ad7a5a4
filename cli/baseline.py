"""What is typed: ``tailrace baseline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.options import BASELINES, Baselines
from tailrace.cli.show import Form, Sheet, TableOrJson, read, show, stderr
from tailrace.harness.errors import InputError
from tailrace.harness.quantities import figure

baseline_app = typer.Typer(
    help="Baselines: save what the gate needs of a run, small enough to commit.", no_args_is_help=True
)


@baseline_app.command(name="save")
def baseline_save(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    name: Annotated[str, typer.Argument(help="A name that is not taken.")],
    folder: Baselines = BASELINES,
) -> None:
    """Save what the gate needs of a run. A saved baseline never changes; prints its file."""
    from tailrace.gate.baselines import load, save
    from tailrace.harness.analysis.comparison import MIN_TRIALS
    from tailrace.harness.records.store import RunFolder

    path = save(RunFolder.open(run), name, folder)
    if few := [cell for cell, saved in load(path).cells.items() if len(saved.trials) < MIN_TRIALS]:
        read(
            stderr(),
            f"fewer than {MIN_TRIALS} trials of {', '.join(few)}: no rule can be settled against that",
        )
    typer.echo(path)


@baseline_app.command(name="list")
def baseline_list(
    folder: Baselines = BASELINES,
    form: Form = TableOrJson.TABLE,
) -> None:
    """List the saved baselines."""
    from tailrace.gate.baselines import load, saved

    rows: list[dict[str, Any]] = []
    for name, path in saved(folder).items():
        try:
            content = load(path)
        except InputError as error:
            rows.append({"name": name, "error": error.message})
            continue
        trials = {cell: len(told.trials) for cell, told in content.cells.items()}
        rows.append({"name": name, "run": content.run, "started_at": content.started_at, "trials": trials})
    headings = ("name", "run", "started", "cells and their trials")
    show(form, rows, [Sheet(headings, [_line(row) for row in rows], words=4)])


def _line(row: dict[str, Any]) -> tuple[str | Text, ...]:
    if "error" in row:
        return row["name"], figure(None), figure(None), Text(row["error"], style="bold red")
    return row["name"], row["run"], row["started_at"], ", ".join(f"{cell} {n}" for cell, n in row["trials"].items())


@baseline_app.command(name="show")
def baseline_show(
    name: Annotated[str, typer.Argument(help="A saved baseline's name or path, or a run folder.")],
    folder: Baselines = BASELINES,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Show a baseline: conditions, and every trial's figures that the default rules look at."""
    from tailrace.gate.baselines import find
    from tailrace.gate.rules import DEFAULT_RULES, parse_rules

    content = find(name, folder)
    figures = [rule.figure for rule in parse_rules(DEFAULT_RULES)]
    rows = [
        (
            *(cell, str(trial.number)),
            *("not claimed" if trial.figures[key] is None else figure(trial.figures[key], ".4g") for key in figures),
            trial.verdict,
        )
        for cell, told in content.cells.items()
        for trial in told.trials
    ]
    conditions = [
        Text(f"{cell}: {condition} {json.dumps(value)}", style="dim")
        for cell, told in content.cells.items()
        for condition, value in told.conditions.items()
    ]
    title = Text(f"{content.run}, {content.started_at}", style="bold")
    show(form, content.content(), [title, Sheet(("cell", "trial", *figures, "verdict"), rows), *conditions])
