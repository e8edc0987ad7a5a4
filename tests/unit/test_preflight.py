"""What each framework is given of a tuning, scenario by scenario, settled before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from harness.adapter import Tuning, WireProtocol
from harness.errors import InputError
from harness.preflight import check
from harness.registry import all_adapters, get_adapter
from harness.spec import Experiment


def experiment(**changes: Any) -> Experiment:
    basis = {
        "name": "x",
        "adapters": ["triton", "kserve"],
        "trace": {"name": "steady", "params": {"rate": 20, "duration_s": 5}},
        "tuning": {"max_batch": 8, "replicas": 2},
        "when_refused": "leave_out",
        "scenarios": [
            {"name": "tuned"},
            {"name": "own", "tuning": "defaults"},
            {"name": "one", "tuning": {"replicas": 1}},
        ],
    }
    return Experiment.model_validate({**basis, **changes})


def test_every_cell_has_the_tuning_that_its_framework_can_express() -> None:
    checked = check(experiment())
    given_to = {
        (cell.adapter, cell.scenario.name): (expressed.tuning.chosen(), set(expressed.left_out))
        for cell, expressed in checked.tunings.items()
    }
    assert given_to == {
        ("triton", "tuned"): ({"max_batch": 8, "replicas": 2}, set()),
        ("triton", "own"): ({}, set()),
        ("triton", "one"): ({"replicas": 1}, set()),
        ("kserve", "tuned"): ({"replicas": 2}, {"max_batch"}),
        ("kserve", "own"): ({}, set()),
        ("kserve", "one"): ({"replicas": 1}, set()),
    }


def test_unless_told_otherwise_a_knob_without_a_place_stops_the_experiment() -> None:
    with pytest.raises(InputError, match="kserve has no place for `max_batch`") as refused:
        check(experiment(when_refused="stop"))
    assert "when_refused: leave_out" in str(refused.value)
    check(experiment(when_refused="stop", adapters=["triton"]))


def test_what_a_protocol_rules_out_is_known_before_the_start() -> None:
    with pytest.raises(InputError, match="over gRPC"):
        check(experiment(adapters=["kserve"], when_refused="stop", tuning={"replicas": 2}, client={"protocol": "grpc"}))


def test_replicas_of_a_scenario_are_weighed_too() -> None:
    with pytest.raises(InputError, match="replicas take at least"):
        check(experiment(scenarios=[{"name": "many", "tuning": {"replicas": 1_000_000}}]))
    fault = [{"kind": "kill_replica", "at_s": 2, "target": 1}]
    with pytest.raises(InputError, match="target 1 does not exist"):
        check(experiment(scenarios=[{"name": "one", "tuning": {"replicas": 1}, "faults": fault}]))
    check(experiment(scenarios=[{"name": "two", "faults": fault}]))


tunings = st.builds(
    Tuning,
    max_batch=st.none() | st.integers(1, 64),
    batch_window_ms=st.none() | st.floats(0, 100),
    replicas=st.none() | st.integers(1, 4),
    queue_limit=st.none() | st.integers(1, 1000),
    server_timeout_s=st.none() | st.floats(0.1, 60),
)


@given(tunings, st.sampled_from(sorted(all_adapters())), st.sampled_from(["http", "grpc"]))
def test_what_is_expressible_is_refused_no_more_and_nothing_is_invented(
    tuning: Tuning, name: str, protocol: WireProtocol
) -> None:
    adapter = get_adapter(name)
    options: BaseModel = adapter.Options()
    expressed, left_out = adapter.expressible(tuning, options, protocol)
    assert adapter.refusals(expressed, options, protocol) == {}
    assert {**expressed.chosen(), **{knob: getattr(tuning, knob) for knob in left_out}} == tuning.chosen()
    assert not set(expressed.chosen()) & set(left_out)
    assert adapter.expressible(expressed, options, protocol) == (expressed, {})
    for knob, reason in left_out.items():
        assert f"`{knob}" in reason
