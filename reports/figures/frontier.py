"""Benefit against p99, one mark per cell, and the cells that nobody beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tailrace.harness.analysis.comparison import MIN_TRIALS
from tailrace.harness.analysis.frontier import frontier_probabilities, non_dominated
from tailrace.harness.analysis.merit import tail_ms
from tailrace.reports import svg
from tailrace.reports.benefits import ATTAINMENT, GOODPUT, Benefit, others
from tailrace.reports.columns import optimistic
from tailrace.reports.conditions import Conditions, distinction
from tailrace.reports.evidence import CellView
from tailrace.reports.figures.drawing import (
    MARKERS,
    MAX_LINES,
    Figure,
    Key,
    LogAxis,
    Styles,
    heading,
    stamp,
)
from tailrace.reports.text import interval, listing, milliseconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_FAINTEST = 0.3
"""How opaque a cell is that is never on the frontier."""
_MENTIONED = 0.025
"""What is less probable than this, or as near to certain, is taken as settled."""


@dataclass(frozen=True)
class Frontier:
    """Cells that were measured under the same conditions, and those of them that nobody beats."""

    title: str
    """What sets the conditions apart from those of other cells; empty when there are no others."""
    cells: tuple[CellView, ...]
    best: tuple[CellView, ...]
    own: tuple[tuple[CellView, ...], ...]
    """Of each framework with several cells those that none of its own beats, where there is another framework."""
    probability: dict[str, float]
    """By key: how probable it is that a cell is on the frontier; empty where the trials do not say."""
    benefit: Benefit = GOODPUT
    """What is set against p99."""


def frontiers(cells: Sequence[CellView]) -> list[Frontier]:
    """The frontier of goodput per device in each group of cells under the same conditions, for only those compare."""
    groups: dict[Conditions, list[CellView]] = {}
    for cell in cells:
        if cell.summary.arrivals > 0:
            groups.setdefault(cell.conditions, []).append(cell)
    return [_group(distinction(conditions, list(groups)), members) for conditions, members in groups.items()]


def _group(title: str, cells: Sequence[CellView], benefit: Benefit = GOODPUT) -> Frontier:
    """Best are the comparable cells with a finite p99 that none of the others beats on both axes."""
    chosen = [c for c in cells if c.comparable and math.isfinite(tail_ms(c.summary))]
    probabilities = frontier_probabilities(
        [
            (
                np.array([trial.p99_ms for trial in cell.repetitions], dtype=np.float64),
                np.array([trial.figure(benefit.key) for trial in cell.repetitions], dtype=np.float64),
            )
            for cell in chosen
        ],
        paired=len({(cell.run, *(trial.number for trial in cell.repetitions)) for cell in chosen}) == 1,
    )
    frameworks: dict[str, list[CellView]] = {}
    for cell in chosen:
        frameworks.setdefault(cell.summary.adapter, []).append(cell)
    several = [own for own in frameworks.values() if len(own) > 1] if len(frameworks) > 1 else []
    return Frontier(
        title,
        tuple(cells),
        _unbeaten(chosen, benefit),
        tuple(_unbeaten(own, benefit) for own in several),
        {cell.key: share for cell, share in zip(chosen, probabilities or [], strict=False)},
        benefit,
    )


def _unbeaten(cells: Sequence[CellView], benefit: Benefit) -> tuple[CellView, ...]:
    on = non_dominated(
        np.array([c.summary.p99_ms for c in cells], dtype=np.float64),
        np.array([benefit.value(c.summary) for c in cells], dtype=np.float64),
    )
    return tuple(cell for cell, member in zip(cells, on, strict=True) if member)


def frontier(groups: Sequence[Frontier]) -> list[Figure]:
    """One figure per group of goodput per device against p99, and one for each other benefit that tells more."""
    told = [each for group in groups for each in (group, *_further(group))]
    return [_frontier(each, f"frontier{i}") for i, each in enumerate(told)]


def _further(group: Frontier) -> list[Frontier]:
    """The same cells by other benefits, without those of which that is not known: INVALID ones alone."""
    found = []
    for benefit in others([cell.summary for cell in group.cells if cell.comparable]):
        title = " · ".join(part for part in (f"{benefit.title} against p99", group.title) if part)
        found.append(_group(title, [cell for cell in group.cells if benefit.known(cell.summary)], benefit))
    return found


def _frontier(group: Frontier, name: str) -> Figure:
    cells, best, benefit = group.cells, group.best, group.benefit
    styles = Styles.of(cells)
    claimed = [cell for cell in cells if cell.summary.p99_ms is not None]
    unclaimed = [cell for cell in cells if cell.summary.p99_ms is None]
    with svg.style():
        canvas = svg.new_figure(320)
        aside = 0.16 if unclaimed and claimed else 0.0
        ax = canvas.add_axes((0.105, 0.17, 0.87 - aside, 0.745))
        ax.grid(True, axis="x")
        ends = [float(cell.summary.slo_ms) for cell in cells]
        for cell in claimed:
            ends += [tail_ms(cell.summary), *(cell.summary.p99_ci_ms or [])]
        infinite = [cell for cell in claimed if math.isinf(tail_ms(cell.summary))]
        scale = LogAxis.fit(
            ax, ends, horizontal=True, most_ticks=6, strip=0.17 if 2 * len(infinite) <= len(claimed) else 0.6
        )
        low, high = _around([end for c in cells for end in (benefit.value(c.summary), *benefit.ends(c.summary))])
        ax.set_ylim(low, min(high, benefit.most))
        for objective in sorted({float(cell.summary.slo_ms) for cell in cells}):
            ax.axvline(objective, color=svg.ALARM, lw=1, ls=(0, (2, 2)), zorder=1.5)
        for own in group.own:
            _staircase(ax, own, benefit, svg.colour(own[0].slot), width=0.8)
        if best:
            _staircase(ax, best, benefit, svg.MUTED, width=1.2)
        for cell in claimed:
            if cell in infinite:
                x = scale.within_strip((infinite.index(cell) + 1) / (len(infinite) + 1))
            else:
                x = tail_ms(cell.summary)
            _point(ax, cell, benefit, x, styles.index(cell), scale, _opacity(group, cell))
        beside = ax if not claimed else canvas.add_axes((0.985 - aside, 0.17, aside, 0.745), sharey=ax) if aside else ax
        if unclaimed:
            _unclaimed(beside, unclaimed, benefit, styles, alone=not claimed)
        heading(canvas, ax, benefit.heading)
        ax.set_xlabel("p99 response time, ms (log scale)", labelpad=3)
        alt = f"{benefit.title} against p99. " + " ".join(_point_words(cell, group) for cell in cells)
        alt += f" On the frontier: {listing([c.label for c in best]) or 'none'}."
        alt += "".join(f" On {own[0].framework}'s own: {listing([c.label for c in own])}." for own in group.own)
        stamp(canvas, cells)
        drawn = svg.inline(
            canvas, name=name, alt=alt, tooltips={f"tip-{cell.key}": _point_words(cell, group) for cell in cells}
        )
    keys = _marker_keys(cells, styles)
    keys += [Key("frontier: nobody is better on both")] if best else []
    keys += [Key("thin, in its colour: a framework's own frontier", group.own[0][0].slot)] if group.own else []
    keys += [Key("objective", kind="objective")]
    return Figure(group.title, drawn, tuple(keys), _frontier_note(group))


def _marker_keys(cells: Sequence[CellView], styles: Styles) -> list[Key]:
    """One entry per cell while they are few, else one per framework and one per scenario."""
    if len(cells) <= MAX_LINES:
        return [Key(cell.label, cell.slot, "marker", marker=styles.index(cell)) for cell in cells]
    frameworks = {cell.summary.adapter: Key(cell.framework, cell.slot, "area") for cell in cells}
    scenarios = {
        styles.index(cell): Key(
            " · ".join(p for p in (cell.scenario, cell.run) if p), None, "marker", 0, styles.index(cell)
        )
        for cell in cells
    }
    return [*frameworks.values(), *scenarios.values()]


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits that hold the values with room to spare: from zero, unless all of them lie in the upper half."""
    low, high = min(values), max(*values, 1e-9)
    if low < 0.5 * high:
        return 0.0, high * 1.08
    room = max(0.3 * (high - low), 0.04 * high)
    return low - room, high + room


