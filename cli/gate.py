"""What is typed: ``tailrace gate`` and ``tailrace compare``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.options import BASELINES, Baselines
from tailrace.cli.show import Points, Sheet, sheet, show
from tailrace.harness.errors import EXIT_INVALID, InputError
from tailrace.harness.quantities import figure

if TYPE_CHECKING:
    from tailrace.gate.decision import Beside, Decision, Finding, GateVerdict, Planned
    from tailrace.gate.ratios import Against
    from tailrace.gate.rules import Rule

EXIT_CODES: dict[GateVerdict, int] = {"pass": 0, "invalid": EXIT_INVALID, "fail": 4, "inconclusive": 5}
WORDS: dict[GateVerdict, str] = {
    "pass": "pass",
    "fail": "REGRESSION",
    "inconclusive": "inconclusive",
    "invalid": "INVALID",
}
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
    from tailrace.gate.rules import DEFAULT_RULES, parse_rules

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
    _show_decision(form, baseline, candidate, decision, taken)
    if code := EXIT_CODES[taken]:
        raise typer.Exit(code)


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


def _show_decision(form: GateFormat, baseline: str, candidate: str, decision: Decision, taken: GateVerdict) -> None:
    """``taken`` is what the verdict is taken for, which makes the exit code."""
    content = {
        "baseline": baseline,
        "candidate": candidate,
        "verdict": decision.verdict,
        "exit_code": EXIT_CODES[taken],
        "findings": [_finding(finding) for finding in decision.findings],
        "allowed": decision.allowed,
        "changed": decision.changed,
        "notes": decision.notes,
    }
    columns: dict[str, Callable[[Finding], str]] = {
        "cell": lambda finding: finding.cell,
        "rule": lambda finding: str(finding.rule),
        "candidate ÷ baseline": lambda finding: figure(finding.against.ratio, ".3f"),
        "95 % interval": lambda finding: _interval(finding.against) or figure(None),
        "noise": lambda finding: _noise(finding.against.noise),
        "trials": lambda finding: "{1} against {0}".format(*finding.trials),
        "arrivals": lambda finding: {True: "the same", False: "others", None: "–"}[finding.against.paired],
        "verdict": lambda finding: WORDS[finding.verdict],
    }
    title = Text(f"{WORDS[decision.verdict]}: {candidate} against {baseline}", style=STYLES[decision.verdict])
    lines = [f"taken for a {taken}: --inconclusive {taken}"] if taken != decision.verdict else []
    lines += [
        f"{finding.cell}, {finding.rule}: {finding.reason}{_settled(finding)}"
        for finding in decision.findings
        if finding.reason is not None
    ]
    lines += [f"changed: {line}" for line in decision.changed]
    lines += [f"different conditions, allowed: {line}" for line in decision.allowed]
    show(form, content, [title, sheet(decision.findings, columns, words=2), Points([*lines, *decision.notes])])


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
    return f"{figure(found.ratio, '.3f')} {_interval(found)}".rstrip()


def _interval(found: Against) -> str:
    return "" if found.interval is None else f"[{', '.join(figure(end, '.3f') for end in found.interval)}]"


def _settled(finding: Finding) -> str:
    """What would settle it, where the ratio is known."""
    ratio = finding.against.ratio
    if ratio is None:
        return ""
    count = "more than a thousand" if finding.trials_needed is None else f"about {finding.trials_needed}"
    return f"; {count} trials of each run would settle it, if the ratio is {ratio:.3f}"


def _finding(finding: Finding) -> dict[str, Any]:
    found = finding.against
    return {
        "cell": finding.cell,
        **_rule(finding.rule),
        "verdict": finding.verdict,
        "ratio": found.ratio,
        "interval": found.interval,
        "noise": found.noise,
        "paired": found.paired,
        "method": found.method,
        "baseline_trials": finding.trials[0],
        "candidate_trials": finding.trials[1],
        "reason": finding.reason,
        "trials_needed": finding.trials_needed,
    }


def _rule(rule: Rule) -> dict[str, Any]:
    return {"rule": str(rule), "figure": rule.figure, "bound": rule.bound}


def _noise(value: float | None) -> str:
    return figure(None if value is None else math.expm1(value), ".1%")


def _show_plan(
    form: GateFormat, baseline: str, again: str | None, planned: Sequence[Planned], effect: float, power: float
) -> None:
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
        "noise": lambda row: _noise(row.noise),
        f"catch {effect - 1:.0%} with as many": lambda row: figure(row.power_now, ".0%"),
        f"trials to catch it at {power:.0%}": lambda row: count(row, row.to_catch),
        "to pass without change": lambda row: count(row, row.to_pass),
        "trials needed": lambda row: count(row, row.needed),
    }
    noise = baseline if again is None else f"{again} against {baseline}"
    title = Text(f"trials that each rule takes, by the noise of {noise}", style="bold")
    lines = [f"{row.cell}, {row.rule}: {row.reason}: no noise is known" for row in planned if row.reason is not None]
    show(form, content, [title, sheet(planned, columns, words=2), Points(lines)])
