"""The tight case, in the simulator alone: which settings of a system that scales itself keep an objective most cheaply, and
under other seeds of the trace too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tailrace.harness.analysis.metrics import Ints
from tailrace.simulator.capacity import CHECKED_SEEDS, ENOUGH_SEEDS
from tailrace.simulator.engine import simulate
from tailrace.simulator.published_case import AUTOSCALER, SYSTEM
from tailrace.simulator.system import Autoscaler, Batching, Failure, System
from tailrace.traces import catalogue
from tailrace.tuner.grid import Settings, combinations
from tailrace.tuner.objective import Expected, Objective


@dataclass(frozen=True)
class Case:
    """The tight case: what may be set of a system that scales itself, and what that costs."""

    settings: Settings
    system: System
    figures: dict[str, float]
    mean_replicas: float


CASE_KNOBS: dict[str, tuple[Any, ...]] = {
    "max_batch": (4, 8, 12, 16, 24, 32),
    "window_ms": (0, 2, 5, 10),
    "up_above": (2, 4, 6, 10),
    "warm_pool": (0, 1, 2, 3),
    "replicas": (1, 2, 3, 4),
}


def held_seeds(system: System, trace: str, seeds: Iterable[int], objective: Objective) -> int:
    """Under how many seeds of a generated trace a system keeps an objective."""
    traces = (catalogue.load(trace, seed=seed) for seed in seeds)
    return sum(
        objective.met(
            Expected.of(simulate(system, traffic.arrivals_ns, span_ns=traffic.span_ns).figures(objective.p99_ms))
        )
        for traffic in traces
    )


def scaled_cases(base: System, scaler: Autoscaler, arrivals_ns: Ints, span_ns: int, slo_ms: float) -> list[Case]:
    """Every combination of :data:`CASE_KNOBS` that is possible, simulated."""
    found = []
    for settings in combinations(CASE_KNOBS):
        if settings["replicas"] < scaler.min + settings["warm_pool"]:
            continue  # it would be told to keep more than there are
        chosen = scaler.model_copy(
            update={
                "up_above": float(settings["up_above"]),
                "down_below": min(scaler.down_below, settings["up_above"] / 2),
                "warm_pool": settings["warm_pool"],
            }
        )
        system = base.model_copy(
            update={
                "batching": Batching(max_batch=settings["max_batch"], window_ms=settings["window_ms"]),
                "replicas": settings["replicas"],
                "autoscaler": chosen,
            }
        )
        simulated = simulate(system, arrivals_ns, span_ns=span_ns)
        found.append(Case(settings, system, simulated.figures(slo_ms), simulated.ready_ns / span_ns))
    return found


@dataclass(frozen=True)
class TightCase:
    """All settings on one trace, and the one to take."""

    span_s: float
    failures: Sequence[Failure]
    """Replicas that are lost within the trace."""
    drawn: bool
    """Whether the trace has other seeds to be tried under; one that is a file has not."""
    cases: Sequence[Case]
    within: Sequence[Case]
    """Those that keep the objective: the cheapest first, of equally cheap ones that with the better tail."""
    chosen: int | None
    """Which of ``within`` holds under other seeds as well, or simply the first where there are none."""
    held: dict[int, int]
    """Of those that were tried: under how many of :data:`CHECKED_SEEDS` other seeds it held."""
    cheapest: Case
    """Of all, whatever its tail."""


def tight_case(objective: Objective, trace: str, seed: int) -> TightCase:
    """Simulate every setting of the published case on a trace, and choose."""
    traffic = catalogue.load(trace, seed=seed)
    failures = tuple(failure for failure in SYSTEM.failures if failure.at_s < traffic.span_s)
    base = SYSTEM.model_copy(update={"failures": failures})
    cases = scaled_cases(base, AUTOSCALER, traffic.arrivals_ns, traffic.span_ns, objective.p99_ms)
    within = [case for case in cases if objective.met(Expected.of(case.figures))]
    within.sort(key=lambda case: (round(case.mean_replicas, 2), case.figures["p99_ms"]))
    drawn = catalogue.entry(trace).kind == "generator"
    seeds = range(seed + 1, seed + 1 + CHECKED_SEEDS)
    held: dict[int, int] = {}
    chosen = None if drawn or not within else 0
    for position, case in enumerate(within if drawn else []):
        held[position] = held_seeds(case.system, trace, seeds, objective)
        if held[position] >= ENOUGH_SEEDS:
            chosen = position
            break
    cheapest = min(cases, key=lambda case: (case.mean_replicas, case.figures["p99_ms"]))
    return TightCase(traffic.span_s, failures, drawn, cases, within, chosen, held, cheapest)
