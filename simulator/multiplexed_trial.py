"""A measured trial in which models shared a limited memory: what loads cost beyond the link, and what is simulated of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.analysis.metrics import MEASURED_COLUMNS, NS_PER_MS, NS_PER_S, Floats, Ints, measured
from tailrace.harness.analysis.residence import Met, loads_of, met
from tailrace.harness.plan.schedule import Phase
from tailrace.harness.records.store import TrialFolder
from tailrace.simulator.multiplexing import Device, Memory, simulate
from tailrace.simulator.system import Batching, Service

_APART_NS = 10_000_000_000
"""Between two requests of the verification: each is answered before the next is asked."""


@dataclass(frozen=True)
class MultiplexedTrial:
    """What was recorded of a trial, one entry for each arrival, warm-up first."""

    memory: Memory
    batching: Batching
    span_ns: int
    arrivals_ns: Ints
    done_ns: Ints
    models: NDArray[np.int64]
    """Positions in the memory's sizes."""
    met: NDArray[np.uint8]
    """How each met its model (:class:`Met`)."""
    traced_from: int
    """Where warm-up ends and the trace begins."""
    loads: NDArray[np.int64]
    """Begun and ended (ns from the epoch) and model of each that came to its end; shape (loads, 3)."""
    verified_each: int
    """So many requests each model was asked before, one after the other, the last one first."""

    @property
    def trace(self) -> NDArray[np.int64]:
        """The models that the trace asked for, in order."""
        return self.models[self.traced_from :]


@dataclass(frozen=True)
class Predicted:
    """What the simulation says of a trial's trace, one entry for each of its arrivals, and how many loads ended in it."""

    response_ms: Floats
    met: NDArray[np.uint8]
    loads: int


def read_multiplexed(folder: TrialFolder) -> MultiplexedTrial | None:
    """``None`` for a trial that is not done, whose models did not share a limited memory, or that had faults."""
    facts = folder.facts
    memory = facts.memory
    requests = folder.request_columns(*MEASURED_COLUMNS, "model") if folder.done else None
    if requests is None or memory is None or facts.faults:
        return None
    names = facts.models
    place = {name: position for position, name in enumerate(names)}
    phases = [measured(requests, phase, models=names) for phase in (Phase.WARMUP, Phase.MEASURE)]
    tuning = facts.tuning
    loads = [(begun, ended, place[model]) for model, begun, ended, whole, _ in loads_of(folder.events) if whole]
    return MultiplexedTrial(
        memory=Memory(
            memory.budget_bytes,
            [memory.sizes[name] for name in names],
            memory.policy,
            [place[name] for name in memory.pinned],
            [place[name] for name in memory.at_start],
        ),
        batching=Batching(
            max_batch=tuning.get("max_batch") or 1,
            window_ms=(tuning.get("batch_window_ms") or 0.0) if tuning.get("max_batch") else 0.0,
            window_opens=facts.options.get("window_opens", "arrival"),
        ),
        span_ns=round(facts.span_s * NS_PER_S),
        arrivals_ns=np.concatenate([phase.intended_ns for phase in phases]),
        done_ns=np.concatenate([phase.done_ns for phase in phases]),
        models=np.concatenate([np.asarray(phase.model, dtype=np.int64) for phase in phases]),
        met=np.concatenate([met(phase, names, folder.events) for phase in phases]),
        traced_from=len(phases[0]),
        loads=np.array(loads, dtype=np.int64).reshape(-1, 3),
        verified_each=facts.verified_before // len(names),
    )


def fitted(trial: MultiplexedTrial, cost: Mapping[str, float]) -> Device:
    """The device that a trial's server computes and loads on. ``cost`` has what the emulated device takes (``base_ms``,
    ``per_item_ms``, ``load_ms``, ``load_gb_per_s``). What the server adds before a load can begin is what it was each time in
    the trial; what it adds to an answer, and after a load until the first of those who waited is answered, is the median."""
    service = Service(base_ms=cost["base_ms"], per_item_ms=cost["per_item_ms"])
    times_ms = service.times_ns(trial.batching.max_batch) / NS_PER_MS
    hot_ms = ((trial.done_ns - trial.arrivals_ns) / NS_PER_MS)[trial.met == Met.HOT]
    overhead_ms = _middle(hot_ms - trial.batching.window_ms - times_ms[1])
    start_ms, ready_ms = [], []
    free_ns = np.iinfo(np.int64).min
    for begun, ended, model in trial.loads.tolist():
        waited = np.flatnonzero(
            (trial.models == model) & (trial.arrivals_ns <= begun) & (trial.done_ns >= ended) & (trial.met != Met.HOT)
        )
        if len(waited):
            # Decided when the first had come, and the load before was over; earlier than it began in any case.
            start_ms.append((begun - max(int(trial.arrivals_ns[waited[0]]), min(begun, free_ns))) / NS_PER_MS)
            batch_ms = times_ms[min(len(waited), trial.batching.max_batch)]
            ready_ms.append((int(trial.done_ns[waited].min()) - ended) / NS_PER_MS - batch_ms - overhead_ms)
        free_ns = ended
    return Device(
        service,
        trial.batching,
        cost["load_ms"],
        cost["load_gb_per_s"],
        starts_s=tuple(max(0.0, start) / 1e3 for start in start_ms) or (0.0,),
        ready_s=_middle(np.array(ready_ms)) / 1e3,
        overhead_ms=overhead_ms,
    )


def _middle(values: Floats) -> float:
    """The median, and at least 0; 0 of nothing."""
    return max(0.0, float(np.median(values))) if len(values) else 0.0


def predict(device: Device, trial: MultiplexedTrial) -> Predicted:
    """Simulate a trial from its server's start on: verification, warm-up and the trace's own arrivals, under its policy."""
    asked = np.repeat(np.arange(len(trial.memory.sizes))[::-1], trial.verified_each)
    first_ns = int(trial.arrivals_ns[0]) if len(trial.arrivals_ns) else 0
    before_ns = first_ns - _APART_NS * np.arange(len(asked), 0, -1, dtype=np.int64)
    simulated = simulate(
        device,
        trial.memory,
        np.concatenate([before_ns, trial.arrivals_ns]),
        np.concatenate([asked, trial.models]),
    )
    traced = slice(len(asked) + trial.traced_from, None)
    ended = simulated.loads[:, 1]
    return Predicted(
        simulated.response_ms[traced],
        simulated.met[traced],
        int(np.count_nonzero((ended >= 0) & (ended <= trial.span_ns))),
    )
