"""Was the server in a steady state while it was measured, and how many independent arrivals is a trial worth?

Everything here works on the ranks of the response times within the trace. A failure is +∞ and a tail is heavy, so that
a mean of milliseconds does not exist or belongs to one straggler; ranks are bounded whatever happened and the same on
every monotone scale, and a growing queue, whatever the shape of its growth, is a straight line in them. How large an
effect is, is then told in medians, which readers can check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import stdtr
from scipy.stats import rankdata

from tailrace.harness.analysis.metrics import NS_PER_S, Floats, Measured, percentile

WINDOW = 1 << 20
"""Arrivals, from the middle of the trace, on which autocorrelation is estimated: a million are enough for any time that
matters, and Fourier transforms of more cost memory."""
MSER_BATCH = 5
TREND_BATCHES = 20
MIN_ARRIVALS = MSER_BATCH * TREND_BATCHES
"""Fewer are not judged."""

MIN_WARMUP_S = 1.0
"""A shorter warm-up inside the trace is not worth a verdict."""
MIN_EXCESS = 0.10
"""How much slower, or faster, the median response must be in the beginning than afterwards."""
WARMUP_Z = 4.0
"""Standard errors between both. The point is chosen where the series differs most, so a single comparison's 2.6 for 1 %
would not do; the supremum over such points has 3.6 (Andrews, Tests for parameter instability, Econometrica 61, 1993,
table I, trimming of 5 %), and the autocorrelation of short series of a busy queue is underestimated. What comes of it is
simulated in the tests."""
MIN_DRIFT = 0.10
"""Change of the median response over the trace below which a trend does not matter."""
MIN_FAILURE_DRIFT = 0.05
"""The same for the share of failures, as a difference."""
TREND_LEVEL = 0.01
"""Two-sided level of the test for a trend."""


@dataclass(frozen=True)
class Steadiness:
    """What the response times of a trial say about its steady state; NaN and false where there are too few arrivals."""

    effective_arrivals: float
    warmup_detected_s: float
    """Intended start, on the trace's clock, of the last arrival that MSER-5 would cut off."""
    warmup_excess: float
    """Median response of the trace up to there ÷ median after it − 1; NaN where nothing of the trace is cut off."""
    unlike_rest: bool
    """Whether that beginning matters and is no chance: a server that warms up (slower) or a queue that fills (faster)."""
    drift: float
    """Relative change of the median response from the trace's begin to its end; +∞ where it comes to be failures."""
    drifting: bool
    failure_drift: float
    """Change of the share of failures from the trace's begin to its end."""
    failures_drifting: bool


def steadiness(trace: Measured, warmup: Measured) -> Steadiness:
    """Judge the trace, with the warm-up traffic before it, as if nothing were meant to change."""
    response = trace.response_ms()
    if len(response) < MIN_ARRIVALS:
        ranks = rankdata(response)
        return Steadiness(effective_arrivals(ranks), math.nan, math.nan, False, math.nan, False, math.nan, False)
    ranks = rankdata(response)
    detected_s, excess, unlike_rest = _beginning(trace, warmup, response, ranks)
    batches = np.array_split(response, TREND_BATCHES)
    medians = np.array([percentile(batch, 0.5) for batch in batches])
    failures = np.array([np.mean(np.isinf(batch)) for batch in batches])
    drift = relative_change(medians)
    _, chance = trend(np.array([batch.mean() for batch in np.array_split(ranks, TREND_BATCHES)]))
    failure_drift, failure_chance = trend(failures)
    return Steadiness(
        effective_arrivals=effective_arrivals(ranks),
        warmup_detected_s=detected_s,
        warmup_excess=excess,
        unlike_rest=unlike_rest,
        drift=drift,
        drifting=chance < TREND_LEVEL and abs(drift) >= MIN_DRIFT,
        failure_drift=failure_drift,
        failures_drifting=failure_chance < TREND_LEVEL and abs(failure_drift) >= MIN_FAILURE_DRIFT,
    )


# ---------------------------------------------------------------- autocorrelation


