"""What the terminal shows: a live line per trial on stderr, tables on stdout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tailrace.harness.analysis.aftermath import fault_sentence
from tailrace.harness.analysis.summary import Summary
from tailrace.harness.contract.adapter import Adapter
from tailrace.harness.contract.observations import TOPICS
from tailrace.harness.plan.cells import TrialPlan
from tailrace.harness.plan.fault_kinds import FAULT_KINDS
from tailrace.harness.quantities import milliseconds
from tailrace.harness.replay.driver import Progress as ReplayProgress
from tailrace.harness.run.observer import Observer

VERDICT_STYLES = {"VALID": "green", "INVALID": "bold red", "UNKNOWN": "yellow"}


def _share(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{math.floor(value * 1000) / 10:.1f}%"  # 99.97 % is not 100 %


class _Live(ProgressColumn):
    """Live rate and p99 of the trial that runs."""

    def render(self, task: Task) -> Text:
        live: ReplayProgress | None = task.fields.get("live")
        if live is None:
            return Text("")
        failed = f", {live.failed} failed" if live.failed else ""
        p99 = "–" if live.p99_ms is None else milliseconds(live.p99_ms)
        return Text(f"{live.rate_rps:.0f}/s, p99 {p99} ms{failed}")


class ConsoleObserver(Observer):
    """Progress bars with live rate and p99 on a terminal; plain lines where stderr is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Live(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._label = ""
        self._before_s = 0.0

    def __enter__(self) -> ConsoleObserver:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def trial_begins(self, plan: TrialPlan, position: int, count: int, duration_s: float) -> None:
        self._label = f"[{position}/{count}] {plan.cell.adapter}, {plan.cell.scenario.name}, trial {plan.number}"
        self._task = self._progress.add_task(self._label, total=duration_s, live=None)
        if not self._console.is_terminal:
            self.note(f"{self._label}: {duration_s:.0f} s of traffic")

    def stage(self, plan: TrialPlan, name: str) -> None:
        self._progress.update(self._task, description=f"{self._label}: {name}")

    def progress(self, plan: TrialPlan, progress: ReplayProgress) -> None:
        task = self._progress.tasks[self._progress.task_ids.index(self._task)] if self._task is not None else None
        if task is not None and task.total is not None:
            if progress.t_s < 0:
                self._before_s = max(self._before_s, -progress.t_s)
            completed = min(task.total, max(0.0, progress.t_s + self._before_s))
            self._progress.update(self._task, completed=completed, live=progress)

    def trial_ends(self, plan: TrialPlan, summary: Summary) -> None:
        self._progress.remove_task(self._task)
        self._before_s = 0.0
        line = Text(f"{self._label}: ")
        line.append(summary["verdict"], style=VERDICT_STYLES[summary["verdict"]])
        line.append(
            f", {summary['reasons'][0]['text']}"
            if not summary["arrivals"] and summary["reasons"]
            else f", {summary['goodput_rps']:.1f} good of {summary['offered_rps']:.1f} offered/s, "
            f"p50 {milliseconds(summary['p50_ms'])} ms, p99 {milliseconds(summary['p99_ms'])} ms"
        )
        self._console.print(line, soft_wrap=True)


_TABLE_WIDTH = 150
_OPTIMISTIC = "†"
"""Beside an interval that takes the arrivals of a trial as independent."""


def print_summary(summary: Summary, console: Console) -> None:
    """The cells of a run as a table (on a narrow terminal one block per cell), then the reasons and remedies of whatever
    is not VALID, and what faults did."""
    cells = [_figures(cell) for cell in summary["cells"]]
    if any(cell["emulated"] for cell in summary["cells"]):
        console.print(Text("emulated accelerator: not a real device", style="yellow"))
    if console.width >= _TABLE_WIDTH:
        table = Table()
        for number, heading in enumerate(cells[0] if cells else ()):
            table.add_column(heading, justify="left" if number < 2 else "right")
        for figures in cells:
            table.add_row(*(_styled(value) for value in figures.values()))
        console.print(table)
    else:
        for figures in cells:
            block = Table(show_header=False)
            for heading, value in figures.items():
                block.add_row(heading, _styled(value))
            console.print(block)
    if any(cell["p99_ci_ms"] and cell["p99_ci_ms_source"] == "within-trial" for cell in summary["cells"]):
        console.print(Text(f"{_OPTIMISTIC} within trials, as if arrivals were independent: optimistic", style="dim"))
    for line in comparison_lines(summary["comparisons"]):
        console.print(Text(line), soft_wrap=True)
    for trial in summary["trials"]:
        for reason in trial["reasons"]:
            console.print(
                Text(f"{trial['trial']}: {reason['code']}: {reason['text']}. Remedy: {reason['remedy']}."),
                soft_wrap=True,
            )
        for fault in trial["faults"]:
            console.print(Text(f"{trial['trial']}: {fault_sentence(fault)}"), soft_wrap=True)


def _figures(cell: Summary) -> dict[str, str]:
    """One cell as headings and values for reading."""
    interval = cell["p99_ci_ms"]
    return {
        "adapter": cell["adapter"],
        "scenario": cell["scenario"],
        "trials": str(cell["trials"]),
        "offered/s": f"{cell['offered_rps']:.1f}",
        "goodput/s/device": f"{cell['goodput_rps_per_device']:.1f}",
        "p50 ms": milliseconds(cell["p50_ms"]),
        "p99 ms": milliseconds(cell["p99_ms"]),
        "p99 95% interval": "–"
        if interval is None
        else " – ".join(milliseconds(end) for end in interval)
        + (f" {_OPTIMISTIC}" if cell["p99_ci_ms_source"] == "within-trial" else ""),
        "within SLO": _share(cell["slo_attainment"]),
        "shed": str(cell["shed"]),
        "failed": str(cell["errors"] + cell["timeouts"] + cell["connection_errors"] + cell["dropped"]),
        "device used": _share(cell["utilization"]),
        "cold start s": "–" if cell["cold_start_s"] is None else f"{cell['cold_start_s']:.1f}",
        "verdict": cell["verdict"],
    }


_FIGURE_WORDS = {"p99_ms": "p99", "p50_ms": "p50", "goodput_rps_per_device": "goodput"}


def comparison_lines(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the adapters are to each other: a line for every two under the same scenario, or a single one where there are
    too few blocks for any interval."""
    if comparisons and not any(told["interval"] for told in comparisons):
        reasons = list(dict.fromkeys(told["reason"] for told in comparisons))
        return [f"no adapter was shown to differ from another: {'; '.join(reasons)}"]
    lines: dict[str, list[str]] = {}
    for told in comparisons:
        pair = f"{told['scenario']}: {told['first']} ÷ {told['second']} ({told['blocks']} blocks)"
        words = f"{_FIGURE_WORDS[told['figure']]} "
        if told["interval"]:
            low, high = told["interval"]
            words += f"{told['ratio']:.3f} [{low:.3f}, {high:.3f}] "
        reason = f" ({told['reason']})" if told["reason"] else ""
        lines.setdefault(pair, []).append(f"{words}{told['verdict']}{reason}")
    return [f"{pair}: {'; '.join(words)}" for pair, words in lines.items()]


def _styled(value: str) -> Text:
    return Text(value, style=VERDICT_STYLES.get(value, ""))


def print_adapter(adapter: Adapter, observed: Mapping[str, Any] | None, console: Console) -> None:
    """One adapter as a table: what it claims, beside each axis what this machine showed, and where each knob lands."""
    table = Table(title=Text(f"{adapter.name}: {adapter.title} ({adapter.homepage})"), title_justify="left", width=118)
    table.add_column("", no_wrap=True)
    table.add_column("")
    table.add_row("protocols", ", ".join(adapter.protocols))
    table.add_row("capabilities", ", ".join(adapter.capabilities()) or "none beyond deploy and stop")
    seen: dict[str, list[str]] = {}
    for observation in (observed or {}).get("observations", ()):
        seen.setdefault(observation["axis"], []).append(observation["text"])
    for axis, title in TOPICS.items():
        for claim in filter(None, [adapter.traits.get(axis)]):
            table.add_row(title, Text(claim))
        for number, text in enumerate(seen.get(axis, ())):
            heading = "" if number or axis in adapter.traits else title
            table.add_row(heading, Text(f"seen here: {text}", style="cyan"))
    if observed is None:
        table.add_row("seen here", Text(f"nothing yet: run `nox -s contract -- --adapter {adapter.name}`", style="dim"))
    else:
        table.add_row("seen", f"{observed['seen_at']}, on Python {observed['python']}")
    if adapter.exposes:
        table.add_row("exposes", Text(adapter.exposes, style="yellow"))
    for knob, native in adapter.knobs.items():
        table.add_row(knob, Text(native))
    for knob, reason in adapter.refused.items():
        table.add_row(knob, Text(f"refused: {reason}", style="yellow"))
    for metric, reason in adapter.approximate.items():
        table.add_row(metric, Text(f"approximate: {reason}", style="yellow"))
    for name, field in adapter.Options.model_fields.items():
        table.add_row(f"option {name}", Text(f"{field.description or ''} (default {field.default!r})"))
    console.print(table)


def print_ceiling(content: Mapping[str, Any], console: Console) -> None:
    """What the bare model can, and beside it what races reached of that."""
    if content["device"] == "emulated":
        console.print(Text("emulated accelerator: not a real device", style="yellow"))
    how = ", compiled" if content["compiled"] else ""
    console.print(Text(f"{content['workload']} with no server, on {content['device']} in {content['precision']}{how}"))
    table = Table()
    for heading in ("batch", "copies", "items/s", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right")
    for one in content["ceilings"]:
        figures = (f"{one[key]:.2f}" for key in ("items_per_s", "p50_ms", "p99_ms"))
        table.add_row(str(one["batch"]), str(one["instances"]), *figures)
    console.print(table)
    if not content["cells"]:
        return
    table = Table()
    for heading in ("cell", "batch", "copies", "goodput/s", "of the bare model's"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for cell in content["cells"]:
        reached = f"{cell['goodput_rps']:.2f}", f"{cell['of_ceiling']:.0%}"
        table.add_row(Text(cell["cell"]), str(cell["batch"]), str(cell["instances"]), *reached)
    console.print(table)
    console.print(Text("a share below what was offered is the framework's overhead", style="dim"))
    if any(cell["of_ceiling"] > 1 for cell in content["cells"]):
        warning = (
            "more than the bare model can: the machine was busier now than in the race; measure again on a quiet one"
        )
        console.print(Text(warning, style="yellow"))


def print_coldstart(record: Mapping[str, Any], console: Console) -> None:
    """The phases of cold starts and the penalty of the first request, a line for each adapter."""
    from tailrace.harness.run.coldstart import MODES, PHASES

    if record["emulated"]:
        console.print(Text("emulated accelerator: not a real device", style="yellow"))
    console.print(Text(MODES[record["mode"]], style="dim"))
    phases = PHASES[record["mode"]]
    table = Table()
    table.add_column("adapter")
    headings = ("starts", *(f"{words} s" for words in phases.values()), "in all s", "first request ms", "warm ms")
    for heading in (*headings, "ratio", "warm after", "lied s"):
        table.add_column(heading, justify="right")
    for name, summary in record["summary"].items():
        figures: list[str] = []
        if summary["done"]:
            phases_s = [*(summary["phases"][key] for key in phases), summary["since_start"]["first_answer_s"]]
            requests = [summary[key] for key in ("first_request_ms", "warm_request_ms", "first_request_ratio")]
            figures = [_spread(told, ".3f") for told in phases_s] + [_spread(told, ".2f") for told in requests]
            figures += [_spread(summary["warm_after_requests"], "g"), _spread(summary["lied_s"], ".3f")]
        table.add_row(name, f"{summary['done']} of {summary['trials']}", *figures)
    console.print(table)
    console.print(Text("median; least to greatest; [95% interval of the median] from six starts on", style="dim"))
    notes = {f"{trial['adapter']}: {note}": None for trial in record["trials"] for note in trial.get("notes", ())}
    for told in notes:
        console.print(Text(told), soft_wrap=True)


def _spread(told: Mapping[str, Any], shape: str) -> str:
    lines = [f"{told['median']:{shape}}", f"{told['min']:{shape}} to {told['max']:{shape}}"]
    if told["interval"]:
        lines.append(f"[{told['interval'][0]:{shape}}, {told['interval'][1]:{shape}}]")
    return "\n".join(lines)


def print_faults(matrix: Mapping[str, Mapping[str, str | None]], console: Console) -> None:
    """Kinds of faults against adapters; reasons below the table."""
    table = Table()
    table.add_column("fault", no_wrap=True)
    table.add_column("what it does, and its parameters")
    for name in matrix:
        table.add_column(name, justify="center", no_wrap=True)
    reasons: list[str] = []
    for kind, fault in FAULT_KINDS.items():
        marks = []
        for name, refusals in matrix.items():
            reason = refusals[kind]
            if reason is not None:
                reasons.append(f"{kind} on {name}: {reason}")
            marks.append(Text("yes", "green") if reason is None else Text(f"no ({len(reasons)})", "yellow"))
        parameters = ", ".join(f"{name} ({value:g})" for name, value in fault.defaults.items())
        table.add_row(kind, Text(fault.does + (f": {parameters}" if parameters else "")), *marks)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(Text(f"({number}) {reason}"), soft_wrap=True)
