"""What a fault cost, and whether all requests are accounted for: known cases, and what must hold for any."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.analysis.aftermath import accounting, aftermath, pair
from tailrace.harness.analysis.metrics import Measured
from tailrace.harness.records.facts import Fault
from tailrace.harness.records.schema import OUTCOME_NAMES, Outcome
from tailrace.harness.records.summary import TrialSummary
from tests.records import trial_summary


def measured(outcomes: list[Outcome], *, gap_s: float = 0.1, took_s: float = 0.02) -> Measured:
    intended = (np.arange(len(outcomes)) * gap_s * 1e9).astype(np.int64)
    return Measured(intended, intended, intended, intended + int(took_s * 1e9), np.array(outcomes, dtype=np.uint8))


FAULT = Fault(kind="kill_node", at_s=3.0, injected_s=3.0, target="node-1", pid=5)


def event(name: str, t_s: float, **more: Any) -> dict[str, Any]:
    return {"event": name, "t_ns": int(t_s * 1e9), **more}


def test_who_noticed_first_and_how_the_node_came_back() -> None:
    outcomes = [Outcome.OK] * 35 + [Outcome.ERROR] * 5 + [Outcome.TIMEOUT] * 2 + [Outcome.OK] * 58
    events = [
        event("node-spawned", 1.0, node="node-1"),  # of an earlier death
        event("balancer-down", 3.9, node="node-1"),
        event("node-spawned", 4.5, node="node-1"),
        event("node-ready", 5.0, node="node-0"),  # another node
        event("node-port-open", 5.5, node="node-1"),
        event("node-ready", 6.0, node="node-1"),
        event("balancer-up", 6.2, node="node-1"),
        event("node-first-answer", 6.5, node="node-1"),
    ]
    told = aftermath(FAULT, measured(outcomes), events, 10.0, 100.0)
    assert told.recovery is not None
    assert told.recovery.lost_by_outcome == {"error": 5, "timeout": 2}
    assert np.isclose(told.detected_s or 0, 0.52)
    assert np.isclose(told.marked_down_s or 0, 0.9)
    expected = {"spawned_s": 1.5, "port_open_s": 2.5, "ready_s": 3.0, "in_rotation_s": 3.2, "first_answer_s": 3.5}
    assert {key: round(value, 6) for key, value in told.came_back.dump().items()} == expected
    assert np.isclose(told.recovery.baseline_goodput_rps or 0, 10)
    assert told.recovery.dip_goodput_rps == 5


def test_the_balancer_may_notice_what_no_client_does() -> None:
    told = aftermath(FAULT, measured([Outcome.OK] * 100), [event("balancer-down", 3.25, node="node-1")], 10.0, 100.0)
    assert np.isclose(told.detected_s or 0, 0.25)
    assert told.recovery is not None
    assert told.recovery.first_failure_s is None
    assert told.recovery.lost_by_outcome == {}
    assert told.came_back.dump() == {}


def test_a_replacement_is_the_one_on_the_node_in_question() -> None:
    events = [
        event("replica-born", 3.5, replica="node-0/m-1"),
        event("replica-born", 4.5, replica="node-1/m-2"),
    ]
    trace = measured([Outcome.OK] * 100)
    assert np.isclose(aftermath(FAULT, trace, events, 10.0, 100.0).replica_born_s or 0, 1.5)
    single = FAULT.model_copy(update={"target": "m-0"})
    assert np.isclose(aftermath(single, trace, events, 10.0, 100.0).replica_born_s or 0, 0.5)


def test_a_fault_that_hit_nothing_has_no_aftermath() -> None:
    missed = FAULT.model_copy(update={"injected_s": None})
    assert aftermath(missed, measured([Outcome.OK] * 10), [], 1.0, 100.0).dump() == {**missed.dump(), "recovery": None}


outcome_lists = st.lists(st.sampled_from(list(Outcome)), max_size=60)


@given(outcome_lists, outcome_lists, st.integers(0, 20), st.integers(0, 20))
def test_accounts_close_and_bound_what_was_done_twice(
    trace: list[Outcome], warmup: list[Outcome], lost_work: int, twice: int
) -> None:
    ok = (trace + warmup).count(Outcome.OK)
    sent = len(trace) + len(warmup) - (trace + warmup).count(Outcome.DROPPED)
    lost_work = min(lost_work, sent - ok)
    told = accounting(
        measured(trace), measured(warmup), executed=float(ok + lost_work + twice + 3), server_ok=None, probes=3
    )
    assert told.closed
    assert set(told.outcomes) == set(OUTCOME_NAMES)
    assert told.unanswered_work == lost_work + twice
    assert told.done_twice is not None and told.unanswered_work is not None
    assert told.done_twice <= twice <= told.unanswered_work
    assert told.server_ok_less_client_ok is None


def test_a_trial_is_paired_with_the_one_that_met_the_same_arrivals_without_a_fault() -> None:
    def trial(name: str, number: int, faults: list[Any], **more: Any) -> TrialSummary:
        basis = {"adapter": "a", "tuning": {"replicas": 2}, "p99_ms": 1.0, "goodput_rps": 5.0, "ok": 9}
        return trial_summary(trial=name, number=number, faults=faults, **{**basis, **more})

    fault = {**FAULT.dump(), "recovery": None}

    calm, other_seed = trial("calm", 1, []), trial("calm-2", 2, [])
    other_tuning = trial("defaults", 1, [], tuning={})
    faulty, alone = trial("faulty", 1, [fault]), trial("alone", 3, [fault])
    other_rate = trial("twice as fast", 1, [], mean_rate=100.0)
    pair([other_tuning, other_seed, other_rate, faulty, alone, calm])
    assert faulty.without_fault is not None and faulty.without_fault.trial == "calm"
    assert alone.without_fault is None
    assert calm.without_fault is None
