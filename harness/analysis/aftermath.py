"""What a fault did: when it was noticed, what it cost, how its victim came back; and whether all requests are accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tailrace.harness.analysis.metrics import NS_PER_S, Measured, recovery
from tailrace.harness.quantities import milliseconds
from tailrace.harness.records.facts import Fault
from tailrace.harness.records.schema import OUTCOME_NAMES, Outcome
from tailrace.harness.records.summary import Accounting, Aftermath, TrialSummary, WithoutFault

_COMING_BACK = {
    "node-spawned": "spawned_s",
    "node-port-open": "port_open_s",
    "node-ready": "ready_s",
    "node-first-answer": "first_answer_s",
    "balancer-up": "in_rotation_s",
}
"""Event of a node that comes back → the key under which its time from the fault is told."""


def aftermath(
    fault: Fault, trace: Measured, events: Sequence[Mapping[str, Any]], span_s: float, slo_ms: float
) -> Aftermath:
    """An injected fault as the trial tells it, and what came of it."""
    if fault.injected_s is None:
        return Aftermath.model_validate({**fault.dump(), "recovery": None})
    at_s = fault.injected_s
    found = recovery(trace, span_s, slo_ms, at_s)
    after = [event for event in events if event.get("t_ns", -1) / NS_PER_S >= at_s]
    marked_down = _first(after, "balancer-down", at_s, node=_node(fault))
    noticed = [time_s for time_s in (found.first_failure_s, marked_down) if time_s is not None]
    came_back = {
        key: time_s
        for event, key in _COMING_BACK.items()
        if (time_s := _first(after, event, at_s, node=_node(fault))) is not None
    }
    return Aftermath.model_validate(
        {
            **fault.dump(),
            "recovery": found,
            "detected_s": min(noticed, default=None),
            "marked_down_s": marked_down,
            "replica_born_s": _first(after, "replica-born", at_s, node=_node(fault)),
            "came_back": came_back if "spawned_s" in came_back else {},
        }
    )


def _node(fault: Fault) -> str | None:
    """The node that a fault was done to, where its target names one."""
    target = fault.target or ""
    return target.partition("/")[0] if target.startswith("node-") else None


def _first(events: Sequence[Mapping[str, Any]], name: str, at_s: float, node: str | None = None) -> float | None:
    for event in events:
        where = event.get("node") or str(event.get("replica", "")).partition("/")[0]
        if event["event"] == name and node in (None, where):
            return float(event["t_ns"]) / NS_PER_S - at_s
    return None


def accounting(
    trace: Measured, warmup: Measured, *, executed: float | None, server_ok: float | None, probes: int
) -> Accounting:
    """Whether every arrival has one outcome, and how the client's counts stand beside the servers'; warm-up included.

    ``executed`` is how many items the devices computed, where that is counted; ``server_ok`` how many requests the servers
    say that they answered; ``probes`` how many the harness itself made meanwhile. ``unanswered_work`` is what was computed and
    never reached a client as a success: at the most so much was done twice (retries by the framework), at the least
    ``done_twice``, which no failed request can explain.
    """
    outcomes = {
        name: trace.count(Outcome(code)) + warmup.count(Outcome(code)) for code, name in enumerate(OUTCOME_NAMES)
    }
    arrivals = len(trace) + len(warmup)
    ok, dropped = outcomes["ok"], outcomes["dropped"]
    failed = arrivals - ok - dropped
    surplus = None if executed is None else round(executed) - probes - ok
    return Accounting(
        arrivals=arrivals,
        outcomes=outcomes,
        closed=sum(outcomes.values()) == arrivals,
        executed=None if executed is None else round(executed) - probes,
        unanswered_work=surplus,
        done_twice=None if surplus is None else max(0, surplus - failed),
        server_ok=None if server_ok is None else round(server_ok),
        server_ok_less_client_ok=None if server_ok is None else round(server_ok) - probes - ok,
    )


def _conditions(trial: TrialSummary) -> tuple[Any, ...]:
    """What two trials have to share for one to show what a fault did to the other."""
    memory = trial.multiplexing
    shared = None if memory is None else (memory.policy, memory.pinned, memory.memory_mb)
    return trial.adapter, trial.number, trial.tuning, trial.composition, trial.protocol, trial.mean_rate, shared


def pair(trials: Sequence[TrialSummary]) -> None:
    """Set beside every trial with faults the one that met the same arrivals without: same framework, seed,
    rate, tuning, composition, and memory of its models."""
    for trial in trials:
        calm = next(
            (
                other
                for other in trials
                if trial.faults
                and not other.faults
                and _conditions(other) == _conditions(trial)
                and other.state == trial.state == "done"
            ),
            None,
        )
        trial.without_fault = (
            None
            if calm is None
            else WithoutFault(
                trial=calm.trial,
                slo_attainment=calm.slo_attainment,
                goodput_rps=calm.goodput_rps,
                p99_ms=calm.p99_ms,
                ok=calm.ok,
            )
        )


def fault_sentence(fault: Aftermath) -> str:
    """What a fault did, in one sentence."""
    recovery = fault.recovery
    if recovery is None:
        return f"{fault.kind} at {fault.at_s:g} s hit nothing (see events.jsonl)"
    back = recovery.recovery_s
    if back is None:
        told = "attainment did not come back"
    elif back == 0:
        told = "attainment held"
    else:
        told = f"attainment back after {back:g} s"
    if recovery.relapse_s:
        told += f" (and low again in {recovery.relapse_s} later seconds)"
    return (
        f"{fault.kind} at {recovery.at_s:.2f} s: {told}; from then on {recovery.lost} of the requests failed; "
        f"p99 until recovery {milliseconds(recovery.outage_p99_ms)} ms"
    )
