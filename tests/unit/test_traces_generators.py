"""Generated traces: their rates and their burstiness are those asked for, and a seed decides all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tailrace.traces.generators import (
    GENERATORS,
    BurstyParameters,
    DiurnalParameters,
    SteadyParameters,
    SurgeParameters,
    bursty,
    diurnal,
    steady,
    surge,
)
from tailrace.traces.statistics import NS_PER_S
from tailrace.traces.trace import describe

SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_decides_all(name: str) -> None:
    generator = GENERATORS[name]
    first, again, other = (generator.draw(generator.parameters(), seed=seed) for seed in (5, 5, 6))
    assert first.arrivals_ns.tolist() == again.arrivals_ns.tolist()
    assert first.arrivals_ns.tolist() != other.arrivals_ns.tolist()
    assert first.provenance["seed"] == 5
    assert first.provenance["parameters"] == generator.parameters().model_dump()


@pytest.mark.parametrize("name", GENERATORS)
def test_every_parameter_is_documented(name: str) -> None:
    assert all(field.description for field in GENERATORS[name].parameters.model_fields.values())


def test_the_default_surge_is_the_one_of_the_design() -> None:
    trace = surge(SurgeParameters(), seed=1)
    assert (trace.span_s, trace.fault_at_s, trace.transient) == (30, 20, True)


@given(SEEDS)
def test_a_surge_follows_its_triangle(seed: int) -> None:
    seconds = surge(SurgeParameters(), seed=seed).arrivals_ns / NS_PER_S
    edges = np.arange(0, 31, 3)
    counts, _ = np.histogram(seconds, edges)
    fine = np.linspace(0, 30, 30_001)
    rate = 40 + 600 * np.maximum(0, 1 - np.abs(fine - 15) / 9)
    expected = [rate[(fine >= a) & (fine < a + 3)].mean() * 3 for a in edges[:-1]]
    assert bool(np.all(np.abs(counts - expected) < 6 * np.sqrt(expected)))


@given(SEEDS, st.floats(1, 500), st.floats(1, 20))
def test_steady_arrivals_number_as_poisson_ones(seed: int, rate: float, duration_s: float) -> None:
    trace = steady(SteadyParameters(rate=rate, duration_s=duration_s), seed=seed)
    expected = rate * duration_s
    assert abs(len(trace) - expected) < 6 * expected**0.5 + 5
    assert trace.span_ns == round(duration_s * NS_PER_S)


def test_steady_arrivals_are_poisson() -> None:
    described = describe(steady(SteadyParameters(rate=200, duration_s=600), seed=2))
    assert described.cv == pytest.approx(1, abs=0.03)
    assert described.index_of_dispersion_1s == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("cv", [0.2, 1, 3, 8])
def test_bursty_gaps_have_the_rate_and_the_cv_asked_for(cv: float) -> None:
    trace = bursty(BurstyParameters(rate=200, cv=cv, duration_s=2000), seed=11)
    described = describe(trace)
    assert described.cv == pytest.approx(cv, rel=0.05)
    assert abs(len(trace) - 400_000) < 6 * cv * 400_000**0.5


def test_bursty_arrivals_are_in_equilibrium_from_the_first_instant() -> None:
    parameters = BurstyParameters(rate=10, cv=5, duration_s=10)
    mean = np.mean([len(bursty(parameters, seed=seed)) for seed in range(4000)])
    # An ordinary renewal process would add (cv² − 1)/2 = 12 arrivals to the 100; the deviation of this mean is 0.7.
    assert mean == pytest.approx(100, abs=4)


@given(SEEDS)
def test_a_day_is_quiet_at_night_and_busy_at_noon(seed: int) -> None:
    trace = diurnal(DiurnalParameters(), seed=seed)
    counts = np.bincount(trace.arrivals_ns // (15 * NS_PER_S), minlength=8).reshape(2, 4).sum(axis=0)
    # A quarter of a day from midnight holds (1/4 − amplitude/2π) of the day, the next one (1/4 + amplitude/2π).
    night, noon = (12_000 * (0.25 + sign * 0.8 / (2 * np.pi)) for sign in (-1, 1))
    assert bool(np.all(np.abs(counts - [night, noon, noon, night]) < 6 * noon**0.5))


@pytest.mark.parametrize(
    ("model", "values", "says"),
    [
        (SurgeParameters, {"duration_s": 0}, "duration_s"),
        (SurgeParameters, {"duration_s": 10}, "fault_at_s .20. lies outside the trace"),
        (SurgeParameters, {"half_width_s": 0}, "half_width_s"),
        (SteadyParameters, {"rate": -1}, "rate"),
        (SteadyParameters, {"rate": float("nan")}, "rate"),
        (SteadyParameters, {"rate": float("inf")}, "rate"),
        (SteadyParameters, {"rate": 1e9}, "more than 100,000,000 arrivals"),
        (BurstyParameters, {"cv": 0}, "cv"),
        (DiurnalParameters, {"amplitude": 1.1}, "amplitude"),
        (DiurnalParameters, {"period": 1}, "period"),
    ],
)
def test_impossible_parameters_are_refused(model: type[SurgeParameters], values: dict[str, float], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        model.model_validate(values)
