"""The curves of models that share a memory: what memory buys, and what was left of it over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tailrace.harness.analysis.metrics import Floats
from tailrace.reports import svg
from tailrace.reports.downsample import largest_triangles
from tailrace.reports.evidence import CellView
from tailrace.reports.figures.drawing import DASHES, MARKERS, MAX_POINTS, Figure, Key, LogAxis, heading, stamp
from tailrace.reports.multiplexing import Group, Headroom, Line, Multiplexing, Theory, memory, shared
from tailrace.reports.text import interval, listing, milliseconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LRU_DASH, _LEAST_DASH = 2, 1
_ASIDE = 0.007
"""How far apart lines are drawn at the same memory, of the range of memories."""
_HEADROOM_PX, _HEADROOM_GAP_PX = 44, 26


def memory_curves(told: Multiplexing) -> list[Figure]:
    """Two figures for each group: the share of cold requests and the p99, against memory."""
    figures = []
    for index, group in enumerate(told.groups):
        if group.lines:
            figures += [_cold(group, f"cold-share{index}"), _tail(group, f"cold-tail{index}")]
    return figures


def _title(what: str, group: Group) -> str:
    return " · ".join(part for part in (what, group.title) if part)


def _cells(group: Group) -> list[CellView]:
    return [cell for line in group.lines for cell in line.cells]


def _keys(lines: Sequence[Line]) -> list[Key]:
    return [
        Key(line.label, line.cells[0].slot, "marker", marker=style) for style, line in zip(_styles(lines), lines, strict=True)
    ]  # fmt: skip


def _styles(lines: Sequence[Line]) -> list[int]:
    """A marker and a dash for each policy, whatever the framework, whose colour tells it."""
    policies = [line.label.partition(" · ")[2] for line in lines]
    order = list(dict.fromkeys(policies))
    return [order.index(policy) for policy in policies]


def _memory_axis(ax: Axes, group: Group) -> None:
    sizes = sorted({float(size) for line in group.lines for size in line.memory_mb})
    low, high = sizes[0], sizes[-1]
    room = 0.06 * (high - low) or 0.1 * high
    ax.set_xlim(low - room, high + room)
    shown = [low]
    for size in sizes[1:]:
        if size - shown[-1] >= 0.12 * (high - low):
            shown.append(size)
    ax.set_xticks(shown, [f"{size:,.0f}" for size in shown])
    ax.set_xlabel("memory for models, MiB", labelpad=3)


def _cold(group: Group, name: str) -> Figure:
    tips: dict[str, str] = {}
    with svg.style():
        canvas = svg.new_figure(300)
        ax = canvas.add_axes((0.105, 0.17, 0.87, 0.745))
        most = 0.0
        if group.theory is not None:
            curves = ((group.theory.lru, _LRU_DASH), (group.theory.least, _LEAST_DASH))
            for curve, dash in curves:
                drawn_as = {"color": svg.MUTED, "lw": 1.6, "ls": DASHES[dash], "zorder": 1.5}
                if group.theory.memory_mb[0] == group.theory.memory_mb[-1]:
                    ax.axhline(100 * float(curve[0]), **drawn_as)  # of one memory, a line has no length
                else:
                    ax.plot(group.theory.memory_mb, 100 * curve, **drawn_as)
                most = max(most, 100 * float(curve.max()))
        for line, style, aside in zip(group.lines, _styles(group.lines), _aside(group.lines, group), strict=True):
            ends = [shared(cell).cold.share_ci or [np.nan, np.nan] for cell in line.cells]
            low, high = 100 * np.array(ends, dtype=np.float64).T
            _draw(ax, line, style, line.memory_mb + aside, (100 * line.cold, low, high), name)
            most = max(most, float(np.nanmax(np.r_[high, 0.0])))
            tips |= {f"tip-{name}-{cell.key}": _cold_words(cell) for cell in line.cells}
        ax.set_ylim(0, max(most * 1.05, 1.0))
        _memory_axis(ax, group)
        heading(canvas, ax, "Cold requests, %")
        stamp(canvas, _cells(group))
        alt = "Cold requests against memory. " + " ".join(tips.values()) + _theory_words(group.theory)
        drawn = svg.inline(canvas, name=name, alt=alt, tooltips=tips)
    keys = _keys(group.lines)
    if group.theory is not None:
        least = "the fewest, had the future been known" if group.theory.exact else "a bound: nobody has fewer"
        keys += [Key("LRU in theory (Che)", dash=_LRU_DASH), Key(least, dash=_LEAST_DASH)]
    return Figure(_title("Cold requests against memory", group), drawn, tuple(keys))


def _tail(group: Group, name: str) -> Figure:
    tips: dict[str, str] = {}
    unclaimed = [cell.label for cell in _cells(group) if cell.summary.p99_ms is None]
    objectives = sorted({float(cell.summary.slo_ms) for cell in _cells(group)})
    with svg.style():
        canvas = svg.new_figure(300)
        ax = canvas.add_axes((0.105, 0.17, 0.87, 0.745))
        ends = [end for cell in _cells(group) for end in (cell.summary.p99_ms, *(cell.summary.p99_ci_ms or [])) if end]
        scale = LogAxis.fit(ax, [*ends, *objectives])
        for objective in objectives:
            ax.axhline(objective, color=svg.ALARM, lw=1, ls=DASHES[4], zorder=1.5)
        for line, style, aside in zip(group.lines, _styles(group.lines), _aside(group.lines, group), strict=True):
            known = tuple(cell for cell in line.cells if cell.summary.p99_ms is not None)
            if not known:
                continue
            claimed = Line(line.label, known)
            told = [[s.p99_ms, *(s.p99_ci_ms or [s.p99_ms] * 2)] for s in (cell.summary for cell in known)]
            middle, low, high = scale.place(np.array(told, dtype=np.float64)).T
            _draw(ax, claimed, style, claimed.memory_mb + aside, (middle, low, high), name)
            tips |= {f"tip-{name}-{cell.key}": _tail_words(cell) for cell in known}
        _memory_axis(ax, group)
        heading(canvas, ax, "p99 response time, ms (log scale)")
        stamp(canvas, _cells(group))
        alt = "p99 against memory. " + (" ".join(tips.values()) or "No p99 is claimed.")
        drawn = svg.inline(canvas, name=name, alt=alt, tooltips=tips)
    keys = [*_keys(group.lines), Key(f"objective, {listing([milliseconds(o) for o in objectives])}", kind="objective")]
    note = f"Too few arrivals to claim a p99: {listing(unclaimed)}." if unclaimed else ""
    return Figure(_title("p99 against memory", group), drawn, tuple(keys), note)


def _aside(lines: Sequence[Line], group: Group) -> list[float]:
    """How far to the right each line is drawn, in MiB, so that marks at the same place do not hide each other."""
    sizes = np.concatenate([line.memory_mb for line in group.lines])
    step = _ASIDE * (float(np.ptp(sizes)) or float(sizes.max()))
    return [step * (i - (len(lines) - 1) / 2) for i in range(len(lines))]


def _draw(ax: Axes, line: Line, style: int, x: Floats, band: tuple[Floats, Floats, Floats], name: str) -> None:
    """A line through its cells: a mark with its interval for each. ``band`` has the middle, the low and the high ends."""
    colour = svg.colour(line.cells[0].slot)
    middle, low, high = band
    ax.plot(x, middle, color=colour, lw=1.5, ls=DASHES[style % len(DASHES)], alpha=0.8)
    ax.vlines(x, low, high, color=colour, lw=1.3, alpha=0.7)
    for i, cell in enumerate(line.cells):
        (mark,) = ax.plot(
            x[i], middle[i], MARKERS[style % len(MARKERS)], ms=7, color=colour, mec=svg.PAPER, clip_on=False, zorder=3
        )
        mark.set_gid(f"tip-{name}-{cell.key}")


def _cold_words(cell: CellView) -> str:
    cold = shared(cell).cold
    ends = interval([100 * end for end in cold.share_ci]) if cold.share_ci else ""
    return f"{cell.label}, {memory(shared(cell).memory_mb)}: {share(cold.share)} cold {ends}.".replace(" .", ".")


def _tail_words(cell: CellView) -> str:
    s = cell.summary
    told = f"{milliseconds(s.p99_ms)} {interval(s.p99_ci_ms)}".strip()
    return f"{cell.label}, {memory(shared(cell).memory_mb)}: p99 {told}."


def _theory_words(theory: Theory | None) -> str:
    if theory is None:
        return ""
    low, high = theory.memory_mb[0], theory.memory_mb[-1]
    told = [
        f" {what}: {share(float(curve[0]))} at {memory(low)}, {share(float(curve[-1]))} at {memory(high)}."
        for what, curve in (("LRU in theory", theory.lru), ("The fewest", theory.least))
    ]
    return "".join(told)


def headroom(cells: Sequence[Headroom]) -> Figure | None:
    """Memory that nobody had, over the first trial of each cell, one below the other."""
    if not cells:
        return None
    rows = len(cells)
    height = 24 + rows * _HEADROOM_PX + (rows - 1) * _HEADROOM_GAP_PX + 36
    words = []
    with svg.style():
        canvas = svg.new_figure(height)
        for i, told in enumerate(cells):
            top = height - 24 - i * (_HEADROOM_PX + _HEADROOM_GAP_PX)
            ax = canvas.add_axes((0.105, (top - _HEADROOM_PX) / height, 0.87, _HEADROOM_PX / height))
            kept = largest_triangles(told.t_s, told.free_mb, MAX_POINTS)
            ax.plot(
                told.t_s[kept], told.free_mb[kept], color=svg.colour(told.cell.slot), lw=1.2, drawstyle="steps-post"
            )
            ax.set_xlim(0, float(told.cell.repetitions[0].span_s))
            ax.set_ylim(0, max(1.0, float(told.free_mb.max()) * 1.1))
            ax.yaxis.set_major_locator(svg.few_ticks(2))
            ax.xaxis.set_visible(i == rows - 1)
            heading(canvas, ax, told.cell.label)
            words.append(f"{told.cell.label}: {memory(float(told.free_mb.min()))} at the least.")
        ax.set_xlabel("seconds of the trace", labelpad=2)
        stamp(canvas, [told.cell for told in cells])
        alt = "Memory that no model had, over time. " + " ".join(words)
        drawn = svg.inline(canvas, name="headroom", alt=alt)
    return Figure("Memory that no model had, MiB", drawn, note="Of the first trial of each cell.")
