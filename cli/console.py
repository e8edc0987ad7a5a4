"""A run on the terminal: a live line for the trial that goes on, and the figures of all in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from tailrace.cli.show import EMULATED, Part, read, sheet
from tailrace.harness.analysis.aftermath import fault_sentence
from tailrace.harness.quantities import figure, milliseconds, percent
from tailrace.harness.run.observer import Observer

if TYPE_CHECKING:
    from rich.console import Console

    from tailrace.harness.plan.cells import TrialPlan
    from tailrace.harness.records.summary import CellSummary, Comparison, RunSummary, TrialSummary
    from tailrace.harness.replay.driver import Progress as ReplayProgress

_VERDICT_STYLES = {"VALID": "green", "INVALID": "bold red", "UNKNOWN": "yellow"}


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
        read(self._console, Text(text, style="dim"))

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

    def trial_ends(self, plan: TrialPlan, summary: TrialSummary) -> None:
        self._progress.remove_task(self._task)
        self._before_s = 0.0
        line = Text(f"{self._label}: ")
        line.append(verdict(summary.verdict))
        line.append(
            f", {summary.reasons[0].text}"
            if not summary.arrivals and summary.reasons
            else f", {summary.goodput_rps:.1f} good of {summary.offered_rps:.1f} offered/s, "
            f"p50 {milliseconds(summary.p50_ms)} ms, p99 {milliseconds(summary.p99_ms)} ms"
        )
        read(self._console, line)


_WIDTH = 150
_OPTIMISTIC = "†"
"""Beside an interval that takes the arrivals of a trial as independent."""


def summary_parts(summary: RunSummary) -> Iterator[Part]:
    """The cells of a run as a table, then the reasons and remedies of whatever is not VALID, and what faults did."""
    cells = summary.cells
    if any(cell.emulated for cell in cells):
        yield EMULATED
    yield sheet(cells, _COLUMNS, words=2, width=_WIDTH)
    if any(cell.p99_ci_ms and cell.p99_ci_ms_source == "within-trial" for cell in cells):
        yield Text(f"{_OPTIMISTIC} within trials, as if arrivals were independent: optimistic", style="dim")
    yield from comparison_lines(summary.comparisons)
    for trial in summary.trials:
        for reason in trial.reasons:
            yield f"{trial.trial}: {reason.code}: {reason.text}. Remedy: {reason.remedy}."
        for fault in trial.faults:
            yield f"{trial.trial}: {fault_sentence(fault)}"


def verdict(word: str) -> Text:
    """A verdict in its colour."""
    return Text(word, style=_VERDICT_STYLES[word])


def _interval(cell: CellSummary) -> str:
    ends = cell.p99_ci_ms
    mark = f" {_OPTIMISTIC}" if cell.p99_ci_ms_source == "within-trial" else ""
    return figure(None) if ends is None else " – ".join(map(milliseconds, ends)) + mark


_COLUMNS: dict[str, Callable[[CellSummary], str | Text]] = {
    "adapter": lambda cell: cell.adapter,
    "scenario": lambda cell: cell.scenario,
    "trials": lambda cell: str(cell.trials),
    "offered/s": lambda cell: figure(cell.offered_rps, ".1f"),
    "goodput/s/device": lambda cell: figure(cell.goodput_rps_per_device, ".1f"),
    "p50 ms": lambda cell: milliseconds(cell.p50_ms),
    "p99 ms": lambda cell: milliseconds(cell.p99_ms),
    "p99 95% interval": _interval,
    "within SLO": lambda cell: percent(cell.slo_attainment),
    "shed": lambda cell: str(cell.shed),
    "failed": lambda cell: str(cell.errors + cell.timeouts + cell.connection_errors + cell.dropped),
    "device used": lambda cell: percent(cell.utilization),
    "cold start s": lambda cell: figure(cell.cold_start_s, ".1f"),
    "verdict": lambda cell: verdict(cell.verdict),
}
"""One cell as headings and values for reading."""


_FIGURE_WORDS = {"p99_ms": "p99", "p50_ms": "p50", "goodput_rps_per_device": "goodput"}


def comparison_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """What the adapters are to each other: a line for every two under the same scenario, or a single one where there are
    too few blocks for any interval."""
    if comparisons and not any(told.interval for told in comparisons):
        reasons = list(dict.fromkeys(told.reason for told in comparisons if told.reason))
        return [f"no adapter was shown to differ from another: {'; '.join(reasons)}"]
    lines: dict[str, list[str]] = {}
    for told in comparisons:
        pair = f"{told.scenario}: {told.first} ÷ {told.second} ({told.blocks} blocks)"
        words = f"{_FIGURE_WORDS[told.figure]} "
        if told.interval:
            low, high = told.interval
            words += f"{told.ratio:.3f} [{low:.3f}, {high:.3f}] "
        reason = f" ({told.reason})" if told.reason else ""
        lines.setdefault(pair, []).append(f"{words}{told.verdict}{reason}")
    return [f"{pair}: {'; '.join(words)}" for pair, words in lines.items()]
