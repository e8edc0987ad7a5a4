"""The one order of cells that headlines, maps and recommendations share."""

from __future__ import annotations

import math
from itertools import pairwise

from tailrace.harness.analysis.merit import merit, tail_ms, within_objective
from tailrace.harness.records.summary import CellSummary
from tests.records import cell_summary


def cell(goodput: float, p99_ms: float | None, *, verdict: str = "VALID", arrivals: int = 1000) -> CellSummary:
    figures = {"goodput_rps_per_device": goodput, "p99_ms": p99_ms, "slo_ms": 50}
    return cell_summary(verdict=verdict, arrivals=arrivals, **figures)


def test_cells_from_the_best_to_what_cannot_be_compared() -> None:
    order = [
        cell(10, 50),
        cell(9, 20),
        cell(9, 30),
        cell(99, 51),
        cell(98, math.inf),
        cell(97, None),
        cell(100, 10, verdict="INVALID"),
        cell(0, None, arrivals=0),
    ]
    assert all(merit(better) > merit(worse) for better, worse in pairwise(order))
    assert [within_objective(each) for each in order] == [True] * 3 + [False] * 5


def test_a_tail_that_is_not_claimed_is_longer_than_any() -> None:
    assert tail_ms(cell(1, None)) == math.inf > tail_ms(cell(1, 1e9))
