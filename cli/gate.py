"""What is typed: ``tailrace gate`` and ``tailrace compare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.options import BASELINES, Baselines
from tailrace.cli.show import Points, Sheet, note, sheet, show
from tailrace.harness.errors import InputError, StorageError
from tailrace.harness.quantities import figure

if TYPE_CHECKING:
    from tailrace.gate.decision import Beside, GateVerdict, Planned
    from tailrace.gate.ratios import Against
    from tailrace.gate.rules import Rule

STYLES: dict[GateVerdict, str] = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "invalid": "bold red"}


class GateFormat(StrEnum):
    """Forms of `tailrace gate`."""

    TABLE = "table"
    JSON = "json"
    MD = "md"


class Taken(StrEnum):
    """What an inconclusive gate is taken for."""

    PASS = "pass"  # noqa: S105  # no password
    FAIL = "fail"


def gate(
    baseline: Annotated[str, typer.Argument(help="A run folder, or a saved baseline's name or path.")],
    candidate: Annotated[
        str | None, typer.Argument(help="The same. With --plan: a second run of the same thing.")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'FIGURE <= RATIO'",
            help="What candidate ÷ baseline of a figure may be; may be given again. Left out: "
            "p99_ms <= 1.10 and goodput_rps_per_device >= 0.95.",
        ),
    ] = None,
    inconclusive: Annotated[Taken | None, typer.Option(help="Take it for a pass or a fail.")] = None,
    allow_different: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="Conditions that need not be the same in both.")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Take UNKNOWN trials for INVALID ones.")] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Judge nothing: say how many trials each rule takes, by the noise of BASELINE."),
    ] = False,
    effect: Annotated[
        float, typer.Option(min=1.0, max=100.0, help="--plan: the regression to catch, as a factor.")
    ] = 1.15,
    power: Annotated[float, typer.Option(min=0.01, max=0.999, help="--plan: how surely.")] = 0.9,
    folder: Baselines = BASELINES,
    form: Annotated[GateFormat, typer.Option("--format", help="table, json or md.")] = GateFormat.TABLE,
) -> None:
    """Say whether CANDIDATE is worse than BASELINE: exit code 0 pass, 4 regression, 5 inconclusive, 3 INVALID trials.

    A rule fails only where the whole 95 % interval of candidate ÷ baseline lies beyond it, and passes only where the whole
    interval lies within. docs/gate.md.
    """
    from tailrace.gate.baselines import find
    from tailrace.gate.decision import decide
    from tailrace.gate.decision import plan as planned
    from tailrace.gate.judgement import COLUMNS, WORDS, Judgement, keep
    from tailrace.gate.rules import DEFAULT_RULES, parse_rules
    from tailrace.harness.records.store import RunFolder

    rules = parse_rules(rule or DEFAULT_RULES)
    if plan:
        if allow_different or inconclusive or strict:
            raise InputError(
                "--plan judges nothing: --allow-different, --inconclusive and --strict have no place beside it",
                remedy="leave them out; a second run shows the noise where both were measured alike",
            )
        again = None if candidate is None else find(candidate, folder)
        rows = planned(find(baseline, folder), rules, again, effect=effect, wanted=power)
        _show_plan(form, baseline, candidate, rows, effect, power)
        return
    if candidate is None:
        raise InputError(
            "Missing argument CANDIDATE", remedy=f"tailrace gate {baseline} RUN; or --plan, which judges nothing"
        )
    decision = decide(
        find(baseline, folder),
        find(candidate, folder),
        rules,
        allow_different=[name.strip() for name in allow_different.split(",") if name.strip()],
        strict=strict,
    )
    taken = decision.verdict
    if taken == "inconclusive" and inconclusive is not None:
        taken = "pass" if inconclusive is Taken.PASS else "fail"
    judgement = Judgement.of(baseline, candidate, decision, taken)
    if (Path(candidate) / "manifest.json").is_file():
        try:
            keep(judgement, RunFolder.open(Path(candidate)))
        except StorageError as error:
            note(f"the run's report will not show this: {error.message}")
    title = Text(f"{WORDS[judgement.verdict]}: {candidate} against {baseline}", style=STYLES[judgement.verdict])
    table = sheet(judgement.findings, COLUMNS, words=2)
    show(form, judgement.model_dump(), [title, table, Points(judgement.points)])
    if judgement.exit_code:
        raise typer.Exit(judgement.exit_code)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders or saved baselines; each is set beside the first.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the report of all of them here too; of run folders only."),
    ] = None,
    folder: Baselines = BASELINES,
    form: Annotated[GateFormat, typer.Option("--format", help="table, json or md.")] = GateFormat.TABLE,
) -> None:
    """Set runs side by side: what each is to the first, as ratios with their 95 % intervals, and what else differs.

    Nothing is judged: tailrace gate does that. Pairs and intervals are those of the gate (docs/gate.md).
    """
    from tailrace.gate.baselines import find
    from tailrace.gate.decision import side_by_side
    from tailrace.harness.analysis.comparison import FIGURES
    from tailrace.harness.records.store import RunFolder
    from tailrace.reports.report import write

    if len(set(runs)) < 2:
        raise InputError("there is nothing to compare with", remedy="give two runs or more")
    figures = list(FIGURES)
    rows, told = side_by_side({name: find(name, folder) for name in runs}, figures)
    _show_side_by_side(form, runs[0], rows, told, figures)
    if output is not None:
        path = write([RunFolder.open(Path(name)) for name in runs], output)
        if form is GateFormat.TABLE:
            typer.echo(path.resolve())


# ---------------------------------------------------------------- what is told


def _show_side_by_side(
    form: GateFormat, first: str, rows: Sequence[Beside], told: Sequence[str], figures: Sequence[str]
) -> None:
    content = {
        "first": first,
        "cells": [
            {
                "cell": row.cell,
                "run": row.run,
                "trials": row.trials,
                **{figure: asdict(found) for figure, found in row.ratios.items()},
            }
            for row in rows
        ],
        "different": told,
    }
    lines = [
        (row.cell, row.run, "{1} beside {0}".format(*row.trials), *map(_with_interval, row.ratios.values()))
        for row in rows
    ]
    reasons = {
        f"{row.cell}, {row.run}: {found.reason}": None
        for row in rows
        for found in row.ratios.values()
        if found.reason is not None
    }
    title = Text(f"÷ {first}, with 95 % intervals", style="bold")
    table = Sheet(("cell", "run", "trials", *figures), lines, words=2)
    show(form, content, [title, table, Points([*reasons, *told])])


def _with_interval(found: Against) -> str:
    from tailrace.gate.judgement import interval_words

    return f"{figure(found.ratio, '.3f')} {interval_words(found.interval)}".rstrip()


def _rule(rule: Rule) -> dict[str, Any]:
    return {"rule": str(rule), "figure": rule.figure, "bound": rule.bound}


def _show_plan(
    form: GateFormat, baseline: str, again: str | None, planned: Sequence[Planned], effect: float, power: float
) -> None:
    from tailrace.gate.judgement import noise_words

    content = {
        "baseline": baseline,
        "again": again,
        "effect": effect,
        "power": power,
        "rules": [
            {
                "cell": row.cell,
                **_rule(row.rule),
                "trials": row.trials,
                "noise": row.noise,
                "power_now": row.power_now,
                "trials_to_catch": row.to_catch,
                "trials_to_pass": row.to_pass,
                "trials_needed": row.needed,
                "reason": row.reason,
            }
            for row in planned
        ],
    }

    def count(row: Planned, number: int | None) -> str:
        return figure(None) if row.noise is None else "> 1000" if number is None else str(number)

    columns: dict[str, Callable[[Planned], str]] = {
        "cell": lambda row: row.cell,
        "rule": lambda row: str(row.rule),
        "trials": lambda row: str(row.trials),
        "noise": lambda row: noise_words(row.noise),
        f"catch {effect - 1:.0%} with as many": lambda row: figure(row.power_now, ".0%"),
        f"trials to catch it at {power:.0%}": lambda row: count(row, row.to_catch),
        "to pass without change": lambda row: count(row, row.to_pass),
        "trials needed": lambda row: count(row, row.needed),
    }
    noise = baseline if again is None else f"{again} against {baseline}"
    title = Text(f"trials that each rule takes, by the noise of {noise}", style="bold")
    lines = [f"{row.cell}, {row.rule}: {row.reason}: no noise is known" for row in planned if row.reason is not None]
    show(form, content, [title, sheet(planned, columns, words=2), Points(lines)])
