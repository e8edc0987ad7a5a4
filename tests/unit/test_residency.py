"""Who is in memory, who goes, and who has to wait: the policies, and the worker that does what they say."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.multiplexing.residency import PAUSE_S, Policy, Pool, Residency

MODELS = [f"m{i}" for i in range(6)]
EQUAL = dict.fromkeys(MODELS, 1.0)
POLICIES: list[Policy] = ["lru", "lfu", "gdsf"]
requests = st.lists(st.sampled_from(MODELS), max_size=80)


def serve(pool: Pool, asked: list[str]) -> list[str]:
    """Ask one after the other, load at once; returns the misses."""
    missed = []
    for model in asked:
        if not pool.ask(model):
            for victim in pool.victims(model):
                pool.leave(victim)
            pool.enter(model)
            missed.append(model)
    return missed


@given(requests, st.integers(1, 6))
def test_lru_is_lru(asked: list[str], capacity: int) -> None:
    known: OrderedDict[str, None] = OrderedDict()
    missed = []
    for model in asked:
        if model in known:
            known.move_to_end(model)
            continue
        missed.append(model)
        known[model] = None
        if len(known) > capacity:
            known.popitem(last=False)
    assert serve(Pool(capacity, EQUAL, "lru"), asked) == missed


@given(requests, st.sampled_from(POLICIES), st.lists(st.integers(1, 9), min_size=6, max_size=6), st.integers(0, 2))
def test_memory_is_never_overfull_and_pinned_models_stay(
    asked: list[str], policy: Policy, sizes: list[int], pinned: int
) -> None:
    sized = dict(zip(MODELS, map(float, sizes), strict=True))
    pool = Pool(sum(sizes[:pinned]) + max(sizes), sized, policy, MODELS[:pinned])
    for model in MODELS[:pinned]:
        pool.enter(model)
    for model in asked:
        serve(pool, [model])
        assert model in pool.inside
        assert pool.free >= 0
        assert set(MODELS[:pinned]) <= set(pool.inside)


def test_lfu_keeps_who_was_asked_for_most_often_even_after_an_absence() -> None:
    pool = Pool(2, EQUAL, "lfu")
    serve(pool, ["m0", "m0", "m0", "m1", "m1", "m2"])
    assert list(pool.inside) == ["m0", "m2"], "m1 was asked for twice, m0 three times: m1 had to go for m2"
    serve(pool, ["m1"])
    assert list(pool.inside) == ["m0", "m1"]


def test_gdsf_lets_the_large_go_first_and_forgets_old_fame() -> None:
    pool = Pool(4, {"small": 1, "large": 3, "other": 2}, "gdsf")
    serve(pool, ["large", "small", "other"])
    assert list(pool.inside) == ["small", "other"], "as popular as the small one, and three times as large"
    aged = Pool(2, EQUAL, "gdsf")
    serve(aged, ["m0"] * 5)
    serve(aged, ["m1", "m2"] * 8)
    assert "m0" not in aged.inside, "five requests long ago do not count for ever"
    slow = Pool(2, EQUAL, "gdsf")
    serve(slow, ["m0", "m1"])
    slow.learn("m0", 9.0)
    slow.learn("m1", 1.0)
    serve(slow, ["m2"])
    assert list(slow.inside) == ["m0", "m2"], "what is slow to load is worth more"


def test_of_models_nobody_has_asked_for_the_one_that_came_first_goes() -> None:
    for policy in POLICIES:
        pool = Pool(3, EQUAL, policy)
        for model in ("m2", "m0", "m1"):
            pool.enter(model)
        assert pool.victims("m3") == ["m2"], "the same every time, whatever the order of hashes"


def test_the_busy_go_last_and_what_never_fits_is_told() -> None:
    pool = Pool(2, {**EQUAL, "m5": 3.0}, "lru", ["m0"])
    serve(pool, ["m0", "m1"])
    with pytest.raises(ValueError, match="m5 takes 3 of memory, and 1 is all that can be freed"):
        pool.victims("m5")
    free = Pool(2, EQUAL, "lru")
    serve(free, ["m0", "m1"])
    assert free.victims("m2", busy=["m0"]) == ["m1"]
    assert free.victims("m2", busy=["m0", "m1"]) == ["m0"]


class Server:
    """Models that load and unload at once, unless they are told otherwise."""

    def __init__(self, capacity: int = 2, fails: int = 0) -> None:
        self.done: list[tuple[str, str]] = []
        self.failed: list[tuple[str, str]] = []
        self.fails = fails
        self.busy: set[str] = set()
        self.waiting = set(MODELS)
        self.residency = Residency(
            Pool(capacity, EQUAL, "lru"),
            load=self._load,
            unload=self._unload,
            busy=lambda: self.busy,
            waited_for=lambda model: model in self.waiting,
            failed=lambda model, error: self.failed.append((model, str(error))),
            loaded=["m0", "m1"][:capacity],
        )

    async def _load(self, model: str) -> None:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no")
        self.done.append(("load", model))

    async def _unload(self, model: str) -> None:
        self.done.append(("unload", model))


def run(server: Server, doing: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def both() -> None:
        worker = asyncio.create_task(server.residency.run())
        await doing()
        worker.cancel()

    asyncio.run(both())


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_what_is_asked_for_comes_in_for_the_one_that_has_to_go() -> None:
    server = Server()

    async def doing() -> None:
        assert server.residency.ask("m1")
        assert not server.residency.ask("m2")
        assert not server.residency.ask("m2"), "it is on its way"
        await settled()
        assert server.residency.ask("m2")
        assert not server.residency.ask("m0")

    run(server, doing)
    assert server.done[:2] == [("unload", "m0"), ("load", "m2")]
    assert server.residency.counts["model_loads_total"] == 1


def test_a_load_that_fails_once_is_tried_again_and_nobody_notices() -> None:
    server = Server(fails=1)

    async def doing() -> None:
        server.residency.ask("m2")
        await settled()
        assert server.residency.ask("m2")

    run(server, doing)
    assert not server.failed
    assert server.residency.counts["model_load_failures_total"] == 1


def test_a_model_that_fails_to_load_is_told_leaves_no_trace_and_is_left_alone_for_a_while() -> None:
    server = Server(fails=2)

    async def doing() -> None:
        server.residency.ask("m2")
        await settled()
        assert server.failed == [("m2", "no")]
        assert server.residency.pool.free == 1, "m0 has gone for it; its room is free"
        assert not server.residency.ask("m2")
        assert server.failed == [("m2", "no")] * 2, "at once, without another try"
        assert not server.residency.ask("m3")
        await settled()
        assert server.residency.ask("m3"), "others load"
        loop = asyncio.get_running_loop()
        later = loop.time() + PAUSE_S
        loop.time = lambda: later  # type: ignore[method-assign]
        server.residency.ask("m2")
        await settled()
        assert server.residency.ask("m2"), "after the pause it is tried again"

    run(server, doing)


def test_nothing_is_loaded_for_those_who_have_gone() -> None:
    server = Server()
    server.waiting = {"m3"}

    async def doing() -> None:
        server.residency.ask("m2")
        server.residency.ask("m3")
        await settled()

    run(server, doing)
    assert server.done == [("unload", "m0"), ("load", "m3")]
