"""The simulation of many models in one memory: conservation, its limits, and what it comes to in plain cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.analysis.residence import Met
from tailrace.multiplexing.residency import Policy, Pool
from tailrace.simulator.caching import lru_hit_rates
from tailrace.simulator.engine import simulate as simulate_one
from tailrace.simulator.multiplexing import Device, Memory, Multiplexed, simulate
from tailrace.simulator.system import Batching, Service, System

MB = 1_000_000
SERVICE = Service(base_ms=12, per_item_ms=3)
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "gdsf")


def device(**changed: Any) -> Device:
    return Device(
        **{
            "service": SERVICE,
            "batching": Batching(max_batch=8, window_ms=5),
            "load_ms": 50,
            "load_gb_per_s": 1,
            "starts_s": (0.1,),
            **changed,
        }
    )


def times(*at_s: float) -> np.ndarray:
    return np.rint(np.array(at_s) * 1e9).astype(np.int64)


def drawn(seed: int, count: int, rate: float, models: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shares = np.arange(1, models + 1, dtype=np.float64) ** -1.1
    arrivals = np.cumsum(rng.exponential(1e9 / rate, count)).astype(np.int64)
    return arrivals, rng.choice(models, count, p=shares / shares.sum())


def test_a_cold_request_waits_for_the_load_and_those_behind_it_too() -> None:
    memory = Memory(200 * MB, [200 * MB] * 2, "lru", at_start=[0])
    done = simulate(device(), memory, times(0, 10, 10.1, 11), np.array([0, 1, 1, 1]))
    assert done.met.tolist() == [Met.HOT, Met.COLD, Met.WARM, Met.HOT]
    # Window and a batch of one; process, 50 ms and 200 MB at 1 GB/s, then a batch of two, for the window is long over.
    assert done.response_ms == pytest.approx([20, 368, 268, 20])
    assert done.loads.tolist() == [[10_000_000_000, 10_350_000_000, 1]]
    assert done.evictions.tolist() == [[10_000_000_000, 0]]
    assert done.share(Met.COLD) == 0.25
    assert done.share(Met.COLD, since=2) == 0.0


def test_loads_take_as_long_as_they_were_measured_to() -> None:
    memory = Memory(100 * MB, [100 * MB] * 2, "lru", at_start=[0])
    one, same, other = (
        simulate(device(starts_s=(0.1, 0.5)), memory, np.arange(400) * 10**10, np.arange(400) % 2, seed=seed)
        for seed in (1, 1, 2)
    )
    took = one.loads[:, 1] - one.loads[:, 0]
    assert set(took.tolist()) == {250_000_000, 650_000_000}
    assert 0.4 < (took == 250_000_000).mean() < 0.6
    assert np.array_equal(one.loads, same.loads) and not np.array_equal(one.loads, other.loads)


def test_time_may_begin_anywhere() -> None:
    memory = Memory(300 * MB, [100 * MB] * 6, "lru", at_start=[0])
    arrivals, models = drawn(9, 300, 8.0, 6)
    one, other = (simulate(device(), memory, arrivals - shift, models) for shift in (0, 10**13))
    assert np.array_equal(one.response_ms, other.response_ms)
    assert np.array_equal(one.met, other.met)


def test_loads_come_one_after_the_other_and_models_of_different_ones_share_the_device() -> None:
    memory = Memory(400 * MB, [200 * MB] * 3, "lru", at_start=[2])
    done = simulate(device(), memory, times(1, 1.05), np.array([0, 1]))
    assert done.loads[:, 1].tolist() == [1_350_000_000, 1_700_000_000]
    assert done.response_ms == pytest.approx([365, 665])
    hot = Memory(400 * MB, [200 * MB] * 2, "lru", at_start=[0, 1])
    assert simulate(device(), hot, times(1, 1.002), np.array([0, 1])).response_ms == pytest.approx([20, 33])


def test_an_idle_model_goes_first_and_a_busy_one_finishes_what_it_has_in_hand() -> None:
    slow = device(service=Service(base_ms=1000, per_item_ms=0), batching=Batching(max_batch=1, window_ms=0))
    both = Memory(400 * MB, [200 * MB] * 3, "lfu", at_start=[0, 1])
    # Model 0 was asked for less often than 1, but computes: 1 goes, at once.
    idle = simulate(slow, both, times(0, 2, 5, 5.5), np.array([1, 1, 0, 2]))
    assert idle.evictions.tolist() == [[5_500_000_000, 1]]
    assert idle.loads.tolist() == [[5_500_000_000, 5_850_000_000, 2]]
    one = Memory(200 * MB, [200 * MB] * 3, "lru", at_start=[0])
    # Model 0 finishes one request; the other waits until it is back, which is a load for it.
    busy = simulate(slow, one, times(0, 0.1, 0.2), np.array([0, 0, 2]))
    assert busy.met.tolist() == [Met.HOT, Met.COLD, Met.COLD]
    assert busy.loads.tolist() == [[200_000_000, 1_350_000_000, 2], [1_350_000_000, 2_700_000_000, 0]]
    assert busy.response_ms == pytest.approx([1000, 3600, 2150])


@pytest.mark.parametrize("opens", ["arrival", "idle"])
def test_one_model_that_is_always_there_is_the_system_without_a_memory(opens: Any) -> None:
    arrivals, _ = drawn(3, 4000, 60.0, 1)
    batching = Batching(max_batch=8, window_ms=10, window_opens=opens)
    done = simulate(
        device(batching=batching), Memory(MB, [MB], "lru", at_start=[0]), arrivals, np.zeros(4000, dtype=int)
    )
    whole = simulate_one(System(service=SERVICE, batching=batching), arrivals, span_ns=int(arrivals[-1]))
    assert np.array_equal(done.response_ms, whole.response_ms())
    assert (done.met == Met.HOT).all()
    assert len(done.loads) == len(done.evictions) == 0


def plainly(policy: Policy, memory: Memory, sequence: Sequence[int], reload_s: Sequence[float]) -> list[bool]:
    """Which requests find their model where each is answered before the next comes."""
    pool = Pool(
        memory.budget_bytes,
        {str(m): size for m, size in enumerate(memory.sizes)},
        policy,
        list(map(str, memory.pinned)),
    )
    for model in memory.at_start:
        pool.enter(str(model))
    found = []
    for model in map(str, sequence):
        found.append(pool.ask(model))
        if not found[-1]:
            for victim in pool.victims(model):
                pool.leave(victim)
            pool.enter(model)
            pool.learn(model, reload_s[int(model)])
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pinned", [(), (0, 1)])
def test_far_apart_it_is_a_plain_cache(policy: Policy, pinned: tuple[int, ...]) -> None:
    sizes = [(100 + 30 * (m % 5)) * MB for m in range(12)]
    memory = Memory(800 * MB, sizes, policy, pinned, at_start=[0, 1, 2])
    _, models = drawn(5, 600, 1.0, 12)
    done = simulate(device(), memory, np.arange(600) * 10_000_000_000, models)
    found = plainly(policy, memory, models.tolist(), [device().load_ns(size, 0.1) / 1e9 for size in sizes])
    assert (done.met == Met.HOT).tolist() == found
    assert not (done.met == Met.WARM).any()
    assert len(done.loads) == found.count(False)
    assert not set(pinned) & set(done.loads[:, 2].tolist())


def test_far_apart_it_misses_as_often_as_che_says() -> None:
    _, models = drawn(2, 20_000, 1.0, 24)
    shares = np.arange(1, 25, dtype=np.float64) ** -1.1
    shares /= shares.sum()
    memory = Memory(8 * MB, [MB] * 24, "lru", at_start=range(8))
    done = simulate(device(), memory, np.arange(20_000) * 10_000_000_000, models)
    assert done.share(Met.COLD) == pytest.approx(1 - shares @ lru_hit_rates(shares, np.ones(24), 8.0), abs=0.012)


def checked(done: Multiplexed, memory: Memory, arrivals: np.ndarray, models: np.ndarray) -> None:
    assert (done.response_ms >= 15).all()
    assert done.most_bytes <= memory.budget_bytes
    # One at a time, each of a model that was asked for, and no one twice without having gone in between.
    assert (done.loads[1:, 0] >= done.loads[:-1, 1]).all()
    assert set(done.loads[:, 2].tolist()) <= set(models.tolist())
    assert not set(memory.pinned) & set(done.loads[:, 2].tolist())
    inside = len(memory.at_start) + len(done.loads) - len(done.evictions)
    assert 0 <= inside <= len(memory.sizes)
    assert (done.met == Met.COLD).sum() <= len(done.loads)
    assert len(np.unique(models)) <= inside + len(done.evictions)
    # Whoever finds no model waits at least for a load's end.
    assert (done.response_ms[done.met == Met.COLD] >= 150).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(0.5, 200.0),
    policy=st.sampled_from(POLICIES),
    slots=st.integers(1, 6),
    pinned=st.integers(0, 2),
    max_batch=st.integers(1, 4),
    mixed=st.booleans(),
)
def test_all_are_answered_within_the_memory(
    seed: int, rate: float, policy: Policy, slots: int, pinned: int, max_batch: int, mixed: bool
) -> None:
    sizes = [(1 + (m % 3 if mixed else 0)) * 100 * MB for m in range(6)]
    budget = (slots * 100 + (300 if mixed else 100) + sum(sizes[:pinned]) / MB) * MB
    arrivals, models = drawn(seed, 60, rate, 6)
    memory = Memory(budget, sizes, policy, range(pinned), at_start=range(pinned))
    chosen = device(batching=Batching(max_batch=max_batch, window_ms=5))
    checked(simulate(chosen, memory, arrivals, models), memory, arrivals, models)


def test_a_memory_for_all_loads_each_once_or_never() -> None:
    arrivals, models = drawn(4, 500, 50.0, 6)
    everything = Memory(600 * MB, [100 * MB] * 6, "gdsf", at_start=range(6))
    assert (simulate(device(), everything, arrivals, models).met == Met.HOT).all()
    empty = Memory(600 * MB, [100 * MB] * 6, "gdsf")
    assert sorted(simulate(device(), empty, arrivals, models).loads[:, 2].tolist()) == list(range(6))


def test_a_model_that_could_never_be_loaded_is_named() -> None:
    with pytest.raises(ValueError, match="1 takes 2e\\+06 of memory"):
        simulate(device(), Memory(MB, [MB, 2 * MB], "lru"), times(1), np.array([1]))
