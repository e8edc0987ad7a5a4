"""The summary: figures of trials and cells from stored records, for whole runs, broken ones and odd ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.harness.analysis.across import across
from tailrace.harness.analysis.comparison import t_interval
from tailrace.harness.analysis.gpu_figures import gpu_figures, gpus_power_w
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.analysis.summary import (
    goodput_per_dollar,
    goodput_per_joule,
    jsonable,
    summarise,
    write_summary,
)
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.store import RunFolder
from tests.records import change, trial_summary
from tests.synthetic import make_run


def test_counts_close_and_rates_follow_from_them(tmp_path: Path) -> None:
    summary = summarise(make_run(tmp_path / "run", fail_fraction=0.02))
    for trial in summary.trials:
        outcomes = ("ok", "errors", "shed", "timeouts", "connection_errors", "dropped")
        assert sum(trial.figure(key) or 0 for key in outcomes) == trial.arrivals > 0
        assert trial.goodput_rps == pytest.approx(trial.good / trial.span_s)
        assert trial.goodput_rps_per_device == pytest.approx(trial.goodput_rps / trial.devices)
        assert trial.slo_attainment == pytest.approx(trial.good / trial.arrivals)
        assert trial.good <= trial.ok


@given(st.floats(0, 1e5), st.integers(1, 16), st.floats(0.01, 1e3), st.floats(1, 1e4))
def test_what_an_hour_costs_and_draws_gives_back_what_it_answered(
    goodput_rps: float, devices: int, price: float, power_w: float
) -> None:
    """Good requests per dollar times the dollars of an hour, and per joule times its joules, are the hour's good requests."""
    per_dollar, per_joule = goodput_per_dollar(goodput_rps, devices, price), goodput_per_joule(goodput_rps, power_w)
    assert per_dollar is not None and per_joule is not None
    assert per_dollar * devices * price == pytest.approx(goodput_rps * 3600)
    assert per_joule * power_w * 3600 == pytest.approx(goodput_rps * 3600)
    assert goodput_per_dollar(goodput_rps, devices, None) is goodput_per_joule(goodput_rps, None) is None


@settings(deadline=None)  # the first table of a process takes longer than all others
@given(st.lists(st.floats(1, 700), min_size=1, max_size=4))
def test_power_is_of_all_gpus_together_or_not_known(watts: list[float]) -> None:
    """However often each was read, and whatever was read before the trace."""
    readings = [(second, f"gpu-{i}", w) for i, w in enumerate(watts) for second in range(1, 3 + i)]
    readings += [(-2, f"gpu-{i}", 1e6) for i in range(len(watts))]
    columns = {
        "t_ns": [second * 10**9 for second, _, _ in readings],
        "source": ["gpu"] * len(readings),
        "scope": [scope for _, scope, _ in readings],
        "metric": ["power_w"] * len(readings),
        "value": [value for _, _, value in readings],
        "unit": ["W"] * len(readings),
    }
    samples = Samples(pa.table(columns, schema=SAMPLE_SCHEMA))
    figures = gpu_figures(samples, 10.0)
    assert gpus_power_w(figures, len(watts), 10.0) == pytest.approx(sum(watts))
    assert gpus_power_w(figures, len(watts) + 1, 10.0) is None, "one of them told nothing"
    assert gpus_power_w(gpu_figures(samples, 0.5), len(watts), 0.5) is None, "nothing was read in the trace"


def test_dollars_and_joules_are_told_where_price_and_power_are_known(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        adapters=("triton",),
        scenarios=("no-fault",),
        trials=3,
        span_s=12,
        fail_fraction=0.001,
        device="cuda",
    )
    (cell,) = summarise(run).cells
    assert cell.goodput_per_dollar is cell.goodput_per_dollar_ci is cell.device_price_per_hour is None
    for trial in run.trials:
        change(trial, device_price_per_hour=2.5)
    summary = summarise(RunFolder.open(run.folder))
    (cell,) = summary.cells
    assert cell.device_price_per_hour == 2.5
    assert cell.goodput_per_dollar == pytest.approx(cell.goodput_rps_per_device * 3600 / 2.5)
    ends = [end * 3600 / 2.5 for end in cell.goodput_rps_per_device_ci]
    assert cell.goodput_per_dollar_ci == pytest.approx(ends)
    for trial in summary.trials:
        both_w = 2 * trial.gpu_power_w  # two GPUs, of which the mean is kept
        assert trial.goodput_per_joule == pytest.approx(trial.goodput_rps / both_w)
    assert cell.goodput_per_joule is not None and cell.goodput_per_joule_ci is not None
    low, high = cell.goodput_per_joule_ci
    assert low < cell.goodput_per_joule < high
    for key in ("goodput_per_dollar", "goodput_per_joule", "slo_attainment"):
        assert cell.figure(key) == pytest.approx(np.mean([trial.figure(key) for trial in summary.trials]))
    assert cell.slo_attainment is not None and cell.slo_attainment_ci is not None
    low, high = cell.slo_attainment_ci
    assert low < cell.slo_attainment < high <= 1


