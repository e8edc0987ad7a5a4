"""What a fault did: when it was noticed, what it cost, how its victim came back; and whether all requests are accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tailrace.harness.analysis.metrics import NS_PER_S, Measured, recovery
from tailrace.harness.quantities import milliseconds
from tailrace.harness.records.schema import OUTCOME_NAMES, Outcome

_COMING_BACK = {
    "node-spawned": "spawned_s",
    "node-port-open": "port_open_s",
    "node-ready": "ready_s",
    "node-first-answer": "first_answer_s",
    "balancer-up": "in_rotation_s",
}
"""Event of a node that comes back → the key under which its time from the fault is told."""


def aftermath(
    fault: Mapping[str, Any], trace: Measured, events: Sequence[Mapping[str, Any]], span_s: float, slo_ms: float
) -> dict[str, Any]:
    """An injected fault as the trial tells it, and what came of it; times in seconds, those of ``detected_s``,
    ``marked_down_s``, ``replica_born_s`` and ``came_back`` from the fault on.

    ``detected_s`` is when anybody knew: the first client whose request had failed, or the load balancer that took the
    node out. ``came_back`` holds the cold start of a node that was started again. What was not injected has ``recovery``
    ``None`` alone.
    """
    if fault.get("injected_s") is None:
        return {**fault, "recovery": None}
    at_s = float(fault["injected_s"])
    found = recovery(trace, span_s, slo_ms, at_s)
    after = [event for event in events if event.get("t_ns", -1) / NS_PER_S >= at_s]
    marked_down = _first(after, "balancer-down", at_s, node=_node(fault))
    noticed = [time_s for time_s in (found.first_failure_s, marked_down) if time_s is not None]
    came_back = {
        key: time_s
        for event, key in _COMING_BACK.items()
        if (time_s := _first(after, event, at_s, node=_node(fault))) is not None
    }
    return {
        **fault,
        "recovery": vars(found),
        "detected_s": min(noticed, default=None),
        "marked_down_s": marked_down,
        "replica_born_s": _first(after, "replica-born", at_s, node=_node(fault)),
        "came_back": came_back if "spawned_s" in came_back else {},
    }


def _node(fault: Mapping[str, Any]) -> str | None:
    """The node that a fault was done to, where its target names one."""
    target = str(fault.get("target") or "")
    return target.partition("/")[0] if target.startswith("node-") else None


def _first(events: Sequence[Mapping[str, Any]], name: str, at_s: float, node: str | None = None) -> float | None:
    for event in events:
        where = event.get("node") or str(event.get("replica", "")).partition("/")[0]
        if event["event"] == name and node in (None, where):
            return float(event["t_ns"]) / NS_PER_S - at_s
    return None


def accounting(
    trace: Measured, warmup: Measured, *, executed: float | None, server_ok: float | None, probes: int
) -> dict[str, Any]:
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
    return {
        "arrivals": arrivals,
        "outcomes": outcomes,
        "closed": sum(outcomes.values()) == arrivals,
        "executed": None if executed is None else round(executed) - probes,
        "unanswered_work": surplus,
        "done_twice": None if surplus is None else max(0, surplus - failed),
        "server_ok": None if server_ok is None else round(server_ok),
        "server_ok_less_client_ok": None if server_ok is None else round(server_ok) - probes - ok,
    }


_ALIKE = ("adapter", "number", "tuning", "composition", "protocol", "mean_rate")
_ALIKE_IN_MEMORY = ("policy", "pinned", "memory_mb")


def _conditions(trial: Mapping[str, Any]) -> list[Any]:
    """What two trials have to share for one to show what a fault did to the other."""
    memory = trial.get("multiplexing") or {}
    return [*(trial.get(key) for key in _ALIKE), *(memory.get(key) for key in _ALIKE_IN_MEMORY)]


def pair(trials: Sequence[dict[str, Any]]) -> None:
    """Set beside every trial with faults the one that met the same arrivals without: same framework, seed,
    rate, tuning, composition, and memory of its models."""
    for trial in trials:
        calm = next(
            (
                other
                for other in trials
                if trial["faults"]
                and not other["faults"]
                and _conditions(other) == _conditions(trial)
                and other["state"] == trial["state"] == "done"
            ),
            None,
        )
        trial["without_fault"] = (
            None
            if calm is None
            else {key: calm[key] for key in ("trial", "slo_attainment", "goodput_rps", "p99_ms", "ok")}
        )


def fault_sentence(fault: Mapping[str, Any]) -> str:
    """What a fault did, in one sentence."""
    recovery = fault["recovery"]
    if recovery is None:
        return f"{fault['kind']} at {fault['at_s']:g} s hit nothing (see events.jsonl)"
    back = recovery["recovery_s"]
    if back is None:
        told = "attainment did not come back"
    elif back == 0:
        told = "attainment held"
    else:
        told = f"attainment back after {back:g} s"
    if recovery["relapse_s"]:
        told += f" (and low again in {recovery['relapse_s']} later seconds)"
    return (
        f"{fault['kind']} at {fault['injected_s']:.2f} s: {told}; from then on {recovery['lost']} of the requests failed; "
        f"p99 until recovery {milliseconds(recovery['outage_p99_ms'])} ms"
    )
