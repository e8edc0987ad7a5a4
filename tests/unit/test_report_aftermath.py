"""The section on faults: every number in its rows is the record's, under its own heading."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tailrace.reports.aftermath import ACCOUNT_HEADINGS, RECOVERY_HEADINGS, accounts, recoveries
from tailrace.reports.text import NOTHING
from tests.records import trial_summary

RECOVERY = {
    "at_s": 20.5,
    "recovery_s": 3.0,
    "relapse_s": 1,
    "baseline_attainment": 0.99,
    "dip_attainment": 0.25,
    "lost": 12,
    "lost_by_outcome": {"error": 10, "timeout": 2},
    "first_failure_s": 0.25,
    "baseline_goodput_rps": 50.0,
    "dip_goodput_rps": 12.0,
    "outage_p99_ms": 321.0,
}
FAULT = {
    "kind": "kill_node",
    "target": "node-1",
    "injected_s": 20.5,
    "healed_s": None,
    "detected_s": 0.25,
    "marked_down_s": 0.75,
    "replica_born_s": 2.5,
    "came_back": {"spawned_s": 1.25, "ready_s": 4.5, "first_answer_s": 4.75},
    "recovery": RECOVERY,
}
CALM = {"trial": "calm--1", "slo_attainment": 0.999, "goodput_rps": 50.0, "p99_ms": 40.0, "ok": 999}
ACCOUNTING = {
    "arrivals": 1000,
    "outcomes": {"ok": 980, "error": 12, "shed": 3, "timeout": 2, "connection": 1, "dropped": 2},
    "closed": True,
    "executed": 985,
    "unanswered_work": 5,
    "done_twice": 4,
    "server_ok": 973,
    "server_ok_less_client_ok": -7,
}


def cell(*faults: dict[str, Any], **more: Any) -> Any:
    told = {"number": 2, "slo_attainment": 0.95, "accounting": ACCOUNTING, **more}
    return SimpleNamespace(label="Framework · fault", trials=[trial_summary(faults=list(faults), **told)])


def told(fault: dict[str, Any], **more: Any) -> dict[str, str]:
    (row,) = recoveries([cell(fault, **more)])
    return dict(zip(RECOVERY_HEADINGS, (text.replace("\u202f", "").replace("\u00a0", "") for text in row), strict=True))


def test_a_fault_is_told_in_full() -> None:
    assert told(FAULT, without_fault=CALM) == {
        "Cell": "Framework · fault",
        "Trial": "no. 2",
        "Fault": "kill node node-1",
        "At": "20.50s",
        "Lasted": NOTHING,
        "Noticed after": "0.250s, by a client",
        "Attainment before": "99.0%",
        "Lowest second": "25.0%",
        "Failed since": "12 (10 error and 2 timeout)",
        "Recovery": "3.00s",
        "Low again": "1.00s",
        "p99 until recovery": "321ms",
        "Replacement": "started 1.25s, ready 4.50s, right answer 4.75s",
        "Attainment, with": "95.0%",
        "without": "99.90%",
    }


def test_what_differs_is_told_otherwise() -> None:
    assert told({**FAULT, "detected_s": 0.75})["Noticed after"].endswith("by the balancer")
    assert told({**FAULT, "detected_s": None})["Noticed after"] == "by nobody"
    assert told({**FAULT, "healed_s": 25.5})["Lasted"].startswith("5")
    assert told({**FAULT, "came_back": {}})["Replacement"].startswith("new replica 2.5")
    assert told({**FAULT, "came_back": {}, "replica_born_s": None})["Replacement"] == NOTHING
    assert told({**FAULT, "recovery": {**RECOVERY, "recovery_s": 0.0}})["Recovery"] == "held"
    assert told({**FAULT, "recovery": {**RECOVERY, "recovery_s": None}})["Recovery"] == "not recovered"
    assert told({**FAULT, "recovery": {**RECOVERY, "lost_by_outcome": {"error": 12}}})["Failed since"] == "12"
    assert told(FAULT, state="failed")["Trial"] == "no. 2, not finished"


def test_a_fault_that_hit_nothing_says_so() -> None:
    row = told({"kind": "kill_node", "at_s": 4.0, "target": None, "injected_s": None, "recovery": None})
    assert row["Recovery"] == "not injected"
    assert row["At"].startswith("planned 4")
    assert row["Replacement"] == row["Noticed after"] == NOTHING


def test_the_account_of_a_trial_with_faults() -> None:
    (row,) = accounts([cell(FAULT), cell()])
    assert dict(zip(ACCOUNT_HEADINGS, row, strict=True)) == {
        "Cell": "Framework · fault",
        "Trial": "no. 2",
        "Arrivals": "1,000",
        "Answered": "980",
        "Failed": "18",
        "Not sent": "2",
        "Computed": "985",
        "Computed in vain": "5",
        "Done twice": "4",
        "Servers' count less ours": "-7",
    }
    (row,) = accounts([cell(FAULT, accounting={**ACCOUNTING, "executed": None})])
    assert dict(zip(ACCOUNT_HEADINGS, row, strict=True))["Computed"] == NOTHING
