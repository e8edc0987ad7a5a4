"""How bursty a trace is: the figures that describe it, and that a rescaling is judged by.

Definitions, with bins aligned to the start of the trace:

- mean rate: arrivals ÷ span;
- peak-to-mean over a window *w*: the largest count in any bin of width *w* ÷ (mean rate × *w*);
- index of dispersion over *w*: variance ÷ mean of the counts in the full bins (1 for a Poisson process);
- CV of the gaps: standard deviation ÷ mean of the times between arrivals (1 for a Poisson process).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

if TYPE_CHECKING:
    from traces.trace import Trace

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class TraceDescription:
    """The figures of one trace; rates in arrivals per second, the others without unit.

    ``None`` means that the figure does not exist: too few arrivals, a span shorter than the window, or stamps
    coarser than the window (``Trace.resolution_s``), whose finer structure was invented by the importer.
    """

    rows: int
    span_s: float
    mean_rate: float
    peak_to_mean_1s: float | None
    peak_to_mean_60s: float | None
    index_of_dispersion_1s: float | None
    index_of_dispersion_60s: float | None
    cv: float | None

    def as_dict(self) -> dict[str, JsonValue]:
        """The same figures as JSON."""
        return dict(vars(self))


def describe(trace: Trace) -> TraceDescription:
    """Return the figures of ``trace``; takes time and memory in proportion to its arrivals, never to its span."""

    def per_window(window_s: int) -> tuple[float | None, float | None]:
        if trace.resolution_s > window_s:
            return None, None
        window_ns = window_s * NS_PER_S
        return (
            peak_to_mean(trace.arrivals_ns, trace.span_ns, window_ns),
            index_of_dispersion(trace.arrivals_ns, trace.span_ns, window_ns),
        )

    peak_1s, dispersion_1s = per_window(1)
    peak_60s, dispersion_60s = per_window(60)
    gaps_are_real = trace.resolution_s * trace.mean_rate <= 1
    return TraceDescription(
        rows=len(trace),
        span_s=trace.span_s,
        mean_rate=trace.mean_rate,
        peak_to_mean_1s=peak_1s,
        peak_to_mean_60s=peak_60s,
        index_of_dispersion_1s=dispersion_1s,
        index_of_dispersion_60s=dispersion_60s,
        cv=gap_cv(trace.arrivals_ns) if gaps_are_real else None,
    )


def bin_counts(arrivals_ns: NDArray[np.int64], width_ns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count sorted arrivals in bins of ``width_ns``: the indices of the bins that are not empty, and their counts.

    Empty bins are left out because a sparse trace may span years of them.
    """
    indices = arrivals_ns // width_ns
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    return indices[starts], np.diff(starts, append=len(indices)).astype(np.int64)


def peak_to_mean(arrivals_ns: NDArray[np.int64], span_ns: int, width_ns: int) -> float | None:
    """Largest bin ÷ mean bin; ``None`` without arrivals, or where the span is shorter than one bin."""
    if len(arrivals_ns) == 0 or span_ns < width_ns:
        return None
    _, counts = bin_counts(arrivals_ns, width_ns)
    return float(int(counts.max()) * span_ns / (len(arrivals_ns) * width_ns))


def index_of_dispersion(arrivals_ns: NDArray[np.int64], span_ns: int, width_ns: int) -> float | None:
    """Variance ÷ mean of the counts in full bins; ``None`` with fewer than two of them, or nothing in them."""
    bins = span_ns // width_ns
    if bins < 2:
        return None
    indices, counts = bin_counts(arrivals_ns, width_ns)
    counts = counts[indices < bins]
    total = int(counts.sum())
    if total == 0:
        return None
    # Exact integers: the difference of the two squares would lose its digits in floating point.
    squares = int((counts * counts).sum())
    return (bins * squares - total * total) / (bins * total)


def gap_cv(arrivals_ns: NDArray[np.int64]) -> float | None:
    """Coefficient of variation of the gaps; ``None`` with fewer than two gaps, or where all arrivals coincide."""
    if len(arrivals_ns) < 3 or arrivals_ns[-1] == arrivals_ns[0]:
        return None
    gaps = np.diff(arrivals_ns)
    return float(gaps.std() / gaps.mean())
