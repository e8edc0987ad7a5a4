"""Which of several cells did best: one order for a report's headline, its maps and a recommendation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def comparable(cell: Mapping[str, Any]) -> bool:
    """Whether claims may be made from a cell of a summary: nothing INVALID, and something measured."""
    return bool(cell["verdict"] != "INVALID" and cell["arrivals"] > 0)


def tail_ms(cell: Mapping[str, Any]) -> float:
    """The p99 in milliseconds; infinite where none is claimed."""
    return math.inf if cell["p99_ms"] is None else float(cell["p99_ms"])


def within_objective(cell: Mapping[str, Any]) -> bool:
    """Whether a cell claims a p99, and one within its objective."""
    return comparable(cell) and cell["p99_ms"] is not None and tail_ms(cell) <= cell["slo_ms"]


def merit(cell: Mapping[str, Any]) -> tuple[bool, bool, float, float]:
    """The larger, the better: rather one within the objective, then more goodput, then a shorter tail; last what cannot be
    compared."""
    return comparable(cell), within_objective(cell), float(cell["goodput_rps_per_device"]), -tail_ms(cell)
