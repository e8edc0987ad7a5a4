"""The arithmetic of the tail: percentiles with failures as +∞, exact intervals, goodput per second, recovery."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from tailrace.harness.analysis.metrics import (
    Measured,
    Recovery,
    claim_percentile,
    measured,
    nearest_rank,
    order_statistic_bounds,
    percentile,
    recovery,
    samples_needed,
    series,
)
from tailrace.harness.records.schema import OUTCOME_NAMES, PHASE_NAMES, Outcome


def records(intended_s: list[float], response_ms: list[float], outcomes: list[Outcome] | None = None) -> Measured:
    intended = (np.asarray(intended_s) * 1e9).astype(np.int64)
    finite = np.nan_to_num(np.asarray(response_ms, dtype=float), posinf=5.0)
    outcome = outcomes or [Outcome.OK if math.isfinite(r) else Outcome.SHED for r in response_ms]
    return Measured(
        intended_ns=intended,
        sent_ns=intended,
        first_byte_ns=intended,
        done_ns=intended + (finite * 1e6).astype(np.int64),
        outcome=np.asarray(outcome, dtype=np.uint8),
    )


def test_a_server_that_sheds_in_4_ms_has_no_p99_of_4_ms() -> None:
    shed = records([0.0] * 1000, [4.0] * 1000, [Outcome.SHED] * 1000)
    assert percentile(shed.response_ms(), 0.99) == math.inf
    two_percent = records([0.0] * 1000, [4.0] * 1000, [Outcome.SHED] * 20 + [Outcome.OK] * 980)
    assert percentile(two_percent.response_ms(), 0.99) == math.inf
    assert percentile(two_percent.response_ms(), 0.50) == pytest.approx(4.0)


@given(st.lists(st.floats(0, 1e6) | st.just(math.inf), min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_percentile_is_the_nearest_rank(values: list[float], q: float) -> None:
    array = np.asarray(values)
    result = percentile(array, q)
    assert result in values
    assert np.count_nonzero(array <= result) >= q * len(values) - 1e-6
    assert np.count_nonzero(array < result) < q * len(values) + 1e-6


def test_nearest_rank_is_exact_where_binary_fractions_are_not() -> None:
    assert nearest_rank(100, 0.99) == 99
    assert nearest_rank(1000, 0.999) == 999
    assert nearest_rank(101, 0.99) == 100
    assert nearest_rank(1, 0.5) == 1
    assert math.isnan(percentile(np.array([]), 0.5))


@given(st.integers(1, 3000), st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_order_statistic_bounds_are_exact_and_tight(n: int, q: float) -> None:
    low, high = order_statistic_bounds(n, q)
    if low is not None:
        assert binom.cdf(low - 1, n, q) <= 0.025
        assert low == n or binom.cdf(low, n, q) > 0.025, "one rank higher would still hold: not tight"
    else:
        assert binom.cdf(0, n, q) > 0.025
    if high is not None:
        assert binom.sf(high - 1, n, q) <= 0.025
        assert binom.sf(high - 2, n, q) > 0.025, "one rank lower would still hold: not tight"
    else:
        assert binom.sf(n - 1, n, q) > 0.025
    if low is not None and high is not None:
        assert binom.cdf(high - 1, n, q) - binom.cdf(low - 1, n, q) >= 0.95


def test_p99_is_claimed_from_368_arrivals_on() -> None:
    assert samples_needed(0.99) == 368
    short = claim_percentile(np.arange(367.0), 0.99)
    assert short.value is None
    assert short.more_needed == 1
    enough = claim_percentile(np.arange(368.0), 0.99)
    assert enough.value == 364.0
    assert enough.high == 367.0


def test_the_claim_rests_on_the_two_sided_bound() -> None:
    """A one-sided one would exist from 299 arrivals on; what is printed has two ends."""
    assert math.ceil(math.log(0.05) / math.log(0.99)) == 299
    assert 0.99**299 <= 0.05 < 0.99**298
    assert 0.99**368 <= 0.025 < 0.99**367
    for q in (0.5, 0.9, 0.99, 0.999):
        needed = samples_needed(q)
        assert order_statistic_bounds(needed, q)[1] == needed
        assert order_statistic_bounds(needed - 1, q)[1] is None


@pytest.mark.parametrize(
    ("q", "n"),
    [(0.5, 20), (0.5, 101), (0.5, 2000), (0.9, 50), (0.9, 500), (0.9, 3000), (0.99, 500), (0.99, 1000), (0.99, 5000)],
)
def test_the_interval_covers_the_true_quantile_as_often_as_computed(q: float, n: int) -> None:
    """Of 4,000 draws; four standard errors, the Monte-Carlo error that is allowed, are 1.4 points at 95 %.

    p99 of 500 covers 98 %: of so few arrivals, no two order statistics come closer to 95 % from above.
    """
    draws = 4000
    rng = np.random.default_rng([n, round(1000 * q)])
    truth = -math.log(1 - q)  # of the exponential distribution
    below = np.concatenate(
        [np.count_nonzero(rng.exponential(size=(500, n)) < truth, axis=1) for _ in range(draws // 500)]
    )
    low, high = order_statistic_bounds(n, q)
    assert low is not None
    assert high is not None
    covered = float(np.mean((low <= below) & (below < high)))  # the l-th smallest lies below, the u-th does not
    exact = float(binom.cdf(high - 1, n, q) - binom.cdf(low - 1, n, q))
    assert exact >= 0.95
    assert covered >= 0.94
    assert abs(covered - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)
    if (q, n) == (0.99, 500):
        assert exact == pytest.approx(0.98, abs=0.005)


def test_the_claimed_interval_is_made_of_these_order_statistics() -> None:
    rng = np.random.default_rng(8)
    values = rng.exponential(size=1000)
    values[:5] = math.inf
    ordered = np.sort(values)
    for q in (0.5, 0.9, 0.99):
        low, high = order_statistic_bounds(1000, q)
        assert low is not None and high is not None
        claimed = claim_percentile(values, q)
        assert (claimed.low, claimed.high) == (ordered[low - 1], ordered[high - 1])
        assert claimed.value == percentile(values, q)


@given(st.lists(st.tuples(st.floats(0, 9.999), st.floats(0, 500) | st.just(math.inf)), min_size=0, max_size=200))
def test_series_loses_and_invents_nothing(arrivals: list[tuple[float, float]]) -> None:
    arrivals = sorted(arrivals)
    data = records([a for a, _ in arrivals], [r for _, r in arrivals])
    bins = series(data, 10.0, 200.0)
    assert len(bins.t_s) == 10
    assert bins.offered.sum() == len(arrivals)
    assert bins.ok.sum() == sum(math.isfinite(r) for _, r in arrivals)
    assert bins.good.sum() == np.count_nonzero(data.response_ms() <= 200.0)
    assert np.isnan(bins.p99_ms).sum() == np.count_nonzero(bins.offered == 0)


def steady(span_s: int, bad: tuple[float, float] | None = None) -> Measured:
    times = [i / 20 for i in range(span_s * 20)]
    return records(times, [math.inf if bad and bad[0] <= t < bad[1] else 10.0 for t in times])


def test_recovery_is_the_time_until_attainment_is_back_and_stays() -> None:
    result = recovery(steady(40, bad=(20.0, 24.5)), 40, 200, 20.0)
    assert result.baseline_attainment == 1.0
    assert result.dip_attainment == 0.0
    assert result.recovery_s == 5.0
    assert result.lost == 90
    assert result.outage_p99_ms == math.inf


def test_a_fault_without_effect_recovers_at_once_and_loses_nothing() -> None:
    result = recovery(steady(40), 40, 200, 20.0)
    assert result.recovery_s == 0.0
    assert result.lost == 0
    assert result.outage_p99_ms == pytest.approx(10.0)


def test_what_does_not_come_back_within_the_trace_is_not_recovered() -> None:
    result = recovery(steady(40, bad=(20.0, 38.0)), 40, 200, 20.0)
    assert result.recovery_s is None
    assert result.lost == 18 * 20


def test_a_relapse_within_three_seconds_is_no_recovery_and_a_later_one_is_told() -> None:
    times = [i / 20 for i in range(800)]

    def after(*bad: tuple[int, int]) -> Recovery:
        values = [math.inf if any(a <= t < b for a, b in bad) else 10.0 for t in times]
        return recovery(records(times, values), 40, 200, 20.0)

    soon = after((20, 22), (24, 25))
    assert (soon.recovery_s, soon.relapse_s, soon.lost) == (5.0, 0, 60)
    late = after((20, 22), (27, 28), (33, 35))
    assert (late.recovery_s, late.relapse_s, late.lost) == (2.0, 3, 100)


def test_a_fault_that_is_felt_late_has_not_recovered_before_it_was_felt() -> None:
    result = recovery(steady(40, bad=(24.0, 26.0)), 40, 200, 20.0)
    assert (result.recovery_s, result.relapse_s, result.lost) == (6.0, 0, 40)


def test_what_was_under_way_when_the_fault_came_is_hit_by_it() -> None:
    """600 ms of service time: whatever began up to 600 ms before the kill is lost with the server that held it."""
    times = [i / 20 for i in range(800)]
    data = records(times, [600.0] * 800)
    data.outcome[388:400] = Outcome.CONNECTION  # intended before second 20, failed at it
    data.done_ns[388:400] = 20 * 10**9 + 1
    result = recovery(data, 40, 1000, 20.0)
    assert result.baseline_attainment == 1.0
    assert result.lost == 12
    assert result.dip_attainment < 1.0


def test_failures_too_few_to_lower_attainment_are_counted_all_the_same() -> None:
    times = [i / 100 for i in range(4000)]
    data = records(times, [math.inf if t >= 20 and i % 50 == 0 else 10.0 for i, t in enumerate(times)])
    result = recovery(data, 40, 200, 20.0)
    assert (result.recovery_s, result.lost) == (0.0, 40)


def _plain_attainment(data: Measured, span_s: float, slo_ms: float, at_s: float) -> list[float]:
    """Of whole seconds after the fault, arrival by arrival."""
    seconds: dict[int, list[bool]] = {}
    for intended, done, response in zip(data.intended_ns, data.done_ns, data.response_ms(), strict=True):
        t_s = max(intended / 1e9, at_s) if done / 1e9 >= at_s else intended / 1e9
        if t_s >= at_s and math.floor(t_s - at_s) < math.floor(span_s - at_s):
            seconds.setdefault(math.floor(t_s - at_s), []).append(bool(response <= slo_ms))
    return [sum(good) / len(good) for good in seconds.values()]


def test_of_many_records_the_figures_are_those_of_the_straightforward_way() -> None:
    """10⁵ arrivals, unordered, with every outcome, read from a table with plain texts and one with dictionaries."""
    rng = np.random.default_rng(9)
    n, span_s, slo_ms, at_s = 100_000, 100.0, 30.0, 40.5
    intended = (rng.uniform(0, span_s, n) * 1e9).astype(np.int64)
    done = intended + (rng.lognormal(2.5, 0.8, n) * 1e6).astype(np.int64)
    outcome = np.where(
        (intended > 41e9) & (intended < 47e9), 4, rng.choice(6, n, p=[0.95, 0.01, 0.01, 0.01, 0.01, 0.01])
    )
    sent = pa.array(intended + 1000, mask=outcome == Outcome.DROPPED)
    phase = np.where(np.arange(n) % 10 == 0, 0, 1)
    table = pa.table(
        {
            "intended_ns": intended,
            "sent_ns": sent,
            "first_byte_ns": pa.nulls(n, pa.int64()),
            "done_ns": done,
            "outcome": pa.array(np.array(OUTCOME_NAMES)[outcome]),
            "phase": pa.array(np.array(PHASE_NAMES)[phase]),
        }
    )
    for name in ("outcome", "phase"):
        encoded = pa.chunked_array(
            [table[name][:7].dictionary_encode().chunk(0), table[name][7:].dictionary_encode().chunk(0)]
        )
        chunked = table.set_column(table.column_names.index(name), name, encoded)
    data = measured(table)
    for field in ("intended_ns", "sent_ns", "first_byte_ns", "done_ns", "outcome"):
        assert np.array_equal(getattr(data, field), getattr(measured(chunked), field))
    order = np.array(sorted(np.flatnonzero(phase == 1), key=lambda i: intended[i]))
    assert np.array_equal(data.intended_ns, intended[order])
    assert np.array_equal(data.done_ns, done[order])
    assert np.array_equal(data.outcome, outcome[order])
    assert np.array_equal(data.sent_ns, np.where(outcome[order] == Outcome.DROPPED, -1, intended[order] + 1000))
    assert (data.first_byte_ns == -1).all()

    response = data.response_ms()
    bins = series(data, span_s, slo_ms)
    second = data.intended_ns // 10**9
    for i in range(100):
        members = response[second == i]
        assert bins.offered[i] == len(members)
        assert bins.ok[i] == np.count_nonzero(np.isfinite(members))
        assert bins.good[i] == np.count_nonzero(members <= slo_ms)
        assert bins.p99_ms[i] == np.sort(members)[nearest_rank(len(members), 0.99) - 1]

    found = recovery(data, span_s, slo_ms, at_s)
    assert found.dip_attainment == min(_plain_attainment(data, span_s, slo_ms, at_s))
    assert found.recovery_s is not None and 6 <= found.recovery_s <= 8
    after = np.maximum(data.intended_ns, np.where(data.done_ns / 1e9 >= at_s, at_s * 1e9, 0)) >= at_s * 1e9
    assert found.lost == np.count_nonzero(after & ~data.ok)
