"""What was set in a cell."""

from __future__ import annotations

from collections.abc import Sequence

from tailrace.reports.evidence import CellView
from tailrace.reports.text import humanly, listing

LOAD = "mean load, requests/s"


def settings(cell: CellView) -> dict[str, float]:
    """The knobs of a cell that are numbers, in words, and its mean load where the scenario asked for one."""
    numbers = {name: value for name, value in cell.summary.tuning.items() if isinstance(value, int | float)}
    rate = cell.summary.mean_rate
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
