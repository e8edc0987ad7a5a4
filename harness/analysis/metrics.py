"""From run records to figures: every number that a report prints about a trial is computed here, from stored records."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import bdtr

from tailrace.harness.plan.schedule import Phase
from tailrace.harness.records.record import Ends
from tailrace.harness.records.schema import OUTCOME_NAMES, PHASE_NAMES, Outcome
from tailrace.harness.records.summary import Recovery

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NS_PER_MS = 1e6
NS_PER_S = 1e9


@dataclass(frozen=True)
class Measured:
    """The arrivals of the trace itself (phase ``measure``) as arrays, one entry per arrival, ordered by intended start.

    Times in nanoseconds from the epoch. ``outcome`` holds :class:`Outcome` values; ``sent_ns`` is −1 for dropped ones.
    """

    intended_ns: Ints
    sent_ns: Ints
    first_byte_ns: Ints
    done_ns: Ints
    outcome: NDArray[np.uint8]
    model: NDArray[np.uint16] | None = None
    """Position of each arrival's model among the ``models`` that :func:`measured` was given."""

    def __len__(self) -> int:
        return len(self.intended_ns)

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which arrivals were answered with success."""
        return np.equal(self.outcome, Outcome.OK)

    def those(self, chosen: slice | Ints) -> Measured:
        """The arrivals at these positions."""
        return Measured(
            self.intended_ns[chosen],
            self.sent_ns[chosen],
            self.first_byte_ns[chosen],
            self.done_ns[chosen],
            self.outcome[chosen],
            None if self.model is None else self.model[chosen],
        )

    def response_ms(self) -> Floats:
        """Response time of every arrival: done − intended, +∞ for whatever was not answered with success."""
        return np.where(self.ok, (self.done_ns - self.intended_ns) / NS_PER_MS, np.inf)

    def service_ms(self) -> Floats:
        """Service time (done − sent) of the successes alone."""
        return (self.done_ns[self.ok] - self.sent_ns[self.ok]) / NS_PER_MS

    def send_lag_ms(self) -> Floats:
        """Send lag (sent − intended) of everything that was sent."""
        sent = self.sent_ns >= 0
        return (self.sent_ns[sent] - self.intended_ns[sent]) / NS_PER_MS

    def count(self, outcome: Outcome) -> int:
        """How many arrivals had this outcome."""
        return int(np.count_nonzero(self.outcome == outcome))


MEASURED_COLUMNS = ("intended_ns", "sent_ns", "first_byte_ns", "done_ns", "outcome", "phase")
"""The columns of a run record that :func:`measured` needs."""


def measured(requests: pa.Table, phase: Phase = Phase.MEASURE, *, models: Sequence[str] = ()) -> Measured:
    """The arrivals of one phase of a run record, of which texts may be dictionary-encoded. With ``models``, all that are in
    the record, its column ``model`` is needed too."""
    chosen = np.flatnonzero(_codes(requests["phase"], PHASE_NAMES) == phase)
    intended = requests["intended_ns"].to_numpy()[chosen]
    if (
        intended[1:] < intended[:-1]
    ).any():  # records are stored in the order of the schedule; a killed trial's are not
        order = np.argsort(intended, kind="stable")
        chosen, intended = chosen[order], intended[order]

    def column(name: str) -> Ints:
        return np.asarray(requests[name].fill_null(-1).to_numpy()[chosen], dtype=np.int64)

    return Measured(
        intended_ns=intended,
        sent_ns=column("sent_ns"),
        first_byte_ns=column("first_byte_ns"),
        done_ns=column("done_ns"),
        outcome=_codes(requests["outcome"], OUTCOME_NAMES)[chosen].astype(np.uint8),
        model=_codes(requests["model"], models)[chosen] if models else None,
    )


def _codes(texts: pa.ChunkedArray, names: Sequence[str]) -> NDArray[np.uint16]:
    """The position of each text in ``names``."""
    parts = [np.empty(0, dtype=np.uint16)]
    for chunk in texts.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        positions = np.array([names.index(name) for name in encoded.dictionary.to_pylist()], dtype=np.uint16)
        parts.append(positions[encoded.indices.to_numpy()])
    return np.concatenate(parts)


def percentile(values: Floats, q: float) -> float:
    """The nearest-rank percentile: the ⌈q·n⌉-th smallest value, +∞ included; NaN of nothing. ``q`` in (0, 1]."""
    n = len(values)
    if n == 0:
        return math.nan
    rank = nearest_rank(n, q)
    return float(np.partition(values, rank - 1)[rank - 1])


def nearest_rank(n: int, q: float) -> int:
    """⌈q·n⌉, at least 1; guarded against binary fractions (0.99·100 is 99, not 100)."""
    return max(1, math.ceil(q * n - 1e-9))


def order_statistic_bounds(n: int, q: float, confidence: float = 0.95) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the order statistics that enclose the true ``q``-quantile with at least ``confidence``.

    Exact and free of distribution: the number of observations below the quantile is Binomial(n, q), so the interval
    between ranks l and u covers with probability P(l ≤ B < u). Each side gives away at most half of the error. A bound
    that would lie outside the sample does not exist: ``None``. (Conover, Practical Nonparametric Statistics, 3.2.)
    """

    def below(k: int) -> float:
        """P(B ≤ k), which rises with k: both ends are found by bisection."""
        return float(bdtr(k, n, q))

    half = (1 - confidence) / 2
    lower = bisect_right(range(n), half, key=below)  # the largest l with P(B < l) ≤ half
    upper = bisect_left(range(n), 1 - half, key=below) + 1  # the smallest u with P(B < u) ≥ 1 − half
    return (lower if lower >= 1 else None), (upper if upper <= n else None)


