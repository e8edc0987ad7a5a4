"""Steady state: what is one is not called otherwise, and what drifts, fills up or warms up is caught."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.analysis.metrics import Floats, Measured
from tailrace.harness.analysis.steadiness import (
    MIN_ARRIVALS,
    WINDOW,
    Steadiness,
    autocorrelation_time,
    effective_arrivals,
    mser,
    relative_change,
    steadiness,
    trend,
)
from tailrace.harness.records.schema import Outcome

RATE = 100
WARMUP_S = 3.0


def records(intended_s: Floats, response_ms: Floats) -> Measured:
    """+∞ is a failure."""
    intended = (intended_s * 1e9).astype(np.int64)
    failed = np.isinf(response_ms)
    return Measured(
        intended_ns=intended,
        sent_ns=intended,
        first_byte_ns=intended,
        done_ns=intended + (np.where(failed, 5.0, response_ms) * 1e6).astype(np.int64),
        outcome=np.where(failed, Outcome.ERROR, Outcome.OK).astype(np.uint8),
    )


NOTHING = records(np.empty(0), np.empty(0))


def arrivals(rng: np.random.Generator, span_s: float) -> Floats:
    """Poisson warm-up, a second of silence, and a Poisson trace, as a schedule has them; seconds."""
    warm = np.sort(rng.uniform(-WARMUP_S - 1, -1, rng.poisson(RATE * WARMUP_S)))
    return np.concatenate([warm, np.sort(rng.uniform(0, span_s, rng.poisson(RATE * span_s)))])


def queue(at_s: Floats, busy: float) -> Floats:
    """Response times of M/D/1 with that share of its capacity asked for, in ms (Lindley's recursion)."""
    service = np.arange(len(at_s)) * busy / RATE
    return 1e3 * (service + busy / RATE + np.maximum.accumulate(at_s - service) - at_s)


def judged(at_s: Floats, response_ms: Floats) -> Steadiness:
    """Negative times are warm-up."""
    warm = at_s < 0
    return steadiness(records(at_s[~warm], response_ms[~warm]), records(at_s[warm], response_ms[warm]))


def found(seed: int, span_s: float, response: Callable[[Floats, np.random.Generator], Floats]) -> bool:
    rng = np.random.default_rng(seed)
    at_s = arrivals(rng, span_s)
    result = judged(at_s, response(at_s, rng))
    return result.unlike_rest or result.drifting or result.failures_drifting


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("span_s", [10, 30])
@pytest.mark.parametrize("busy", [0.0, 0.5, 0.7, 0.8, 0.9])
def test_of_stationary_trials_at_most_one_in_twenty_is_doubted(busy: float, span_s: float) -> None:
    """Independent exponential times (busy 0), and queues from nearly idle to 90 % busy."""

    def response(at_s: Floats, rng: np.random.Generator) -> Floats:
        return queue(at_s, busy) if busy else rng.exponential(20, len(at_s))

    draws = 300
    doubted = sum(found(seed, span_s, response) for seed in range(draws))
    assert doubted <= 0.05 * draws


@pytest.mark.parametrize("span_s", [10, 30])
@pytest.mark.parametrize("total", [0.5, -0.4])
def test_a_drift_by_half_is_caught(total: float, span_s: float) -> None:
    def response(at_s: Floats, rng: np.random.Generator) -> Floats:
        return queue(at_s, 0.5) * (1 + total * np.maximum(at_s, 0) / span_s)

    assert sum(found(seed, span_s, response) for seed in range(50)) >= 45


@pytest.mark.parametrize(("busy", "at_least"), [(1.1, 35), (1.3, 49)])
def test_a_queue_that_grows_without_bound_is_caught(busy: float, at_least: int) -> None:
    assert sum(found(seed, 30, lambda at_s, _: queue(at_s, busy)) for seed in range(50)) >= at_least


def test_a_server_that_warms_up_inside_the_trace_is_caught_and_the_second_is_told() -> None:
    ends = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        at_s = arrivals(rng, 30)
        response = rng.lognormal(3, 0.3, len(at_s)) * (1 + 2 * np.exp(-np.maximum(at_s, 0) / 2))
        result = judged(at_s, response)
        assert result.unlike_rest and result.warmup_excess > 0.1
        ends.append(result.warmup_detected_s)
    assert 2 < np.median(ends) < 12


def test_a_warm_up_that_ended_before_the_trace_is_none_of_its_business() -> None:
    rng = np.random.default_rng(1)
    at_s = arrivals(rng, 30)
    response = rng.lognormal(3, 0.3, len(at_s)) * np.where(at_s < -2.5, 4.0, 1.0)
    result = judged(at_s, response)
    assert result.warmup_detected_s == pytest.approx(-2.5, abs=0.3)
    assert math.isnan(result.warmup_excess) and not result.unlike_rest


def test_a_queue_that_runs_full_and_then_only_fails_is_caught() -> None:
    """The end does not drift any more; the beginning tells."""
    rng = np.random.default_rng(2)
    at_s = arrivals(rng, 30)
    response = np.where(at_s < 5, 20 + 200 * np.maximum(at_s, 0), math.inf)
    result = judged(at_s, response)
    assert result.unlike_rest and result.warmup_excess == -1.0


def test_a_growing_share_of_failures_is_caught_though_the_median_stays() -> None:
    def response(at_s: Floats, rng: np.random.Generator) -> Floats:
        return np.where(
            rng.random(len(at_s)) < 0.25 * np.maximum(at_s, 0) / 30, math.inf, rng.exponential(20, len(at_s))
        )

    rng = np.random.default_rng(3)
    at_s = arrivals(rng, 30)
    result = judged(at_s, response(at_s, rng))
    assert result.failures_drifting
    assert result.failure_drift == pytest.approx(0.25, abs=0.06)


def test_a_tenth_that_fails_throughout_is_steady() -> None:
    def response(at_s: Floats, rng: np.random.Generator) -> Floats:
        return np.where(rng.random(len(at_s)) < 0.1, math.inf, rng.exponential(20, len(at_s)))

    assert sum(found(seed, 30, response) for seed in range(100)) <= 5


@pytest.mark.parametrize("n", [0, 1, MIN_ARRIVALS - 1, MIN_ARRIVALS, 500])
@pytest.mark.parametrize("response_ms", [10.0, math.inf])
def test_where_nothing_varies_nothing_is_claimed(n: int, response_ms: float) -> None:
    result = steadiness(records(np.arange(n) / RATE, np.full(n, response_ms)), NOTHING)
    assert math.isnan(result.effective_arrivals)
    assert not (result.unlike_rest or result.drifting or result.failures_drifting)
    assert math.isnan(result.drift) if n < MIN_ARRIVALS else result.drift == 0


@given(st.lists(st.floats(0.1, 1e4) | st.just(math.inf), max_size=300), st.integers(0, 100))
def test_whatever_the_answers_the_judgement_is_finite_or_says_that_there_is_none(
    values: list[float], warm: int
) -> None:
    at_s = (np.arange(len(values)) - min(warm, len(values))) / RATE
    result = judged(at_s, np.array(values, dtype=np.float64))
    trace = int(np.count_nonzero(at_s >= 0))
    assert math.isnan(result.effective_arrivals) or 0 < result.effective_arrivals <= trace
    if trace >= MIN_ARRIVALS:
        assert result.warmup_detected_s <= at_s[-1]
        assert result.drift >= -1 and -1.5 <= result.failure_drift <= 1.5


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_the_effective_number_is_that_of_an_autoregressive_series(r: float) -> None:
    """AR(1) has τ = (1 + r) ÷ (1 − r) exactly."""
    rng = np.random.default_rng(4)
    series = rng.normal(size=100_000)
    for i in range(1, len(series)):
        series[i] += r * series[i - 1]
    expected = len(series) * (1 - r) / (1 + r)
    assert effective_arrivals(series) == pytest.approx(expected, rel=0.1)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=60).filter(lambda v: max(v) - min(v) > 1e-3))
