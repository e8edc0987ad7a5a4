"""Response time by percentile, down to where the number of arrivals ends the claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tailrace.reports import svg
from tailrace.reports.evidence import NINES, CellView
from tailrace.reports.figures.drawing import (
    DASHES,
    MAX_LINES,
    Figure,
    Key,
    LogAxis,
    Styles,
    heading,
    stamp,
)
from tailrace.reports.text import listing, milliseconds

_QUANTILE_TICKS = ((0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %"))


def latency(cells: Sequence[CellView]) -> list[Figure]:
    """Response time by percentile on a log tail, in as many panels as it takes to keep lines apart."""
    drawn = [cell for cell in cells if cell.evidence and np.count_nonzero(~np.isnan(cell.evidence.latency_ms.mid)) > 1]
    return [_latency_panel(title, group, f"latency{i}") for i, (title, group) in enumerate(_panels(drawn)) if group]


def _panels(cells: Sequence[CellView]) -> list[tuple[str, list[CellView]]]:
    """Cells in groups of at most ``MAX_LINES``, if splitting by scenario, or by scenario and run, can do it."""
    splits: tuple[Callable[[CellView], str], ...] = (
        lambda cell: "",
        lambda cell: cell.scenario,
        lambda cell: " · ".join(part for part in (cell.scenario, cell.run) if part),
    )
    groups: dict[str, list[CellView]] = {}
    for split in splits:
        groups = {}
        for cell in cells:
            groups.setdefault(split(cell), []).append(cell)
        if all(len(group) <= MAX_LINES for group in groups.values()):
            break
    return list(groups.items())


def _latency_panel(title: str, cells: Sequence[CellView], name: str) -> Figure:
    styles = Styles.of(cells)
    bands = [cell.evidence.latency_ms for cell in cells if cell.evidence is not None]
    everything = np.concatenate([np.concatenate([band.mid, band.low, band.high]) for band in bands])
    objectives = sorted({float(cell.summary.slo_ms) for cell in cells})
    with svg.style():
        canvas = svg.new_figure(300)
        ax = canvas.add_axes((0.105, 0.085, 0.87, 0.83))
        scale = LogAxis.fit(ax, [*everything, *objectives])
        for objective in objectives:
            ax.axhline(objective, color=svg.ALARM, lw=1, ls=(0, (2, 2)), zorder=1.5)
        shown = 1.0
        for cell, band in zip(cells, bands, strict=True):
            colour = svg.colour(cell.slot)
            ax.fill_between(NINES, scale.place(band.low), scale.place(band.high), color=colour, alpha=0.16, lw=0)
            (line,) = ax.plot(
                NINES, scale.place(band.mid), color=colour, lw=2, ls=DASHES[styles.index(cell) % len(DASHES)]
            )
            line.set_gid(f"tip-{cell.key}")
            known = np.flatnonzero(~np.isnan(band.mid))
            shown = max(shown, float(NINES[known[-1]]) if len(known) else 0.0)
        ax.set_xlim(0, shown + 0.05)
        ticks = [(-math.log10(1 - q), label) for q, label in _QUANTILE_TICKS if -math.log10(1 - q) <= shown + 0.05]
        ax.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
        heading(canvas, ax, "Response time, ms (log scale)")
        alt = "Response time by percentile. " + " ".join(_latency_words(cell) for cell in cells)
        tooltips = {f"tip-{cell.key}": _latency_words(cell) for cell in cells}
        stamp(canvas, cells)
        drawn = svg.inline(canvas, name=name, alt=alt, tooltips=tooltips)
    keys = [Key(cell.label, cell.slot, dash=styles.index(cell)) for cell in cells]
    keys += [Key(f"objective, {listing([milliseconds(o) for o in objectives])}", kind="objective")]
    return Figure(title, drawn, tuple(keys))


def _latency_words(cell: CellView) -> str:
    s = cell.summary
    p99 = milliseconds(s.p99_ms) if s.p99_ms is not None else "not claimed"
    p50 = milliseconds(s.p50_ms) if s.p50_ms is not None else "not claimed"
    return f"{cell.label}: p50 {p50}, p99 {p99}."