def samples_needed(q: float, confidence: float = 0.95) -> int:
    """The fewest arrivals from which the upper bound of the ``q``-quantile exists: qⁿ ≤ (1 − confidence)/2.

    This is the bound of the two-sided interval, 368 arrivals for p99 at 95 %, because an interval with both ends is what
    is printed beside every percentile; a claim that rests on it must not be allowed before its upper end exists. The
    one-sided bound, qⁿ ≤ 1 − confidence, would exist from 299 arrivals on, and says less: only that the quantile is not
    higher.
    """
    return math.ceil(math.log((1 - confidence) / 2) / math.log(q))


@dataclass(frozen=True)
class Percentile:
    """A percentile with its within-trial interval in milliseconds; ``inf`` where the rank falls among failures.

    ``value`` is ``None`` when it is not claimed; ``more_needed`` then says how many more arrivals would do.
    The interval treats arrivals as independent, which queueing makes optimistic.
    """

    q: float
    value: float | None
    low: float | None
    high: float | None
    more_needed: int

    @property
    def ends(self) -> Ends | None:
        """Both ends of the interval; ``None`` unless both exist."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def claim_percentile(values: Floats, q: float, confidence: float = 0.95) -> Percentile:
    """A percentile, claimed only when the upper end of its two-sided interval exists (see :func:`samples_needed`)."""
    n = len(values)
    low, high = order_statistic_bounds(n, q, confidence)
    if high is None:
        return Percentile(q, None, None, None, max(1, samples_needed(q, confidence) - n))
    ranks = [nearest_rank(n, q), low if low is not None else 1, high]
    at, lower, upper = np.partition(values, [rank - 1 for rank in ranks])[[rank - 1 for rank in ranks]]
    return Percentile(q, float(at), float(lower), float(upper), 0)


@dataclass(frozen=True)
class Series:
    """One-second bins of a trial, by intended start; all arrays have one entry per second of the trace."""

    t_s: Floats
    offered: Ints
    ok: Ints
    good: Ints
    p50_ms: Floats
    p99_ms: Floats
    """Nearest-rank over the second's arrivals, +∞ where it falls among failures, NaN in empty seconds."""

    @property
    def attainment(self) -> Floats:
        """Good ÷ offered; NaN in seconds without arrivals."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.offered > 0, self.good / np.maximum(self.offered, 1), np.nan)


def series(records: Measured, span_s: float, slo_ms: float) -> Series:
    """The per-second view of a trial. The last second may be a partial one."""
    seconds = max(1, math.ceil(span_s - 1e-9))
    response = records.response_ms()
    inner = np.searchsorted(records.intended_ns, np.arange(1, seconds) * int(NS_PER_S))
    by_second = np.split(response, inner)  # views; the first and the last take what lies outside
    return Series(
        t_s=np.arange(seconds, dtype=np.float64),
        offered=np.array([len(values) for values in by_second], dtype=np.int64),
        ok=np.array([np.count_nonzero(part) for part in np.split(records.ok, inner)], dtype=np.int64),
        good=np.array([np.count_nonzero(values <= slo_ms) for values in by_second], dtype=np.int64),
        p50_ms=np.array([percentile(values, 0.50) for values in by_second]),
        p99_ms=np.array([percentile(values, 0.99) for values in by_second]),
    )


RECOVERY_MARGIN = 0.05
RECOVERY_HOLD_S = 3


def recovery(records: Measured, span_s: float, slo_ms: float, at_s: float) -> Recovery:
    """Recovery from a fault at ``at_s``: the time, counted from the fault, until the SLO attainment of 1-second bins,
    once it has fallen below its pre-fault mean minus 5 points, is back at least there and stays for 3 s.

    Bins begin at the fault, so that its instant does not fall inside one; an arrival that was under way when the fault
    came is hit by it and counts into the first. The search begins at the first dip, for a fault may take seconds to be
    felt. Empty bins say nothing and neither break nor prove a recovery.
    """
    t_s = records.intended_ns / NS_PER_S
    t_s = np.where(records.done_ns / NS_PER_S >= at_s, np.maximum(t_s, at_s), t_s)
    response = records.response_ms()
    good = response <= slo_ms
    before, after = t_s < at_s, t_s >= at_s
    baseline = float(np.mean(good[before])) if before.any() else None
    bins = math.floor(max(0.0, span_s - at_s) + 1e-9)
    index = np.floor(t_s[after] - at_s).astype(np.int64)
    binned = index < bins  # what comes in a last second that is not whole has no bin
    offered = np.bincount(index[binned], minlength=bins)
    seen = offered > 0
    attainment = np.full(bins, np.nan)
    np.divide(np.bincount(index[binned & good[after]], minlength=bins), offered, out=attainment, where=seen)
    low = seen & (attainment < (baseline if baseline is not None else 1.0) - RECOVERY_MARGIN)
    recovered: int | None = 0
    if low.any():
        recovered = next(
            (
                i
                for i in range(int(np.argmax(low)), bins - RECOVERY_HOLD_S + 1)
                if seen[i : i + RECOVERY_HOLD_S].any() and not low[i : i + RECOVERY_HOLD_S].any()
            ),
            None,
        )
    # An outage that no bin shows lasted less than one: it is over by the end of the first.
    until = span_s if recovered is None else at_s + max(recovered, 1)
    good_per_bin = np.bincount(index[binned & good[after]], minlength=bins)[
        : bins if recovered is None else max(recovered, 1)
    ]
    failed = after & ~records.ok
    return Recovery(
        at_s=at_s,
        baseline_attainment=baseline,
        dip_attainment=float(np.nanmin(attainment)) if seen.any() else math.nan,
        recovery_s=None if recovered is None else float(recovered),
        relapse_s=0 if recovered is None else int(np.count_nonzero(low[recovered:])),
        lost=int(np.count_nonzero(failed)),
        lost_by_outcome={
            OUTCOME_NAMES[code]: int(count)
            for code, count in enumerate(np.bincount(records.outcome[failed], minlength=len(OUTCOME_NAMES)))
            if count
        },
        first_failure_s=max(0.0, float(records.done_ns[failed].min()) / NS_PER_S - at_s) if failed.any() else None,
        baseline_goodput_rps=np.count_nonzero(good[before]) / at_s if before.any() and at_s > 0 else None,
        dip_goodput_rps=float(good_per_bin.min()) if len(good_per_bin) else math.nan,
        outage_p99_ms=percentile(response[after & (t_s < until)], 0.99),
    )
