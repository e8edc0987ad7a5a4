"""The report: run folders in, one self-contained HTML page out, the same bytes for the same sources."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from tailrace.harness.errors import InputError
from tailrace.harness.records.store import RunFolder
from tailrace.reports.aftermath import ACCOUNT_HEADINGS, RECOVERY_HEADINGS, accounts, recoveries
from tailrace.reports.answers import RATIO_HEADINGS, answers, conditions, device_note, kicker, question, ratios, verdict
from tailrace.reports.by_model import MODEL_HEADINGS, by_model
from tailrace.reports.columns import COLUMNS, fields
from tailrace.reports.contestants import profiles
from tailrace.reports.defaults import defaults
from tailrace.reports.evidence import CellView, RunView, view
from tailrace.reports.figures.cold_start import cold_start
from tailrace.reports.figures.drawing import DASHES, Key
from tailrace.reports.figures.frontier import frontier, frontiers
from tailrace.reports.figures.knobs import knobs
from tailrace.reports.figures.memory import headroom, memory_curves
from tailrace.reports.figures.recovery import recovery_curves
from tailrace.reports.figures.tail import latency
from tailrace.reports.figures.timeline import timelines
from tailrace.reports.gate import GATE_HEADINGS, gated
from tailrace.reports.multiplexing import MULTIPLEXING_HEADINGS, PREDICTION_HEADINGS, multiplexing, words
from tailrace.reports.page import render, write_page
from tailrace.reports.pipelines import PRICE_HEADINGS, STAGE_HEADINGS, pipelines
from tailrace.reports.reproduce import Portable, reproduce
from tailrace.reports.ruler import HEADINGS, ruler
from tailrace.reports.text import NOTHING, count, listing

FAILURES_PER_CELL = 5

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
"""Markers for legends, as paths in a box of 28 × 12, in the order of :data:`~tailrace.reports.figures.drawing.MARKERS`."""


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
    script = (files("tailrace.reports") / "report.js").read_text(encoding="utf-8")
    races = frontiers(cells)
    shared = multiplexing(views)
    return render(
        "report.html.j2",
        title=question(views),
        kicker=kicker(views),
        answers=answers(views),
        verdict=verdict(views),
        differences=conditions(views),
        gated=gated(views),
        gate_headings=GATE_HEADINGS,
        defaults=defaults(cells),
        pipelines=pipelines(cells),
        price_headings=PRICE_HEADINGS,
        multiplexing=shared,
        multiplexing_words=words(shared) if shared else (),
        multiplexing_headings=MULTIPLEXING_HEADINGS,
        prediction_headings=PREDICTION_HEADINGS,
        memory_curves=memory_curves(shared) if shared else (),
        headroom=headroom(shared.headroom) if shared else None,
        stage_headings=STAGE_HEADINGS,
        ruler=ruler(views),
        ruler_headings=HEADINGS,
        profiles=profiles(views),
        device_note=device_note(views),
        all_emulated=bool(cells) and all(cell.summary.emulated for cell in cells),
        cells=cells,
        best={cell.key for group in races for cell in group.best if len(group.cells) > 1},
        columns=COLUMNS,
        column_groups=[(name, len(list(group))) for name, group in itertools.groupby(c.group for c in COLUMNS)],
        fields=fields,
        ratios=ratios(views),
        ratio_headings=RATIO_HEADINGS,
        models=by_model(cells),
        model_headings=MODEL_HEADINGS,
        failures=_failures(cells),
        tails=latency(cells),
        frontiers=frontier(races),
        knob_maps=knobs(cells),
        timelines=timelines(cells),
        timeline_keys=_timeline_keys(cells),
        recoveries=recoveries(cells),
        recovery_curves=recovery_curves(cells),
        recovery_headings=RECOVERY_HEADINGS,
        account_headings=ACCOUNT_HEADINGS,
        accounts=accounts(cells),
        cold=cold_start(cells),
        cold_hits=_cold_hits(cells),
        warnings=_warnings(views),
        reproductions=[reproduce(run) for run in views],
        dashes=["none" if dash == "-" else " ".join(str(2 * part) for part in dash[1]) for dash in DASHES],
        markers=MARKER_SHAPES,
        script=Markup(script),  # noqa: S704 - our own file
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
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


def _cold_hits(cells: Sequence[CellView]) -> str:
    """Whether the load ever met a replica that had not answered before; nothing where that is not known."""
    known = {cell.label: [t.cold_copies_hit for t in cell.trials if t.cold_copies_hit is not None] for cell in cells}
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
            for warning in trial.facts.warnings:
                told.setdefault(portable(warning), []).append(where)
    return [
        (first + (f" and {count(len(rest), 'more trial')}" if rest else ""), text)
        for text, (first, *rest) in told.items()
    ]