def test_no_interval_of_a_rate_goes_below_nothing() -> None:
    trials = [trial_summary(goodput_rps=rate) for rate in (0.0, 0.0, 0.4)]
    told = across(trials, "goodput_rps", "ci", log=False)
    assert told["goodput_rps"] == pytest.approx(0.4 / 3)
    assert told["ci"][0] == 0
    assert told["ci"][1] > 0.4


def test_without_a_gpu_nothing_is_said_per_joule(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), trials=3, span_s=12)
    (cell,) = summarise(run).cells
    assert cell.goodput_per_joule is cell.goodput_per_joule_ci is None


def test_a_killed_run_is_summarised_as_far_as_it_went(tmp_path: Path) -> None:
    summary = summarise(make_run(tmp_path / "run", variant="killed"))
    assert summary.verdict == "INVALID"
    broken = [trial for trial in summary.trials if trial.state != "done"]
    assert broken
    assert all("incomplete" in [reason.code for reason in trial.reasons] for trial in broken)


@pytest.mark.parametrize("variant", ["empty", "one-request"])
def test_odd_traces_are_summarised_without_inventing_a_percentile(tmp_path: Path, variant: str) -> None:
    summary = write_summary(make_run(tmp_path / "run", variant=variant))
    for trial in summary.trials:
        assert trial.p99_ms is None
        assert trial.p99_more_needed == 368 - trial.arrivals
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert told["trials"][0]["p99_ms"] is None


def test_a_trial_that_failed_dooms_its_cell_but_is_no_repetition(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), trials=3)
    whole = summarise(run).cells[0]
    victim = run.trials[0]
    change(victim, state="failed", error={"message": "it did not come up"})
    (victim.folder / "requests.parquet").unlink()
    run.__dict__.clear()
    run.__init__(tmp_path / "run")  # type: ignore[misc]
    cell = summarise(run).cells[0]
    assert cell.verdict == "INVALID"
    assert cell.trials == 3
    assert cell.offered_rps == pytest.approx(whole.offered_rps, rel=0.1), "not a third less"
    assert cell.arrivals < whole.arrivals
    assert cell.goodput_rps_per_device_ci is None, "two repetitions have no t interval"


def test_a_steady_state_is_judged_where_one_is_meant(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",))
    (trial,) = summarise(run).trials
    assert 1 < trial.effective_arrivals < trial.arrivals
    assert trial.warmup_detected_s is trial.drift is trial.failure_drift is None, "a surge is never steady"
    change(run.trials[0], transient=False)
    (judged,) = summarise(RunFolder.open(run.folder)).trials
    assert None not in (judged.warmup_detected_s, judged.drift, judged.failure_drift)
    assert all(math.isfinite(judged.figure(key) or 0) for key in ("warmup_detected_s", "drift", "failure_drift"))


def test_the_frequency_is_compared_between_the_halves_of_the_trace() -> None:
    t_s = np.arange(-2.0, 12.0)
    columns = {
        "t_ns": (t_s * 1e9).astype(np.int64),
        "source": ["host"] * len(t_s),
        "scope": ["host"] * len(t_s),
        "metric": ["frequency_mhz"] * len(t_s),
        "value": np.where(t_s < 0, 800.0, np.where(t_s < 5, 3000.0, 2400.0)),
        "unit": ["MHz"] * len(t_s),
    }
    samples = Samples(pa.table(columns, schema=SAMPLE_SCHEMA))
    assert samples.halves("host", "frequency_mhz", 10.0) == pytest.approx(-0.2)
    assert samples.halves("host", "frequency_mhz", 4.0) is None, "two readings are no half"
    assert samples.halves("host", "steal", 10.0) is None


@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=20), st.booleans())
def test_t_intervals_hold_their_centre_and_scale(values: list[float], log: bool) -> None:
    interval = t_interval(np.array(values), log=log)
    assert interval is not None
    centre, low, high = interval
    assert low <= centre <= high
    mean = math.exp(np.mean(np.log(values))) if log else np.mean(values)
    assert centre == pytest.approx(mean)


def test_t_interval_is_the_textbooks() -> None:
    centre, low, high = t_interval(np.array([9.0, 10.0, 11.0]), log=False) or (0.0, 0.0, 0.0)
    assert centre == pytest.approx(10.0)
    assert high - centre == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975; 2) · s/√n
    assert centre - low == pytest.approx(high - centre)
    assert t_interval(np.array([1.0, 2.0]), log=False) is None
    assert t_interval(np.array([1.0, 2.0, math.inf]), log=True) is None


def test_of_two_trials_the_worse_percentile_stands_for_the_cell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), trials=2)
    summary = summarise(run)
    (cell,) = summary.cells
    assert cell.p99_ms == max(trial.p99_ms for trial in summary.trials)
    assert cell.p99_ci_ms_source == "within-trial"


@given(
    st.recursive(
        st.floats() | st.none() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_whatever_is_summarised_is_legal_json(value: object) -> None:
    json.dumps(jsonable(value), allow_nan=False)
    assert jsonable(math.inf) == "inf"
    assert jsonable(math.nan) is None
