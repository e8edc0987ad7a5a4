"""The section on faults: what each cost and how it healed, and whether every request is accounted for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tailrace.harness.records.summary import Accounting, Aftermath, Recovery, TrialSummary
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
        (cell.label, _number(trial), *_recovery(fault), share(trial.slo_attainment), _without(trial))
        for cell in cells
        for trial in cell.trials
        for fault in trial.faults
    ]


def accounts(cells: Sequence[CellView]) -> list[tuple[str, ...]]:
    """A row for each trial with faults, in the order of :data:`ACCOUNT_HEADINGS`."""
    return [
        (cell.label, _number(trial), *_account(trial.accounting))
        for cell in cells
        for trial in cell.trials
        if trial.faults
    ]


def _number(trial: TrialSummary) -> str:
    return f"no. {trial.number}" + ("" if trial.state == "done" else ", not finished")


def _without(trial: TrialSummary) -> str:
    calm = trial.without_fault
    return NOTHING if calm is None else share(calm.slo_attainment)


def _recovery(fault: Aftermath) -> tuple[str, ...]:
    kind = humanly(fault.kind) + (f" {fault.target}" if fault.target else "")
    told = fault.recovery
    if told is None:
        return (kind, f"planned {seconds(fault.at_s)}", *[NOTHING] * 5, "not injected", *[NOTHING] * 3)
    took = told.recovery_s
    lasted_s = None if fault.healed_s is None or fault.injected_s is None else fault.healed_s - fault.injected_s
    empty = math.isnan(told.dip_attainment)
    recovered = "held" if took == 0 else seconds(took) if took is not None else "not recovered"
    return (
        kind,
        quantity(fault.injected_s, "s", digits=4),
        NOTHING if lasted_s is None else seconds(lasted_s),
        _noticed(fault),
        share(told.baseline_attainment),
        share(told.dip_attainment),
        _lost(told),
        "no arrivals to tell" if empty else recovered,
        NOTHING if empty or took is None else seconds(told.relapse_s),
        milliseconds(told.outage_p99_ms),
        _replacement(fault),
    )


def _noticed(fault: Aftermath) -> str:
    """When, and by whom: a client whose request had failed, or the load balancer."""
    when = fault.detected_s
    if when is None:
        return "by nobody"
    return f"{seconds(when)}, by {'the balancer' if when == fault.marked_down_s else 'a client'}"


def _lost(told: Recovery) -> str:
    by_outcome = [f"{number:,} {outcome}" for outcome, number in told.lost_by_outcome.items()]
    return f"{told.lost:,}" + (f" ({listing(by_outcome)})" if len(by_outcome) > 1 else "")


def _replacement(fault: Aftermath) -> str:
    """How long after the fault somebody else stood in the victim's place."""
    back = fault.came_back
    phases = {"started": back.spawned_s, "ready": back.ready_s, "right answer": back.first_answer_s}
    told = [f"{word} {seconds(after_s)}" for word, after_s in phases.items() if after_s is not None]
    if told:
        return ", ".join(told)
    return NOTHING if fault.replica_born_s is None else f"new replica {seconds(fault.replica_born_s)}"


def _account(told: Accounting) -> tuple[str, ...]:
    outcomes = told.outcomes
    failed = told.arrivals - outcomes["ok"] - outcomes["dropped"]
    counts = [told.arrivals, outcomes["ok"], failed, outcomes["dropped"]]
    rest = [told.executed, told.unanswered_work, told.done_twice, told.server_ok_less_client_ok]
    return tuple(NOTHING if number is None else f"{number:,}" for number in [*counts, *rest])