def effective_arrivals(series: Floats) -> float:
    """How many independent arrivals would tell as much about the level of ``series`` as these do: n ÷ τ, at most n.

    NaN where nothing varies, for then nothing can be said of dependence.
    """
    n = len(series)
    middle = series if n <= WINDOW else series[(n - WINDOW) // 2 : (n + WINDOW) // 2]
    return n / autocorrelation_time(middle)


def autocorrelation_time(series: Floats) -> float:
    """The integrated autocorrelation time τ = 1 + 2 Σ ρ_k, at least 1; NaN where nothing varies.

    The sum is cut by Geyer's initial monotone sequence (Practical Markov Chain Monte Carlo, Statistical Science 7, 1992,
    3.3): sums of two neighbouring ρ are taken as long as they are positive, and none counts more than one before it.
    Autocorrelation through the Fourier transform, O(n log n).
    """
    n = len(series)
    if n < 2 or series.min() == series.max():
        return math.nan
    size = next_fast_len(2 * n, real=True)  # padded with zeros, so that the end does not meet the beginning
    spectrum = np.abs(rfft(series - series.mean(), size)) ** 2
    covariance = irfft(spectrum, size)[:n]
    pairs = (covariance[: n - n % 2] / covariance[0]).reshape(-1, 2).sum(axis=1)
    positive = pairs[: int(np.argmax(pairs <= 0))] if (pairs <= 0).any() else pairs
    return max(1.0, 2.0 * float(np.minimum.accumulate(positive).sum()) - 1.0)


# ---------------------------------------------------------------- warm-up


def mser(batch_means: Floats, most: int) -> int:
    """How many batches to cut off at the beginning, at most ``most``: the marginal standard error rule.

    The d that minimises Σ_{i>d} (x_i − mean)² ÷ (n − d)², which is the squared half-width of the interval for the mean of
    what is left, up to a constant. With batches of five: MSER-5 (White, An effective truncation heuristic for bias
    reduction in simulation output, Simulation 69, 1997; Franklin & White, Stationarity tests and MSER-5, Winter
    Simulation Conference 2008).
    """
    n = len(batch_means)
    x = batch_means - batch_means.mean()  # before it is squared: differences of large sums lose digits
    left = np.arange(n, 0, -1, dtype=np.float64)
    sums = np.cumsum(x[::-1])[::-1]
    squares = np.cumsum(np.square(x[::-1]))[::-1]
    return int(np.argmin(((squares - sums * sums / left) / left**2)[: most + 1]))


def _beginning(trace: Measured, warmup: Measured, response: Floats, ranks: Floats) -> tuple[float, float, bool]:
    """Where MSER-5 on warm-up and trace puts the end of the initial transient, by how much the trace was slower up to
    there, and whether that is a transient that matters.

    At most the first half of the trace may be cut off: a minimum beyond it is no beginning (White 1997), and a trend
    tells more about it. MSER always has a minimum, and on noise that is correlated it lies anywhere; so a cut inside the
    trace counts only when it is longer than :data:`MIN_WARMUP_S`, when the medians on both sides differ by
    :data:`MIN_EXCESS`, and when the mean ranks on both sides lie :data:`WARMUP_Z` standard errors apart, of which the
    autocorrelation time of the rest says how large they are.
    """
    ordered = np.sort(response)
    before = warmup.response_ms()
    lower, upper = (np.searchsorted(ordered, before, side=side) for side in ("left", "right"))
    warm_ranks = (lower + upper + 1) / 2  # the rank that each would have had in the trace
    both = np.concatenate([warm_ranks, ranks])
    whole = len(both) - len(both) % MSER_BATCH
    batch_means = both[:whole].reshape(-1, MSER_BATCH).mean(axis=1)
    most = min((len(before) + len(response) // 2) // MSER_BATCH, len(batch_means) - 1)
    cut = mser(batch_means, most) * MSER_BATCH
    if cut <= len(before):
        last_cut = warmup.intended_ns[max(0, cut - 1)] if len(before) else 0  # nothing cut off: the first of all
        return float(last_cut) / NS_PER_S, math.nan, False
    head = cut - len(before)
    detected_s = float(trace.intended_ns[head - 1]) / NS_PER_S
    slow, usual = percentile(response[:head], 0.5), percentile(response[head:], 0.5)
    excess = slow / usual - 1 if math.isfinite(slow) or math.isfinite(usual) else math.nan  # both ∞: nothing to compare
    if detected_s <= MIN_WARMUP_S or not abs(excess) >= MIN_EXCESS:
        return detected_s, excess, False
    rest = ranks[head:]
    error = float(rest.std()) / math.sqrt(effective_arrivals(rest)) if rest.min() < rest.max() else 0.0
    apart = abs(float(ranks[:head].mean() - rest.mean()))
    return detected_s, excess, apart > WARMUP_Z * error * math.sqrt(1 + len(rest) / head)


# ---------------------------------------------------------------- trend


def trend(batches: Floats) -> tuple[float, float]:
    """The change of a straight line through equally long batches, from begin to end of them all, and the probability of
    one as large by chance (two-sided).

    Least squares, with the number of batches reduced for the autocorrelation r of the residuals at lag 1, both in the
    standard error and in the degrees of freedom of Student's t: n_e = n (1 − r) ÷ (1 + r) (Santer et al., Statistical
    significance of trends and trend differences in layer-average atmospheric temperature time series, Journal of
    Geophysical Research 105, 2000). From so few residuals r comes out too small, by (1 + 4 r) ÷ n when a mean is taken
    off (Kendall, Note on bias in the estimation of autocorrelation, Biometrika 41, 1954), which is given back; a negative
    r is not believed.
    """
    n = len(batches)
    x = (np.arange(n) + 0.5) / n - 0.5
    y = batches - batches.mean()
    change = float(x @ y / (x @ x))
    residuals = y - change * x
    left = float(residuals @ residuals)
    if left <= 1e-20 * float(batches @ batches):  # a straight line, but for rounding
        flat = abs(change) <= 1e-9 * float(np.abs(batches).max())
        return change, 1.0 if flat else 0.0
    r = float(residuals[1:] @ residuals[:-1]) / left
    r = min(0.99, max(0.0, r + (1 + 4 * r) / n))
    freedom = max(0.5, n * (1 - r) / (1 + r) - 2)
    t = abs(change) / math.sqrt(left / freedom / float(x @ x))
    return change, 2 * float(stdtr(freedom, -t))


def relative_change(medians: Floats) -> float:
    """By how much the level changes from the begin to the end of equally long batches, relative to the begin, from their
    medians in milliseconds: exp(slope) − 1, with the slope of Theil and Sen on logarithms, the median over all pairs of
    batches, which a few odd batches do not move. +∞: the median comes to be failures; −1: it ceases to be; 0 where all
    fail throughout. (Sen, Journal of the American Statistical Association 63, 1968.)
    """
    earlier, later = np.triu_indices(len(medians), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        levels = np.log(medians)
        slopes = (levels[later] - levels[earlier]) / (later - earlier)
    slopes = np.sort(slopes[~np.isnan(slopes)])  # two failing batches say nothing
    return math.expm1(percentile(slopes, 0.5) * len(medians)) if len(slopes) else 0.0
