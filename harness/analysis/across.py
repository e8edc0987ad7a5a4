"""Across the trials of a cell: what becomes of a figure that each of them has, as the fields of the cell's own record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tailrace.harness.analysis.comparison import over_trials
from tailrace.harness.records.summary import Figures


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def largest(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    return max((value for value in values if value is not None), default=None)


def across(
    members: Sequence[Figures], name: str, ends: str, *, log: bool, within: tuple[float, float] = (0.0, math.inf)
) -> dict[str, Any]:
    """A mean of a cell with its interval over trials in the field ``ends``, cut to what the figure can be; no interval where
    there is none."""
    interval = over_trials(np.array([trial.figure(name) for trial in members], dtype=np.float64), log=log)
    if interval is None:
        return {ends: None}
    return {name: interval.centre, ends: np.clip(interval.ends, *within).tolist()}


def percentile_across(members: Sequence[Figures], name: str) -> dict[str, Any]:
    """A percentile of a cell: from three finite trials on the geometric mean with its interval over trials; from
    fewer, the median trial (of two, the worse one) with the envelope of the within-trial intervals; nothing when a
    trial claims nothing."""
    ends = name.replace("_ms", "_ci_ms")
    source = f"{ends}_source"
    values = [value for trial in members if (value := trial.figure(name)) is not None]
    if len(values) < len(members):
        return {name: None, ends: None, source: None}
    found = across(members, name, ends, log=True)
    if found[ends] is not None:
        return {**found, source: "across-trials"}
    intervals = [getattr(trial, ends) for trial in members]
    envelope = [min(low for low, _ in intervals), max(high for _, high in intervals)]
    return {name: sorted(values)[len(values) // 2], ends: envelope, source: "within-trial"}
