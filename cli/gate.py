"""What is typed: ``tailrace gate`` and ``tailrace baseline``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tailrace.cli.terminal import TableOrJson, stderr, stdout
from tailrace.harness.errors import EXIT_INVALID, InputError

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

baseline_app = typer.Typer(
    help="Baselines: save what the gate needs of a run, small enough to commit.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Option("--folder", help="Where baselines are saved.")]
DEFAULT_FOLDER = Path("baselines")


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
    folder: Folder = DEFAULT_FOLDER,
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
        _print(_plan_report(baseline, candidate, rows, effect, power), form)
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
    _print(_gate_report(baseline, candidate, decision, taken), form)
    if code := EXIT_CODES[taken]:
        raise typer.Exit(code)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders or saved baselines; each is set beside the first.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the report of all of them here too; of run folders only."),
    ] = None,
    folder: Folder = DEFAULT_FOLDER,
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
    _print(_side_by_side_report(runs[0], rows, told, figures), form)
    if output is not None:
        path = write([RunFolder.open(Path(name)) for name in runs], output)
        if form is GateFormat.TABLE:
            typer.echo(path.resolve())


# ---------------------------------------------------------------- what is told


@dataclass
class _Report:
    """A title, a table and sentences below it; and all of that for machines."""

    title: str
    headings: Sequence[str]
    content: Any
    style: str = "bold"
    rows: list[list[str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def _print(report: _Report, form: GateFormat) -> None:
    if form is GateFormat.JSON:
        typer.echo(json.dumps(report.content, indent=1, allow_nan=False))
    elif form is GateFormat.MD:
        typer.echo(_markdown(report))
    else:
        console = stdout()
        console.print(Text(report.title, style=report.style), soft_wrap=True)
        table = Table()
        for number, heading in enumerate(report.headings):
            table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold")
        for row in report.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for line in report.lines:
            console.print(Text(f"- {line}"), soft_wrap=True)


def _markdown(report: _Report) -> str:
    from tailrace.reports.text import markdown_safe, markdown_table

    lines = [f"- {markdown_safe(line)}" for line in report.lines]
    table = markdown_table(report.headings, report.rows)
    return "\n".join([f"### {markdown_safe(report.title)}", "", *table, *(["", *lines] if lines else [])])


def _gate_report(baseline: str, candidate: str, decision: Decision, taken: GateVerdict) -> _Report:
    """``taken`` is what the verdict is taken for, which makes the exit code."""
    from tailrace.harness.analysis.summary import jsonable

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
    headings = ("cell", "rule", "candidate ÷ baseline", "95 % interval", "noise", "trials", "arrivals", "verdict")
    title = f"{WORDS[decision.verdict]}: {candidate} against {baseline}"
    report = _Report(title, headings, jsonable(content), STYLES[decision.verdict])
    if taken != decision.verdict:
        report.lines.append(f"taken for a {taken}: --inconclusive {taken}")
    for finding in decision.findings:
        found = finding.against
        report.rows.append(
            [
                finding.cell,
                str(finding.rule),
                _ratio(found.ratio),
                "–" if found.interval is None else f"[{_ratio(found.interval[0])}, {_ratio(found.interval[1])}]",
                _noise(found.noise),
                "{1} against {0}".format(*finding.trials),
                {True: "the same", False: "others", None: "–"}[found.paired],
                WORDS[finding.verdict],
            ]
        )
        if finding.reason is not None:
            report.lines.append(f"{finding.cell}, {finding.rule}: {finding.reason}{_settled(finding)}")
    report.lines += [f"changed: {line}" for line in decision.changed]
    report.lines += [f"different conditions, allowed: {line}" for line in decision.allowed]
    report.lines += decision.notes
    return report


def _side_by_side_report(first: str, rows: Sequence[Beside], told: Sequence[str], figures: Sequence[str]) -> _Report:
    from tailrace.harness.analysis.summary import jsonable

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
    report = _Report(f"÷ {first}, with 95 % intervals", ("cell", "run", "trials", *figures), jsonable(content))
    for row in rows:
        values = [_with_interval(found) for found in row.ratios.values()]
        report.rows.append([row.cell, row.run, "{1} beside {0}".format(*row.trials), *values])
        reasons = {found.reason: None for found in row.ratios.values() if found.reason is not None}
        report.lines += [f"{row.cell}, {row.run}: {reason}" for reason in reasons]
    report.lines += told
    return report


def _with_interval(found: Against) -> str:
    if found.ratio is None:
        return "–"
    ends = "" if found.interval is None else f" [{_ratio(found.interval[0])}, {_ratio(found.interval[1])}]"
    return f"{_ratio(found.ratio)}{ends}"


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


def _ratio(value: float | None) -> str:
    return "–" if value is None else "∞" if math.isinf(value) else f"{value:.3f}"


def _noise(value: float | None) -> str:
    return "–" if value is None else f"{math.expm1(value):.1%}"


def _plan_report(baseline: str, again: str | None, planned: Sequence[Planned], effect: float, power: float) -> _Report:
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
    headings = (
        *("cell", "rule", "trials", "noise", f"catch {effect - 1:.0%} with as many"),
        *(f"trials to catch it at {power:.0%}", "to pass without change", "trials needed"),
    )
    noise = baseline if again is None else f"{again} against {baseline}"
    report = _Report(f"trials that each rule takes, by the noise of {noise}", headings, content)
    for row in planned:
        counts = (row.to_catch, row.to_pass, row.needed)
        told = ["–" if row.noise is None else "> 1000" if count is None else str(count) for count in counts]
        now = "–" if row.power_now is None else f"{row.power_now:.0%}"
        report.rows.append([row.cell, str(row.rule), str(row.trials), _noise(row.noise), now, *told])
        if row.reason is not None:
            report.lines.append(f"{row.cell}, {row.rule}: {row.reason}: no noise is known")
    return report


# ---------------------------------------------------------------- baselines


@baseline_app.command(name="save")
def baseline_save(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    name: Annotated[str, typer.Argument(help="A name that is not taken.")],
    folder: Folder = DEFAULT_FOLDER,
) -> None:
    """Save what the gate needs of a run. A saved baseline never changes; prints its file."""
    from tailrace.gate.baselines import load, save
    from tailrace.harness.analysis.comparison import MIN_TRIALS
    from tailrace.harness.records.store import RunFolder

    path = save(RunFolder.open(run), name, folder)
    if few := [cell for cell, saved in load(path).cells.items() if len(saved.trials) < MIN_TRIALS]:
        stderr().print(
            Text(f"fewer than {MIN_TRIALS} trials of {', '.join(few)}: no rule can be settled against that"),
            soft_wrap=True,
        )
    typer.echo(path)


@baseline_app.command(name="list")
def baseline_list(
    folder: Folder = DEFAULT_FOLDER,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
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
    if form is TableOrJson.JSON:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table()
    for heading in ("name", "run", "started", "cells and their trials"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], "–", "–", Text(row["error"], style="bold red"))
        else:
            told = ", ".join(f"{cell} {count}" for cell, count in row["trials"].items())
            table.add_row(row["name"], Text(row["run"]), Text(row["started_at"]), Text(told))
    stdout().print(table)


@baseline_app.command(name="show")
def baseline_show(
    name: Annotated[str, typer.Argument(help="A saved baseline's name or path, or a run folder.")],
    folder: Folder = DEFAULT_FOLDER,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
) -> None:
    """Show a baseline: conditions, and every trial's figures that the default rules look at."""
    from tailrace.gate.baselines import find
    from tailrace.gate.rules import DEFAULT_RULES, parse_rules

    content = find(name, folder)
    if form is TableOrJson.JSON:
        typer.echo(json.dumps(content.content(), indent=1, allow_nan=False))
        return
    console = stdout()
    figures = [rule.figure for rule in parse_rules(DEFAULT_RULES)]
    table = Table()
    for heading in ("cell", "trial", *figures, "verdict"):
        table.add_column(heading, justify="left" if heading in ("cell", "verdict") else "right")
    for cell, told in content.cells.items():
        for trial in told.trials:
            values = ("not claimed" if trial.figures[key] is None else f"{trial.figures[key]:.4g}" for key in figures)
            table.add_row(cell, str(trial.number), *values, trial.verdict)
    console.print(Text(f"{content.run}, {content.started_at}", style="bold"))
    console.print(table)
    for cell, told in content.cells.items():
        for condition, value in told.conditions.items():
            console.print(Text(f"{cell}: {condition} {json.dumps(value)}", style="dim"), soft_wrap=True)
