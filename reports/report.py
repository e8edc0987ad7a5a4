"""The report: run folders in, one self-contained HTML page out, the same bytes for the same sources."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from harness.comparison import FIGURES
from harness.errors import InputError
from harness.store import RunFolder
from reports import figures
from reports.aftermath import ACCOUNT_HEADINGS, RECOVERY_HEADINGS, accounts, recoveries
from reports.columns import COLUMNS, fields
from reports.conditions import differences
from reports.contestants import left_out, profiles
from reports.defaults import defaults
from reports.evidence import CellView, RunView, view
from reports.figures import DASHES, Key
from reports.headline import Headline, headline
from reports.page import render, write_page
from reports.reproduce import Portable, reproduce
from reports.ruler import HEADINGS, ruler
from reports.text import (
    NOTHING,
    count,
    interval,
    listing,
    milliseconds,
    significant,
)

FAILURES_PER_CELL = 5
REASONS_SHOWN = 1
"""Per code and remedy; the rest is folded away."""

MARKER_SHAPES = (
    "M14 1.5a4.5 4.5 0 1 0 .01 0z",
    "M10 2h8v8h-8z",
    "M14 1l5 9.5h-10z",
    "M14 .5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
    "M14 11l5-9.5h-10z",
    "M12.3 1.5h3.4v2.8h2.8v3.4h-2.8v2.8h-3.4v-2.8h-2.8v-3.4h2.8z",
    "M10 3.5l2-2l2 2l2-2l2 2l-2 2.5l2 2.5l-2 2l-2-2l-2 2l-2-2l2-2.5z",
    "M14 1l4.3 2.5v5l-4.3 2.5l-4.3-2.5v-5z",
)
"""Markers for legends, as paths in a box of 28 × 12, in the order of :data:`reports.figures.MARKERS`."""


def write(runs: Sequence[RunFolder], path: Path) -> Path:
    """Write the report of these runs to ``path``, by rename, and return it. Raises :class:`StorageError`."""
    return write_page(build(runs), path)


def build(runs: Sequence[RunFolder]) -> str:
    """One HTML page for one run, or for several side by side with their cells labelled by run.

    It needs no network and no other file, and holds nothing that changes between two calls on the same sources.
    """
    if not runs:
        raise InputError("a report needs at least one run", remedy="give the folder that `tailrace run` printed")
    views = view(runs)
    cells = [cell for run in views for cell in run.cells]
    script = (files("reports") / "report.js").read_text(encoding="utf-8")
    frontiers = figures.frontiers(cells)
    return render(
        "report.html.j2",
        title=_question(views),
        kicker=_kicker(views),
        answers=[_Answer(run.label, _own_question(run, views), headline(run)) for run in views],
        verdict=_verdict(views),
        differences=differences([(run.title, cell.conditions) for run in views for cell in run.cells])
        + left_out(views),
        defaults=defaults(cells),
        ruler=ruler(views),
        ruler_headings=HEADINGS,
        profiles=profiles(views),
        device_note=_device_note(views),
        all_emulated=bool(cells) and all(cell.summary["emulated"] for cell in cells),
        cells=cells,
        best={cell.key for group in frontiers for cell in group.best if len(group.cells) > 1},
        columns=COLUMNS,
        column_groups=[(name, len(list(group))) for name, group in itertools.groupby(c.group for c in COLUMNS)],
        fields=fields,
        ratios=_ratios(views),
        failures=_failures(cells),
        tails=figures.latency(cells),
        frontiers=figures.frontier(frontiers),
        timelines=figures.timelines(cells),
        timeline_keys=_timeline_keys(cells),
        recoveries=recoveries(cells),
        recovery_headings=RECOVERY_HEADINGS,
        account_headings=ACCOUNT_HEADINGS,
        accounts=accounts(cells),
        cold=figures.cold_start(cells),
        cold_hits=_cold_hits(cells),
        warnings=_warnings(views),
        reproductions=[reproduce(run) for run in views],
        dashes=["none" if dash == "-" else " ".join(str(2 * part) for part in dash[1]) for dash in DASHES],
        markers=MARKER_SHAPES,
        script=Markup(script),  # noqa: S704 - our own file
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


# ---------------------------------------------------------------- top of the page


@dataclass(frozen=True)
class _Answer:
    label: str
    question: str
    headline: Headline


def _asked(run: RunView) -> str:
    return str(run.manifest["experiment"].get("question") or "")


def _question(views: Sequence[RunView]) -> str:
    questions = {_asked(run) for run in views}
    if len(questions) == 1 and (question := questions.pop()):
        return question
    return listing([run.title for run in views]) if len(views) <= 4 else f"{len(views)} runs side by side"


def _own_question(run: RunView, views: Sequence[RunView]) -> str:
    return "" if len({_asked(other) for other in views}) == 1 else _asked(run)


def _kicker(views: Sequence[RunView]) -> list[str]:
    """Workload, trace, device and objective, as far as all runs agree."""
    if len(views) == 1:
        told = views[0].manifest.get("workload") or {}
        trace = views[0].manifest.get("trace") or {}
        parts = [str(views[0].title), str(told.get("title") or ""), str(trace.get("name") or "")]
    else:
        parts = [count(len(views), "run")]
    cells = [cell.summary for run in views for cell in run.cells]
    if len({(c["devices"], c["device"]) for c in cells}) == 1:
        parts.append(count(cells[0]["devices"], f"{cells[0]['device']} device"))
    if len({c["slo_ms"] for c in cells}) == 1:
        parts.append(f"objective {milliseconds(cells[0]['slo_ms'])}")
    return [part for part in parts if part]


def _device_note(views: Sequence[RunView]) -> str:
    emulated = [cell for run in views for cell in run.cells if cell.summary["emulated"]]
    if not emulated:
        return ""
    everything = all(cell.summary["emulated"] for run in views for cell in run.cells)
    extent = "Every figure here comes" if everything else "The figures marked so come"
    return (
        f"{extent} from an emulated accelerator, which sleeps where a device would compute. Servers, queues, batches, "
        "failures and recoveries are real; milliseconds and requests per second say nothing about any GPU."
    )


@dataclass(frozen=True)
class _Reason:
    code: str
    where: str
    text: str
    remedy: str
    more: tuple[str, ...]
    details: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Verdict:
    word: str
    sentence: str
    reasons: tuple[_Reason, ...]


def _verdict(views: Sequence[RunView]) -> _Verdict:
    trials = [trial for run in views for trial in run.summary["trials"]]
    planned = sum(run.summary["planned_trials"] for run in views)
    numbers = {word: sum(t["verdict"] == word for t in trials) for word in ("VALID", "UNKNOWN", "INVALID")}
    word = max((run.summary["verdict"] for run in views), key=list(numbers).index)
    if numbers["VALID"] == len(trials) and trials:
        told = ["The only trial is valid" if len(trials) == 1 else f"All {count(len(trials), 'trial')} are valid"]
    else:
        told = [
            ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
            + f" of {count(len(trials), 'trial')}"
        ]
    if planned > len(trials):
        told.append(f"{planned - len(trials)} of {count(planned, 'planned trial')} never began")
    return _Verdict(word, "; ".join(told) + ".", _reasons(views))


def _reasons(views: Sequence[RunView]) -> tuple[_Reason, ...]:
    """Reasons with the same code and remedy together, INVALID ones first."""
    groups: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for run in views:
        portable = Portable(run.folder)
        for trial in run.summary["trials"]:
            error = run.folder.trial(trial["trial"]).facts.get("error") or {}
            for reason in trial["reasons"]:
                where = f"{trial['trial']}{' in ' + run.label if run.label else ''}"
                detail = portable(str(error.get("detail") or "")) if reason["code"] == "incomplete" else ""
                key = (reason["effect"], reason["code"], portable(str(reason["remedy"])))
                groups.setdefault(key, []).append((where, portable(str(reason["text"])), detail))
    return tuple(
        _Reason(
            code,
            members[0][0],
            members[0][1],
            remedy,
            tuple(f"{where}: {text}" for where, text, _ in members[REASONS_SHOWN:]),
            tuple((where, detail) for where, _, detail in members if detail),
        )
        for (_, code, remedy), members in sorted(groups.items(), key=lambda item: item[0])
    )


# ---------------------------------------------------------------- tables


def _ratios(views: Sequence[RunView]) -> list[tuple[str, ...]]:
    """A row for every two frameworks under the same scenario of a run: the pair, its blocks, and each figure."""
    rows = []
    for run in views:
        names = {cell.summary["adapter"]: cell.framework for cell in run.cells}
        pairs: dict[tuple[str, str, str], dict[str, Any]] = {}
        for told in run.summary["comparisons"]:
            pairs.setdefault((told["scenario"], told["first"], told["second"]), {})[told["figure"]] = told
        for (scenario, first, second), figures_of in pairs.items():
            where = " · ".join(part for part in (f"{names[first]} ÷ {names[second]}", scenario, run.label) if part)
            blocks = str(max(told["blocks"] for told in figures_of.values()))
            rows.append((where, blocks, *(_ratio(figures_of[figure]) for figure in FIGURES)))
    return rows


def _ratio(told: Mapping[str, Any]) -> str:
    value = (
        "" if told["ratio"] is None else f"{significant(told['ratio'])}× {interval(told['interval'])}".strip() + ": "
    )
    return f"{value}{told['verdict']}" + (f" ({told['reason']})" if told["reason"] else "")


def _failures(cells: Sequence[CellView]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for cell in cells:
        for outcome, status, error, number in cell.failures[:FAILURES_PER_CELL]:
            rows.append((cell.label, outcome, status or NOTHING, error or NOTHING, f"{number:,}"))
        rest = cell.failures[FAILURES_PER_CELL:]
        if rest:
            total = sum(number for *_, number in rest)
            rows.append((cell.label, "", "", count(len(rest), "other message"), f"{total:,}"))
    return rows


def _cold_hits(cells: Sequence[CellView]) -> str:
    """Whether the load ever met a replica that had not answered before; nothing where that is not known."""
    known = {
        cell.label: [t["cold_copies_hit"] for t in cell.trials if t["cold_copies_hit"] is not None] for cell in cells
    }
    known = {label: hits for label, hits in known.items() if hits}
    if not known:
        return ""
    hit = [f"{label} ({max(hits)})" for label, hits in known.items() if max(hits)]
    if not hit:
        return "No cold replica was ever hit: every copy of the model that answered in a trace had answered before it began."
    return f"Copies of the model that gave their first answer within a trace, the most in one trial: {listing(hit)}."


def _timeline_keys(cells: Sequence[CellView]) -> list[Key]:
    slots = list(dict.fromkeys(cell.slot for cell in cells if cell.evidence is not None))
    keys = [Key("offered"), Key("goodput and all else, in the framework's colour", slots[0] if slots else None, "area")]
    keys.append(Key("objective", kind="objective"))
    if any(cell.faults for cell in cells):
        keys.append(Key("from a fault until it is healed and recovered from", kind="window"))
    return keys


def _warnings(views: Sequence[RunView]) -> list[tuple[str, str]]:
    """Where and what; the same words of several trials once."""
    told: dict[str, list[str]] = {}
    for run in views:
        portable = Portable(run.folder)
        for trial in run.folder.trials:
            where = f"{trial.id}{' in ' + run.label if run.label else ''}"
            for warning in trial.facts.get("warnings") or []:
                text = warning if isinstance(warning, str) else _warning_text(warning)
                told.setdefault(portable(text), []).append(where)
    return [
        (first + (f" and {count(len(rest), 'more trial')}" if rest else ""), text)
        for text, (first, *rest) in told.items()
    ]


def _warning_text(warning: Any) -> str:
    if not isinstance(warning, dict):
        return str(warning)
    remedy = f" Remedy: {warning['remedy']}" if warning.get("remedy") else ""
    return f"{warning.get('message') or warning.get('text') or warning}{remedy}"