def _opacity(group: Frontier, cell: CellView) -> float:
    """The less a cell may be on the frontier, the fainter."""
    probability = group.probability.get(cell.key, 1.0 if cell in group.best or not group.best else 0.0)
    return _FAINTEST + (1 - _FAINTEST) * probability if cell.comparable else 1.0


def _frontier_note(group: Frontier) -> str:
    cells, best = group.cells, group.best
    told = [f"On the frontier: {listing([cell.label for cell in best])}." if best else "No cell is on the frontier."]
    if group.probability:
        unsettled = [
            f"{cell.label} {share(probability)}"
            for cell in cells
            if _MENTIONED < (probability := group.probability.get(cell.key, 0.0)) < 1 - _MENTIONED
        ]
        told.append(
            "The fainter a cell, the less probable it is that its true point is on the frontier"
            + (f"; not settled: {listing(unsettled)}." if unsettled else ".")
        )
    elif len(cells) > 1:
        told.append(f"How sure that is takes {MIN_TRIALS} trials of every cell to say.")
    if any(c.summary.p99_ms == math.inf for c in cells):
        told.append(
            "In the ∞ strip: cells in which more than 1\u202f% of requests failed, so that their p99 has no end."
        )
    if any(c.summary.p99_ms is None for c in cells):
        told.append("Apart: cells with too few arrivals to claim a p99.")
    if any(not c.comparable for c in cells):
        told.append("Hollow: INVALID cells, which cannot be on the frontier.")
    told += [note] if (note := group.benefit.note([cell.summary for cell in cells])) else []
    return " ".join(told)


