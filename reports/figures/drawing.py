"""What all figures share: their words and keys, dashes and markers, a logarithmic axis with a place for ∞."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tailrace.harness.analysis.metrics import Floats
from tailrace.reports import svg
from tailrace.reports.evidence import CellView
from tailrace.reports.text import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


MAX_POINTS = 240
"""Points of a line; longer ones are thinned, for no screen shows more."""
MAX_LINES = 6
"""Lines in one panel; with more, figures split by scenario."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (2, 2)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


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
class Styles:
    """Dashes and markers by scenario (and run): colour is the framework's alone."""

    order: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Iterable[CellView]) -> Styles:
        return cls({kind: i for i, kind in enumerate(dict.fromkeys((cell.scenario, cell.run) for cell in cells))})

    def index(self, cell: CellView) -> int:
        return self.order[cell.scenario, cell.run]


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
    if any(cell.summary.emulated for cell in cells):
        above = 1 - 15 / (canvas.get_figheight() * 72)
        canvas.text(
            0.975, above, "emulated", color=svg.CAUTION, fontsize=12, va="baseline", ha="right", fontweight="bold"
        )


def percent_axis(ax: Axes) -> None:
    ax.set_ylim(0, 103)
    ax.set_yticks([0, 50, 100])
