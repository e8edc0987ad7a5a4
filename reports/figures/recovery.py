"""Attainment around a fault, of all cells with that fault."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tailrace.harness.analysis.metrics import Floats
from tailrace.reports import svg
from tailrace.reports.evidence import CellView
from tailrace.reports.figures.drawing import (
    DASHES,
    Figure,
    Key,
    Styles,
    heading,
    percent_axis,
    stamp,
)
from tailrace.reports.text import humanly

_BEFORE_S, _AFTER_S = 5.0, 30.0


def recovery_curves(cells: Sequence[CellView]) -> list[Figure]:
    """For each kind of fault how much of what was offered was good, second by second from the fault on, of every cell with
    that fault and no other."""
    kinds: dict[str, list[CellView]] = {}
    for cell in cells:
        if cell.evidence is not None and cell.comparable and len(cell.faults) == 1 and cell.faults[0].seen:
            kinds.setdefault(cell.faults[0].kind, []).append(cell)
    return [_recovery(kind, members, f"recovery{i}") for i, (kind, members) in enumerate(kinds.items())]


def _recovery(kind: str, cells: Sequence[CellView], name: str) -> Figure:
    styles = Styles.of(cells)
    words = []
    with svg.style():
        canvas = svg.new_figure(240)
        ax = canvas.add_axes((0.105, 0.17, 0.87, 0.70))
        longest = max(since_s[-1] for since_s, _ in map(_since_the_fault, cells)) + 0.5
        ax.set_xlim(-_BEFORE_S, min(longest, _AFTER_S))
        percent_axis(ax)
        ax.axvline(0, color=svg.ALARM, lw=1.2, zorder=1)
        for cell in cells:
            since_s, percent = _since_the_fault(cell)
            colour, dash = svg.colour(cell.slot), DASHES[styles.index(cell) % len(DASHES)]
            (line,) = ax.plot(since_s, percent, color=colour, lw=1.8, ls=dash, drawstyle="steps-mid")
            line.set_gid(f"tip-{name}-{cell.key}")
            after = percent[since_s > 0]
            lowest = f"{np.nanmin(after):.0f} %" if np.isfinite(after).any() else "not known"
            words.append(f"{cell.label}: at the lowest {lowest}; {cell.faults[0].outcome}.")
        ax.set_xlabel("seconds since the fault", labelpad=3)
        heading(canvas, ax, "Good, % of what was offered")
        stamp(canvas, cells)
        tooltips = {f"tip-{name}-{cell.key}": told for cell, told in zip(cells, words, strict=True)}
        alt = f"Recovery from {humanly(kind)}. " + " ".join(words)
        drawn = svg.inline(canvas, name=name, alt=alt, tooltips=tooltips)
    keys = tuple(Key(cell.label, cell.slot, dash=styles.index(cell)) for cell in cells)
    return Figure(humanly(kind), drawn, keys)


def _since_the_fault(cell: CellView) -> tuple[Floats, Floats]:
    """The middle of every second, counted from the fault, and the share that was good in it (per cent; NaN where nothing was
    offered), of the median over trials."""
    if cell.evidence is None:
        raise ValueError("a cell that measured nothing has no curve")
    percent = cell.evidence.attainment.times(100).mid
    since_s: Floats = np.arange(len(percent), dtype=np.float64) + 0.5 - cell.faults[0].from_s
    shown = (since_s >= -_BEFORE_S) & (since_s <= _AFTER_S)
    return since_s[shown], percent[shown]
