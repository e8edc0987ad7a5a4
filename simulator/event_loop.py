"""The event loop, compiled: arrivals, batches, scaler and failures in the order of their instants.

It goes from event to event, so that a quiet hour costs nothing and an arrival some tens of nanoseconds. Of events at
one instant the order is: failure, arrival, start of a batch, scaler, sample. All times are whole nanoseconds from the
trace's start, and so ties are ties.

Router, batcher and scalers stand here and a second time in the reference server (``queueing.py``, ``batching.py`` and
``scaling.py`` in ``adapters/reference/server``); tests hold the two together, event by event. One description does not serve
both. The server's work is on requests that can be withdrawn, replicas that leave and loads that are predicted, with the
standard library alone; what is compiled here are loops over arrays of whole numbers, a hundred times as fast. The few
expressions that both could share would need a file of their own, and Numba keeps a compiled function until *its own* file
changes: a policy that was changed there would be served and not simulated. Without that cache every command that simulates
would compile for ten seconds first.

Long because for the same reason all compiled functions stand in one file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tailrace.harness.analysis.metrics import Ints
from tailrace.simulator.system import Router

NS_PER_S = 1_000_000_000
NEVER = np.int64(2**62)
ANSWERED, SHED, LOST, QUEUED = 0, 1, 2, 3
"""What became of an arrival: answered; refused by a full queue; in the hands of a replica that died (or there was none to
send it to); still waiting when nothing more would happen."""

ROUTERS: dict[Router, int] = {"shared": 0, "round_robin": 1, "random": 2, "power_of_two": 3, "shortest_queue": 4}
_SHARED, _ROUND_ROBIN, _RANDOM, _POWER_OF_TWO, _SHORTEST = ROUTERS.values()
_PATIENCE_NS = 3600 * NS_PER_S
"""How long after the trace's end a system that still has requests waiting is watched."""
_NONE, _ALL = -1, -2
"""In place of the queue whose next batch must be found again."""


class Rules(NamedTuple):
    """The system and how long it is watched, in whole numbers; times in ns."""

    max_batch: int
    cycle: int
    window: int
    window_from_idle: bool
    router: int
    limit: int
    replicas: int
    """Of each model, at first."""
    models: int
    slots: int
    """Room for so many replicas; dead ones make room."""
    devices: int
    span: int
    sample_period: int


class Scaling(NamedTuple):
    """A scaler's rules, times in ns; without one, ``period`` is 0."""

    period: int
    fewest: int
    most: int
    cold_start: int
    up_above: float
    """Two thresholds of requests that wait for each replica; or the target, twice."""
    down_below: float
    up_after: int
    """For how long more, or fewer, must have been wanted."""
    down_after: int
    looks: int
    """Over how many looks requests are averaged; 0 with thresholds."""


class Failures(NamedTuple):
    """By failure, in their order: the instant, the model, and after how long there is a replacement."""

    at: Ints
    model: Ints
    replaced_after: Ints


class Fates(NamedTuple):
    """By arrival: what became of it, when its batch started and was done (or −1)."""

    outcome: NDArray[np.uint8]
    started: Ints
    done: Ints


class _Replicas(NamedTuple):
    """By slot: whether a replica lives, from when it is ready and free, and the batch in its hands: from and until when, the
    first of its arrivals among those dispatched, and how many."""

    alive: NDArray[np.bool_]
    model: Ints
    ready_at: Ints
    free_at: Ints
    begun_at: Ints
    done_at: Ints
    first: Ints
    size: Ints


class _Queues(NamedTuple):
    """By queue, of a model that its replicas share or of a replica: first, last and number of those that wait. ``behind`` is, by
    arrival, the next one in its queue, or −1."""

    head: Ints
    tail: Ints
    length: Ints
    behind: Ints


class _Looks(NamedTuple):
    """By model: the requests seen at a scaler's last looks, and since when it has wanted more replicas, or fewer."""

    seen: Ints
    more_since: Ints
    fewer_since: Ints


