"""The harness's own scaler: what it decides, and what it does with a cluster that obeys, refuses, or cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.contract.adapter import MetricSample
from tailrace.harness.errors import InputError, ServerError
from tailrace.harness.plan.experiment import Experiment, ScalerChoice
from tailrace.harness.records.store import EventLog
from tailrace.harness.run.preflight import check
from tailrace.harness.servers.balancer import BackendState
from tailrace.harness.servers.scaler import Scaler, decide, label
from tests.conftest import wait_until


def policy(**changes: Any) -> ScalerChoice:
    return ScalerChoice.model_validate(
        {"of": "replicas", "min": 1, "max": 6, "up_above": 4, "down_below": 1, "period_s": 0.1, **changes}
    )


@pytest.mark.parametrize(
    ("active", "requests", "wanted"),
    [
        (1, 4, 1),  # the threshold itself is no excess
        (1, 5, 2),
        (1, 17, 5),  # as many as bring it down to the threshold
        (1, 900, 6),
        (3, 6, 3),
        (3, 2, 2),  # one fewer, not two
        (1, 0, 1),
    ],
)
def test_decisions(active: int, requests: float, wanted: int) -> None:
    assert decide(policy(), active, requests) == wanted


@given(st.integers(1, 6), st.floats(0, 1e4), st.floats(0.1, 50), st.floats(0, 0.99))
def test_a_decision_stays_within_its_limits_and_goes_the_right_way(
    active: int, requests: float, up: float, share: float
) -> None:
    chosen = policy(up_above=up, down_below=up * share)
    wanted = decide(chosen, active, requests)
    assert chosen.min <= wanted <= chosen.max
    if requests / active > up:
        assert wanted > active or active == chosen.max
        assert requests / wanted <= up * (1 + 1e-9) or wanted == chosen.max or wanted == active + 1
    elif requests / active < chosen.down_below:
        assert wanted == max(chosen.min, active - 1)
    else:
        assert wanted == active


class FakeCluster:
    def __init__(self, requests: list[float], *, fails: bool = False) -> None:
        self._requests = requests
        self._fails = fails
        self.asked: list[tuple[str, int]] = []

    def _next(self) -> float:
        if not self._requests:
            raise OSError("nobody answers")
        return self._requests.pop(0)

    def scrape(self) -> list[MetricSample]:
        waiting = self._next()
        return [MetricSample("queue_depth", waiting / 2, "a"), MetricSample("queue_depth", waiting / 2, "b")]

    def balancer_states(self) -> dict[str, BackendState]:
        return {"node-0": BackendState(up=True, checked=True, in_flight=int(self._next()))}

    def scale(self, replicas: int) -> None:
        self._change("replicas", replicas)

    def set_active(self, count: int) -> None:
        self._change("nodes", count)

    def _change(self, what: str, count: int) -> None:
        self.asked.append((what, count))
        if self._fails:
            raise ServerError("no room")


def run(tmp_path: Path, cluster: FakeCluster, chosen: ScalerChoice, changes: int) -> list[dict[str, Any]]:
    events = EventLog(tmp_path / "events.jsonl")
    scaler = Scaler(chosen, cluster, events)  # type: ignore[arg-type]
    scaler.start()
    wait_until(lambda: len(cluster.asked) >= changes, "it has decided")
    scaler.stop()
    events.close()
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("unit", ["replicas", "nodes"])
def test_it_follows_the_load_up_and_down(tmp_path: Path, unit: str) -> None:
    cluster = FakeCluster([0, 10, 10, 1])
    events = run(tmp_path, cluster, policy(of=unit), 2)
    assert cluster.asked == [(unit, 3), (unit, 2)]
    assert [(event["event"], event["before"], event["wanted"]) for event in events] == [
        ("scale", 1, 3),
        ("scaled", 1, 3),
        ("scale", 3, 2),
        ("scaled", 3, 2),
    ]


def test_what_a_server_refuses_is_told_and_tried_again(tmp_path: Path) -> None:
    cluster = FakeCluster([10, 10], fails=True)
    events = run(tmp_path, cluster, policy(), 2)
    assert cluster.asked == [("replicas", 3)] * 2
    assert [event["event"] for event in events] == ["scale", "scale-failed"] * 2
    assert "no room" in events[1]["reason"]


def test_its_label_says_whose_it_is() -> None:
    assert "harness's own queue-depth scaler (1 to 6" in label(policy())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min": 7}, "min .7. is above max"),
        ({"down_below": 4}, "is not below up_above"),
        ({"warm_pool": 1}, "only nodes"),
        ({"cold_start": "model"}, "the framework's own affair"),
    ],
)
def test_policies_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policy(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapters": ["kserve"]}, "does not have the capability `scale`: scale its nodes instead"),
        ({"adapters": ["ray_serve"], "nodes": 6, "devices": 6, "of": "nodes"}, "a scaler of its own"),
        ({"adapters": ["triton"], "of": "nodes"}, "`nodes` is 1, and must be the scaler's `max`, 6"),
        (
            {"adapters": ["ray_serve"], "tuning": {"autoscale": {"min": 1, "max": 2, "target_ongoing": 1}}},
            "two scalers",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused_before_the_start(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(experiment(**changes))


def experiment(of: str = "replicas", **changes: Any) -> Experiment:
    scaler = {"of": of, "min": 1, "max": 6, "up_above": 4, "down_below": 1}
    return Experiment.model_validate(
        {
            "name": "x",
            "adapters": ["triton"],
            "trace": {"name": "steady", "params": {"rate": 20, "duration_s": 5}},
            "when_refused": "leave_out",
            "scenarios": [{"name": "scaled", "scaler": scaler}],
            **changes,
        }
    )


def test_replicas_begin_with_the_fewest() -> None:
    checked = check(experiment(tuning={"replicas": 3}))
    assert [cell.tuning.replicas for cell in checked.cells.values()] == [1]
