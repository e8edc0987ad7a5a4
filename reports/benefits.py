"""What a frontier sets against p99: goodput per device, and what else is known of the same cells and tells more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailrace.harness.records.summary import CellSummary
from tailrace.reports.text import interval, listing, per_second, quantity, share, significant

_LOADS_DIFFER = 1.05
"""Largest ÷ smallest offered load from which on they were meant to differ; the same rate drawn anew differs by less."""


@dataclass(frozen=True)
class Benefit:
    """A figure of cells of which more is better: where it stands in a summary, and how it is drawn and said."""

    key: str
    """In the summary of a cell or of a trial; ``None`` there where it is not known."""
    title: str
    heading: str
    """Above the axis; names the unit that is drawn."""
    words: Callable[[float], str]
    """What is drawn, with its unit."""
    sentence: str
    """What is said of one cell; braces hold the place of the value."""
    factor: float = 1.0
    """What is drawn ÷ what the summary holds."""
    most: float = math.inf
    """The axis ends there at the latest."""
    note: Callable[[Sequence[CellSummary]], str] = lambda cells: ""
    """What has to be said of these cells beside the figure."""

    def known(self, summary: CellSummary) -> bool:
        """Whether the summary holds it."""
        return summary.figure(self.key) is not None

    def value(self, summary: CellSummary) -> float:
        """As it is drawn; it must be known."""
        if (value := summary.figure(self.key)) is None:
            raise ValueError(f"{self.key} is not known")
        return value * self.factor

    def ends(self, cell: CellSummary) -> list[float]:
        """Both ends of a cell's interval over trials, as they are drawn; empty where it has none."""
        return [end * self.factor for end in cell.ends(self.key) or ()]

    def said(self, cell: CellSummary) -> str:
        """The value of a cell with its interval, in words."""
        return self.sentence.format(f"{self.words(self.value(cell))} {interval(self.ends(cell))}".strip())


def _price(cells: Sequence[CellSummary]) -> str:
    prices = sorted({cell.device_price_per_hour for cell in cells if cell.device_price_per_hour is not None})
    told = f"At {listing([significant(price) for price in prices])} US dollars per device and hour, by the experiment"
    return (
        f"{told}; at one price for all, cells lie as they do by goodput per device." if len(prices) == 1 else f"{told}."
    )


GOODPUT = Benefit(
    "goodput_rps_per_device",
    "Goodput per device",
    "Goodput per device, requests/s",
    words=per_second,
    sentence="goodput {} per device",
)
ATTAINMENT = Benefit(
    "slo_attainment",
    "SLO attainment",
    "Within SLO, % of what was offered",
    words=lambda percent: share(percent / 100),
    sentence="{} within SLO",
    factor=100.0,
    most=100.0,
    note=lambda cells: "Cells were offered different loads: much goodput may be a small share of what was asked for.",
)
PER_DOLLAR = Benefit(
    "goodput_per_dollar",
    "Goodput per US dollar",
    "Good requests per US dollar, thousands",
    words=lambda thousands: quantity(thousands, "thousand good requests per US dollar"),
    sentence="{}",
    factor=1e-3,
    note=_price,
)
PER_JOULE = Benefit(
    "goodput_per_joule",
    "Goodput per joule",
    "Good requests per joule",
    words=lambda value: quantity(value, "good requests per joule"),
    sentence="{}",
    note=lambda cells: "Energy of the GPUs alone, from their own counters, or readings of power, over the trace.",
)


def others(cells: Sequence[CellSummary]) -> list[Benefit]:
    """What else than goodput per device may be set against p99 for cells that compare: what is known of each of them; and
    attainment only under different loads, for under one it is goodput on another scale."""
    if not cells:
        return []
    offered = [cell.offered_rps for cell in cells if cell.offered_rps is not None]
    told = [ATTAINMENT] if offered and max(offered) > _LOADS_DIFFER * min(offered) else []
    return [benefit for benefit in (*told, PER_DOLLAR, PER_JOULE) if all(map(benefit.known, cells))]