def test_autocorrelation_by_fourier_is_that_by_definition(values: list[float]) -> None:
    x = np.array(values) - np.mean(values)
    rho = [float(x[: len(x) - k] @ x[k:]) / float(x @ x) for k in range(len(x))]
    total, most = 0.0, math.inf
    for k in range(0, len(x) - 1, 2):
        pair = rho[k] + rho[k + 1]
        if pair <= 1e-9:  # where rounding may decide otherwise, by nothing that matters
            break
        most = min(most, pair)
        total += most
    assert autocorrelation_time(np.array(values)) == pytest.approx(max(1.0, 2 * total - 1), rel=1e-6, abs=1e-6)


def test_long_series_are_judged_by_their_middle() -> None:
    rng = np.random.default_rng(5)
    series = rng.normal(size=WINDOW + 1000)
    assert effective_arrivals(series) == pytest.approx(len(series), rel=0.05)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=60), st.integers(0, 60))
def test_mser_minimises_what_it_says(values: list[float], most: int) -> None:
    x = np.array(values)
    most = min(most, len(x) - 1)
    spread = [float(np.sum((x[d:] - x[d:].mean()) ** 2)) / (len(x) - d) ** 2 for d in range(most + 1)]
    assert spread[mser(x, most)] == pytest.approx(min(spread), rel=1e-6, abs=1e-9)


@given(st.lists(st.floats(-100, 100), min_size=5, max_size=40), st.floats(-10, 10))
def test_a_trend_is_the_slope_of_least_squares_over_the_whole_window(values: list[float], slope: float) -> None:
    y = np.array(values) + slope * np.arange(len(values))
    change, chance = trend(y)
    assert change == pytest.approx(np.polyfit(np.arange(len(y)), y, 1)[0] * len(y), rel=1e-6, abs=1e-6)
    assert 0 <= chance <= 1
    assert trend(y + 5)[0] == pytest.approx(change, rel=1e-6, abs=1e-6)


def test_a_straight_line_is_no_chance_and_a_constant_no_trend() -> None:
    assert trend(np.arange(20.0)) == pytest.approx((20.0, 0.0))
    assert trend(np.full(20, 0.1)) == pytest.approx((0.0, 1.0))
    assert trend(np.zeros(20)) == (0.0, 1.0)


@given(st.floats(0.1, 1e4), st.floats(-0.1, 0.1), st.integers(0, 4))
def test_a_relative_change_is_exact_for_a_steady_rate_and_robust_to_odd_batches(
    level: float, per_batch: float, odd: int
) -> None:
    medians = level * np.exp(per_batch * np.arange(20))
    assert relative_change(medians) == pytest.approx(math.expm1(20 * per_batch))
    medians[3 : 3 + odd] *= 50
    assert abs(math.log1p(relative_change(medians)) - 20 * per_batch) < 2.5


def test_failures_are_changes_to_and_from_infinity() -> None:
    assert relative_change(np.array([1.0] * 10 + [math.inf] * 10)) == math.inf
    assert relative_change(np.array([math.inf] * 10 + [1.0] * 10)) == -1.0
    assert relative_change(np.full(20, math.inf)) == 0.0
