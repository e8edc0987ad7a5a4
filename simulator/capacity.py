"""How large a warm pool must be for a ramp of load, in closed form, derived in docs/capacity.md, and checked by simulation.

Load and replicas are fluids here: demand rises in a straight line, a replica serves full batches, and what exceeds the
replicas' rate piles up. The scaler adds one replica at a time, each ready a cold start after it was called for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from tailrace.harness.analysis.metrics import percentile
from tailrace.simulator.engine import simulate
from tailrace.simulator.system import Autoscaler, Batching, Service, System
from tailrace.traces.generators import SurgeParameters, surge

CHECKED_SEEDS = 20
ENOUGH_SEEDS = 19
"""Of those; one may miss by chance."""


@dataclass(frozen=True)
class Ramp:
    """Demand that rises from ``from_rps`` to ``to_rps`` within ``ramp_s``, and falls back as fast: a triangle."""

    from_rps: float
    to_rps: float
    ramp_s: float

    @property
    def slope(self) -> float:
        """Arrivals/s gained each second."""
        return (self.to_rps - self.from_rps) / self.ramp_s

    def demand(self, t_s: float) -> float:
        """Arrivals/s at an instant."""
        return max(self.from_rps, self.to_rps - self.slope * abs(self.ramp_s - t_s))


@dataclass(frozen=True)
class Shortfall:
    """What becomes of a ramp that is met with so many replicas and a warm pool."""

    warm_pool: int
    ready_at_start: int
    """With the warm pool."""
    exceeded_at_s: float | None
    """When demand exceeds what is ready; ``None``: never."""
    first_added_at_s: float | None
    """When the first replica that the scaler calls for is ready."""
    ready_at_peak: int
    shortfall_rps: float
    """Demand at the peak beyond what the replicas that are ready then serve; 0 where they serve all of it."""
    backlog: float
    """Requests that wait, at the most."""
    worst_ms: float
    """Response time at the worst instant: the backlog ahead, until the next replica is idle, and one's own batch."""


def replica_rps(service: Service, batching: Batching) -> float:
    """What one replica serves in full batches."""
    return batching.max_batch / (float(service.times_ns(batching.max_batch)[-1]) / 1e9)


def shortfall(ramp: Ramp, service: Service, batching: Batching, scaler: Autoscaler, warm_pool: int) -> Shortfall:
    """The closed form for one warm pool."""
    rate = replica_rps(service, batching)
    ready = max(1, math.ceil(ramp.from_rps / rate)) + warm_pool
    batch_ms = float(service.times_ns(batching.max_batch)[-1]) / 1e6
    if ramp.to_rps <= ready * rate:
        return Shortfall(warm_pool, ready, None, None, ready, 0.0, 0.0, batch_ms * (1 + 1 / ready))
    exceeded_s = max(0.0, (ready * rate - ramp.from_rps) / ramp.slope)
    # Beyond the batch that gathers anyway while all compute, the queue is ½·slope·τ²; the scaler acts at its first look
    # after that exceeds the threshold of all replicas.
    unnoticed = max(0.0, scaler.up_above * ready - batching.max_batch)
    noticed_s = math.sqrt(2 * unnoticed / ramp.slope) + scaler.period_s
    first_s = exceeded_s + noticed_s + scaler.cold_start_s
    each_s = scaler.cold_start_s + scaler.period_s
    added = 0 if first_s > ramp.ramp_s else 1 + math.floor((ramp.ramp_s - first_s) / each_s)
    at_peak = min(ready + added, max(ready, math.ceil(ramp.to_rps / rate)))
    backlog, wait_s = _backlog(ramp, rate, ready, exceeded_s, first_s, each_s)
    return Shortfall(
        warm_pool=warm_pool,
        ready_at_start=ready,
        exceeded_at_s=exceeded_s,
        first_added_at_s=first_s,
        ready_at_peak=at_peak,
        shortfall_rps=max(0.0, ramp.to_rps - at_peak * rate),
        backlog=backlog,
        worst_ms=wait_s * 1e3 + batch_ms * (1 + 1 / ready),
    )