@njit(cache=True)
def run(  # type: ignore[no-untyped-def]  # noqa: PLR0912, PLR0915
    rules: Rules, scaling: Scaling, service, failures: Failures, arrivals, models, seed
):
    """Run a system through arrivals (instants and models), from event to event, until nothing more would happen.

    ``service`` is what a batch of each size takes, shape (max_batch + 1,). Returns the arrivals' fates; batches by size; how
    long replicas were computing, and ready, within the span; and the samples, shape (m, 4).

    Long because an array that is passed to a function has its references counted, which takes longer than most of what is done
    with it: the events that there are millions of, arrivals and batches, are in the loop itself, the rare ones below it.
    """
    np.random.seed(seed)
    n = len(arrivals)
    shared = rules.router == _SHARED
    replicas = _first_replicas(rules)
    alive, model_of, ready_at, free_at, begun_at, done_at, first, size_of = replicas
    queues = _empty_queues(rules.models if shared else rules.slots, n)
    head, tail, length, behind = queues
    fates = Fates(np.full(n, QUEUED, np.uint8), np.full(n, -1, np.int64), np.full(n, -1, np.int64))
    outcome, started, done = fates
    device_free = np.zeros(rules.devices, np.int64)
    dispatched = np.empty(n, np.int64)  # arrivals in the order in which batches took them
    taken = 0
    batches = np.zeros(rules.max_batch + 1, np.int64)
    samples = np.empty((rules.span // rules.sample_period + 1, 4), np.int64)
    sampled = 0
    starts = _tree(len(length))  # when each queue's next batch starts if nothing else happens
    # Of each model: the replicas that are ready, how many, and until when that holds.
    roster = np.empty((rules.models, rules.slots), np.int64)
    listed = np.zeros(rules.models, np.int64)
    holds_until = np.full(rules.models, -1, np.int64)
    looks = _Looks(
        np.zeros((rules.models, max(scaling.looks, 1)), np.int64),
        np.full(rules.models, NEVER, np.int64),
        np.full(rules.models, NEVER, np.int64),
    )
    looked = 0
    waiting = 0
    turn = 0
    busy = np.int64(0)
    ready = np.int64(0)
    arrival = 0
    failure = 0
    next_tick = np.int64(0) if scaling.period > 0 else NEVER
    next_sample = np.int64(0)
    changed = np.int64(_NONE)
    now = np.int64(0)

    while True:
        if changed != _NONE:
            if changed == _ALL:
                holds_until[:] = -1
            for q in range(0 if changed == _ALL else changed, len(length) if changed == _ALL else changed + 1):
                idle_at = NEVER
                if length[q] > 0 and shared:
                    for r in range(rules.slots):
                        if alive[r] and model_of[r] == q:
                            idle_at = min(idle_at, max(ready_at[r], free_at[r]))
                elif length[q] > 0 and alive[q]:
                    idle_at = max(ready_at[q], free_at[q])
                start = max(now, idle_at)
                if idle_at != NEVER and length[q] < rules.max_batch:
                    opens = max(idle_at, arrivals[head[q]]) if rules.window_from_idle else arrivals[head[q]]
                    start = max(start, opens + rules.window)
                _put(starts, q, start)
            changed = np.int64(_NONE)

        next_arrival = arrivals[arrival] if arrival < n else NEVER
        next_failure = failures.at[failure] if failure < len(failures.at) else NEVER
        next_batch = starts[1]
        happens = min(next_failure, next_arrival, next_batch)
        if arrival == n and waiting == 0 and min(next_failure, next_sample, next_tick) > rules.span:
            break
        if happens == NEVER and scaling.period == 0 and next_sample > rules.span:
            break
        now = min(happens, next_tick, next_sample)
        if now > rules.span + _PATIENCE_NS:
            break

        if next_failure == now:
            dead = _first_ready(replicas, failures.model[failure], now)
            if dead >= 0:
                ready += _end(replicas, dead, now, rules.span)
                busy -= _lose_batch(replicas, dead, fates, dispatched, device_free, now, rules.span)
                if not shared:
                    waiting -= _lose_queue(queues, dead, outcome)
                if failures.replaced_after[failure] < NEVER:
                    _add(replicas, failures.model[failure], 1, now + failures.replaced_after[failure])
            failure += 1
            changed = np.int64(_ALL)

        elif next_arrival == now:
            wanted = np.int64(models[arrival])
            line = wanted
            if not shared:
                if now >= holds_until[wanted]:
                    listed[wanted], holds_until[wanted] = _list_ready(roster[wanted], replicas, wanted, now)
                line = _routed(rules.router, turn, roster[wanted], listed[wanted], now, done_at, length, size_of)
                turn += 1
            if line < 0:
                outcome[arrival] = LOST
            elif length[line] >= rules.limit:
                outcome[arrival] = SHED
            else:
                if tail[line] >= 0:
                    behind[tail[line]] = arrival
                else:
                    head[line] = arrival
                tail[line] = arrival
                length[line] += 1
                waiting += 1
                if length[line] == 1 or length[line] == rules.max_batch:
                    changed = np.int64(line)
            arrival += 1

        elif next_batch == now:
            queue = _first(starts)
            chosen = queue
            if shared:
                for r in range(rules.slots):
                    if alive[r] and model_of[r] == queue and ready_at[r] <= now and free_at[r] <= now:
                        chosen = r
                        break
            size = min(length[queue], rules.max_batch)
            begins = max(now, device_free[chosen % rules.devices])
            ends = begins + service[size]
            device_free[chosen % rules.devices] = ends
            free_at[chosen] = ends + rules.cycle
            done_at[chosen] = ends
            begun_at[chosen] = begins
            first[chosen] = taken
            size_of[chosen] = size
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
            busy += min(ends, rules.span) - min(begins, rules.span)
            changed = np.int64(queue)

        elif next_tick == now:
            for model in range(rules.models):
                change = _wanted(scaling, replicas, queues, looks, looked, model, now, shared)
                if change != 0:
                    changed = np.int64(_ALL)
                if change > 0:
                    _add(replicas, model, change, now + scaling.cold_start)
                elif change < 0:
                    ready += _end_idle(replicas, queues, model, -change, now, rules.span, shared)
            looked += 1
            next_tick += scaling.period

        else:
            there, computing = _count(replicas, now)
            samples[sampled] = (now, waiting, there, computing)
            sampled += 1
            next_sample += rules.sample_period
            if next_sample > rules.span:
                next_sample = NEVER

    for r in range(rules.slots):
        if alive[r]:
            ready += _end(replicas, r, rules.span, rules.span)
    return fates, batches, busy, ready, samples[:sampled]


@njit(cache=True)
def _first_replicas(rules: Rules):  # type: ignore[no-untyped-def]
    """Those that every model has at first, ready, in the first slots."""
    slots = rules.slots
    alive = np.zeros(slots, np.bool_)
    model = np.zeros(slots, np.int64)
    for r in range(rules.models * rules.replicas):
        alive[r] = True
        model[r] = r // rules.replicas
    ready_at, free_at, begun_at = np.zeros(slots, np.int64), np.zeros(slots, np.int64), np.zeros(slots, np.int64)
    done_at, first, size = np.zeros(slots, np.int64), np.zeros(slots, np.int64), np.zeros(slots, np.int64)
    return _Replicas(alive, model, ready_at, free_at, begun_at, done_at, first, size)


@njit(cache=True)
def _empty_queues(count, arrivals):  # type: ignore[no-untyped-def]
    """So many queues in which none of so many arrivals waits."""
    head, tail = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    return _Queues(head, tail, np.zeros(count, np.int64), np.full(arrivals, -1, np.int64))


@njit(cache=True)
def _tree(leaves):  # type: ignore[no-untyped-def]
    """A tree whose inner nodes are the smaller of their two children: the first of a thousand leaves is found in ten steps."""
    room = 1
    while room < leaves:
        room *= 2
    return np.full(2 * room, NEVER, np.int64)


@njit(cache=True)
def _put(tree, leaf, value):  # type: ignore[no-untyped-def]
    """Give a leaf a value, and the nodes above it the smallest below each."""
    node = len(tree) // 2 + leaf
    tree[node] = value
    while node > 1:
        node //= 2
        tree[node] = min(tree[2 * node], tree[2 * node + 1])


@njit(cache=True)
def _first(tree):  # type: ignore[no-untyped-def]
    """The leaf with the smallest value; the first of equal ones."""
    leaves = len(tree) // 2
    node = 1
    while node < leaves:
        node = 2 * node if tree[2 * node] <= tree[2 * node + 1] else 2 * node + 1
    return node - leaves


@njit(cache=True)
def _list_ready(roster, replicas: _Replicas, model, now):  # type: ignore[no-untyped-def]
    """List a model's replicas that are ready: how many, and until when there will be no more of them. Where none is, the one
    that will be first is listed, for whoever comes now waits for it."""
    found = 0
    soonest = np.int64(-1)
    until = NEVER
    for r in range(len(replicas.alive)):
        if replicas.alive[r] and replicas.model[r] == model:
            if replicas.ready_at[r] <= now:
                roster[found] = r
                found += 1
            elif replicas.ready_at[r] < until:
                until = replicas.ready_at[r]
                soonest = np.int64(r)
    if found == 0 and soonest >= 0:
        roster[0] = soonest
        found = 1
    return found, until


@njit(cache=True)
def _routed(router, turn, roster, listed, now, done_at, length, size):  # type: ignore[no-untyped-def]
    """The replica of the roster that an arrival is sent to; −1: there is none."""
    if listed == 0:
        return np.int64(-1)
    if router == _ROUND_ROBIN:
        return roster[turn % listed]
    if router == _RANDOM:
        return roster[np.random.randint(listed)]
    if router == _POWER_OF_TWO:
        one = roster[np.random.randint(listed)]
        other = roster[np.random.randint(listed)]
        ones = length[one] + (size[one] if done_at[one] > now else 0)
        others = length[other] + (size[other] if done_at[other] > now else 0)
        return one if ones <= others else other
    best = roster[0]
    fewest = NEVER
    for k in range(listed):
        r = roster[k]
        under_way = length[r] + (size[r] if done_at[r] > now else 0)
        if under_way < fewest:
            best = r
            fewest = under_way
    return best


@njit(cache=True)
def _first_ready(replicas: _Replicas, model, now):  # type: ignore[no-untyped-def]
    """A model's first replica that is ready; −1: none is."""
    for r in range(len(replicas.alive)):
        if replicas.alive[r] and replicas.model[r] == model and replicas.ready_at[r] <= now:
            return r
    return -1


@njit(cache=True)
def _add(replicas: _Replicas, model, count, ready_at):  # type: ignore[no-untyped-def]
    """So many replicas of a model more, as far as there is room."""
    for r in range(len(replicas.alive)):
        if count > 0 and not replicas.alive[r]:
            replicas.alive[r] = True
            replicas.model[r] = model
            replicas.ready_at[r] = ready_at
            replicas.free_at[r] = ready_at
            replicas.done_at[r] = 0
            count -= 1


@njit(cache=True)
def _end(replicas: _Replicas, r, now, span):  # type: ignore[no-untyped-def]
    """A replica is there no more. Returns how long it was ready within the span."""
    replicas.alive[r] = False
    return max(np.int64(0), min(now, span) - min(replicas.ready_at[r], span))


@njit(cache=True)
def _end_idle(replicas: _Replicas, queues: _Queues, model, count, now, span, shared):  # type: ignore[no-untyped-def]
    """End so many of a model's replicas, of those that have nothing to do; busy ones are asked again at the next look. Returns
    how long they were ready within the span."""
    ready = np.int64(0)
    for r in range(len(replicas.alive)):
        idle = replicas.ready_at[r] <= now and replicas.free_at[r] <= now and (shared or queues.length[r] == 0)
        if count > 0 and replicas.alive[r] and replicas.model[r] == model and idle:
            ready += _end(replicas, r, now, span)
            count -= 1
    return ready


@njit(cache=True)
def _lose_batch(replicas: _Replicas, r, fates: Fates, dispatched, device_free, now, span):  # type: ignore[no-untyped-def]
    """What a dead replica had in its hands is lost, and its device free. Returns for how long within the span it would have
    computed."""
    if replicas.done_at[r] <= now:
        return np.int64(0)
    for k in range(replicas.first[r], replicas.first[r] + replicas.size[r]):
        fates.outcome[dispatched[k]] = LOST
        fates.done[dispatched[k]] = -1
    until = max(now, replicas.begun_at[r])
    if device_free[r % len(device_free)] == replicas.done_at[r]:
        device_free[r % len(device_free)] = until
    return max(np.int64(0), min(replicas.done_at[r], span) - min(until, span))


@njit(cache=True)
def _lose_queue(queues: _Queues, r, outcome):  # type: ignore[no-untyped-def]
    """What waited for a dead replica alone is lost. Returns how much."""
    lost = queues.length[r]
    while queues.head[r] >= 0:
        outcome[queues.head[r]] = LOST
        queues.head[r] = queues.behind[queues.head[r]]
    queues.tail[r] = -1
    queues.length[r] = 0
    return lost


@njit(cache=True)
def _wanted(  # type: ignore[no-untyped-def]
    scaling: Scaling, replicas: _Replicas, queues: _Queues, looks: _Looks, looked, model, now, shared
):
    """How many replicas of a model the scaler wants more, or fewer, below 0."""
    waiting = queues.length[model] if shared else np.int64(0)
    there = 0
    pending = 0
    in_hand = np.int64(0)
    for r in range(len(replicas.alive)):
        if replicas.alive[r] and replicas.model[r] == model:
            if replicas.ready_at[r] <= now:
                there += 1
            else:
                pending += 1
            if replicas.done_at[r] > now:
                in_hand += replicas.size[r]
            if not shared:
                waiting += queues.length[r]
    if scaling.looks > 0:
        looks.seen[model, looked % scaling.looks] = waiting + in_hand
        mean = looks.seen[model].sum() / min(looked + 1, scaling.looks)
        return _to_target(scaling, looks, model, mean, there + pending, now)
    depth = waiting / max(1, there)
    if depth > scaling.up_above and pending == 0 and there < scaling.most:
        return np.int64(1)
    return np.int64(-1) if depth < scaling.down_below and there > scaling.fewest else np.int64(0)


@njit(cache=True)
def _to_target(scaling: Scaling, looks: _Looks, model, requests, replicas, now):  # type: ignore[no-untyped-def]
    """How many replicas are missing, or too many, once that has been so for long enough."""
    wanted = min(max(np.int64(np.ceil(requests / scaling.up_above)), scaling.fewest), scaling.most)
    missing = wanted - replicas
    looks.more_since[model] = min(looks.more_since[model], now) if missing > 0 else NEVER
    looks.fewer_since[model] = min(looks.fewer_since[model], now) if missing < 0 else NEVER
    if missing > 0 and now - looks.more_since[model] >= scaling.up_after:
        looks.more_since[model] = NEVER
        return missing
    return missing if missing < 0 and now - looks.fewer_since[model] >= scaling.down_after else np.int64(0)


@njit(cache=True)
def _count(replicas: _Replicas, now):  # type: ignore[no-untyped-def]
    """How many replicas are ready, and how many of them compute."""
    ready = 0
    computing = 0
    for r in range(len(replicas.alive)):
        if replicas.alive[r] and replicas.ready_at[r] <= now:
            ready += 1
            if replicas.done_at[r] > now:
                computing += 1
    return ready, computing
