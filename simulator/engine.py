"""A system run through arrivals, and what became of each: the event loop's rules in, the figures of a trial out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.analysis.metrics import Floats, Ints, percentile
from tailrace.simulator.event_loop import (
    ANSWERED,
    LOST,
    NEVER,
    NS_PER_S,
    QUEUED,
    ROUTERS,
    SHED,
    Failures,
    Rules,
    Scaling,
    run,
)
from tailrace.simulator.system import NS_PER_MS, System

__all__ = ["ANSWERED", "LOST", "NS_PER_S", "QUEUED", "SHED", "Simulated", "simulate"]


@dataclass(frozen=True)
class Simulated:
    """What the model did with every arrival, and its state over time."""

    arrivals_ns: Ints
    done_ns: Ints
    """When the batch was done, without the overhead; −1 unless ``outcome`` is :data:`ANSWERED`."""
    started_ns: Ints
    """When its batch was taken from the queue; −1 where none was."""
    outcome: NDArray[np.uint8]
    batches: Ints
    """How many batches of each size were started, shape (max_batch + 1,)."""
    busy_ns: int
    ready_ns: int
    """Time that replicas were computing, and were ready, summed over replicas, within the span."""
    samples: Ints
    """Every period: instant (ns), requests waiting, replicas ready, replicas computing; shape (m, 4)."""
    span_ns: int
    system: System

    def count(self, outcome: int) -> int:
        """How many arrivals ended so."""
        return int(np.count_nonzero(self.outcome == outcome))

    def response_ms(self) -> Floats:
        """Response time of every arrival, +∞ for what was not answered, or not within the timeout."""
        answered = self.outcome == ANSWERED
        taken = (self.done_ns - self.arrivals_ns) / NS_PER_MS + self.system.overhead_ms
        if self.system.timeout_s is not None:
            answered &= taken <= self.system.timeout_s * 1e3
        return np.where(answered, taken, np.inf)

    def figures(self, slo_ms: float) -> dict[str, float]:
        """The figures that a trial has: percentiles and mean batch, goodput, attainment, utilization, replicas; NaN of
        nothing."""
        response = self.response_ms()
        good = int(np.count_nonzero(response <= slo_ms))
        started = int(self.batches.sum())
        items = int((self.batches * np.arange(len(self.batches))).sum())
        ready = self.samples[:, 2]
        return {
            "arrived": len(response),
            "answered": int(np.isfinite(response).sum()),
            "shed": self.count(SHED),
            "lost": self.count(LOST),
            "queued": self.count(QUEUED),
            "p50_ms": percentile(response, 0.50),
            "p99_ms": percentile(response, 0.99),
            "goodput_rps": good / (self.span_ns / NS_PER_S),
            "slo_attainment": good / len(response) if len(response) else float("nan"),
            "utilization": self.busy_ns / self.ready_ns if self.ready_ns else float("nan"),
            "mean_batch": items / started if started else float("nan"),
            "replicas_min": int(ready.min()) if len(ready) else self.system.replicas,
            "replicas_max": int(ready.max()) if len(ready) else self.system.replicas,
        }


def simulate(
    system: System,
    arrivals_ns: Ints,
    *,
    span_ns: int,
    models: NDArray[np.uint16] | None = None,
    model_count: int = 1,
    seed: int = 7,
    sample_s: float = 0.1,
) -> Simulated:
    """Run a system through arrivals (sorted, ns from the trace's start).

    ``models`` names each arrival's model by number; every model has ``system.replicas`` replicas of its own. ``seed`` is
    for the routers that draw. Failures come to pass at their instants; past the span the system drains for at most an hour.
    """
    scaler = system.autoscaler or system.tracking
    most = max(system.replicas, scaler.max if scaler else 0)
    slots = most * model_count + len(system.failures)
    rules = Rules(
        max_batch=system.batching.max_batch,
        cycle=round(system.cycle_ms * NS_PER_MS),
        window=round(system.batching.window_ms * NS_PER_MS),
        window_from_idle=system.batching.window_opens == "idle",
        router=ROUTERS[system.router],
        limit=int(NEVER) if system.queue_limit is None else system.queue_limit,
        replicas=system.replicas,
        models=model_count,
        slots=slots,
        devices=slots if system.devices is None else system.devices,
        span=span_ns,
        sample_period=max(1, round(sample_s * NS_PER_S)),
    )
    failures = sorted(system.failures, key=lambda failure: failure.at_s)
    replaced = [NEVER if f.replaced_after_s is None else round(f.replaced_after_s * NS_PER_S) for f in failures]
    fates, batches, busy, ready, samples = run(
        rules,
        _scaling(system, most),
        system.service.times_ns(system.batching.max_batch),
        Failures(
            np.array([round(f.at_s * NS_PER_S) for f in failures], np.int64),
            np.array([f.model for f in failures], np.int64),
            np.array(replaced, np.int64),
        ),
        np.array(arrivals_ns, np.int64),  # copies: the loop is compiled once, for arrays that may be written
        np.zeros(len(arrivals_ns), np.uint16) if models is None else np.array(models, np.uint16),
        seed,
    )
    outcome, started, done = fates
    return Simulated(arrivals_ns, done, started, outcome, batches, busy, ready, samples, span_ns, system)


def _scaling(system: System, most: int) -> Scaling:
    """A system's scaler for the loop, times in ns. Thresholds are made floats, for a default may be written as a whole number
    and the loop would be compiled again for that."""

    def ns(seconds: float) -> int:
        return round(seconds * NS_PER_S)

    if queue := system.autoscaler:
        fewest, cold_start = queue.min + queue.warm_pool, ns(queue.cold_start_s)
        up_above, down_below = float(queue.up_above), float(queue.down_below)
        return Scaling(ns(queue.period_s), fewest, most, cold_start, up_above, down_below, 0, 0, looks=0)
    if tracking := system.tracking:
        return Scaling(
            period=ns(tracking.period_s),
            fewest=tracking.min,
            most=most,
            cold_start=ns(tracking.cold_start_s),
            up_above=float(tracking.target_ongoing),
            down_below=float(tracking.target_ongoing),
            up_after=ns(tracking.up_after_s),
            down_after=ns(tracking.down_after_s),
            looks=max(1, round(tracking.averaged_over_s / tracking.period_s)),
        )
    return Scaling(0, 0, 0, 0, 0.0, 0.0, 0, 0, 0)
