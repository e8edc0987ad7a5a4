"""What a report says before any figure, in whatever form it comes: question, answers, what is not VALID, who is what to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailrace.harness.analysis.comparison import FIGURES
from tailrace.harness.records.summary import Comparison
from tailrace.reports.conditions import differences
from tailrace.reports.contestants import left_out
from tailrace.reports.evidence import RunView
from tailrace.reports.headline import Headline, headline
from tailrace.reports.reproduce import Portable
from tailrace.reports.text import count, interval, listing, milliseconds, significant

RATIO_HEADINGS = ("Pair", "Blocks", "p99", "p50", "Goodput per device")
REASONS_SHOWN = 1
"""Per code and remedy; the rest is folded away."""


@dataclass(frozen=True)
class RunAnswer:
    """What one run found."""

    label: str
    question: str
    headline: Headline


def answers(views: Sequence[RunView]) -> list[RunAnswer]:
    """What each run found, and what it asks where others ask something else."""
    same = len({_asked(run) for run in views}) == 1
    return [RunAnswer(run.label, "" if same else _asked(run), headline(run)) for run in views]


def conditions(views: Sequence[RunView]) -> list[str]:
    """In what the runs are not alike, and what frameworks run without: a sentence each."""
    told = [(run.title, cell.conditions) for run in views for cell in run.cells]
    return [*differences(told), *left_out(views)]


def _asked(run: RunView) -> str:
    return str(run.manifest["experiment"].get("question") or "")


def question(views: Sequence[RunView]) -> str:
    """What all runs ask; else what they are called."""
    questions = {_asked(run) for run in views}
    if len(questions) == 1 and (question := questions.pop()):
        return question
    return listing([run.title for run in views]) if len(views) <= 4 else f"{len(views)} runs side by side"


def kicker(views: Sequence[RunView]) -> list[str]:
    """Workload, trace, device and objective, as far as all runs agree."""
    if len(views) == 1:
        told = views[0].manifest.get("workload") or {}
        trace = views[0].manifest.get("trace") or {}
        parts = [str(views[0].title), str(told.get("title") or ""), str(trace.get("name") or "")]
    else:
        parts = [count(len(views), "run")]
    cells = [cell.summary for run in views for cell in run.cells]
    if len({(c.devices, c.device) for c in cells}) == 1:
        parts.append(count(cells[0].devices, f"{cells[0].device} device"))
    if len({c.slo_ms for c in cells}) == 1:
        parts.append(f"objective {milliseconds(cells[0].slo_ms)}")
    return [part for part in parts if part]


def device_note(views: Sequence[RunView]) -> str:
    """What was emulated; nothing where nothing was."""
    emulated = [cell for run in views for cell in run.cells if cell.summary.emulated]
    if not emulated:
        return ""
    everything = all(cell.summary.emulated for run in views for cell in run.cells)
    extent = "Every figure here comes" if everything else "The figures marked so come"
    return (
        f"{extent} from an emulated accelerator, which sleeps where a device would compute. Servers, queues, batches, "
        "failures and recoveries are real; milliseconds and requests per second say nothing about any GPU."
    )


@dataclass(frozen=True)
class Reason:
    """Why trials are not VALID: the first of them, and more of the same."""

    code: str
    where: str
    text: str
    remedy: str
    more: tuple[str, ...]
    details: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OverallVerdict:
    """How far the trials of all runs can be trusted."""

    word: str
    sentence: str
    reasons: tuple[Reason, ...]


_VERDICTS = ("VALID", "UNKNOWN", "INVALID")


def verdict_counts(verdicts: Sequence[str]) -> str:
    """``2 VALID, 1 UNKNOWN``; empty without trials."""
    numbers = {word: verdicts.count(word) for word in _VERDICTS}
    return ", ".join(f"{number} {word}" for word, number in numbers.items() if number)


def verdict(views: Sequence[RunView]) -> OverallVerdict:
    """The verdict over all trials, with its reasons."""
    trials = [trial for run in views for trial in run.summary.trials]
    planned = sum(run.summary.planned_trials for run in views)
    word = max((run.summary.verdict for run in views), key=_VERDICTS.index)
    if trials and all(trial.verdict == "VALID" for trial in trials):
        told = ["The only trial is valid" if len(trials) == 1 else f"All {count(len(trials), 'trial')} are valid"]
    else:
        told = [f"{verdict_counts([trial.verdict for trial in trials])} of {count(len(trials), 'trial')}"]
    if planned > len(trials):
        told.append(f"{planned - len(trials)} of {count(planned, 'planned trial')} never began")
    return OverallVerdict(word, "; ".join(told) + ".", reasons(views))


def reasons(views: Sequence[RunView]) -> tuple[Reason, ...]:
    """Reasons with the same code and remedy together, INVALID ones first."""
    groups: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for run in views:
        portable = Portable(run.folder)
        for trial in run.summary.trials:
            error = run.folder.trial(trial.trial).facts.error
            for reason in trial.reasons:
                where = f"{trial.trial}{' in ' + run.label if run.label else ''}"
                detail = portable(error.detail) if error and error.detail and reason.code == "incomplete" else ""
                key = (reason.effect, reason.code, portable(reason.remedy))
                groups.setdefault(key, []).append((where, portable(reason.text), detail))
    return tuple(
        Reason(
            code,
            members[0][0],
            members[0][1],
            remedy,
            tuple(f"{where}: {text}" for where, text, _ in members[REASONS_SHOWN:]),
            tuple((where, detail) for where, _, detail in members if detail),
        )
        for (_, code, remedy), members in sorted(groups.items(), key=lambda item: item[0])
    )


def ratios(views: Sequence[RunView]) -> list[tuple[str, ...]]:
    """A row for every two frameworks under the same scenario of a run: the pair, its blocks, and each figure."""
    rows = []
    for run in views:
        names = {cell.summary.adapter: cell.framework for cell in run.cells}
        called = {cell.summary.scenario: cell.scenario for cell in run.cells}
        pairs: dict[tuple[str, str, str], dict[str, Comparison]] = {}
        for told in run.summary.comparisons:
            pairs.setdefault((told.scenario, told.first, told.second), {})[told.figure] = told
        for (scenario, first, second), figures_of in pairs.items():
            where = " · ".join(
                part for part in (f"{names[first]} ÷ {names[second]}", called[scenario], run.label) if part
            )
            blocks = str(max(told.blocks for told in figures_of.values()))
            rows.append((where, blocks, *(_ratio(figures_of[figure]) for figure in FIGURES)))
    return rows


def _ratio(told: Comparison) -> str:
    value = "" if told.ratio is None else f"{significant(told.ratio)}× {interval(told.interval)}".strip() + ": "
    return f"{value}{told.verdict}" + (f" ({told.reason})" if told.reason else "")
