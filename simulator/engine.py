"""The event loop, compiled: arrivals, batches, autoscaler and failures in the order of their instants.

It goes from event to event, so that a quiet hour costs nothing and an arrival some tens of nanoseconds. Of events at
one instant the order is: failure, arrival, start of a batch, autoscaler, sample. All times are whole nanoseconds from the
trace's start, and so ties are ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tailrace.harness.analysis.metrics import Floats, Ints, percentile
from tailrace.simulator.system import NS_PER_MS, Router, System

NS_PER_S = 1_000_000_000
NEVER = np.int64(2**62)
ANSWERED, SHED, LOST, QUEUED = 0, 1, 2, 3
"""What became of an arrival: answered; refused by a full queue; in the hands of a replica that died (or there was none to
send it to); still waiting when nothing more would happen."""

_ROUTERS: dict[Router, int] = {"shared": 0, "round_robin": 1, "random": 2, "power_of_two": 3, "shortest_queue": 4}
_SHARED, _ROUND_ROBIN, _RANDOM, _POWER_OF_TWO, _SHORTEST = _ROUTERS.values()
_PATIENCE_NS = 3600 * NS_PER_S
"""How long after the trace's end a system that still has requests waiting is watched."""


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
        """The figures that a trial has: percentiles and mean batch, goodput, attainment, utilisation, replicas; NaN of
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
            "utilisation": self.busy_ns / self.ready_ns if self.ready_ns else float("nan"),
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
    window_ns = round(system.batching.window_ms * NS_PER_MS)
    most = max(system.replicas, scaler.max if scaler else 0)
    slots = most * model_count + len(system.failures)
    failures = sorted(system.failures, key=lambda failure: failure.at_s)
    replaced = [NEVER if f.replaced_after_s is None else round(f.replaced_after_s * NS_PER_S) for f in failures]
    scaling, (up_above, down_below) = _scaling(system, most)
    outcome, started, done, batches, busy, ready, samples = _run(
        np.array(arrivals_ns, np.int64),  # copies: the loop is compiled once, for arrays that may be written
        np.zeros(len(arrivals_ns), np.uint16) if models is None else np.array(models, np.uint16),
        model_count,
        system.service.times_ns(system.batching.max_batch),
        round(system.cycle_ms * NS_PER_MS),
        window_ns,
        system.batching.window_opens == "idle",
        system.replicas,
        slots,
        slots if system.devices is None else system.devices,
        _ROUTERS[system.router],
        NEVER if system.queue_limit is None else system.queue_limit,
        np.array(scaling, np.int64),
        float(up_above),
        float(down_below),
        np.array([round(f.at_s * NS_PER_S) for f in failures], np.int64),
        np.array([f.model for f in failures], np.int64),
        np.array(replaced, np.int64),
        span_ns,
        max(1, round(sample_s * NS_PER_S)),
        seed,
    )
    return Simulated(arrivals_ns, done, started, outcome, batches, busy, ready, samples, span_ns, system)


def _scaling(system: System, most: int) -> tuple[list[int], tuple[float, float]]:
    """For the loop: period, fewest, most and cold start; then for how long more and fewer must have been wanted, and over how
    many looks requests are averaged (0 for thresholds). And the two thresholds, or the target twice."""
    if queue := system.autoscaler:
        times_s = [queue.period_s, queue.cold_start_s]
        period, cold_start = (round(time_s * NS_PER_S) for time_s in times_s)
        return [period, queue.min + queue.warm_pool, most, cold_start, 0, 0, 0], (queue.up_above, queue.down_below)
    if tracking := system.tracking:
        times_s = [tracking.period_s, tracking.cold_start_s, tracking.up_after_s, tracking.down_after_s]
        period, cold_start, up_after, down_after = (round(time_s * NS_PER_S) for time_s in times_s)
        looks = max(1, round(tracking.averaged_over_s / tracking.period_s))
        target = tracking.target_ongoing
        return [period, tracking.min, most, cold_start, up_after, down_after, looks], (target, target)
    return [0] * 7, (0.0, 0.0)


@njit(cache=True)
def _run(  # type: ignore[no-untyped-def]  # noqa: PLR0912, PLR0915
    arrivals,
    models,
    model_count,
    service,
    cycle,
    window,
    window_from_idle,
    initial,
    slots,
    devices,
    router,
    limit,
    scaling,
    up_above,
    down_below,
    failure_at,
    failure_model,
    failure_replaced,
    span,
    sample_period,
    seed,
):
    np.random.seed(seed)
    n = len(arrivals)
    max_batch = len(service) - 1
    period, floor, most, cold_start, up_after, down_after, looks = scaling
    shared = router == _SHARED
    queues = model_count if shared else slots

    outcome = np.full(n, QUEUED, np.uint8)
    started = np.full(n, -1, np.int64)
    done = np.full(n, -1, np.int64)
    batches = np.zeros(max_batch + 1, np.int64)
    samples = np.empty((span // sample_period + 1, 4), np.int64)
    sampled = 0

    # Of each replica: whether it lives, from when it is ready and idle, the batch in its hands, when that began.
    alive = np.zeros(slots, np.bool_)
    ready_at = np.zeros(slots, np.int64)
    free_at = np.zeros(slots, np.int64)
    begun_at = np.zeros(slots, np.int64)
    done_at = np.zeros(slots, np.int64)
    batch_first = np.zeros(slots, np.int64)
    batch_size = np.zeros(slots, np.int64)
    model_of = np.zeros(slots, np.int64)
    device_free = np.zeros(devices, np.int64)
    dispatched = np.empty(n, np.int64)  # arrivals in the order in which batches took them
    taken = 0

    # Queues are lists through `behind`; `starts` is when the next batch of each starts if nothing else happens, as the leaves
    # of a tree whose inner nodes are the smaller of their two children: among a thousand queues the first is found in ten steps.
    behind = np.full(n, -1, np.int64)
    head = np.full(queues, -1, np.int64)
    tail = np.full(queues, -1, np.int64)
    length = np.zeros(queues, np.int64)
    leaves = 1
    while leaves < queues:
        leaves *= 2
    starts = np.full(2 * leaves, NEVER, np.int64)
    # Of each model: the replicas that are ready, how many, and until when that holds.
    roster = np.empty((model_count, slots), np.int64)
    listed = np.zeros(model_count, np.int64)
    holds_until = np.full(model_count, -1, np.int64)
    waiting = 0
    turn = 0

    slot = 0
    for model in range(model_count):
        for _ in range(initial):
            alive[slot] = True
            model_of[slot] = model
            slot += 1

    busy = np.int64(0)
    ready = np.int64(0)
    arrival = 0
    failure = 0
    next_tick = np.int64(0) if period > 0 else NEVER
    next_sample = np.int64(0)
    # Of each model: the requests that were seen at the last looks, and since when more or fewer replicas are wanted.
    seen = np.zeros((model_count, max(looks, 1)), np.int64)
    looked = 0
    wanted_more = np.full(model_count, NEVER, np.int64)
    wanted_fewer = np.full(model_count, NEVER, np.int64)
    changed = np.int64(-1)  # the queue whose next batch must be found again; -2: all of them
    now = np.int64(0)

    while True:
        if changed != -1:
            if changed == -2:
                holds_until[:] = -1
            first, last = (0, queues) if changed == -2 else (changed, changed + 1)
            for q in range(first, last):
                idle_at = NEVER
                if length[q] > 0 and shared:
                    for r in range(slots):
                        if alive[r] and model_of[r] == q:
                            idle_at = min(idle_at, max(ready_at[r], free_at[r]))
                elif length[q] > 0 and alive[q]:
                    idle_at = max(ready_at[q], free_at[q])
                if idle_at == NEVER:
                    _put(starts, leaves, q, NEVER)
                elif length[q] >= max_batch:
                    _put(starts, leaves, q, max(now, idle_at))
                else:
                    opens = max(idle_at, arrivals[head[q]]) if window_from_idle else arrivals[head[q]]
                    _put(starts, leaves, q, max(now, idle_at, opens + window))
            changed = np.int64(-1)

        next_arrival = arrivals[arrival] if arrival < n else NEVER
        next_failure = failure_at[failure] if failure < len(failure_at) else NEVER
        next_batch = starts[1]
        happens = min(next_failure, next_arrival, next_batch)
        if arrival == n and waiting == 0 and min(next_failure, next_sample, next_tick) > span:
            break
        if happens == NEVER and period == 0 and next_sample > span:
            break
        now = min(happens, next_tick, next_sample)
        if now > span + _PATIENCE_NS:
            break

        if next_failure == now:
            for r in range(slots):
                if alive[r] and model_of[r] == failure_model[failure] and ready_at[r] <= now:
                    alive[r] = False
                    ready += max(np.int64(0), min(now, span) - min(ready_at[r], span))
                    if done_at[r] > now:
                        for k in range(batch_first[r], batch_first[r] + batch_size[r]):
                            outcome[dispatched[k]] = LOST
                            done[dispatched[k]] = -1
                        busy -= max(np.int64(0), min(done_at[r], span) - min(max(now, begun_at[r]), span))
                        if device_free[r % devices] == done_at[r]:
                            device_free[r % devices] = max(now, begun_at[r])
                    if not shared:
                        while head[r] >= 0:
                            outcome[head[r]] = LOST
                            head[r] = behind[head[r]]
                        waiting -= length[r]
                        length[r] = 0
                        tail[r] = -1
                    if failure_replaced[failure] < NEVER:
                        for s in range(slots):
                            if not alive[s]:
                                alive[s] = True
                                model_of[s] = model_of[r]
                                ready_at[s] = now + failure_replaced[failure]
                                free_at[s] = ready_at[s]
                                done_at[s] = 0
                                break
                    break
            failure += 1
            changed = np.int64(-2)

        elif next_arrival == now:
            wanted = np.int64(models[arrival])
            line = wanted
            if not shared:
                if now >= holds_until[wanted]:
                    listed[wanted], holds_until[wanted] = _list_ready(
                        roster[wanted], wanted, now, alive, model_of, ready_at
                    )
                line = _routed(router, turn, roster[wanted], listed[wanted], now, done_at, length, batch_size)
                turn += 1
            if line < 0:
                outcome[arrival] = LOST
            elif length[line] >= limit:
                outcome[arrival] = SHED
            else:
                if tail[line] >= 0:
                    behind[tail[line]] = arrival
                else:
                    head[line] = arrival
                tail[line] = arrival
                length[line] += 1
                waiting += 1
                if length[line] == 1 or length[line] == max_batch:
                    changed = np.int64(line)
            arrival += 1

        elif next_batch == now:
            queue = _first(starts, leaves)
            chosen = queue
            if shared:
                for r in range(slots):
                    if alive[r] and model_of[r] == queue and ready_at[r] <= now and free_at[r] <= now:
                        chosen = r
                        break
            size = min(length[queue], max_batch)
            begins = max(now, device_free[chosen % devices])
            ends = begins + service[size]
            device_free[chosen % devices] = ends
            free_at[chosen] = ends + cycle
            done_at[chosen] = ends
            begun_at[chosen] = begins
            batch_first[chosen] = taken
            batch_size[chosen] = size
            for _ in range(size):
                i = head[queue]
                head[queue] = behind[i]
                started[i] = now
                done[i] = ends
                outcome[i] = ANSWERED
                dispatched[taken] = i
                taken += 1
            if head[queue] < 0:
                tail[queue] = -1
            length[queue] -= size
            waiting -= size
            batches[size] += 1
            busy += min(ends, span) - min(begins, span)
            changed = np.int64(queue)

        elif next_tick == now:
            for model in range(model_count):
                queued = np.int64(0)
                if shared:
                    queued = length[model]
                there = 0
                pending = 0
                in_hand = np.int64(0)
                for r in range(slots):
                    if alive[r] and model_of[r] == model:
                        if ready_at[r] <= now:
                            there += 1
                        else:
                            pending += 1
                        if done_at[r] > now:
                            in_hand += batch_size[r]
                        if not shared:
                            queued += length[r]
                more = 0
                fewer = 0
                if looks == 0:
                    depth = queued / max(1, there)
                    if depth > up_above and pending == 0 and there < most:
                        more = 1
                    elif depth < down_below and there > floor:
                        fewer = 1
                else:
                    seen[model, looked % looks] = queued + in_hand
                    requests = seen[model].sum() / min(looked + 1, looks)
                    wanted_count = min(max(np.int64(np.ceil(requests / up_above)), floor), most)
                    missing = wanted_count - there - pending
                    wanted_more[model] = min(wanted_more[model], now) if missing > 0 else NEVER
                    wanted_fewer[model] = min(wanted_fewer[model], now) if missing < 0 else NEVER
                    if missing > 0 and now - wanted_more[model] >= up_after:
                        more = missing
                        wanted_more[model] = NEVER
                    elif missing < 0 and now - wanted_fewer[model] >= down_after:
                        fewer = -missing  # those that are busy are asked again at the next look
                if more > 0 or fewer > 0:
                    changed = np.int64(-2)
                for r in range(slots):
                    if more > 0 and not alive[r]:
                        alive[r] = True
                        model_of[r] = model
                        ready_at[r] = now + cold_start
                        free_at[r] = ready_at[r]
                        done_at[r] = 0
                        more -= 1
                        continue
                    idle = alive[r] and model_of[r] == model and ready_at[r] <= now and free_at[r] <= now
                    if fewer > 0 and idle and (shared or length[r] == 0):
                        alive[r] = False
                        ready += min(now, span) - min(ready_at[r], span)
                        fewer -= 1
            looked += 1
            next_tick += period

        else:
            there = 0
            computing = 0
            for r in range(slots):
                if alive[r] and ready_at[r] <= now:
                    there += 1
                    if done_at[r] > now:
                        computing += 1
            samples[sampled] = (now, waiting, there, computing)
            sampled += 1
            next_sample += sample_period
            if next_sample > span:
                next_sample = NEVER

    for r in range(slots):
        if alive[r]:
            ready += span - min(ready_at[r], span)
    return outcome, started, done, batches, busy, ready, samples[:sampled]


@njit(cache=True)
def _put(tree, leaves, leaf, value):  # type: ignore[no-untyped-def]
    """Give a leaf a value, and the nodes above it the smallest below each."""
    node = leaves + leaf
    tree[node] = value
    while node > 1:
        node //= 2
        tree[node] = min(tree[2 * node], tree[2 * node + 1])


@njit(cache=True)
def _first(tree, leaves):  # type: ignore[no-untyped-def]
    """The leaf with the smallest value; the first of equal ones."""
    node = 1
    while node < leaves:
        node = 2 * node if tree[2 * node] <= tree[2 * node + 1] else 2 * node + 1
    return node - leaves


@njit(cache=True)
def _list_ready(roster, model, now, alive, model_of, ready_at):  # type: ignore[no-untyped-def]
    """List a model's replicas that are ready: how many, and until when there will be no more of them. Where none is, the one
    that will be first is listed, for whoever comes now waits for it."""
    found = 0
    soonest = np.int64(-1)
    until = NEVER
    for r in range(len(alive)):
        if alive[r] and model_of[r] == model:
            if ready_at[r] <= now:
                roster[found] = r
                found += 1
            elif ready_at[r] < until:
                until = ready_at[r]
                soonest = np.int64(r)
    if found == 0 and soonest >= 0:
        roster[0] = soonest
        found = 1
    return found, until


@njit(cache=True)
def _routed(router, turn, roster, listed, now, done_at, length, batch_size):  # type: ignore[no-untyped-def]
    """The replica of the roster that an arrival is sent to; -1: there is none."""
    if listed == 0:
        return np.int64(-1)
    if router == _ROUND_ROBIN:
        return roster[turn % listed]
    if router == _RANDOM:
        return roster[np.random.randint(listed)]
    if router == _POWER_OF_TWO:
        one = roster[np.random.randint(listed)]
        other = roster[np.random.randint(listed)]
        ones = length[one] + (batch_size[one] if done_at[one] > now else 0)
        others = length[other] + (batch_size[other] if done_at[other] > now else 0)
        return one if ones <= others else other
    best = roster[0]
    fewest = NEVER
    for k in range(listed):
        r = roster[k]
        under_way = length[r] + (batch_size[r] if done_at[r] > now else 0)
        if under_way < fewest:
            best = r
            fewest = under_way
    return best
