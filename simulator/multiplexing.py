"""Many models on one emulated device that does not hold them all: an event simulation with the reference server's own policy.

Mechanisms are the reference server's (:mod:`.reference.server`): a request queues at its model; a replica that is idle
takes a batch as the batcher says, and holds the device for it; what is asked for and not in memory is loaded, one model after the
other in the order in which they were asked for. Whoever has to go for that finishes the batch that it has in hand, and what waits
for it waits until it comes back. All times are whole nanoseconds.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.analysis.metrics import Floats, Ints
from tailrace.harness.analysis.residence import Met
from tailrace.multiplexing.residency import Policy, Pool
from tailrace.simulator.system import NS_PER_MS, Batching, Service

__all__ = ["Device", "Memory", "Multiplexed", "simulate"]

NS_PER_S = 1_000_000_000
_ARRIVES, _COMPUTED, _LOADED, _DUE = range(4)
"""What happens, in the order in which it does at one instant."""


@dataclass(frozen=True)
class Device:
    """What computing and loading cost on one device."""

    service: Service
    batching: Batching
    load_ms: float
    load_gb_per_s: float
    """A load occupies the link for ``load_ms``, and for the model's bytes at this speed."""
    starts_s: tuple[float, ...] = (0.0,)
    """From the decision to load a model until the link is asked for: whoever has to go ends, and a process starts. Each load
    draws one of these; what was measured varies, and the tail is made of that."""
    ready_s: float = 0.0
    """From the end of the load until the model is asked."""
    overhead_ms: float = 0.0
    """What every answer takes beyond queue and batch."""

    def load_ns(self, size_bytes: float, start_s: float) -> int:
        """From the decision to load a model of so many bytes until it is asked."""
        link_s = self.load_ms / 1e3 + size_bytes / (self.load_gb_per_s * 1e9)
        return round((start_s + link_s + self.ready_s) * NS_PER_S)


@dataclass(frozen=True)
class Memory:
    """The memory that models share. ``sizes`` are bytes by model; ``pinned`` and ``at_start`` are positions in them."""

    budget_bytes: float
    sizes: Sequence[float]
    policy: Policy
    pinned: Collection[int] = ()
    at_start: Sequence[int] = ()


@dataclass(frozen=True)
class Multiplexed:
    """What came of every arrival, in their order, and of every load, in theirs."""

    response_ms: Floats
    met: NDArray[np.uint8]
    """How each met its model (:class:`Met`), told as of a real trial."""
    loads: NDArray[np.int64]
    """One row for each: when it was decided, when it was done (ns), and the model; shape (loads, 3)."""
    evictions: NDArray[np.int64]
    """One row for each: from when on it was asked nothing more (ns), and the model; shape (evictions, 2)."""
    most_bytes: float
    """The most that was taken at any time."""

    def share(self, kind: Met, since: int = 0) -> float:
        """The share of a kind among the arrivals from the one with this number on; NaN where there are none."""
        return float((self.met[since:] == kind).mean()) if len(self.met) > since else float("nan")


@dataclass(eq=False)
class _Model:
    """One model's queue and replica."""

    idle_since: int
    waiting: deque[int] = field(default_factory=deque)
    loaded: bool = False
    in_hand: list[int] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.in_hand)


def simulate(
    device: Device, memory: Memory, arrivals_ns: Ints, models: NDArray[np.integer], *, seed: int = 7
) -> Multiplexed:
    """Until every arrival is answered. ``arrivals_ns`` ascend; ``models`` are the positions of theirs in the memory's sizes;
    ``seed`` is of what is drawn. Raises ``ValueError`` where a model that is asked for could never be loaded."""
    return _Simulation(device, memory, arrivals_ns, models, seed).run()


