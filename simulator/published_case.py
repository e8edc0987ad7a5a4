"""The published case: a small simulation, ticked by the millisecond, reproduced to the digit, and its error named.

It was published with a throughput of half of what it served: a replica that the autoscaler retires takes its count of
served requests with it. :func:`run` gives both: the figures as they were published, and what came to pass.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from tailrace.harness.analysis.metrics import Ints
from tailrace.simulator.system import Autoscaler, Batching, Failure, Service, System

SEED = 7
SPAN_S = 30
TICK_S = 0.001
FAILURE_AT_S = 20
SLO_MS = 200
AUTOSCALER = Autoscaler(period_s=0.1, up_above=10, down_below=3, min=1, warm_pool=1, cold_start_s=0.8)
SYSTEM = System(
    service=Service(base_ms=12, per_item_ms=3),
    batching=Batching(max_batch=16, window_ms=10),
    replicas=2,
    autoscaler=AUTOSCALER,
    failures=(Failure(at_s=FAILURE_AT_S),),
)
"""The same system for the event loop of :mod:`tailrace.simulator.engine`."""


@dataclass(frozen=True)
class Published:
    """The figures as they were published. Latencies count the batch of the replica that died as answered, and
    ``served`` leaves out what retired replicas had served."""

    served: int
    throughput_rps: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    utilization: float
    replicas_min: int
    replicas_max: int
    slo_met: bool


@dataclass(frozen=True)
class Actual:
    """What came to pass; ``arrived`` = ``answered`` + ``lost`` + ``queued``, ``dispatched`` = ``answered`` + ``lost``."""

    arrived: int
    dispatched: int
    answered: int
    lost: int
    queued: int
    throughput_rps: float
    published_is_wrong_because: str = (
        "replicas that were retired took their count of served requests with them; and the latencies count what the "
        "dying replica had in hand as answered"
    )


@dataclass
class _Replica:
    ready_at: float
    free_at: float = 0.0
    healthy: bool = True
    served: int = 0
    in_hand: int = 0

    def ready(self, now: float) -> bool:
        return self.healthy and self.ready_at <= now


@dataclass
class _State:
    replicas: list[_Replica] = field(default_factory=lambda: [_Replica(0.0), _Replica(0.0)])
    queue: list[float] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    lost: int = 0
    utilizations: list[float] = field(default_factory=list)
    ready_counts: list[int] = field(default_factory=list)


def rate_at(t_s: float) -> float:
    """Arrivals per second of the surge: 40, and up to 600 more around second 15."""
    return 40 + 600 * max(0.0, 1 - abs(t_s - SPAN_S / 2) / 9)


def run() -> tuple[Published, Actual, Ints]:
    """The published figures, the actual ones, and the arrivals (ns) for other models of the same case."""
    draw = random.Random(SEED)  # noqa: S311 (the case is defined by this generator)
    state = _State()
    failed = False
    now = 0.0
    # Time adds up tick by tick, with the rounding of binary fractions; the figures hang on it.
    while now < SPAN_S:
        if not failed and now >= FAILURE_AT_S:
            failed = True
            _fail(state, now)
        if draw.random() < rate_at(now) * TICK_S:
            state.queue.append(now)
            state.arrivals_s.append(now)
        _start_batches(state, now)
        if round(now * 1000) % 100 == 0:
            _scale(state, now)
        now += TICK_S
    return _published(state), _actual(state), np.rint(np.array(state.arrivals_s) * 1e9).astype(np.int64)


def _fail(state: _State, now: float) -> None:
    first = next(replica for replica in state.replicas if replica.ready(now))
    first.healthy = False
    state.lost = first.in_hand if first.free_at > now else 0


def _start_batches(state: _State, now: float) -> None:
    batching, service = SYSTEM.batching, SYSTEM.service
    for replica in state.replicas:
        if not replica.ready(now) or replica.free_at > now or not state.queue:
            continue
        if len(state.queue) >= batching.max_batch or now - state.queue[0] >= batching.window_ms / 1e3:
            batch, state.queue = state.queue[: batching.max_batch], state.queue[batching.max_batch :]
            replica.free_at = now + service.base_ms / 1e3 + service.per_item_ms / 1e3 * len(batch)
            replica.in_hand = len(batch)
            replica.served += len(batch)
            state.latencies_s += [replica.free_at - arrived for arrived in batch]


def _scale(state: _State, now: float) -> None:
    scaler = AUTOSCALER
    ready = [replica for replica in state.replicas if replica.ready(now)]
    pending = [replica for replica in state.replicas if replica.healthy and replica.ready_at > now]
    depth = len(state.queue) / max(1, len(ready))
    if depth > scaler.up_above and not pending:
        state.replicas.append(_Replica(now + scaler.cold_start_s))
    elif depth < scaler.down_below and len(ready) > scaler.min + scaler.warm_pool:
        idle = next((replica for replica in ready if replica.free_at <= now), None)
        if idle is not None:
            state.replicas.remove(idle)
    state.utilizations.append(sum(replica.free_at > now for replica in ready) / max(1, len(ready)))
    state.ready_counts.append(len(ready))


def _published(state: _State) -> Published:
    latencies = sorted(state.latencies_s)

    def percentile_ms(p: float) -> float:
        return latencies[min(int(len(latencies) * p), len(latencies) - 1)] * 1e3

    served = sum(replica.served for replica in state.replicas)
    p99_ms = percentile_ms(0.99)
    return Published(
        served=served,
        throughput_rps=served / SPAN_S,
        mean_ms=sum(latencies) / len(latencies) * 1e3,
        p50_ms=percentile_ms(0.50),
        p99_ms=p99_ms,
        utilization=sum(state.utilizations) / len(state.utilizations),
        replicas_min=min(state.ready_counts),
        replicas_max=max(state.ready_counts),
        slo_met=p99_ms <= SLO_MS,
    )


def _actual(state: _State) -> Actual:
    dispatched = len(state.latencies_s)
    answered = dispatched - state.lost
    return Actual(
        arrived=len(state.arrivals_s),
        dispatched=dispatched,
        answered=answered,
        lost=state.lost,
        queued=len(state.queue),
        throughput_rps=answered / SPAN_S,
    )
