"""The theory of a memory that does not hold all models, against simulation and brute force."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.simulator.caching import least_loads, lru_hit_rates


def zipf(count: int, exponent: float) -> np.ndarray:
    shares = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return shares / shares.sum()


def lru_hits(sequence: np.ndarray, sizes: np.ndarray, capacity: float) -> np.ndarray:
    """Which requests find their model, as plainly as it can be written."""
    inside: OrderedDict[int, None] = OrderedDict()
    hits = np.zeros(len(sequence), dtype=bool)
    for i, model in enumerate(sequence):
        hits[i] = model in inside
        while model not in inside and sum(sizes[list(inside)]) + sizes[model] > capacity:
            inside.popitem(last=False)
        inside[model] = None
        inside.move_to_end(model)
    return hits


def fewest_loads(sequence: list[int], sizes: np.ndarray, capacity: float) -> int:
    """By trying everything: the loads that lead to each possible content of the memory."""
    models = range(len(sizes))
    contents = [
        frozenset(chosen)
        for size in range(len(sizes) + 1)
        for chosen in itertools.combinations(models, size)
        if sum(sizes[m] for m in chosen) <= capacity
    ]
    feasible = set(contents)
    cost = dict.fromkeys(contents, 0)
    for model in sequence:
        reached: dict[frozenset[int], int] = {}
        for content, loads in cost.items():
            if model in content:
                reached[content] = min(reached.get(content, loads), loads)
                continue
            for kept in contents:
                after = kept | {model}
                if kept <= content and after in feasible:
                    reached[after] = min(reached.get(after, loads + 1), loads + 1)
        cost = reached
    return min(cost.values())


@pytest.mark.parametrize(("exponent", "slots"), [(0.0, 6), (0.8, 3), (1.1, 8), (1.1, 16), (2.0, 4)])
def test_che_comes_close_to_a_simulated_lru(exponent: float, slots: int) -> None:
    shares, sizes = zipf(24, exponent), np.full(24, 400.0)
    sequence = np.random.default_rng(7).choice(24, 60_000, p=shares)
    hits = lru_hits(sequence, sizes, 400.0 * slots)
    rates = lru_hit_rates(shares, sizes, 400.0 * slots)
    assert 1 - shares @ rates == pytest.approx(1 - hits[1000:].mean(), abs=0.01)
    for model in (0, 3, 12):
        assert rates[model] == pytest.approx(hits[sequence == model].mean(), abs=0.03)


def test_che_counts_sizes_and_pinned_models() -> None:
    shares, sizes = zipf(24, 1.1), np.where(np.arange(24) % 2, 100.0, 300.0)
    sequence = np.random.default_rng(7).choice(24, 60_000, p=shares)
    assert shares @ lru_hit_rates(shares, sizes, 1600.0) == pytest.approx(
        lru_hits(sequence, sizes, 1600.0).mean(), abs=0.03
    )
    rates = lru_hit_rates(shares, sizes, 1600.0, pinned=3)
    others = sequence[sequence >= 3]
    assert (rates[:3] == 1).all()
    assert rates[3:] @ shares[3:] / shares[3:].sum() == pytest.approx(
        lru_hits(others, sizes, 1600.0 - 700.0).mean(), abs=0.04
    )


def test_a_memory_for_all_misses_nothing_and_one_for_none_everything() -> None:
    shares, sizes = zipf(5, 1.0), np.full(5, 200.0)
    assert lru_hit_rates(shares, sizes, 1000.0).tolist() == [1.0] * 5
    assert lru_hit_rates(shares, sizes, 399.0, pinned=1).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    # 0.6 of a model is no model: between 400 and 599 nothing changes.
    assert lru_hit_rates(shares, sizes, 599.0) == pytest.approx(lru_hit_rates(shares, sizes, 400.0))
    assert lru_hit_rates(np.array([0.5, 0.5, 0.0]), sizes[:3], 400.0).tolist() == [1.0, 1.0, 0.0]


@given(
    shares=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12),
    size=st.floats(0.1, 1000.0),
    capacity=st.floats(0.0, 20_000.0),
)
def test_che_fills_the_memory_and_prefers_the_popular(shares: list[float], size: float, capacity: float) -> None:
    p, sizes = np.array(shares) / sum(shares), np.full(len(shares), size)
    rates = lru_hit_rates(p, sizes, capacity)
    assert ((rates >= 0) & (rates <= 1)).all()
    whole = min(len(shares), int(capacity / size + 1e-9))
    assert rates.sum() == pytest.approx(whole, rel=1e-6, abs=1e-6)
    assert (np.diff(rates[np.argsort(p)]) >= -1e-12).all()


@given(sequence=st.lists(st.integers(0, 3), max_size=9), slots=st.integers(1, 3))
def test_belady_is_what_trying_everything_finds(sequence: list[int], slots: int) -> None:
    sizes = np.full(4, 2.0)
    found = least_loads(sequence, sizes, 2.0 * slots + 1)
    assert found.exact
    assert found.loads == fewest_loads(sequence, sizes, 2.0 * slots + 1)


@given(
    sequence=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    room=st.integers(0, 6),
)
def test_nobody_has_fewer_loads_than_the_bound(sequence: list[int], sizes: list[int], room: int) -> None:
    each, capacity = np.array(sizes, dtype=np.float64), float(max(sizes) + room)
    found = least_loads(sequence, each, capacity)
    fewest = fewest_loads(sequence, each, capacity)
    assert found.loads == fewest if found.exact else 0 <= found.loads <= fewest


def test_the_bound_is_not_idle() -> None:
    sequence = [0, 1, 2, 3] * 25
    found = least_loads(sequence, np.array([1.0, 2.0, 3.0, 4.0]), 5.0)
    assert not found.exact
    assert found.loads >= 25
    assert least_loads(sequence, np.array([1.0, 2.0, 3.0, 4.0]), 10.0).loads == 0


@pytest.mark.parametrize("slots", [2, 5, 8])
def test_lru_needs_no_fewer_loads_than_the_optimum(slots: int) -> None:
    sequence = np.random.default_rng(1).choice(12, 2000, p=zipf(12, 1.1))
    sizes = np.ones(12)
    misses = int((~lru_hits(sequence, sizes, slots)).sum())
    assert least_loads(sequence.tolist(), sizes, slots).loads < misses