class _Simulation:
    def __init__(
        self, device: Device, memory: Memory, arrivals_ns: Ints, models: NDArray[np.integer], seed: int
    ) -> None:
        self._device = device
        self._random = np.random.default_rng(seed)
        self._sizes = memory.sizes
        self._arrivals = [int(at) for at in arrivals_ns]
        self._wanted_model = [int(model) for model in models]
        names = [str(model) for model in range(len(memory.sizes))]
        self._pool = Pool(
            memory.budget_bytes,
            dict(zip(names, memory.sizes, strict=True)),
            memory.policy,
            [names[model] for model in memory.pinned],
        )
        begin = self._arrivals[0] if self._arrivals else 0
        self._models = [_Model(idle_since=begin) for _ in names]
        for model in memory.at_start:
            self._pool.enter(names[model])
            self._models[model].loaded = True
        self._names = names
        self._service_ns = [int(ns) for ns in device.service.times_ns(device.batching.max_batch)]
        self._window_ns = round(device.batching.window_ms * NS_PER_MS)
        self._events: list[tuple[int, int, int]] = [(at, _ARRIVES, i) for i, at in enumerate(self._arrivals)]
        """When, what, and the arrival or model; a list that ascends is a heap."""
        self._device_free = begin
        self._wanted: dict[int, None] = {}
        self._loading: tuple[int, int] | None = None
        """When it was decided, and the model."""
        self._leaving: deque[int] = deque()
        """Who has to go before that, the first of whom is finishing its batch."""
        self._done = np.zeros(len(self._arrivals), dtype=np.int64)
        self._met = np.full(len(self._arrivals), Met.HOT, dtype=np.uint8)
        self._loads: list[tuple[int, int, int]] = []
        self._evictions: list[tuple[int, int]] = []
        self._most = memory.budget_bytes - self._pool.free

    def run(self) -> Multiplexed:
        while self._events:
            now, what, which = heapq.heappop(self._events)
            if what == _ARRIVES:
                self._arrive(which, now)
            elif what == _COMPUTED:
                self._finish(which, now)
            elif what == _LOADED:
                self._loaded(which, now)
            else:
                self._start_batch(which, now)
        response_ms = (self._done - np.array(self._arrivals, dtype=np.int64)) / NS_PER_MS + self._device.overhead_ms
        return Multiplexed(
            response_ms,
            self._met,
            np.array(self._loads, dtype=np.int64).reshape(-1, 3),
            np.array(self._evictions, dtype=np.int64).reshape(-1, 2),
            self._most,
        )

    # ------------------------------------------------------------------------------------------------- requests

    def _arrive(self, arrival: int, now: int) -> None:
        model = self._wanted_model[arrival]
        self._models[model].waiting.append(arrival)
        self._pool.ask(self._names[model])
        if self._models[model].loaded:
            self._look_at(model, now)
            return
        self._wanted[model] = None
        if self._loading is None:
            self._bring(model, now)

    def _look_at(self, model: int, now: int) -> None:
        """See to it that a model's next batch begins when it is due."""
        due = self._due(self._models[model])
        if due is not None:
            heapq.heappush(self._events, (max(now, due), _DUE, model))

    def _due(self, at: _Model) -> int | None:
        """When a model's next batch begins if nothing else happens; ``None``: not before something has happened."""
        if not at.loaded or at.in_hand or not at.waiting:
            return None
        batching = self._device.batching
        if len(at.waiting) >= batching.max_batch:
            return at.idle_since
        oldest = self._arrivals[at.waiting[0]]
        opens = max(at.idle_since, oldest) if batching.window_opens == "idle" else oldest
        return max(at.idle_since, opens + self._window_ns)

    def _start_batch(self, model: int, now: int) -> None:
        """Start the batch that is due, unless what made it so has been taken already."""
        at = self._models[model]
        due = self._due(at)
        if due is None or due > now:
            return
        at.in_hand = [at.waiting.popleft() for _ in range(min(len(at.waiting), self._device.batching.max_batch))]
        # Whoever has been given a batch first has the device first.
        self._device_free = max(now, self._device_free) + self._service_ns[len(at.in_hand)]
        heapq.heappush(self._events, (self._device_free, _COMPUTED, model))

    def _finish(self, model: int, now: int) -> None:
        at = self._models[model]
        self._done[at.in_hand] = now
        at.in_hand = []
        at.idle_since = now
        if at.loaded:
            self._look_at(model, now)
        else:  # it has been waited for, to have its memory
            self._make_room(now)

    # ------------------------------------------------------------------------------------------------- memory

    def _bring(self, model: int, now: int) -> None:
        busy = [name for name, at in zip(self._names, self._models, strict=True) if at.busy]
        victims = self._pool.victims(self._names[model], busy)
        self._loading = now, model
        self._leaving = deque(map(int, victims))
        if self._leaving:
            self._put_out(now)
        self._make_room(now)

    def _put_out(self, now: int) -> None:
        """The first of those who have to go is asked nothing more."""
        self._pool.leave(self._names[self._leaving[0]])
        self._models[self._leaving[0]].loaded = False
        self._evictions.append((now, self._leaving[0]))

    def _make_room(self, now: int) -> None:
        """Go on as soon as the one that is to go has nothing in hand, and load when all have gone."""
        while self._leaving and not self._models[self._leaving[0]].in_hand:
            gone = self._leaving.popleft()
            if self._models[gone].waiting:  # too late for the copy that has gone
                self._wanted[gone] = None
            if self._leaving:
                self._put_out(now)
        if not self._leaving and self._loading is not None:
            model = self._loading[1]
            self._pool.enter(self._names[model])
            self._most = max(self._most, self._pool.capacity - self._pool.free)
            took = self._device.load_ns(self._sizes[model], float(self._random.choice(self._device.starts_s)))
            self._pool.learn(self._names[model], took / NS_PER_S)
            heapq.heappush(self._events, (now + took, _LOADED, model))

    def _loaded(self, model: int, now: int) -> None:
        assert self._loading is not None  # noqa: S101 - nothing else is loaded
        decided, _ = self._loading
        self._loading = None
        self._loads.append((decided, now, model))
        at = self._models[model]
        at.loaded, at.idle_since = True, now
        del self._wanted[model]
        if at.waiting:
            waited = list(at.waiting)
            self._met[waited] = np.maximum(self._met[waited], Met.WARM)
            self._met[waited[0]] = Met.COLD
        # Before anybody else comes in: were it to go again for that, its requests might wait for ever.
        self._start_batch(model, now)
        self._look_at(model, now)
        if self._wanted:
            self._bring(next(iter(self._wanted)), now)