def _staircase(ax: Axes, best: Sequence[CellView], benefit: Benefit, colour: str, *, width: float) -> None:
    """What can be had: at least this p99 for that benefit."""
    points = sorted((c.summary.p99_ms, benefit.value(c.summary)) for c in best)
    x, y = np.array(points, dtype=np.float64).T
    ax.plot(
        np.r_[x[0], x, ax.get_xlim()[1]],
        np.r_[ax.get_ylim()[0], y, y[-1]],
        color=colour,
        lw=width,
        drawstyle="steps-post",
    )


def _point(ax: Axes, cell: CellView, benefit: Benefit, x: float, style: int, scale: LogAxis, opacity: float) -> None:
    s = cell.summary
    y, colour = benefit.value(s), svg.colour(cell.slot)
    if s.p99_ci_ms and math.isfinite(tail_ms(s)):
        low, high = scale.place(np.array(s.p99_ci_ms, dtype=np.float64))
        ax.plot([low, high], [y, y], color=colour, lw=1.3, alpha=0.8 * opacity)
    if ends := benefit.ends(s):
        ax.plot([x, x], ends, color=colour, lw=1.3, alpha=0.8 * opacity)
    _marker(ax, cell, x, y, style, opacity)


def _marker(ax: Axes, cell: CellView, x: float, y: float, style: int, opacity: float = 1.0) -> None:
    colour = svg.colour(cell.slot)
    (mark,) = ax.plot(
        [x],
        [y],
        MARKERS[style % len(MARKERS)],
        ms=8,
        color=colour,
        mfc=colour if cell.comparable else svg.PAPER,
        mec=svg.PAPER if cell.comparable else colour,
        mew=1,
        alpha=opacity,
        clip_on=False,
        zorder=3,
    )
    mark.set_gid(f"tip-{cell.key}")


def _unclaimed(ax: Axes, cells: Sequence[CellView], benefit: Benefit, styles: Styles, *, alone: bool) -> None:
    """Cells without a p99, at their benefit, side by side."""
    if not alone:
        ax.tick_params(labelleft=False)
    ax.set_xscale("linear")
    ax.set_xlim(0, len(cells) + 1)
    ax.set_xticks([(len(cells) + 1) / 2], ["not claimed"])
    ax.grid(False, axis="x")
    ax.axvspan(0, len(cells) + 1, color=svg.MUTED, alpha=0.08, lw=0, zorder=0)
    for i, cell in enumerate(cells):
        _marker(ax, cell, i + 1, benefit.value(cell.summary), styles.index(cell))


def _point_words(cell: CellView, group: Frontier) -> str:
    s = cell.summary
    p99 = "not claimed" if s.p99_ms is None else f"{milliseconds(s.p99_ms)} {interval(s.p99_ci_ms)}".strip()
    p99 = f"{p99} {optimistic(s, 'p99_ms')}".strip()
    within = "" if group.benefit is ATTAINMENT else f", {share(s.slo_attainment)} within SLO"
    verdict = "" if s.verdict == "VALID" else f", {s.verdict}"
    probability = group.probability.get(cell.key)
    sure = "" if probability is None else f", on the frontier with probability {share(probability)}"
    return f"{cell.label}: {group.benefit.said(s)}, p99 {p99}{within}{sure}{verdict}."
