"""A cell second by second: rate, attainment, p99 and gauges on one time axis, with its faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tailrace.harness.analysis.metrics import Floats
from tailrace.reports import svg
from tailrace.reports.downsample import largest_triangles
from tailrace.reports.evidence import GAUGES, Band, CellView, Evidence
from tailrace.reports.figures.drawing import (
    MAX_POINTS,
    Figure,
    LogAxis,
    heading,
    percent_axis,
    stamp,
)
from tailrace.reports.text import humanly, seconds, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def timelines(cells: Sequence[CellView]) -> list[Figure]:
    """One figure per cell, all on the same scales: rate, attainment, p99, utilization, queue depth, batch, power, and replicas
    where their number changes in some cell, on one time axis."""
    drawn = [(cell, cell.evidence) for cell in cells if cell.evidence is not None]
    if not drawn:
        return []
    bands = [evidence for _, evidence in drawn]
    peaks = {name: _peak(name, bands) for name in _GAUGE_HEADINGS}
    changing = any(np.nanmin(e.gauges["replicas"].low) < peaks["replicas"] for e in bands if "replicas" in e.gauges)
    gauges = [name for name in GAUGES if any(name in e.gauges for e in bands) and (name != "replicas" or changing)]
    peak_rate = max(float(np.nanmax(e.rate.high)) for e in bands)
    p99s = np.concatenate([[float(c.summary.slo_ms) for c, _ in drawn], *(e.p99_ms.low for e in bands)])
    p99s = np.concatenate([p99s, *(e.p99_ms.high for e in bands)])
    shared = _Shared(peak_rate, p99s, peaks, tuple(gauges), any(c.faults for c, _ in drawn))
    return [_timeline(cell, evidence, shared) for cell, evidence in drawn]


def _peak(name: str, bands: Sequence[Evidence]) -> float:
    return max([1.0, *(float(np.nanmax(e.gauges[name].high)) for e in bands if name in e.gauges)])


@dataclass(frozen=True)
class _Shared:
    """What the timelines of a report have in common, so that they can be compared by eye."""

    peak_rate: float
    p99s_ms: Floats
    peaks: Mapping[str, float]
    """Of the gauges that have no natural limit."""
    gauges: tuple[str, ...]
    faults: bool


_PANEL_PX, _GAP_PX, _BOTTOM_PX = 82, 30, 34
_GAUGE_HEADINGS = {
    "queue_depth": "Queue depth, requests",
    "batch_size": "Mean batch, requests",
    "power_w": "Power of all GPUs, W",
    "replicas": "Replicas alive",
}
"""Of those that have no natural limit."""


def _timeline(cell: CellView, evidence: Evidence, shared: _Shared) -> Figure:
    panels = 3 + len(shared.gauges)
    top_px = 40 if shared.faults else 24
    height = top_px + panels * _PANEL_PX + (panels - 1) * _GAP_PX + _BOTTOM_PX
    span_s = float(max(trial.span_s for trial in cell.repetitions))
    colour = svg.colour(cell.slot)
    with svg.style():
        canvas = svg.new_figure(height)
        axes = []
        for i in range(panels):
            top = height - top_px - i * (_PANEL_PX + _GAP_PX)
            ax = canvas.add_axes((0.105, (top - _PANEL_PX) / height, 0.87, _PANEL_PX / height))
            ax.set_xlim(0, span_s)
            ax.xaxis.set_visible(i == panels - 1)
            axes.append(ax)
        rate, attainment, p99, *others = axes
        heading(canvas, rate, "Requests per second")
        rate.set_ylim(0, shared.peak_rate * 1.06)
        rate.yaxis.set_major_locator(svg.few_ticks())
        _line(rate, evidence.goodput, colour, area=True)
        _line(rate, evidence.rate, svg.MUTED, width=1.2)
        heading(canvas, attainment, "Good, % of what was offered")
        percent_axis(attainment)
        _line(attainment, evidence.attainment.times(100), colour)
        heading(canvas, p99, "p99 response time, ms (log scale)")
        scale = LogAxis.fit(p99, shared.p99s_ms, most_ticks=3, strip=0.3)
        p99.axhline(float(cell.summary.slo_ms), color=svg.ALARM, lw=1, ls=(0, (2, 2)), zorder=1.5)
        _line(p99, evidence.p99_ms, colour, scale=scale)
        for ax, name in zip(others, shared.gauges, strict=True):
            if name == "utilization":
                heading(canvas, ax, "Utilization, %")
                percent_axis(ax)
            else:
                heading(canvas, ax, _GAUGE_HEADINGS[name])
                ax.set_ylim(0, shared.peaks[name] * 1.06)
                ax.yaxis.set_major_locator(svg.few_ticks())
            if name in evidence.gauges:
                _line(ax, evidence.gauges[name].times(100 if name == "utilization" else 1), colour)
            else:
                ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=svg.MUTED)
        _fault_marks(cell, axes, span_s)
        axes[-1].xaxis.set_major_locator(svg.few_ticks(6))
        axes[-1].set_xlabel("seconds of the trace", labelpad=2)
        stamp(canvas, [cell])
        drawn = svg.inline(canvas, name=f"time-{cell.key}", alt=_timeline_words(cell, evidence))
    return Figure(cell.label, drawn, note=_timeline_note(len(cell.repetitions)))


def _timeline_note(trials: int) -> str:
    if trials == 1:
        return ""
    middle = "worse second of 2 trials" if trials == 2 else f"median second over {trials} trials"
    return f"{middle}; bands: lowest to highest"


def _line(
    ax: Axes, band: Band, colour: str, *, scale: LogAxis | None = None, area: bool = False, width: float = 1.8
) -> None:
    """A per-second line with its band; thinned where it has more points than anyone can see."""
    place: Callable[[Floats], Floats] = scale.place if scale is not None else (lambda values: values)
    t_s: Floats = np.arange(len(band.mid), dtype=np.float64) + 0.5
    mid, low, high = place(band.mid), place(band.low), place(band.high)
    height: Floats = np.nan_to_num(high)
    kept = largest_triangles(t_s, height, MAX_POINTS)
    t_s, mid, low, high = t_s[kept], mid[kept], low[kept], high[kept]
    if area:
        ax.fill_between(t_s, 0, mid, color=colour, alpha=0.22, lw=0)
    if not np.array_equal(low, high, equal_nan=True):
        ax.fill_between(t_s, low, high, color=colour, alpha=0.25, lw=0)
    alone = ~np.isnan(mid) & np.isnan(np.r_[np.nan, mid[:-1]]) & np.isnan(np.r_[mid[1:], np.nan])
    ax.plot(t_s, mid, color=colour, lw=width)
    ax.plot(t_s[alone], mid[alone], color=colour, marker="o", ms=3, lw=0)


def _fault_marks(cell: CellView, axes: Sequence[Axes], span_s: float) -> None:
    """Shade each fault from injection until it is healed and recovered from, or to the end, over all panels."""
    for window in cell.faults:
        until = window.until_s(span_s)
        for ax in axes:
            if until > window.from_s:
                ax.axvspan(window.from_s, until, color=svg.ALARM, alpha=0.1, lw=0, zorder=0)
            ax.axvline(window.from_s, color=svg.ALARM, lw=1.2, zorder=1)
        side = "left" if window.from_s < 0.3 * span_s else "center" if window.from_s < 0.55 * span_s else "right"
        axes[0].annotate(
            humanly(window.kind) + (f": {window.outcome}" if len(cell.faults) == 1 else ""),  # of several no room
            (window.from_s, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 25),
            textcoords="offset points",
            ha=side,
            color=svg.ALARM,
            fontsize=11,
            annotation_clip=False,
        )


def _timeline_words(cell: CellView, evidence: Evidence) -> str:
    told = [
        f"Timeline of {cell.label}: offered rate up to {significant(float(np.nanmax(evidence.rate.mid)))} requests/s,",
        f"goodput up to {significant(float(np.nanmax(evidence.goodput.mid)))} requests/s.",
    ]
    told += [f"{humanly(f.kind)} at {seconds(f.from_s)}, {f.outcome}." for f in cell.faults]
    return " ".join(told)
