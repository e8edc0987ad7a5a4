"""The figures of a report: small, drawn once for phone and desktop, with failures visible as ∞ and never left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tailrace.harness.analysis.comparison import MIN_TRIALS
from tailrace.harness.analysis.frontier import frontier_probabilities, non_dominated
from tailrace.harness.analysis.metrics import Floats
from tailrace.reports import svg
from tailrace.reports.benefits import ATTAINMENT, GOODPUT, Benefit, others
from tailrace.reports.columns import optimistic
from tailrace.reports.conditions import Conditions, distinction
from tailrace.reports.downsample import largest_triangles
from tailrace.reports.evidence import GAUGES, NINES, Band, CellView, Evidence, FaultWindow
from tailrace.reports.settings import merit, settings, varied, within_objective
from tailrace.reports.text import humanly, interval, listing, milliseconds, seconds, share, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MAX_POINTS = 240
"""Points of a line; longer ones are thinned, for no screen shows more."""
MAX_LINES = 6
"""Lines in one panel; with more, figures split by scenario."""
_FAINTEST = 0.3
"""How opaque a cell is that is never on the frontier."""
_MENTIONED = 0.025
"""What is less probable than this, or as near to certain, is taken as settled."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (2, 2)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
PHASES = (
    ("process_s", "process spawned"),
    ("port_open_s", "port open"),
    ("ready_s", "says ready"),
    ("first_answer_s", "first correct answer"),
)
"""Cold start, cumulative: key of the trial's facts and what has happened by then."""


@dataclass(frozen=True)
class Key:
    """One entry of a legend: what it looks like and what it means."""

    label: str
    slot: int | None = None
    """Colour; ``None`` for the colour of muted text."""
    kind: str = "line"
    """``line``, ``area``, ``window``, ``marker`` or ``objective``."""
    dash: int = 0
    marker: int = 0
    strength: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A drawn figure with its words."""

    title: str
    svg: Markup
    keys: tuple[Key, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class _Styles:
    """Dashes and markers by scenario (and run): colour is the framework's alone."""

    order: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Iterable[CellView]) -> _Styles:
        return cls({kind: i for i, kind in enumerate(dict.fromkeys((cell.scenario, cell.run) for cell in cells))})

    def index(self, cell: CellView) -> int:
        return self.order[cell.scenario, cell.run]


# ---------------------------------------------------------------- latency by percentile


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
    styles = _Styles.of(cells)
    bands = [cell.evidence.latency_ms for cell in cells if cell.evidence is not None]
    everything = np.concatenate([np.concatenate([band.mid, band.low, band.high]) for band in bands])
    objectives = sorted({float(cell.summary["slo_ms"]) for cell in cells})
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


