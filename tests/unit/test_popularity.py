"""Several models: who is asked for, and how each fared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tailrace.harness.analysis.metrics import measured
from tailrace.harness.analysis.summary import by_model, summarise
from tailrace.harness.contract.popularity import Models, Popularity, draw, ranked
from tailrace.harness.errors import InputError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.schedule import Phase, build_schedule
from tailrace.harness.records.store import RunFolder
from tailrace.harness.run.preflight import check
from tailrace.reports.by_model import by_model as rows_by_model
from tailrace.reports.evidence import view
from tailrace.simulator.fitting import read_trial
from tailrace.traces.catalogue import load
from tests.conftest import tailrace
from tests.records import change
from tests.synthetic import make_run


def times(count: int, span_s: float = 10.0) -> Any:
    return np.sort(np.random.default_rng(0).integers(0, int(span_s * 1e9), count))


def drawn(popularity: Popularity, count: int, arrivals: int = 20_000, seed: int = 1) -> Any:
    return draw(popularity, count, times(arrivals), None, np.random.default_rng(seed))


def test_zipf_gives_the_shares_of_its_law() -> None:
    counts = np.bincount(drawn(Popularity(exponent=1.0), 4), minlength=4) / 20_000
    wanted = np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    assert np.allclose(counts, wanted, atol=0.015), counts
    alike = np.bincount(drawn(Popularity(exponent=0), 4), minlength=4) / 20_000
    assert np.allclose(alike, 0.25, atol=0.015)


def test_drift_moves_the_crown() -> None:
    models = drawn(Popularity(kind="drift", exponent=3.0, every_s=2.5), 3, arrivals=8000)
    period = times(8000) // 2_500_000_000
    crowned = [int(np.bincount(models[period == k]).argmax()) for k in range(4)]
    assert crowned == [0, 1, 2, 0]
    least = [int(np.bincount(models[period == k], minlength=3).argmin()) for k in (1, 2)]
    assert least == [0, 1], "who was first is last"


@given(st.integers(1, 50), st.floats(0, 10), st.integers(0, 2**31))
def test_every_index_is_a_model(count: int, exponent: float, seed: int) -> None:
    for popularity in (Popularity(exponent=exponent), Popularity(kind="drift", exponent=exponent, every_s=0.3)):
        models = drawn(popularity, count, arrivals=200, seed=seed)
        assert models.dtype == np.uint16
        assert models.max() < count
        assert np.array_equal(models, drawn(popularity, count, arrivals=200, seed=seed)), "the seed says it all"


@given(st.lists(st.integers(0, 6), max_size=60))
def test_a_traces_models_are_ranked_by_their_arrivals(told: list[int]) -> None:
    ranks = ranked(np.array(told, dtype=np.int64))
    assert len(ranks) == len(told)
    counts = np.bincount(ranks) if told else np.array([])
    assert list(counts) == sorted(counts, reverse=True)
    assert len({(a, int(b)) for a, b in zip(told, ranks, strict=True)}) == len(set(told)), "one rank for each model"


def test_a_schedule_keeps_its_arrivals_and_payloads_whatever_models_are_asked_for() -> None:
    common: dict[str, Any] = {"payload_count": 8, "warmup_s": 1.0, "warmup_rate": 50, "seed": 3}
    one = build_schedule(times(500), models=("m",), **common)
    three = build_schedule(times(500), models=("a", "b", "c"), popularity=Popularity(exponent=1), **common)
    assert np.array_equal(one.intended_ns, three.intended_ns)
    assert np.array_equal(one.payload_id, three.payload_id)
    assert set(one.model) == {0}
    assert set(three.model) == {0, 1, 2}
    own = np.arange(500, dtype=np.int64) % 2 * 7
    traced = build_schedule(
        times(500), models=("a", "b", "c"), popularity=Popularity(kind="trace"), trace_models=own, **common
    )
    assert np.array_equal(traced.model[traced.phase == Phase.MEASURE], own // 7)
    assert set(traced.model[traced.phase == Phase.WARMUP]) == {0, 1}, "warm-up asks for what the trace asks for"


def experiment(**more: Any) -> Experiment:
    return Experiment.model_validate({"name": "x", "adapters": ["null"], "trace": "steady", **more})


def test_a_number_stands_for_so_many_models() -> None:
    assert experiment(models=3).models == Models(count=3)
    assert experiment(models=3).models.names("emulated") == ("emulated-00", "emulated-01", "emulated-02")
    assert experiment().models.names("emulated") == ("emulated",)
    with pytest.raises(ValidationError, match="needs `every_s`"):
        experiment(models={"count": 2, "popularity": {"kind": "drift"}})
    with pytest.raises(ValidationError, match="this is `kind: zipf`"):
        experiment(models={"count": 2, "popularity": {"every_s": 3}})
    for wrong in (0, True, {"count": 2, "popularity": {"kind": "drift"}}, {"count": 2, "popularity": {"every_s": 3}}):
        with pytest.raises(ValidationError):
            experiment(models=wrong)


def test_what_a_trace_cannot_say_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path / "home"))
    by_trace = {"count": 2, "popularity": {"kind": "trace"}}
    with pytest.raises(InputError, match="does not say which model") as refused:
        check(experiment(models=by_trace))
    assert "--model-column" in str(refused.value)
    table = tmp_path / "mine.csv"
    table.write_text("t,who\n" + "".join(f"{i / 20},{'abc'[i % 3]}\n" for i in range(200)))
    done = tailrace(
        "traces", "add", str(table), "--column", "t", "--model-column", "who", "--name", "mine", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert load("mine", seed=1).model_index is not None
    with pytest.raises(InputError, match=r"`models.count` is 2, but the trace has arrivals for 3 models"):
        check(experiment(models=by_trace, trace="mine"))
    check(experiment(models={**by_trace, "count": 3}, trace="mine"))


@pytest.fixture
def served_two(tmp_path: Path) -> RunFolder:
    """A run whose second model is slow and seldom asked for."""
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), trials=2)
    for trial in run.trials:
        requests = trial.requests
        assert requests is not None
        names = np.where(np.arange(len(requests)) % 10 == 0, "m-01", "m-00")
        late = np.where(names == "m-01", 500_000_000, 0)
        columns = {name: requests[name] for name in requests.column_names}
        columns["model"] = names
        columns["done_ns"] = np.asarray(requests["done_ns"].to_numpy()) + late
        table = pa.table(columns, schema=requests.schema)
        pq.write_table(table, trial.folder / "requests.parquet")
        change(trial, models=["m-00", "m-01"])
    return RunFolder.open(run.folder)


def test_each_model_has_figures_of_its_own(served_two: RunFolder) -> None:
    summary = summarise(served_two)
    for figures in (*summary.trials, *summary.cells):
        fast, slow = figures.models
        assert (fast.model, slow.model) == ("m-00", "m-01")
        assert fast.arrivals + slow.arrivals == figures.arrivals
        assert fast.good + slow.good == figures.good
        assert slow.p50_ms - fast.p50_ms > 400
        assert slow.slo_attainment == 0 < fast.slo_attainment
    rows = rows_by_model(view([served_two])[0].cells)
    assert [row[1:3] for row in rows] == [("m-00", "89.9\u202f%"), ("m-01", "10.0\u202f%")]
    with pytest.raises(InputError, match="had 2 models"):
        read_trial(served_two.trials[0])


def test_a_model_that_nobody_asked_for_claims_nothing(served_two: RunFolder) -> None:
    requests = served_two.trials[0].requests
    assert requests is not None
    trace = measured(requests, models=("m-00", "m-01", "m-02"))
    idle = by_model(("m-00", "m-01", "m-02"), trace, 200.0)[2]
    assert (idle.arrivals, idle.p50_ms, idle.p99_ms) == (0, None, None)
    assert np.isnan(idle.slo_attainment)
    assert by_model((), replace(trace, model=None), 200.0) == []
