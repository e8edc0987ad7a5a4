"""Which models are in the memory of a device that does not hold them all, and which go when another one is asked for.

:class:`Pool` decides and knows no clock, so that a simulator can ask it, too; :class:`Residency` does what it decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Literal

Policy = Literal["lru", "lfu", "gdsf"]
ATTEMPTS = 2
"""How often a model is loaded in vain before those who wait for it are told; its process may have been killed."""
PAUSE_S = 1.0
"""For so long a model that could not be loaded is not tried again."""


class Pool:
    """The models in memory, by what each takes of it, under a policy that says who goes first:

    * ``lru``: who was asked for longest ago.
    * ``lfu``: who was asked for least often since the beginning, in memory or not.
    * ``gdsf``: GreedyDual-Size-Frequency: the lowest of *age + requests × reload seconds ÷ size*, where requests count since the
      model came in, and age is that value of whoever went last (Cherkasova 1998). What was once popular ages away, and what
      is small and slow to load stays.

    Ties go by ``lru``. ``pinned`` models never go.
    """

    def __init__(
        self, capacity: float, sizes: Mapping[str, float], policy: Policy, pinned: Collection[str] = ()
    ) -> None:
        self.capacity = capacity
        self.sizes = sizes
        self.policy = policy
        self.pinned = frozenset(pinned)
        self.inside: dict[str, int] = {}
        """Requests of each model in memory since it came in."""
        self._asked = dict.fromkeys(sizes, 0)
        self._last = dict.fromkeys(sizes, 0)
        self._value = dict.fromkeys(sizes, 0.0)
        self._reload_s: dict[str, float] = {}
        self._age = 0.0
        self._requests = 0

    @property
    def free(self) -> float:
        """Room that nobody has."""
        return self.capacity - sum(self.sizes[model] for model in self.inside)

    def ask(self, model: str) -> bool:
        """A request for a model has come; returns whether it is in memory."""
        self._requests += 1
        self._last[model] = self._requests
        self._asked[model] += 1
        if model not in self.inside:
            return False
        self.inside[model] += 1
        self._weigh(model)
        return True

    def victims(self, model: str, busy: Collection[str] = ()) -> list[str]:
        """Who has to go for a model to come in: in the policy's order, but whoever is busy after all others. Raises
        ``ValueError`` when there would not be room without all of them."""
        chosen: list[str] = []
        room = self.free
        # In the order in which they came in: a set would decide ties by chance.
        others = [other for other in self.inside if other not in self.pinned]
        for victim in sorted(others, key=lambda other: (other in busy, *self._rank(other))):
            if room >= self.sizes[model]:
                break
            chosen.append(victim)
            room += self.sizes[victim]
        if room < self.sizes[model]:
            raise ValueError(f"{model} takes {self.sizes[model]:g} of memory, and {room:g} is all that can be freed")
        return chosen

    def enter(self, model: str) -> None:
        """A model takes its room."""
        self.inside[model] = 1
        self._weigh(model)

    def leave(self, model: str) -> None:
        """A model has gone."""
        if self.inside.pop(model, None) is not None:
            self._age = max(self._age, self._value[model])

    def learn(self, model: str, reload_s: float) -> None:
        """How long it took to load a model."""
        self._reload_s[model] = reload_s
        self._weigh(model)

    def _weigh(self, model: str) -> None:
        known = self._reload_s.values()
        reload_s = self._reload_s.get(model, sum(known) / len(known) if known else 1.0)
        self._value[model] = self._age + self.inside.get(model, 1) * reload_s / self.sizes[model]

    def _rank(self, model: str) -> tuple[float, int]:
        worth = {"lru": 0.0, "lfu": float(self._asked[model]), "gdsf": self._value[model]}[self.policy]
        return worth, self._last[model]


class Residency:
    """Brings in the models that are asked for, one after the other, for they all come over one link.

    ``load`` and ``unload`` return when that is done; the latter lets a busy model finish what it has begun. ``busy`` are the
    models with requests that wait or are computed, and ``waited_for`` tells whether anybody still waits for a model whose turn
    has come. ``failed`` is told of a model that could not be loaded, and why.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        load: Callable[[str], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        busy: Callable[[], Collection[str]],
        waited_for: Callable[[str], bool],
        failed: Callable[[str, Exception], None],
        loaded: Collection[str],
    ) -> None:
        """``loaded`` are in memory already."""
        self.pool = pool
        for model in loaded:
            pool.enter(model)
        self.counts = {"model_loads_total": 0.0, "model_evictions_total": 0.0, "model_load_failures_total": 0.0}
        self._load, self._unload, self._busy, self._failed = load, unload, busy, failed
        self._waited_for = waited_for
        self._wanted: dict[str, None] = {}
        self._barred: dict[str, tuple[float, Exception]] = {}
        self._loaded = set(loaded)
        self._wake = asyncio.Event()

    def ask(self, model: str) -> bool:
        """A request for a model has come; returns whether it can be answered now, else it is seen to that it can."""
        self.pool.ask(model)
        if model in self._loaded:
            return True
        self.want(model)
        return False

    def want(self, model: str) -> None:
        """Have a model in memory, after those that were wanted before. One that could just now not be loaded fails again."""
        until_s, error = self._barred.get(model, (0.0, None))
        if error is not None and asyncio.get_running_loop().time() < until_s:
            self._failed(model, error)
            return
        self._wanted[model] = None
        self._wake.set()

    async def run(self) -> None:
        """Do so for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                model = next(iter(self._wanted))
                await self._bring(model)
                del self._wanted[model]

    async def _bring(self, model: str) -> None:
        if model in self._loaded or not self._waited_for(model):
            return
        loop = asyncio.get_running_loop()
        try:
            for victim in self.pool.victims(model, self._busy()):
                self.pool.leave(victim)
                self._loaded.discard(victim)
                self.counts["model_evictions_total"] += 1
                await self._unload(victim)
            self.pool.enter(model)
            await self._try_to_load(model)
        except Exception as error:  # whatever the model or its server says
            self.pool.leave(model)
            self._barred[model] = loop.time() + PAUSE_S, error
            self._failed(model, error)

    async def _try_to_load(self, model: str) -> None:
        loop = asyncio.get_running_loop()
        for attempt in range(1, ATTEMPTS + 1):
            began_s = loop.time()
            try:
                await self._load(model)
            except Exception:
                self.counts["model_load_failures_total"] += 1
                if attempt == ATTEMPTS:
                    raise
            else:
                self.counts["model_loads_total"] += 1
                self._loaded.add(model)
                self.pool.learn(model, loop.time() - began_s)
                return
