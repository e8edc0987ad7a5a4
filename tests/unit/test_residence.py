"""Cold, warm, hot: told from what the device says of loads and what clients say of requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tailrace.harness.analysis.metrics import Measured
from tailrace.harness.analysis.residence import Met, loads_of, met, residence, residence_across
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.contract.multiplexing import MIB, Multiplexing, plan_memory
from tailrace.harness.contract.popularity import Models
from tailrace.harness.errors import InputError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.records.schema import SAMPLE_SCHEMA, Outcome
from tailrace.harness.run.preflight import check
from tests.fake_nvml import FakeGpu, install
from tests.records import facts, trial_summary

S = 1_000_000_000


def trace(*requests: tuple[int, float, float, bool]) -> Measured:
    """Each: model, sent and done in seconds, whether it was answered; in the order of sending."""
    model, sent, done, ok = (np.array(column) for column in zip(*requests, strict=True))
    sent_ns, done_ns = (sent * S).astype(np.int64), (done * S).astype(np.int64)
    outcome = np.where(ok, Outcome.OK, Outcome.TIMEOUT).astype(np.uint8)
    return Measured(sent_ns, sent_ns, done_ns, done_ns, outcome, model.astype(np.uint16))


def event(what: str, model: str, at_s: float, pid: int = 1) -> dict[str, Any]:
    return {"event": f"model-{what}", "model": model, "t_ns": round(at_s * S), "pid": pid, "bytes": 100}


RESIDENT = {"event": "models-resident", "models": ["a"], "t_ns": 0}
LOAD_B = [event("begun", "b", 2.0), event("loaded", "b", 2.5)]


def test_the_first_who_waited_is_cold_the_others_warm_and_whose_model_is_there_hot() -> None:
    told = trace(
        (1, 1.9, 2.6, True),  # for whom it was loaded: sent before the device knew of it
        (1, 1.95, 2.6, True),  # came before the load began, but was not the first
        (0, 2.1, 2.2, True),  # another model
        (1, 2.4, 2.6, True),
        (1, 2.5, 2.7, True),  # sent when it was loaded
        (1, 3.0, 3.1, True),
    )
    assert list(met(told, ["a", "b"], [RESIDENT, *LOAD_B])) == [
        *(Met.COLD, Met.WARM, Met.HOT, Met.WARM, Met.HOT, Met.HOT)
    ]


def test_who_fails_before_any_load_ended_was_cold_if_the_model_was_away() -> None:
    told = trace(
        (0, 0.5, 0.6, False),  # its model was there: whatever failed it, it was not memory
        (1, 0.5, 1.5, False),  # never loaded in its time
        (0, 1.0, 4.0, False),  # its model went while it waited
        (0, 3.5, 3.6, False),
    )
    events = [RESIDENT, *LOAD_B, event("gone", "a", 2.0)]
    assert list(met(told, ["a", "b"], events)) == [Met.HOT, Met.COLD, Met.COLD, Met.COLD]


def test_loads_that_were_cut_off_or_failed_are_loads_that_did_not_come_to_their_end() -> None:
    events = [
        *(event("begun", "b", 1.0, pid=7), event("begun", "b", 2.0, pid=8), event("failed", "b", 3.0, pid=8)),
        *(event("begun", "a", 2.5, pid=9), event("loaded", "a", 2.75, pid=9)),
    ]
    assert [(model, begun / S, ended / S, whole) for model, begun, ended, whole, _ in loads_of(events)] == [
        ("b", 1.0, 1.0, False),
        ("b", 2.0, 3.0, False),
        ("a", 2.5, 2.75, True),
    ]


def test_the_most_popular_are_there_at_first_as_far_as_there_is_room() -> None:
    plan = plan_memory(Multiplexing(memory_mb=10, pinned=1), ["a", "b", "c", "d"], [4, 5, 3, 3], "`multiplexing`")
    assert plan.pinned == ("a",)
    assert plan.at_start == ("a", "b")
    assert plan.sizes["c"] == 3 * 2**20
    everything = plan_memory(Multiplexing(memory_mb=10), ["a", "b"], [4, 5], "`multiplexing`")
    assert everything.at_start == ("a", "b")


def test_memory_too_small_for_the_largest_model_is_refused_with_the_sizes() -> None:
    with pytest.raises(InputError, match=r"`x`\.memory_mb: 4 MiB do not hold 5 MiB of the largest one, b.*\n.*use 5"):
        plan_memory(Multiplexing(memory_mb=4), ["a", "b"], [3, 5], "`x`")
    with pytest.raises(InputError, match=r"3 MiB of 1 pinned models and 5 MiB of the largest one, b(.|\n)*use 8"):
        plan_memory(Multiplexing(memory_mb=7, pinned=1), ["a", "b"], [3, 5], "`x`")
    with pytest.raises(InputError, match=r"pinned: 3 models are to be pinned, and there are 2"):
        plan_memory(Multiplexing(memory_mb=70, pinned=3), ["a", "b"], [3, 5], "`x`")


def test_mixed_sizes_fill_their_range_and_are_no_matter_of_popularity() -> None:
    sizes = Models(count=40, size_mb=(100, 900)).sizes_mb()
    assert min(sizes) < 130
    assert max(sizes) > 870
    assert abs(np.corrcoef(sizes, range(40))[0, 1]) < 0.2
    assert Models(count=3, size_mb=7).sizes_mb() == (7, 7, 7)


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "many",
            "adapters": ["reference"],
            "models": {"count": 4, "size_mb": 100},
            "multiplexing": {"memory_mb": 200},
            "trace": {"name": "steady", "params": {"rate": 5, "duration_s": 2}},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiplexing": {"memory_mb": 90}}, "90 MiB do not hold 100 MiB of the largest one, emulated-00"),
        ({"tuning": {"replicas": 2}}, "one replica: set `tuning.replicas: 1`"),
        ({"nodes": 2, "devices": 2}, "the memory of one device"),
        ({"workload": "emulated_pipeline"}, "emulated_pipeline is a pipeline"),
        (
            {
                "adapters": ["triton"],
                "workload": "minilm",
                "artifact": "torchscript",
                "models": {"count": 1, "size_mb": 9},
            },
            "nobody sees what it takes",
        ),
        ({"workload": "minilm", "artifact": "torchscript"}, "an export is of one model, and `models.count` is 4"),
        ({"adapters": ["triton"], "client": {"protocol": "grpc"}}, "controller speaks HTTP"),
        ({"adapters": ["null"]}, "null has no policy of its own, and its adapter not the capability `load_model`"),
        ({"multiplexing": {"memory_mb": 200, "policy": "fifo"}}, "policy"),
    ],
)
def test_what_cannot_share_a_memory_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        check(experiment(**changes))


def test_real_models_share_a_real_devices_memory_no_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for adapter in ("reference", "triton", "ray_serve", "torchserve", "kserve"):
        (plan,) = (cell.memory for cell in check(experiment(adapters=[adapter], workload="minilm")).cells.values())
        assert (next(iter(plan.sizes)), len(plan.at_start)) == ("minilm-00", 2)
    install(monkeypatch, FakeGpu(memory_bytes=1 << 30))
    own = {"workload": "minilm", "device": "cuda", "models": {"count": 4, "size_mb": 400}}
    assert all(cell.memory for cell in check(experiment(**own, multiplexing={"memory_mb": 900})).cells.values())
    with pytest.raises(InputError, match="`memory_mb` is 1100, and the GPU has 1,024 MiB"):
        check(experiment(**own, multiplexing={"memory_mb": 1100}))


def test_a_scenario_may_have_a_memory_of_its_own() -> None:
    scenarios = [{"name": "a"}, {"name": "b", "multiplexing": {"memory_mb": 300, "policy": "gdsf"}}]
    checked = check(experiment(scenarios=scenarios))
    plans = {cell.scenario.name: cell.memory for cell in checked.cells.values() if cell.memory}
    assert (plans["a"].policy, len(plans["a"].at_start)) == ("lru", 2)
    assert (plans["b"].policy, len(plans["b"].at_start)) == ("gdsf", 3)
    with pytest.raises(InputError, match=r"`scenarios.b.multiplexing`.memory_mb: 20 MiB"):
        check(experiment(scenarios=[{"name": "b", "multiplexing": {"memory_mb": 20}}]))


def test_the_figures_of_a_trial_and_of_its_cell() -> None:
    told = trace((1, 1.9, 2.6, True), (1, 2.4, 2.6, True), (0, 3.0, 3.1, True), (0, 3.5, 9.0, False))
    plan = {
        "policy": "lru",
        "pinned": ["a"],
        "at_start": ["a"],
        "budget_bytes": 3 * MIB,
        "sizes": {"a": 1, "b": 1},
        "controlled": True,
    }
    events = [
        *(
            event("begun", "b", -2.0, pid=5),
            event("loaded", "b", -1.0, pid=5),
            RESIDENT,
        ),  # before the trace: not counted
        *LOAD_B,
        *(
            event("gone", "b", 3.0),
            event("refused", "b", 3.2),
            event("begun", "b", 4.0, pid=2),
            event("gone", "a", 99.0),
        ),
    ]
    at_s = [-1.0, 1.0, 2.0, 50.0]
    free = [0, 2 * MIB, MIB, 0]
    rows = [
        {
            "t_ns": round(t * S),
            "source": "memory",
            "scope": "device-0",
            "metric": metric,
            "value": float(value),
            "unit": "1",
        }
        for t, mib in zip(at_s, free, strict=True)
        for metric, value in (("memory_free_bytes", mib), ("models_resident", 3 - mib / MIB))
    ]
    samples = Samples(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA))
    figures = residence(facts(memory=plan), told, ["a", "b"], events, samples, 10.0)
    assert figures is not None
    counted = ("loads", "evictions", "load_failures", "refused", "controlled", "pinned", "models", "memory_mb")
    assert [getattr(figures, name) for name in counted] == [1, 1, 1, 1, True, 1, 2, 3]
    assert figures.reload_mb == 100 / MIB
    assert figures.load_p50_s == 0.5
    assert (figures.headroom_min_mb, figures.headroom_mean_mb, figures.resident_mean) == (1, 1.5, 1.5)
    assert [met.requests for met in (figures.cold, figures.warm, figures.hot)] == [1, 1, 2]
    assert figures.cold.share == 0.25
    assert figures.cold.share_ci is not None
    low, high = figures.cold.share_ci
    assert (round(low, 4), round(high, 4)) == (0.0456, 0.6994), "Wilson's interval of 1 in 4"
    assert [met.failed for met in (figures.cold, figures.warm, figures.hot)] == [0, 0, 1]
    cell = residence_across([trial_summary(multiplexing=figures, arrivals=4)] * 2)
    assert cell is not None
    assert (cell.loads, cell.evictions, cell.load_failures, cell.refused) == (2, 2, 2, 2)
    assert (cell.load_p50_s, cell.headroom_min_mb, cell.cold.share) == (0.5, 1, 0.25)
    assert residence_across([trial_summary(arrivals=4)]) is None
    assert residence(facts(), told, ["a", "b"], events, samples, 10.0) is None
