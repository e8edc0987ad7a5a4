"""The frontier and how sure it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.analysis.frontier import frontier_probabilities, non_dominated
from tailrace.harness.analysis.metrics import Floats

BOTH = pytest.mark.parametrize("paired", [False, True])


def cell(cost: float, benefit: float, *, spread: float = 0.01, trials: int = 3, seed: int = 0) -> tuple[Floats, Floats]:
    noise = np.random.default_rng(seed).normal(0, spread, (2, trials))
    return cost * np.exp(noise[0] - noise[0].mean()), benefit * np.exp(noise[1] - noise[1].mean())


@given(st.lists(st.tuples(st.floats(1, 10), st.floats(1, 10)), min_size=1, max_size=30))
def test_sorting_gives_what_comparing_all_pairs_gives(points: list[tuple[float, float]]) -> None:
    cost, benefit = np.array(points).T
    found = non_dominated(cost, benefit)
    for i, kept in enumerate(found):
        dominated = (cost <= cost[i]) & (benefit >= benefit[i]) & ((cost < cost[i]) | (benefit > benefit[i]))
        assert kept == (not dominated.any())


def test_a_hundred_thousand_points() -> None:
    """Along a line where nobody beats anybody, and one point that beats all."""
    cost = np.arange(100_000.0)
    assert non_dominated(cost, cost).all()
    best = non_dominated(np.append(cost, -1.0), np.append(cost, 1e6))
    assert best.sum() == 1
    assert best[-1]


@BOTH
def test_far_apart_is_certain(paired: bool) -> None:
    good, bad = cell(50, 200), cell(100, 100, seed=1)
    assert frontier_probabilities([good, bad], paired=paired) == [1.0, 0.0]


@BOTH
def test_a_trade_keeps_both(paired: bool) -> None:
    assert frontier_probabilities([cell(50, 100), cell(100, 200, seed=1)], paired=paired) == [1.0, 1.0]


@pytest.mark.parametrize("trials", [3, 12])
def test_twins_are_a_matter_of_chance(trials: int) -> None:
    """Of two cells with the same point one dominates the other half of the time, each as often."""
    one, other = cell(50, 100, trials=trials, spread=0.05), cell(50, 100, trials=trials, spread=0.05, seed=1)
    probabilities = frontier_probabilities([one, other], paired=False)
    assert probabilities is not None
    assert all(0.6 < probability < 0.95 for probability in probabilities)


@pytest.mark.parametrize("trials", [3, 12])
def test_blocks_settle_what_they_do_to_all_alike(trials: int) -> None:
    """A tenth slower and no more goodput in every block, however much blocks differ from each other."""
    cost, benefit = cell(50, 100, spread=0.2, trials=trials)
    slower = cost * 1.1, benefit * 0.999
    paired = frontier_probabilities([(cost, benefit), slower], paired=True)
    assert paired == [1.0, 0.0]
    apart = frontier_probabilities([(cost, benefit), slower], paired=False)
    assert apart is not None
    assert apart[1] > 0.3


def test_more_trials_settle_what_few_leave_open() -> None:
    """A cell that is 3 % worse on both, at 3 % of noise."""

    def probability(trials: int) -> float:
        found = frontier_probabilities(
            [cell(50, 100, spread=0.03, trials=trials), cell(51.5, 97, spread=0.03, trials=trials, seed=1)],
            paired=False,
        )
        assert found is not None
        return found[1]

    assert 0.1 < probability(3) < 0.8
    assert probability(40) < 0.05


@BOTH
def test_the_probability_is_calibrated(paired: bool) -> None:
    """Of two cells that are measured in three trials, again and again: where less than 5 % is claimed, the true point is on
    the frontier hardly ever."""
    random = np.random.default_rng(3)
    wrong = claims = 0
    for _ in range(100):
        truth = random.normal(0, 0.05, (2, 2))
        block = random.normal(0, 0.05, 3) if paired else 0.0
        cells = [
            (
                np.exp(4 + truth[i, 0] + block + random.normal(0, 0.03, 3)),
                np.exp(4 + truth[i, 1] + block + random.normal(0, 0.03, 3)),
            )
            for i in range(2)
        ]
        found = frontier_probabilities(cells, paired=paired)
        assert found is not None
        true_on = non_dominated(truth[:, 0], truth[:, 1])
        for probability, on in zip(found, true_on, strict=True):
            if probability < 0.05:
                claims += 1
                wrong += bool(on)
    assert claims > 5
    assert wrong <= max(2, 0.15 * claims)


def test_a_cell_whose_tail_had_no_end_in_a_trial_is_rarely_on_the_frontier() -> None:
    """With finite trials alone it would be better on both; of three trials drawn again, 19 in 27 hold the infinite one."""
    shaky = np.array([40.0, np.inf, 41.0]), np.array([101.0, 102.0, 101.0])
    found = frontier_probabilities([shaky, cell(50, 100, spread=0.001)], paired=True)
    assert found is not None
    assert found[1] == pytest.approx(19 / 27, abs=0.05)
    assert found[0] == 1.0, "it has the most goodput whatever its tail"
    lesser = np.array([40.0, np.inf, 41.0]), np.array([99.0, 98.0, 99.0])
    found = frontier_probabilities([lesser, cell(50, 100, spread=0.001)], paired=True)
    assert found is not None
    assert found[0] == pytest.approx(8 / 27, abs=0.05)


@pytest.mark.parametrize(
    "broken", [np.array([50.0, 51.0]), np.array([50.0, np.nan, 51.0]), np.array([50.0, 0.0, 51.0])]
)
def test_without_trials_there_is_no_probability(broken: Floats) -> None:
    assert frontier_probabilities([cell(50, 100), (broken, np.full(len(broken), 100.0))], paired=False) is None


def test_trials_without_spread_are_certain() -> None:
    flat = np.full(3, 50.0), np.full(3, 100.0)
    worse = np.full(3, 60.0), np.full(3, 90.0)
    assert frontier_probabilities([flat, worse], paired=True) == [1.0, 0.0]
    assert frontier_probabilities([], paired=True) == []
