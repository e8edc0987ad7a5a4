"""The report: run folders in, one self-contained HTML page out, the same bytes for the same sources."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from harness.errors import InputError, StorageError
from harness.store import RunFolder
from harness.summary import Summary
from reports import figures
from reports.columns import COLUMNS, fields
from reports.conditions import differences
from reports.evidence import CellView, RunView, view
from reports.figures import DASHES, Key
from reports.headline import Headline, headline
from reports.reproduce import Portable, reproduce
from reports.svg import palette_css
from reports.text import NOTHING, count, humanly, listing, milliseconds, printable, quantity, seconds, share, tied

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
    page = build(runs)
    staged = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8", newline="\n") as handle:
            handle.write(page)
            handle.flush()
            os.fsync(handle.fileno())
        staged.replace(path)
    except OSError as error:
        raise StorageError.of(path, error) from error
    return path


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
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (files("reports") / name).read_text(encoding="utf-8")),
    )
    environment.filters["tied"] = tied
    page = environment.get_template("report.html.j2").render(
        title=_question(views),
        kicker=_kicker(views),
        answers=[_Answer(run.label, _own_question(run, views), headline(run)) for run in views],
        verdict=_verdict(views),
        differences=differences([(run.title, cell.conditions) for run in views for cell in run.cells]),
        device_note=_device_note(views),
        all_emulated=bool(cells) and all(cell.summary["emulated"] for cell in cells),
        cells=cells,
        best={cell.key for group in frontiers for cell in group.best if len(group.cells) > 1},
        columns=COLUMNS,
        column_groups=[(name, len(list(group))) for name, group in itertools.groupby(c.group for c in COLUMNS)],
        fields=fields,
        failures=_failures(cells),
        tails=figures.latency(cells),
        frontiers=figures.frontier(frontiers),
        timelines=figures.timelines(cells),
        timeline_keys=_timeline_keys(cells),
        recoveries=_recoveries(cells),
        cold=figures.cold_start(cells),
        warnings=_warnings(views),
        reproductions=[reproduce(run) for run in views],
        dashes=["none" if dash == "-" else " ".join(str(2 * part) for part in dash[1]) for dash in DASHES],
        markers=MARKER_SHAPES,
        style=Markup(_stylesheet()),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return printable(page)


def _stylesheet() -> str:
    sheet = (files("reports") / "report.css").read_text(encoding="utf-8")
    dark = f"@media screen and (prefers-color-scheme: dark){{:root{{{palette_css(dark=True)}}}}}"
    return f":root{{{palette_css(dark=False)}}}\n{dark}\n{sheet}"


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


def _recoveries(cells: Sequence[CellView]) -> list[tuple[str, ...]]:
    return [
        (cell.label, _number(trial), *_recovery(fault))
        for cell in cells
        for trial in cell.trials
        for fault in trial["faults"]
    ]


def _number(trial: Summary) -> str:
    return f"no. {trial['number']}" + ("" if trial["state"] == "done" else ", not finished")


def _recovery(fault: dict[str, Any]) -> tuple[str, ...]:
    kind = humanly(str(fault.get("kind", "fault"))) + (f" {fault['target']}" if fault.get("target") else "")
    told = fault["recovery"]
    if told is None:
        return (kind, f"planned {seconds(fault.get('at_s'))}", *[NOTHING] * 3, "not injected", *[NOTHING] * 2)
    took = told["recovery_s"]
    empty = math.isnan(told["dip_attainment"])
    recovered = "held" if took == 0 else seconds(took) if took is not None else "not recovered"
    return (
        kind,
        quantity(fault["injected_s"], "s", digits=4),
        share(told["baseline_attainment"]),
        share(told["dip_attainment"]),
        f"{told['lost']:,}",
        "no arrivals to tell" if empty else recovered,
        NOTHING if empty or took is None else seconds(told["relapse_s"]),
        milliseconds(told["outage_p99_ms"]),
    )


def _timeline_keys(cells: Sequence[CellView]) -> list[Key]:
    slots = list(dict.fromkeys(cell.slot for cell in cells if cell.evidence is not None))
    keys = [Key("offered"), Key("goodput and all else, in the framework's colour", slots[0] if slots else None, "area")]
    keys.append(Key("objective", kind="objective"))
    if any(cell.faults for cell in cells):
        keys.append(Key("from a fault to its recovery", kind="window"))
    return keys


def _warnings(views: Sequence[RunView]) -> list[tuple[str, str]]:
    told = []
    for run in views:
        portable = Portable(run.folder)
        for trial in run.folder.trials:
            where = f"{trial.id}{' in ' + run.label if run.label else ''}"
            for warning in trial.facts.get("warnings") or []:
                text = warning if isinstance(warning, str) else _warning_text(warning)
                told.append((where, portable(text)))
    return told


def _warning_text(warning: Any) -> str:
    if not isinstance(warning, dict):
        return str(warning)
    remedy = f" Remedy: {warning['remedy']}" if warning.get("remedy") else ""
    return f"{warning.get('message') or warning.get('text') or warning}{remedy}"
