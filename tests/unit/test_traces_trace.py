"""The arithmetic of traces: windows, rescaling, compression and tails keep what they promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tailrace.harness.errors import InputError
from tailrace.traces.generators import SteadyParameters, SurgeParameters, steady, surge
from tailrace.traces.statistics import NS_PER_S, bin_counts, gap_cv, index_of_dispersion, peak_to_mean
from tailrace.traces.trace import MAX_NS, Trace, compress_time, describe, random_source, rescale, window, with_tail

SEEDS = st.integers(0, 2**32)


def trace_of(stamps: list[int], span_ns: int | None = None, **fields: Any) -> Trace:
    arrivals = np.array(sorted(stamps), dtype=np.int64)
    return Trace(
        name="t",
        arrivals_ns=arrivals,
        span_ns=span_ns or (int(arrivals[-1]) + 1 if len(stamps) else NS_PER_S),
        **fields,
    )


@st.composite
def traces(draw: st.DrawFn, min_size: int = 0) -> Trace:
    span_ns = draw(st.integers(1, 10**14))
    stamps = draw(st.lists(st.integers(0, span_ns - 1), min_size=min_size, max_size=60))
    models = np.arange(len(stamps), dtype=np.int64) if draw(st.booleans()) else None
    return trace_of(stamps, span_ns, model_index=models)


def kept_in_order(part: NDArray[np.int64], whole: NDArray[np.int64]) -> bool:
    """Whether ``part`` is a sub-multiset of ``whole``."""
    values, counts = np.unique(part, return_counts=True)
    return all(np.count_nonzero(whole == value) >= count for value, count in zip(values, counts, strict=True))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "name"),
        ({"arrivals_ns": np.array([2, 1], dtype=np.int64)}, "not sorted"),
        ({"arrivals_ns": np.array([-1, 1], dtype=np.int64)}, "leaves the span"),
        ({"arrivals_ns": np.array([0, 10], dtype=np.int64)}, "leaves the span"),
        ({"arrivals_ns": np.array([0.0, 1.0])}, "int64"),
        ({"arrivals_ns": np.zeros((1, 2), dtype=np.int64)}, "int64"),
        ({"span_ns": 0}, "span_ns"),
        ({"span_ns": 2**63}, "span_ns"),
        ({"model_index": np.array([0], dtype=np.int64)}, "model_index has 1"),
        ({"model_index": np.array([0, -1], dtype=np.int64)}, "negative"),
        ({"fault_at_s": 1.0}, "fault_at_s"),
        ({"fault_at_s": float("nan")}, "fault_at_s"),
        ({"resolution_s": -1.0}, "resolution_s"),
    ],
)
def test_an_impossible_trace_is_refused(fields: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"name": "t", "arrivals_ns": np.array([0, 9], dtype=np.int64), "span_ns": 10}
    assert len(Trace(**good)) == 2
    with pytest.raises(InputError, match=says):
        Trace(**{**good, **fields})


def test_arrivals_cannot_be_written_through_a_trace() -> None:
    trace = trace_of([1, 2])
    with pytest.raises(ValueError, match="read-only"):
        trace.arrivals_ns[0] = 0


@given(traces(), st.floats(0, 1), st.floats(0, 1))
def test_a_window_holds_exactly_the_arrivals_inside_it(trace: Trace, a: float, b: float) -> None:
    start_s, end_s = sorted((a * trace.span_s, b * trace.span_s))
    if round(start_s * NS_PER_S) == round(end_s * NS_PER_S):
        with pytest.raises(InputError):
            window(trace, start_s, end_s)
        return
    part = window(trace, start_s, end_s)
    start_ns = round(start_s * NS_PER_S)
    inside = (trace.arrivals_ns >= start_ns) & (trace.arrivals_ns < start_ns + part.span_ns)
    assert (part.arrivals_ns + start_ns).tolist() == trace.arrivals_ns[inside].tolist()
    if trace.model_index is not None:
        assert part.model_index is not None
        assert part.model_index.tolist() == trace.model_index[inside].tolist()


@given(traces(), st.floats(0.01, 0.99))
def test_two_adjacent_windows_make_the_whole(trace: Trace, cut: float) -> None:
    at = cut * trace.span_s
    if not 0 < round(at * NS_PER_S) < trace.span_ns:
        return
    left, right = window(trace, 0, at), window(trace, at, trace.span_s)
    assert left.span_ns + right.span_ns == trace.span_ns
    assert [*left.arrivals_ns, *(right.arrivals_ns + left.span_ns)] == trace.arrivals_ns.tolist()


def test_a_window_moves_the_fault_or_drops_it() -> None:
    trace = surge(SurgeParameters(), seed=1)
    assert window(trace, 5, 25).fault_at_s == 15
    assert window(trace, 0, 20).fault_at_s is None
    assert window(trace, 21, 25).fault_at_s is None


@pytest.mark.parametrize("bounds", [(-1, 5), (5, 5), (6, 5), (0, 31), (float("nan"), 5), (0, float("inf"))])
def test_a_window_outside_the_trace_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="window"):
        window(surge(SurgeParameters(), seed=1), *bounds)


@given(traces(min_size=2), st.floats(1, 12), SEEDS)
def test_rescaling_up_meets_the_rate_and_keeps_every_arrival(trace: Trace, factor: float, seed: int) -> None:
    bigger = rescale(trace, trace.mean_rate * factor, seed)
    assert len(bigger) == round(trace.mean_rate * factor * trace.span_s)
    assert kept_in_order(trace.arrivals_ns, bigger.arrivals_ns)
    assert (bigger.arrivals_ns[0], bigger.arrivals_ns[-1]) == (trace.arrivals_ns[0], trace.arrivals_ns[-1])
    assert bigger.span_ns == trace.span_ns
    assert bigger.arrivals_ns.tolist() == rescale(trace, trace.mean_rate * factor, seed).arrivals_ns.tolist()
    if trace.model_index is not None:
        assert bigger.model_index is not None
        assert set(bigger.model_index) == set(trace.model_index)
        # each arrival carries the model of the last original arrival at or before it
        assert bool(np.all(trace.arrivals_ns[bigger.model_index] <= bigger.arrivals_ns))


@given(traces(min_size=2), st.integers(1, 8), SEEDS)
def test_a_whole_factor_divides_every_gap_evenly(trace: Trace, factor: int, seed: int) -> None:
    bigger = rescale(trace, trace.mean_rate * factor, seed)
    assert len(bigger) == factor * len(trace)
    pieces = np.diff(np.searchsorted(bigger.arrivals_ns, np.unique(trace.arrivals_ns)))
    assert len(trace) <= factor or bool(np.all(pieces >= factor))
    if len(trace) > factor and len(np.unique(trace.arrivals_ns)) == len(trace):
        assert pieces.sum() - factor * len(pieces) == factor - 1  # one gap fewer than arrivals


@given(traces(min_size=1), st.floats(0.01, 0.99), SEEDS)
def test_rescaling_down_keeps_a_subset(trace: Trace, factor: float, seed: int) -> None:
    smaller = rescale(trace, trace.mean_rate * factor, seed)
    assert kept_in_order(smaller.arrivals_ns, trace.arrivals_ns)
    assert smaller.span_ns == trace.span_ns
    assert smaller.arrivals_ns.tolist() == rescale(trace, trace.mean_rate * factor, seed).arrivals_ns.tolist()
    if trace.model_index is not None:
        assert smaller.model_index is not None
        assert trace.arrivals_ns[smaller.model_index].tolist() == smaller.arrivals_ns.tolist()


@given(st.floats(0.05, 0.95), SEEDS)
def test_thinning_meets_the_rate_within_five_standard_deviations(factor: float, seed: int) -> None:
    trace = steady(SteadyParameters(rate=500, duration_s=20), seed=7)
    kept = len(rescale(trace, trace.mean_rate * factor, seed))
    deviation = (len(trace) * factor * (1 - factor)) ** 0.5
    assert abs(kept - len(trace) * factor) <= 5 * deviation + 1


def test_another_seed_thins_and_divides_otherwise() -> None:
    trace = steady(SteadyParameters(), seed=1)
    for rate in (20.0, 250.0):
        assert rescale(trace, rate, 1).arrivals_ns.tolist() != rescale(trace, rate, 2).arrivals_ns.tolist()


def test_thinning_is_independent_of_the_draws_that_made_the_trace() -> None:
    trace = steady(SteadyParameters(rate=2000), seed=3)
    halves = rescale(trace, trace.mean_rate / 2, 3).arrivals_ns // (15 * NS_PER_S)
    assert abs(np.count_nonzero(halves == 0) - np.count_nonzero(halves == 1)) < 5 * len(halves) ** 0.5


def test_each_purpose_draws_for_itself() -> None:
    assert random_source(1, "a").random() == random_source(1, "a").random()
    assert len({random_source(seed, purpose).random() for seed in (1, 2) for purpose in ("a", "b", "ab")}) == 6
    with pytest.raises(InputError, match="seed is -1"):
        random_source(-1, "a")


def test_rescaling_records_the_burstiness_before_and_after() -> None:
    trace = surge(SurgeParameters(), seed=1)
    halved = rescale(trace, trace.mean_rate / 2, 9)
    done = halved.provenance["transformations"]
    assert isinstance(done, list)
    record = done[-1]
    assert isinstance(record, dict)
    assert record["before"] == describe(trace).as_dict()
    assert record["after"] == describe(halved).as_dict()
    assert (record["method"], record["seed"]) == ("independent thinning", 9)
    assert trace.provenance["transformations"] == []


def test_subdivision_survives_gaps_and_counts_whose_product_overflows() -> None:
    trace = trace_of([0, MAX_NS - 2], MAX_NS - 1)
    bigger = rescale(trace, 10_000 / trace.span_s, 1)
    assert len(bigger) == 10_000
    assert len(set(np.diff(bigger.arrivals_ns).tolist())) <= 2


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), 1e12])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match="arrivals/s"):
        rescale(steady(SteadyParameters(), seed=1), rate, 1)


def test_rescaling_needs_something_to_rescale() -> None:
    with pytest.raises(InputError, match="no arrivals"):
        rescale(trace_of([]), 5, 1)
    with pytest.raises(InputError, match="no gap"):
        rescale(trace_of([0], NS_PER_S), 5, 1)
    assert len(rescale(trace_of([0], NS_PER_S), 1, 1)) == 1


@given(traces(), st.floats(0.1, 100))
def test_compressing_time_keeps_the_arrivals_and_their_order(trace: Trace, factor: float) -> None:
    faster = compress_time(trace, factor)
    assert len(faster) == len(trace)
    assert abs(faster.span_ns - trace.span_ns / factor) <= 1
    assert bool(np.all(np.abs(faster.arrivals_ns - trace.arrivals_ns / factor) <= 1))


def test_compressing_time_moves_the_fault() -> None:
    faster = compress_time(surge(SurgeParameters(), seed=1), 2)
    assert (faster.fault_at_s, faster.span_s) == (10, 15)
    with pytest.raises(InputError):
        compress_time(faster, 0)


@given(traces(), st.floats(0.001, 60), SEEDS)
def test_a_tail_joins_after_the_trace(trace: Trace, tail_s: float, seed: int) -> None:
    trace = trace_of([a // 1000 for a in trace.arrivals_ns.tolist()], 10**12)  # a span at which rates stay sane
    longer = with_tail(trace, tail_s, seed)
    assert longer.span_ns == trace.span_ns + round(tail_s * NS_PER_S)
    assert longer.arrivals_ns[: len(trace)].tolist() == trace.arrivals_ns.tolist()
    assert bool(np.all(longer.arrivals_ns[len(trace) :] >= trace.span_ns))
    assert longer.arrivals_ns.tolist() == with_tail(trace, tail_s, seed).arrivals_ns.tolist()


def test_the_tail_of_a_surge_goes_on_at_its_base_rate() -> None:
    trace = surge(SurgeParameters(), seed=4)
    longer = with_tail(trace, 1000, seed=4)
    done = longer.provenance["transformations"]
    assert isinstance(done, list)
    assert isinstance(done[0], dict)
    rate = done[0]["rate"]
    assert isinstance(rate, float)
    assert abs(rate - 40) < 5 * (40 / 3) ** 0.5
    assert abs(len(longer) - len(trace) - 1000 * rate) < 5 * (1000 * rate) ** 0.5
    assert longer.transient
    assert longer.fault_at_s == 20


def test_a_tail_after_silence_has_one_arrival_a_second_and_known_models() -> None:
    trace = trace_of([0, 1], 100 * NS_PER_S, model_index=np.array([3, 5], dtype=np.int64))
    longer = with_tail(trace, 400, seed=1)
    assert abs(len(longer) - 402) < 5 * 20
    assert longer.model_index is not None
    assert set(longer.model_index.tolist()) == {3, 5}
    assert with_tail(trace, 0, seed=1) is trace
    for tail_s in (-1.0, float("nan"), 1e9):
        with pytest.raises(InputError, match="tail"):
            with_tail(trace, tail_s, seed=1)


@given(traces(), st.integers(1, 10**13))
def test_bins_add_up(trace: Trace, width_ns: int) -> None:
    indices, counts = bin_counts(trace.arrivals_ns, width_ns)
    assert counts.sum() == len(trace)
    assert bool(np.all(counts > 0))
    assert sorted(set((trace.arrivals_ns // width_ns).tolist())) == indices.tolist()


@given(traces(min_size=1), st.integers(1, 50))
def test_figures_agree_with_dense_bins(trace: Trace, bins: int) -> None:
    width_ns = max(1, trace.span_ns // bins)
    if trace.span_ns // width_ns > 10_000:
        return
    dense = np.bincount(trace.arrivals_ns // width_ns, minlength=-(-trace.span_ns // width_ns))
    assert peak_to_mean(trace.arrivals_ns, trace.span_ns, width_ns) == pytest.approx(
        dense.max() / (trace.mean_rate * width_ns / NS_PER_S)
    )
    full = dense[: trace.span_ns // width_ns]
    dispersion = index_of_dispersion(trace.arrivals_ns, trace.span_ns, width_ns)
    if len(full) < 2 or full.sum() == 0:
        assert dispersion is None
    else:
        assert dispersion == pytest.approx(full.var() / full.mean(), abs=1e-9)


def test_a_regular_trace_has_no_dispersion() -> None:
    described = describe(trace_of(list(range(0, 120 * NS_PER_S, NS_PER_S // 10)), 120 * NS_PER_S))
    assert described.as_dict() == {
        "rows": 1200,
        "span_s": 120.0,
        "mean_rate": 10.0,
        "peak_to_mean_1s": 1.0,
        "peak_to_mean_60s": 1.0,
        "index_of_dispersion_1s": 0.0,
        "index_of_dispersion_60s": 0.0,
        "cv": 0.0,
    }


def test_figures_that_do_not_exist_are_none() -> None:
    empty = describe(trace_of([]))
    assert (empty.rows, empty.mean_rate, empty.peak_to_mean_1s, empty.cv) == (0, 0, None, None)
    one = describe(trace_of([0], NS_PER_S))
    assert (one.peak_to_mean_1s, one.peak_to_mean_60s, one.index_of_dispersion_1s, one.cv) == (1.0, None, None, None)
    two = describe(trace_of([0, NS_PER_S]))
    assert (two.rows, two.index_of_dispersion_1s, two.cv) == (2, None, None)
    assert gap_cv(trace_of([5, 5, 5, 5]).arrivals_ns) is None
    fine = replace(steady(SteadyParameters(rate=2, duration_s=180), seed=1), resolution_s=0.4)
    assert None not in describe(fine).as_dict().values()
    coarse = describe(replace(fine, resolution_s=3.0))
    assert (coarse.peak_to_mean_1s, coarse.index_of_dispersion_1s, coarse.cv) == (None, None, None)
    assert coarse.peak_to_mean_60s is not None


def test_two_arrivals_centuries_apart_are_described_at_once() -> None:
    assert describe(trace_of([0, MAX_NS - 1], MAX_NS)).peak_to_mean_1s == pytest.approx(MAX_NS / NS_PER_S / 2)