_QUANTILE_TICKS = ((0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %"))


def _latency_words(cell: CellView) -> str:
    s = cell.summary
    p99 = milliseconds(s["p99_ms"]) if s["p99_ms"] is not None else "not claimed"
    p50 = milliseconds(s["p50_ms"]) if s["p50_ms"] is not None else "not claimed"
    return f"{cell.label}: p50 {p50}, p99 {p99}."


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis with a strip above it for +∞."""

    begin: float
    """Where the strip begins; it ends as far from its middle."""
    strip: float
    """The middle of the strip."""

    @classmethod
    def fit(
        cls, ax: Axes, values: Iterable[float], *, horizontal: bool = False, most_ticks: int = 7, strip: float = 0.17
    ) -> LogAxis:
        """Set limits and ticks of an axis for these values; the strip takes that share of the finite part's length."""
        every = np.array(list(values), dtype=np.float64)
        finite = every[np.isfinite(every) & (every > 0)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (1.0, 100.0)
        low, high = low / 1.15, max(high, low * 2) * 1.15
        reach = math.log10(high / low)
        infinite = bool(np.isposinf(every).any())
        middle = high * 10 ** (strip / 2 * reach)
        top = high * 10 ** (strip * reach) if infinite else high
        ticks = _log_ticks(low, high, most_ticks)
        labels = [significant(tick, 1) if tick < 1 else f"{tick:,.0f}" for tick in ticks]
        if infinite:
            ticks, labels = [*ticks, middle], [*labels, "∞"]
        axis = ax.xaxis if horizontal else ax.yaxis
        (ax.set_xscale if horizontal else ax.set_yscale)("log")
        (ax.set_xlim if horizontal else ax.set_ylim)(low, top)
        axis.set_ticks(ticks, labels)
        axis.set_ticks([], minor=True)
        if infinite:
            (ax.axvspan if horizontal else ax.axhspan)(high, top, color=svg.ALARM, alpha=0.08, lw=0, zorder=0)
        return cls(high, middle)

    def place(self, values: Floats) -> Floats:
        """Where values are drawn: +∞ in its strip."""
        return np.where(np.isposinf(values), self.strip, values)

    def within_strip(self, share: float) -> float:
        """A place in the strip, from its begin (0) to its end (1), for marks that would hide each other."""
        return float(self.begin * (self.strip / self.begin) ** (2 * share))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between two ends: 1, 2, 5 if they fit, else powers of ten, thinned."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def heading(canvas: Canvas, ax: Axes, text: str) -> None:
    """The axis named in words above it, where it is read first."""
    above = ax.get_position().y1 + 9 / (canvas.get_figheight() * 72)
    canvas.text(0.005, above, text, color=svg.MUTED, fontsize=12, va="baseline")


def stamp(canvas: Canvas, cells: Sequence[CellView]) -> None:
    """Say *emulated* inside the picture, so that it goes wherever the picture goes."""
    if any(cell.summary["emulated"] for cell in cells):
        above = 1 - 15 / (canvas.get_figheight() * 72)
        canvas.text(
            0.975, above, "emulated", color=svg.CAUTION, fontsize=12, va="baseline", ha="right", fontweight="bold"
        )


# ---------------------------------------------------------------- timeline


def timelines(cells: Sequence[CellView]) -> list[Figure]:
    """One figure per cell, all on the same scales: rate, attainment, p99, utilisation, queue depth, batch, power, and replicas
    where their number changes in some cell, on one time axis."""
    drawn = [(cell, cell.evidence) for cell in cells if cell.evidence is not None]
    if not drawn:
        return []
    bands = [evidence for _, evidence in drawn]
    peaks = {name: _peak(name, bands) for name in _GAUGE_HEADINGS}
    changing = any(np.nanmin(e.gauges["replicas"].low) < peaks["replicas"] for e in bands if "replicas" in e.gauges)
    gauges = [name for name in GAUGES if any(name in e.gauges for e in bands) and (name != "replicas" or changing)]
    peak_rate = max(float(np.nanmax(e.rate.high)) for e in bands)
    p99s = np.concatenate([[float(c.summary["slo_ms"]) for c, _ in drawn], *(e.p99_ms.low for e in bands)])
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
    span_s = float(max(trial["span_s"] for trial in cell.repetitions))
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
        _percent_axis(attainment)
        _line(attainment, evidence.attainment.times(100), colour)
        heading(canvas, p99, "p99 response time, ms (log scale)")
        scale = LogAxis.fit(p99, shared.p99s_ms, most_ticks=3, strip=0.3)
        p99.axhline(float(cell.summary["slo_ms"]), color=svg.ALARM, lw=1, ls=(0, (2, 2)), zorder=1.5)
        _line(p99, evidence.p99_ms, colour, scale=scale)
        for ax, name in zip(others, shared.gauges, strict=True):
            if name == "utilization":
                heading(canvas, ax, "Utilisation, %")
                _percent_axis(ax)
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


def _percent_axis(ax: Axes) -> None:
    ax.set_ylim(0, 103)
    ax.set_yticks([0, 50, 100])


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
            humanly(window.kind) + (f": {_recovered(window)}" if len(cell.faults) == 1 else ""),  # of several no room
            (window.from_s, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 25),
            textcoords="offset points",
            ha=side,
            color=svg.ALARM,
            fontsize=11,
            annotation_clip=False,
        )


def _recovered(window: FaultWindow) -> str:
    if not window.seen:
        return "no arrivals after it"
    if window.recovery_s is None:
        return "not recovered"
    return f"recovered after {seconds(window.recovery_s)}" if window.recovery_s > 0 else "attainment held"


def _timeline_words(cell: CellView, evidence: Evidence) -> str:
    told = [
        f"Timeline of {cell.label}: offered rate up to {significant(float(np.nanmax(evidence.rate.mid)))} requests/s,",
        f"goodput up to {significant(float(np.nanmax(evidence.goodput.mid)))} requests/s.",
    ]
    told += [f"{humanly(f.kind)} at {seconds(f.from_s)}, {_recovered(f)}." for f in cell.faults]
    return " ".join(told)


# ---------------------------------------------------------------- recovery


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
    styles = _Styles.of(cells)
    words = []
    with svg.style():
        canvas = svg.new_figure(240)
        ax = canvas.add_axes((0.105, 0.17, 0.87, 0.70))
        longest = max(since_s[-1] for since_s, _ in map(_since_the_fault, cells)) + 0.5
        ax.set_xlim(-_BEFORE_S, min(longest, _AFTER_S))
        _percent_axis(ax)
        ax.axvline(0, color=svg.ALARM, lw=1.2, zorder=1)
        for cell in cells:
            since_s, percent = _since_the_fault(cell)
            colour, dash = svg.colour(cell.slot), DASHES[styles.index(cell) % len(DASHES)]
            (line,) = ax.plot(since_s, percent, color=colour, lw=1.8, ls=dash, drawstyle="steps-mid")
            line.set_gid(f"tip-{name}-{cell.key}")
            after = percent[since_s > 0]
            lowest = f"{np.nanmin(after):.0f} %" if np.isfinite(after).any() else "not known"
            words.append(f"{cell.label}: at the lowest {lowest}; {_recovered(cell.faults[0])}.")
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


# ---------------------------------------------------------------- frontier


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
        if cell.summary["arrivals"] > 0:
            groups.setdefault(cell.conditions, []).append(cell)
    return [_group(distinction(conditions, list(groups)), members) for conditions, members in groups.items()]


def _group(title: str, cells: Sequence[CellView], benefit: Benefit = GOODPUT) -> Frontier:
    """Best are the comparable cells with a finite p99 that none of the others beats on both axes."""
    chosen = [
        c for c in cells if c.comparable and c.summary["p99_ms"] is not None and math.isfinite(c.summary["p99_ms"])
    ]
    probabilities = frontier_probabilities(
        [
            (
                np.array([trial["p99_ms"] for trial in cell.repetitions], dtype=np.float64),
                np.array([trial[benefit.key] for trial in cell.repetitions], dtype=np.float64),
            )
            for cell in chosen
        ],
        paired=len({(cell.run, *(trial["number"] for trial in cell.repetitions)) for cell in chosen}) == 1,
    )
    frameworks: dict[str, list[CellView]] = {}
    for cell in chosen:
        frameworks.setdefault(cell.summary["adapter"], []).append(cell)
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
        np.array([c.summary["p99_ms"] for c in cells], dtype=np.float64),
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
    styles = _Styles.of(cells)
    claimed = [cell for cell in cells if cell.summary["p99_ms"] is not None]
    unclaimed = [cell for cell in cells if cell.summary["p99_ms"] is None]
    with svg.style():
        canvas = svg.new_figure(320)
        aside = 0.16 if unclaimed and claimed else 0.0
        ax = canvas.add_axes((0.105, 0.17, 0.87 - aside, 0.745))
        ax.grid(True, axis="x")
        ends = [float(cell.summary["slo_ms"]) for cell in cells]
        for cell in claimed:
            ends += [cell.summary["p99_ms"], *(cell.summary["p99_ci_ms"] or [])]
        infinite = [cell for cell in claimed if math.isinf(cell.summary["p99_ms"])]
        scale = LogAxis.fit(
            ax, ends, horizontal=True, most_ticks=6, strip=0.17 if 2 * len(infinite) <= len(claimed) else 0.6
        )
        low, high = _around([end for c in cells for end in (benefit.value(c.summary), *benefit.ends(c.summary))])
        ax.set_ylim(low, min(high, benefit.most))
        for objective in sorted({float(cell.summary["slo_ms"]) for cell in cells}):
            ax.axvline(objective, color=svg.ALARM, lw=1, ls=(0, (2, 2)), zorder=1.5)
        for own in group.own:
            _staircase(ax, own, benefit, svg.colour(own[0].slot), width=0.8)
        if best:
            _staircase(ax, best, benefit, svg.MUTED, width=1.2)
        for cell in claimed:
            if cell in infinite:
                x = scale.within_strip((infinite.index(cell) + 1) / (len(infinite) + 1))
            else:
                x = cell.summary["p99_ms"]
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


def _marker_keys(cells: Sequence[CellView], styles: _Styles) -> list[Key]:
    """One entry per cell while they are few, else one per framework and one per scenario."""
    if len(cells) <= MAX_LINES:
        return [Key(cell.label, cell.slot, "marker", marker=styles.index(cell)) for cell in cells]
    frameworks = {cell.summary["adapter"]: Key(cell.framework, cell.slot, "area") for cell in cells}
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
    if any(c.summary["p99_ms"] == math.inf for c in cells):
        told.append(
            "In the ∞ strip: cells in which more than 1\u202f% of requests failed, so that their p99 has no end."
        )
    if any(c.summary["p99_ms"] is None for c in cells):
        told.append("Apart: cells with too few arrivals to claim a p99.")
    if any(not c.comparable for c in cells):
        told.append("Hollow: INVALID cells, which cannot be on the frontier.")
    told += [note] if (note := group.benefit.note([cell.summary for cell in cells])) else []
    return " ".join(told)


def _staircase(ax: Axes, best: Sequence[CellView], benefit: Benefit, colour: str, *, width: float) -> None:
    """What can be had: at least this p99 for that benefit."""
    points = sorted((c.summary["p99_ms"], benefit.value(c.summary)) for c in best)
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
    if s["p99_ci_ms"] and math.isfinite(s["p99_ms"]):
        low, high = scale.place(np.array(s["p99_ci_ms"], dtype=np.float64))
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


def _unclaimed(ax: Axes, cells: Sequence[CellView], benefit: Benefit, styles: _Styles, *, alone: bool) -> None:
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
    p99 = "not claimed" if s["p99_ms"] is None else f"{milliseconds(s['p99_ms'])} {interval(s['p99_ci_ms'])}".strip()
    p99 = f"{p99} {optimistic(s, 'p99_ci_ms')}".strip()
    within = "" if group.benefit is ATTAINMENT else f", {share(s['slo_attainment'])} within SLO"
    verdict = "" if s["verdict"] == "VALID" else f", {s['verdict']}"
    probability = group.probability.get(cell.key)
    sure = "" if probability is None else f", on the frontier with probability {share(probability)}"
    return f"{cell.label}: {group.benefit.said(s)}, p99 {p99}{within}{sure}{verdict}."


# ---------------------------------------------------------------- knobs


_PALEST = 0.12


def knobs(cells: Sequence[CellView]) -> list[Figure]:
    """A map for each framework of a run whose cells without faults span a grid of two knobs (or of one and the load): how much
    goodput each setting gave, and its p99."""
    groups: dict[tuple[str, str], list[CellView]] = {}
    for cell in cells:
        if cell.summary["arrivals"] > 0 and not cell.faulty:
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
                if place not in at or merit(cell) > merit(at[place]):
                    at[place] = cell
        columns, rows = ({settings(cell)[name] for cell in cells if name in settings(cell)} for name in (across, up))
        return cls(across, up, tuple(sorted(columns)), tuple(sorted(rows)), at, tuple(others))


def _knob_figure(told: _KnobMap, name: str) -> Figure:
    from matplotlib.patches import Rectangle

    most = max(cell.summary["goodput_rps_per_device"] for cell in told.at.values()) or 1.0
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
            share_of_most = cell.summary["goodput_rps_per_device"] / most
            p99 = cell.summary["p99_ms"]
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
            if within_objective(cell):
                ax.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fc="none", ec=svg.INK, lw=1.4))
            text = "–" if p99 is None else "∞" if math.isinf(p99) else significant(p99, 2)
            ax.text(x, y, text, ha="center", va="center", color=svg.INK if cell.comparable else svg.MUTED, fontsize=11)
            words[f"tip-{name}-{x}-{y}"] = (
                f"{told.across} {x_value:g}, {told.up} {y_value:g}: {GOODPUT.said(cell.summary)}, p99 "
                f"{'not claimed' if p99 is None else milliseconds(p99)}, {cell.summary['verdict']}."
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


# ---------------------------------------------------------------- cold start


@dataclass(frozen=True)
class ColdStart:
    """Mean phases of one framework's cold starts in one run."""

    label: str
    slot: int
    phases: tuple[tuple[str, float], ...]
    """What had to happen, and how long it took after the one before, in seconds."""
    total_s: float
    starts: int


def cold_starts(cells: Sequence[CellView]) -> list[ColdStart]:
    """Cold start does not know what the trial will do, so the trials of all scenarios of a framework count together."""
    groups: dict[tuple[str, str], list[CellView]] = {}
    for cell in cells:
        groups.setdefault((cell.run, cell.summary["adapter"]), []).append(cell)
    starts = []
    for members in groups.values():
        told = [t["cold_start_phases_s"] for c in members for t in c.repetitions if t["cold_start_phases_s"]]
        known = [(key, words) for key, words in PHASES if told and all(t.get(key) is not None for t in told)]
        if not known:
            continue
        means = [0.0, *(sum(t[key] for t in told) / len(told) for key, _ in known)]
        phases = tuple((words, max(0.0, b - a)) for (_, words), a, b in zip(known, means, means[1:], strict=False))
        first = members[0]
        label = " · ".join(part for part in (first.framework, first.run) if part)
        starts.append(ColdStart(label, first.slot, phases, means[-1], len(told)))
    return starts


def cold_start(cells: Sequence[CellView]) -> Figure | None:
    """Horizontal bars, stacked by phase from pale to full in the framework's colour."""
    starts = cold_starts(cells)
    if not starts:
        return None
    row = 46
    height = 18 + row * len(starts) + 34
    words = [w for _, w in PHASES if any(w == phase for start in starts for phase, _ in start.phases)]
    with svg.style():
        canvas = svg.new_figure(height)
        ax = canvas.add_axes((0.02, 34 / height, 0.955, row * len(starts) / height))
        ax.grid(False)
        ax.grid(True, axis="x")
        for i, start in enumerate(starts):
            left = 0.0
            for phase, took in start.phases:
                ax.barh(i, took, left=left, height=0.42, color=svg.colour(start.slot), alpha=_phase_alpha(phase), lw=0)
                left += took
            text = f"{start.label}  {seconds(start.total_s)}"
            ax.text(0, i - 0.31, text, fontsize=12.5, va="bottom", ha="left")
        ax.set_ylim(len(starts) - 0.5, -0.72)
        ax.set_xlim(0, max(start.total_s for start in starts) * 1.02)
        ax.set_yticks([])
        ax.set_xlabel("seconds since the process was started", labelpad=2)
        alt = "Cold start by phase. " + " ".join(_cold_words(start) for start in starts)
        stamp(canvas, cells)
        drawn = svg.inline(canvas, name="cold", alt=alt)
    keys = tuple(Key(word, None, "area", strength=_phase_alpha(word)) for word in words)
    numbers = sorted({start.starts for start in starts})
    note = "" if numbers == [1] else f"Mean of {listing([str(n) for n in numbers])} cold starts per framework."
    return Figure("", drawn, keys, note)


def _phase_alpha(phase: str) -> float:
    return dict(zip((words for _, words in PHASES), (0.25, 0.5, 0.75, 1.0), strict=True))[phase]


def _cold_words(start: ColdStart) -> str:
    phases = ", ".join(f"{phase} {seconds(took)}" for phase, took in start.phases)
    return f"{start.label}: {seconds(start.total_s)} ({phases})."
