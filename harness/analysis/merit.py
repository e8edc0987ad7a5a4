"""Which of several cells did best: one order for a report's headline, its maps and a recommendation."""

from __future__ import annotations

import math

from tailrace.harness.records.summary import CellSummary


def comparable(cell: CellSummary) -> bool:
    """Whether claims may be made from a cell of a summary: nothing INVALID, and something measured."""
    return cell.verdict != "INVALID" and cell.arrivals > 0


def tail_ms(cell: CellSummary) -> float:
    """The p99 in milliseconds; infinite where none is claimed."""
    return math.inf if cell.p99_ms is None else cell.p99_ms


def within_objective(cell: CellSummary) -> bool:
    """Whether a cell claims a p99, and one within its objective."""
    return comparable(cell) and cell.p99_ms is not None and tail_ms(cell) <= cell.slo_ms


def merit(cell: CellSummary) -> tuple[bool, bool, float, float]:
    """The larger, the better: rather one within the objective, then more goodput, then a shorter tail; last what cannot be
    compared."""
    return comparable(cell), within_objective(cell), cell.goodput_rps_per_device or 0.0, -tail_ms(cell)
