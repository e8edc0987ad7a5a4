"""Verdicts: every reason has a case that raises it and a near miss that does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tailrace.harness.analysis.metrics import Measured
from tailrace.harness.analysis.steadiness import Steadiness
from tailrace.harness.analysis.verdicts import judge
from tailrace.harness.records.schema import Outcome
from tailrace.harness.records.summary import Reason, ResourceUse
from tests.records import facts
from tests.synthetic import calibration

QUIET = ResourceUse(steal=0.0, outside_load=0.0)
PROVEN = calibration(1000.0)


def records(n: int = 500, *, response_ms: float = 50, lag_ms: float = 0.1, failed: Outcome | None = None) -> Measured:
    intended = np.arange(n, dtype=np.int64) * 1_000_000
    return Measured(
        intended_ns=intended,
        sent_ns=intended + int(lag_ms * 1e6),
        first_byte_ns=intended,
        done_ns=intended + int(response_ms * 1e6),
        outcome=np.full(n, Outcome.OK if failed is None else failed, dtype=np.uint8),
    )


NOTHING = records(0)


def codes(
    told: dict[str, Any], trace: Measured, warmup: Measured = NOTHING, **host: float | None
) -> tuple[str, list[str]]:
    noise = QUIET.model_copy(update=host)
    verdict, reasons = judge(facts(**told), trace, warmup, noise, ruler=PROVEN)
    assert all(reason.text and reason.remedy for reason in reasons)
    return verdict, [reason.code for reason in reasons]


def test_a_clean_trial_is_valid() -> None:
    assert codes({}, records()) == ("VALID", [])


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_a_trial_that_did_not_finish_is_invalid(state: str) -> None:
    assert codes({"state": state}, records()) == ("INVALID", ["incomplete"])


def test_one_dropped_arrival_is_one_too_many() -> None:
    trace = records()
    trace.outcome[0] = Outcome.DROPPED
    trace.sent_ns[0] = -1
    assert codes({}, trace) == ("INVALID", ["dropped"])


@pytest.mark.parametrize(
    ("response_ms", "lag_ms", "expected"),
    [(5, 0.99, []), (5, 1.01, ["generator-saturated"]), (50, 4.9, []), (50, 5.1, ["generator-saturated"])],
)
def test_the_generators_lateness_is_judged_against_the_larger_of_1_ms_and_a_tenth_of_the_median(
    response_ms: float, lag_ms: float, expected: list[str]
) -> None:
    told = {"load_generator": {"start_lag_p99_ms": lag_ms}}
    assert codes(told, records(response_ms=response_ms))[1] == expected


def test_waiting_for_a_connection_is_the_servers_doing() -> None:
    told = {"load_generator": {"start_lag_p99_ms": 0.1}}
    assert codes(told, records(response_ms=3000, lag_ms=2000)) == ("VALID", [])


def test_failures_that_take_long_do_not_excuse_a_late_generator() -> None:
    trace = records(response_ms=5)
    trace.outcome[: len(trace) // 2] = Outcome.TIMEOUT
    trace.done_ns[: len(trace) // 2] += 10**10
    assert codes({"load_generator": {"start_lag_p99_ms": 2.0}}, trace)[1] == ["generator-saturated"]


def test_wrong_answers_make_a_trial_invalid_and_give_the_example() -> None:
    wrong = facts(outputs={"checked": 100, "mismatched": 1, "unchecked": 0, "example": "y[0] is 3"})
    verdict, reasons = judge(wrong, records(), NOTHING, QUIET, ruler=PROVEN)
    assert verdict == "INVALID"
    assert "y[0] is 3" in reasons[0].text
    assert (
        codes({"outputs": {"checked": 100, "mismatched": 0, "unchecked": 0, "example": None}}, records())[0] == "VALID"
    )


def test_errors_only() -> None:
    assert codes({}, records(failed=Outcome.SHED)) == ("INVALID", ["errors-only"])


def test_never_warm() -> None:
    assert codes({}, records(), records(10, failed=Outcome.CONNECTION)) == ("INVALID", ["never-warm"])
    assert codes({}, records(), records(10)) == ("VALID", [])


def test_configuration_not_applied() -> None:
    told = {"not_applied": ["max_batch: asked for 16, the server has 8"]}
    assert codes(told, records()) == ("INVALID", ["configuration-not-applied"])


def test_a_node_that_died_and_was_started_again_has_died_all_the_same() -> None:
    told = {"final_probe": WELL, "node_deaths": 1}
    assert codes(told, records()) == ("INVALID", ["server-died"])
    fault = {"kind": "kill_node", "injected_s": 1.0}
    assert codes({**told, "faults": [fault], "planned_faults": 1}, records()) == ("VALID", [])


DEAD = {"process_alive": False, "claims_ready": False, "answers": False}
LYING = {"process_alive": True, "claims_ready": True, "answers": False}
MUTE = {"process_alive": True, "claims_ready": False, "answers": True}
WELL = {"process_alive": True, "claims_ready": True, "answers": True}


@pytest.mark.parametrize(
    ("probe", "expected"), [(DEAD, ["server-died"]), (LYING, ["wedged"]), (MUTE, ["wedged"]), (WELL, [])]
)
def test_the_state_after_the_trial_counts_only_when_no_fault_explains_it(
    probe: dict[str, bool], expected: list[str]
) -> None:
    hit, missed = {"kind": "kill_node", "injected_s": 20.0}, {"kind": "kill_node", "injected_s": None}
    assert codes({"final_probe": probe, "faults": []}, records())[1] == expected
    assert codes({"final_probe": probe, "planned_faults": 1, "faults": [hit]}, records())[1] == []
    missing = codes({"final_probe": probe, "planned_faults": 1, "faults": [missed]}, records())[1]
    assert missing == ["fault-missed", *expected], "a fault that hit nothing explains nothing"


def test_a_planned_fault_that_was_never_tried_is_missed_too() -> None:
    assert codes({"planned_faults": 2, "faults": [{"kind": "kill_node", "injected_s": 1.0}]}, records()) == (
        "INVALID",
        ["fault-missed"],
    )
    assert codes({"state": "interrupted", "planned_faults": 1, "faults": []}, records())[1] == ["incomplete"]


def test_answers_that_nobody_checked_prove_nothing() -> None:
    told = {"outputs": {"checked": 0, "mismatched": 0, "unchecked": 500, "example": None}}
    assert codes(told, records()) == ("INVALID", ["outputs-unchecked"])


def test_a_noisy_host_makes_the_trial_unknown_but_not_better_than_invalid() -> None:
    assert codes({}, records(), steal=0.06) == ("UNKNOWN", ["noisy-host"])
    assert codes({}, records(), outside_load=0.21) == ("UNKNOWN", ["noisy-host"])
    assert codes({}, records(), steal=None, outside_load=None) == ("VALID", [])
    assert codes({}, records(failed=Outcome.ERROR), steal=0.5)[0] == "INVALID"


def test_an_empty_trace_proves_nothing() -> None:
    assert codes({}, NOTHING) == ("INVALID", ["nothing-measured"])


def ruled(trace: Measured, ruler: dict[str, Any] | None) -> tuple[str, list[str]]:
    verdict, reasons = judge(facts(), trace, NOTHING, QUIET, ruler=ruler)
    return verdict, [reason.code for reason in reasons]


@pytest.mark.parametrize(
    ("ceiling_rps", "expected"), [(500.0, []), (499.0, ["generator-saturated"]), (None, ["generator-saturated"])]
)
def test_no_more_is_offered_than_the_calibration_proved(ceiling_rps: float | None, expected: list[str]) -> None:
    """500 arrivals lie within one second here."""
    assert ruled(records(), calibration(500.0, ceiling_rps=ceiling_rps))[1] == expected


@pytest.mark.parametrize("ruler", [None, {}, {"error": "there is no HAProxy"}])
def test_without_a_calibration_nobody_knows(ruler: dict[str, Any] | None) -> None:
    assert ruled(records(), ruler) == ("UNKNOWN", ["not-calibrated"])


def workers(*told: dict[str, Any]) -> dict[str, Any]:
    return {
        "load_generator": {
            "workers": [{"lost": None, "cpu_s": 1.0, "clock_uncertainty_ms": 0.0, **worker} for worker in told]
        }
    }


def test_a_lost_worker_makes_the_trial_invalid() -> None:
    assert codes(
        workers({}, {"lost": "load worker 1 on b: it ended", "cpu_s": None, "clock_uncertainty_ms": None}), records()
    ) == ("INVALID", ["worker-lost"])


@pytest.mark.parametrize(
    ("response_ms", "uncertain_ms", "expected"),
    [
        (5, 0.99, []),
        (5, 1.01, ["clock-uncertain"]),
        (50, 4.9, []),
        (50, 5.1, ["clock-uncertain"]),
        (50, None, ["clock-uncertain"]),
    ],
)
def test_clocks_must_be_known_as_well_as_instants(
    response_ms: float, uncertain_ms: float | None, expected: list[str]
) -> None:
    told = workers({}, {"clock_uncertainty_ms": uncertain_ms})
    assert codes(told, records(response_ms=response_ms)) == ("UNKNOWN" if expected else "VALID", expected)


def test_a_frequency_that_falls_under_steady_load_is_noise() -> None:
    assert codes({}, records(), frequency_change=-0.21) == ("UNKNOWN", ["noisy-host"])
    assert codes({}, records(), frequency_change=-0.19) == ("VALID", [])
    assert codes({}, records(), frequency_change=0.9) == ("VALID", []), "a governor that wakes up"
    assert codes({"transient": True}, records(), frequency_change=-0.5) == ("VALID", []), (
        "load went, and it fell asleep"
    )
    assert codes({"faults": [{"kind": "kill_node", "injected_s": 3.0}]}, records(), frequency_change=-0.5) == (
        "VALID",
        [],
    )


STEADY = Steadiness(
    effective_arrivals=100.0,
    warmup_detected_s=-3.0,
    warmup_excess=math.nan,
    unlike_rest=False,
    drift=0.5,
    drifting=False,
    failure_drift=0.2,
    failures_drifting=False,
)


def doubts(told: dict[str, Any], warmup: Measured = NOTHING, **changes: Any) -> list[Reason]:
    return judge(facts(**told), records(), warmup, QUIET, replace(STEADY, **changes), PROVEN)[1]


def test_a_trial_that_is_not_steady_is_unknown_with_the_warm_up_that_it_needs() -> None:
    assert doubts({}) == []
    warmup = records(10)
    warmup.intended_ns[:] -= 4 * 10**9
    slow: dict[str, Any] = {"unlike_rest": True, "warmup_detected_s": 6.4, "warmup_excess": 0.8}
    (reason,) = doubts({}, warmup, **slow)
    assert (reason.code, reason.effect) == ("not-steady", "UNKNOWN")
    assert "until second 6.4 of the trace" in reason.text and "80% higher" in reason.text
    assert reason.remedy == "lengthen warmup.duration_s to at least 11"
    (filling,) = doubts({}, warmup, **{**slow, "warmup_excess": -1.0})
    assert "the queue was still filling" in filling.text and filling.remedy.startswith("lower the rate")


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"drifting": True, "drift": 0.52}, "rose by 52%", "lower the rate"),
        ({"drifting": True, "drift": math.inf}, "rose to ∞", "lower the rate"),
        ({"drifting": True, "drift": -0.3}, "fell by 30%", "lengthen warmup"),
        ({"failures_drifting": True}, "share of failures rose by 20 points", "lower the rate"),
        ({"failures_drifting": True, "failure_drift": -0.2}, "share of failures fell by 20 points", "lengthen warmup"),
    ],
)
def test_a_drift_is_told_with_its_size(changes: dict[str, Any], text: str, remedy: str) -> None:
    (reason,) = doubts({}, **changes)
    assert text in reason.text and reason.remedy.startswith(remedy)


def test_what_is_meant_to_change_need_not_be_steady() -> None:
    assert doubts({"transient": True}, drifting=True) == []
    assert doubts({"faults": [{"kind": "kill_node", "injected_s": 3.0}]}, drifting=True) == []
    assert [r.code for r in doubts({"faults": [{"kind": "kill_node", "injected_s": None}]}, drifting=True)] == [
        "not-steady"
    ]
