"""What was set in a cell, and which of several settings did best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tailrace.reports.evidence import CellView
from tailrace.reports.text import humanly, listing

LOAD = "mean load, requests/s"


def settings(cell: CellView) -> dict[str, float]:
    """The knobs of a cell that are numbers, in words, and its mean load where the scenario asked for one."""
    numbers = {name: value for name, value in cell.summary["tuning"].items() if isinstance(value, int | float)}
    rate = cell.summary["mean_rate"]
    return {humanly(name): float(value) for name, value in numbers.items()} | ({} if rate is None else {LOAD: rate})


def varied(cells: Sequence[CellView]) -> list[str]:
    """The settings that have several values among these cells, those with the most first."""
    values: dict[str, set[float]] = {}
    for cell in cells:
        for name, value in settings(cell).items():
            values.setdefault(name, set()).add(value)
    return sorted((name for name in values if len(values[name]) > 1), key=lambda name: -len(values[name]))


def setting_words(cell: CellView, names: Sequence[str]) -> str:
    """``max batch 16 and batch window ms 5``: those of the named settings that the cell has."""
    own = settings(cell)
    return listing([f"{name} {own[name]:g}" for name in names if name in own])


def within_objective(cell: CellView) -> bool:
    """Whether the cell claims a p99, and one within its objective."""
    p99 = cell.summary["p99_ms"]
    return bool(cell.comparable and p99 is not None and p99 <= cell.summary["slo_ms"])


def merit(cell: CellView) -> tuple[bool, bool, float, float]:
    """The larger, the better: rather one within the objective, then more goodput, then a shorter tail; last what cannot be
    compared."""
    p99 = cell.summary["p99_ms"]
    tail = math.inf if p99 is None else float(p99)
    return cell.comparable, within_objective(cell), cell.summary["goodput_rps_per_device"], -tail
