"""Verdicts: every reason has a case that raises it and a near miss that does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.metrics import Measured
from harness.records import Outcome
from harness.verdicts import judge

QUIET = {"steal": 0.0, "outside_load": 0.0}


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
    facts: dict[str, Any], trace: Measured, warmup: Measured = NOTHING, **host: float | None
) -> tuple[str, list[str]]:
    verdict, reasons = judge({"state": "done", **facts}, trace, warmup, {**QUIET, **host})
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
    facts = {"load_generator": {"start_lag_p99_ms": lag_ms}}
    assert codes(facts, records(response_ms=response_ms))[1] == expected


def test_waiting_for_a_connection_is_the_servers_doing() -> None:
    facts = {"load_generator": {"start_lag_p99_ms": 0.1}}
    assert codes(facts, records(response_ms=3000, lag_ms=2000)) == ("VALID", [])


def test_failures_that_take_long_do_not_excuse_a_late_generator() -> None:
    trace = records(response_ms=5)
    trace.outcome[: len(trace) // 2] = Outcome.TIMEOUT
    trace.done_ns[: len(trace) // 2] += 10**10
    assert codes({"load_generator": {"start_lag_p99_ms": 2.0}}, trace)[1] == ["generator-saturated"]


def test_wrong_answers_make_a_trial_invalid_and_give_the_example() -> None:
    facts = {"outputs": {"checked": 100, "mismatched": 1, "unchecked": 0, "example": "y[0] is 3"}}
    verdict, reasons = judge({"state": "done", **facts}, records(), NOTHING, QUIET)
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
    facts = {"not_applied": ["max_batch: asked for 16, the server has 8"]}
    assert codes(facts, records()) == ("INVALID", ["configuration-not-applied"])


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
    hit, missed = {"injected_s": 20.0}, {"injected_s": None}
    assert codes({"final_probe": probe, "faults": []}, records())[1] == expected
    assert codes({"final_probe": probe, "planned_faults": 1, "faults": [hit]}, records())[1] == []
    missing = codes({"final_probe": probe, "planned_faults": 1, "faults": [missed]}, records())[1]
    assert missing == ["fault-missed", *expected], "a fault that hit nothing explains nothing"


def test_a_planned_fault_that_was_never_tried_is_missed_too() -> None:
    assert codes({"planned_faults": 2, "faults": [{"injected_s": 1.0}]}, records()) == ("INVALID", ["fault-missed"])
    assert codes({"state": "interrupted", "planned_faults": 1, "faults": []}, records())[1] == ["incomplete"]


def test_answers_that_nobody_checked_prove_nothing() -> None:
    facts = {"outputs": {"checked": 0, "mismatched": 0, "unchecked": 500, "example": None}}
    assert codes(facts, records()) == ("INVALID", ["outputs-unchecked"])


def test_a_noisy_host_makes_the_trial_unknown_but_not_better_than_invalid() -> None:
    assert codes({}, records(), steal=0.06) == ("UNKNOWN", ["noisy-host"])
    assert codes({}, records(), outside_load=0.21) == ("UNKNOWN", ["noisy-host"])
    assert codes({}, records(), steal=None, outside_load=None) == ("VALID", [])
    assert codes({}, records(failed=Outcome.ERROR), steal=0.5)[0] == "INVALID"


def test_an_empty_trace_proves_nothing() -> None:
    assert codes({}, NOTHING) == ("INVALID", ["nothing-measured"])
