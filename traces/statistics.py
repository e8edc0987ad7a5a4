"""How bursty a trace is: the figures that describe it, and that a rescaling is judged by.

Definitions, with bins aligned to the start of the trace:

- mean rate: arrivals ÷ span;
- peak-to-mean over a window *w*: the largest count in any bin of width *w* ÷ (mean rate × *w*);
- index of dispersion over *w*: variance ÷ mean of the counts in the full bins (1 for a Poisson process);
- CV of the gaps: standard deviation ÷ mean of the times between arrivals (1 for a Poisson process).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000


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
