"""How many trials a rule takes: the power of its interval, from the noncentral t distribution."""

from __future__ import annotations

import math
from bisect import bisect_left

from scipy.special import stdtrit
from scipy.stats import nct

from tailrace.harness.analysis.comparison import MIN_TRIALS

MOST_TRIALS = 1_000
"""More than these nobody runs."""
POWER = 0.9


def power(trials: int, distance: float, noise: float) -> float:
    """The chance that the 95 % interval of a ratio lies wholly on the side of the bound on which the true ratio is.

    ``distance`` is |log(true ratio ÷ bound)|, ``noise`` the standard deviation of the logarithms of the ratios of single
    trials, of which there are so many. Their mean ÷ standard error is then noncentral t with trials − 1 degrees of freedom
    and noncentrality distance ÷ noise · √trials, and the interval clears the bound where that is above Student's 97.5 %
    quantile. 0 from fewer than three trials, for they have no interval.
    """
    if trials < MIN_TRIALS or distance <= 0:
        return 0.0
    if noise <= 0:
        return 1.0
    df = trials - 1
    return float(nct.sf(stdtrit(df, 0.975), df, distance / noise * math.sqrt(trials)))


def trials_needed(distance: float, noise: float, wanted: float = POWER) -> int | None:
    """The fewest trials with which :func:`power` reaches ``wanted``; ``None`` where a thousand do not."""
    counts = range(MIN_TRIALS, MOST_TRIALS + 1)
    position = bisect_left(counts, wanted, key=lambda trials: power(trials, distance, noise))
    return counts[position] if position < len(counts) else None
