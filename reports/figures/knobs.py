"""A map of two settings: what each pair of them gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailrace.harness.analysis.merit import merit, within_objective
from tailrace.reports import svg
from tailrace.reports.benefits import GOODPUT
from tailrace.reports.evidence import CellView
from tailrace.reports.figures.drawing import (
    Figure,
    Key,
    heading,
    stamp,
)
from tailrace.reports.settings import settings, varied
from tailrace.reports.text import listing, milliseconds, significant

_PALEST = 0.12


def knobs(cells: Sequence[CellView]) -> list[Figure]:
    """A map for each framework of a run whose cells without faults span a grid of two knobs (or of one and the load): how much
    goodput each setting gave, and its p99."""
    groups: dict[tuple[str, str], list[CellView]] = {}
    for cell in cells:
        if cell.summary.arrivals > 0 and not cell.faulty:
            groups.setdefault((cell.run, cell.framework), []).append(cell)
    maps = [_KnobMap.of(members) for members in groups.values()]
    return [_knob_figure(each, f"knobs{i}") for i, each in enumerate(maps) if each is not None]


@dataclass(frozen=True)
class _KnobMap:
    """The best cell at each place of a grid of two settings."""

    across: str
    up: str
    columns: tuple[float, ...]
    rows: tuple[float, ...]
    at: Mapping[tuple[float, float], CellView]
    others: tuple[str, ...]
    """Settings that differ besides, over which the best was taken."""

    @classmethod
    def of(cls, cells: Sequence[CellView]) -> _KnobMap | None:
        """By the two settings with the most values; ``None`` where no two have several."""
        several = varied(cells)
        if len(several) < 2:
            return None
        across, up, *others = several
        at: dict[tuple[float, float], CellView] = {}
        for cell in cells:
            own = settings(cell)
            if across in own and up in own:
                place = own[across], own[up]
                if place not in at or merit(cell.summary) > merit(at[place].summary):
                    at[place] = cell
        columns, rows = ({settings(cell)[name] for cell in cells if name in settings(cell)} for name in (across, up))
        return cls(across, up, tuple(sorted(columns)), tuple(sorted(rows)), at, tuple(others))


def _knob_figure(told: _KnobMap, name: str) -> Figure:
    from matplotlib.patches import Rectangle

    most = max(GOODPUT.value(cell.summary) for cell in told.at.values()) or 1.0
    first = next(iter(told.at.values()))
    with svg.style():
        canvas = svg.new_figure(90 + 38 * len(told.rows))
        ax = canvas.add_axes((0.14, 0.2, 0.835, 0.66))
        ax.grid(False)
        ax.set_xlim(-0.5, len(told.columns) - 0.5)
        ax.set_ylim(-0.5, len(told.rows) - 0.5)
        words = {}
        for (x_value, y_value), cell in told.at.items():
            x, y = told.columns.index(x_value), told.rows.index(y_value)
            share_of_most = GOODPUT.value(cell.summary) / most
            p99 = cell.summary.p99_ms
            patch = Rectangle(
                (x - 0.46, y - 0.44),
                0.92,
                0.88,
                fc=svg.colour(cell.slot),
                alpha=_PALEST + (0.55 - _PALEST) * share_of_most,
                lw=0,
            )
            patch.set_gid(f"tip-{name}-{x}-{y}")
            ax.add_patch(patch)
            if within_objective(cell.summary):
                ax.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fc="none", ec=svg.INK, lw=1.4))
            text = "–" if p99 is None else "∞" if math.isinf(p99) else significant(p99, 2)
            ax.text(x, y, text, ha="center", va="center", color=svg.INK if cell.comparable else svg.MUTED, fontsize=11)
            words[f"tip-{name}-{x}-{y}"] = (
                f"{told.across} {x_value:g}, {told.up} {y_value:g}: {GOODPUT.said(cell.summary)}, p99 "
                f"{'not claimed' if p99 is None else milliseconds(p99)}, {cell.summary.verdict}."
            )
        ax.set_xticks(range(len(told.columns)), [f"{value:g}" for value in told.columns])
        ax.set_yticks(range(len(told.rows)), [f"{value:g}" for value in told.rows])
        ax.set_xlabel(told.across, labelpad=3)
        heading(canvas, ax, f"{told.up} ↑")
        stamp(canvas, list(told.at.values()))
        drawn = svg.inline(
            canvas, name=name, alt=f"{first.framework} by {told.across} and {told.up}. " + " ".join(words.values()),
            tooltips=words,
        )  # fmt: skip
    note = "The number is the p99 in ms."
    if told.others:
        note += f" Besides, cells differ by {listing(told.others)}: each place shows its best one."
    keys = (
        Key("the stronger, the more goodput per device", first.slot, "area", strength=0.6),
        Key("framed: within the objective"),
    )
    return Figure(" · ".join(part for part in (first.framework, first.run) if part), drawn, keys, note)
