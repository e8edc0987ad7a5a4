"""The section on faults: what each cost and how it healed, and whether every request is accounted for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tailrace.harness.analysis.summary import Summary
from tailrace.reports.evidence import CellView
from tailrace.reports.text import NOTHING, humanly, listing, milliseconds, quantity, seconds, share

RECOVERY_HEADINGS = (
    "Cell",
    "Trial",
    "Fault",
    "At",
    "Lasted",
    "Noticed after",
    "Attainment before",
    "Lowest second",
    "Failed since",
    "Recovery",
    "Low again",
    "p99 until recovery",
    "Replacement",
    "Attainment, with",
    "without",
)
ACCOUNT_HEADINGS = (
    "Cell",
    "Trial",
    "Arrivals",
    "Answered",
    "Failed",
    "Not sent",
    "Computed",
    "Computed in vain",
    "Done twice",
    "Servers' count less ours",
)


def recoveries(cells: Sequence[CellView]) -> list[tuple[str, ...]]:
    """A row for each fault of each trial, in the order of :data:`RECOVERY_HEADINGS`."""
    return [
        (cell.label, _number(trial), *_recovery(fault), share(trial["slo_attainment"]), _without(trial))
        for cell in cells
        for trial in cell.trials
        for fault in trial["faults"]
    ]


def accounts(cells: Sequence[CellView]) -> list[tuple[str, ...]]:
    """A row for each trial with faults, in the order of :data:`ACCOUNT_HEADINGS`."""
    return [
        (cell.label, _number(trial), *_account(trial["accounting"]))
        for cell in cells
        for trial in cell.trials
        if trial["faults"]
    ]


def _number(trial: Summary) -> str:
    return f"no. {trial['number']}" + ("" if trial["state"] == "done" else ", not finished")


def _without(trial: Summary) -> str:
    calm = trial.get("without_fault")
    return NOTHING if calm is None else share(calm["slo_attainment"])


def _recovery(fault: Mapping[str, Any]) -> tuple[str, ...]:
    kind = humanly(str(fault.get("kind", "fault"))) + (f" {fault['target']}" if fault.get("target") else "")
    told = fault["recovery"]
    if told is None:
        return (kind, f"planned {seconds(fault.get('at_s'))}", *[NOTHING] * 5, "not injected", *[NOTHING] * 3)
    took = told["recovery_s"]
    empty = math.isnan(told["dip_attainment"])
    recovered = "held" if took == 0 else seconds(took) if took is not None else "not recovered"
    healed_s = fault.get("healed_s")
    return (
        kind,
        quantity(fault["injected_s"], "s", digits=4),
        NOTHING if healed_s is None else seconds(healed_s - fault["injected_s"]),
        _noticed(fault),
        share(told["baseline_attainment"]),
        share(told["dip_attainment"]),
        _lost(told),
        "no arrivals to tell" if empty else recovered,
        NOTHING if empty or took is None else seconds(told["relapse_s"]),
        milliseconds(told["outage_p99_ms"]),
        _replacement(fault),
    )


def _noticed(fault: Mapping[str, Any]) -> str:
    """When, and by whom: a client whose request had failed, or the load balancer."""
    when = fault.get("detected_s")
    if when is None:
        return "by nobody"
    return f"{seconds(when)}, by {'the balancer' if when == fault.get('marked_down_s') else 'a client'}"


def _lost(told: Mapping[str, Any]) -> str:
    by_outcome = [f"{number:,} {outcome}" for outcome, number in told["lost_by_outcome"].items()]
    return f"{told['lost']:,}" + (f" ({listing(by_outcome)})" if len(by_outcome) > 1 else "")


def _replacement(fault: Mapping[str, Any]) -> str:
    """How long after the fault somebody else stood in the victim's place."""
    came_back = fault.get("came_back") or {}
    phases = {"spawned_s": "started", "ready_s": "ready", "first_answer_s": "right answer"}
    told = [f"{word} {seconds(came_back[key])}" for key, word in phases.items() if key in came_back]
    if told:
        return ", ".join(told)
    born_s = fault.get("replica_born_s")
    return NOTHING if born_s is None else f"new replica {seconds(born_s)}"


def _account(told: Mapping[str, Any]) -> tuple[str, ...]:
    outcomes = told["outcomes"]
    failed = told["arrivals"] - outcomes["ok"] - outcomes["dropped"]
    counts = [told["arrivals"], outcomes["ok"], failed, outcomes["dropped"]]
    rest = [told["executed"], told["unanswered_work"], told["done_twice"], told["server_ok_less_client_ok"]]
    return tuple(NOTHING if number is None else f"{number:,}" for number in [*counts, *rest])