def _backlog(
    ramp: Ramp, rate: float, ready: int, exceeded_s: float, first_s: float, each_s: float
) -> tuple[float, float]:
    """The largest backlog, and the longest wait behind one. Between the instants at which a replica is added or the ramp
    turns, the backlog is a parabola, largest at an end or where demand meets capacity."""
    most = max(ready, math.ceil(ramp.to_rps / rate) + 1)
    steps = [(first_s + i * each_s, ready + 1 + i) for i in range(most - ready)]
    turns = {exceeded_s, ramp.ramp_s, 2 * ramp.ramp_s, *(at for at, _ in steps)}
    backlog = largest = longest_s = 0.0
    for begins, ends in pairwise(sorted(t for t in turns if t >= exceeded_s)):
        replicas = max([count for at, count in steps if at <= begins], default=ready)
        excess = ramp.demand(begins) - replicas * rate
        curve = (ramp.demand(ends) - ramp.demand(begins)) / (ends - begins)
        instants = [ends - begins]
        if curve and 0 < -excess / curve < ends - begins:
            instants.append(-excess / curve)
        for after in instants:
            then = max(0.0, backlog + excess * after + curve * after**2 / 2)
            largest, longest_s = max(largest, then), max(longest_s, then / (replicas * rate))
        after = ends - begins
        backlog = max(0.0, backlog + excess * after + curve * after**2 / 2)
    return largest, longest_s


def shortfalls(ramp: Ramp, service: Service, batching: Batching, scaler: Autoscaler) -> list[Shortfall]:
    """The shortfall of every warm pool, from none to one replica more than the peak needs."""
    most = math.ceil(ramp.to_rps / replica_rps(service, batching)) + 1
    fewest = max(1, math.ceil(ramp.from_rps / replica_rps(service, batching)))
    return [shortfall(ramp, service, batching, scaler, pool) for pool in range(most - fewest + 1)]


@dataclass(frozen=True)
class Checked:
    """A warm pool by the closed form, and simulated."""

    shortfall: Shortfall
    p99_ms: tuple[float, ...]
    """Of each of :data:`CHECKED_SEEDS` seeds."""
    met: int
    """So many of them met the objective."""


@dataclass(frozen=True)
class WarmPool:
    """What to keep warm for a ramp, and what was looked at until that was known."""

    recommended: int | None
    """The smallest that closed form and simulation both find enough; ``None``: none is."""
    by_closed_form: int | None
    replica_rps: float
    rows: tuple[Checked, ...]


def plan_warm_pool(ramp: Ramp, service: Service, batching: Batching, scaler: Autoscaler, slo_ms: float) -> WarmPool:
    """The smallest warm pool that keeps an objective: by the closed form, and under :data:`ENOUGH_SEEDS` simulated seeds."""
    rows = []
    by_closed_form = recommended = None
    for row in shortfalls(ramp, service, batching, scaler):
        p99_ms = _simulated_p99_ms(ramp, service, batching, scaler, row)
        met = sum(value <= slo_ms for value in p99_ms)
        rows.append(Checked(row, p99_ms, met))
        if by_closed_form is None and row.worst_ms <= slo_ms:
            by_closed_form = row.warm_pool
        if by_closed_form is not None and met >= ENOUGH_SEEDS:
            recommended = row.warm_pool
            break
    return WarmPool(recommended, by_closed_form, replica_rps(service, batching), tuple(rows))


def _simulated_p99_ms(
    ramp: Ramp, service: Service, batching: Batching, scaler: Autoscaler, row: Shortfall
) -> tuple[float, ...]:
    """The p99 of such a ramp, by seed."""
    kept = {"min": row.ready_at_start - row.warm_pool, "warm_pool": row.warm_pool}
    system = System(
        service=service, batching=batching, replicas=row.ready_at_start, autoscaler=scaler.model_copy(update=kept)
    )
    parameters = SurgeParameters(
        duration_s=2 * ramp.ramp_s,
        base_rate=ramp.from_rps,
        surge_rate=ramp.to_rps - ramp.from_rps,
        peak_at_s=ramp.ramp_s,
        half_width_s=ramp.ramp_s,
        fault_at_s=None,
    )
    traces = [surge(parameters, seed=seed) for seed in range(CHECKED_SEEDS)]
    return tuple(
        percentile(simulate(system, trace.arrivals_ns, span_ns=trace.span_ns).response_ms(), 0.99) for trace in traces
    )
