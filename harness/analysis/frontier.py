"""Which cells nobody beats: non-dominated points of cost against benefit, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.analysis.comparison import MIN_TRIALS, MIN_TRIALS_FOR_BOOTSTRAP
from tailrace.harness.analysis.metrics import Floats

DRAWS = 2_000
_SEED = 19_750_103
"""Of the draws, so that the same records give the same probabilities."""


def non_dominated(cost: NDArray[np.float64], benefit: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of ``n`` points no other point dominates: no higher cost, no lower benefit, and better in one of them.

    Equal points do not dominate each other, so twins are both kept. Both arrays have shape (n,) and hold no NaN;
    infinite costs are compared as they are. Sorted once, O(n log n) (Kung, Luccio and Preparata 1975, two dimensions).
    """
    n = len(cost)
    if n == 0:
        return np.zeros(0, dtype=np.bool_)
    order = np.lexsort((-benefit, cost))
    c, b = cost[order], benefit[order]
    # The best benefit among strictly cheaper points, and among points of the same cost (each group's first by sorting).
    first_of_cost = np.concatenate([[0], np.flatnonzero(c[1:] > c[:-1]) + 1])
    group = np.cumsum(np.concatenate([[False], c[1:] > c[:-1]]))
    best_so_far = np.concatenate([[-np.inf], np.maximum.accumulate(b)])
    best_cheaper = best_so_far[first_of_cost][group]
    best_same = b[first_of_cost][group]
    kept = np.zeros(n, dtype=np.bool_)
    kept[order] = (b > best_cheaper) & (b == best_same)
    return kept


def frontier_probabilities(cells: Sequence[tuple[Floats, Floats]], *, paired: bool) -> list[float] | None:
    """How probable it is that each cell's true point (geometric means over trials) is on the frontier.

    ``cells`` holds for each the costs and the benefits of its trials, both of shape (trials,). Points are drawn from what
    the trials leave open: from eight trials by resampling them, from three by Student's t on the logarithms; where a cost is
    infinite in some trial, by resampling too, for an infinite one has no logarithm to average. Cost and benefit keep the
    correlation that they have over trials; with ``paired``, for cells whose k-th trials belong to one block, so do all
    cells, and what a block does to everybody alike settles nothing and unsettles nothing. A cell's probability is the share
    of draws in which nobody dominates it. ``None`` where some cell has fewer than three trials, a value that is not known,
    or one that is not positive.
    """
    for cost, benefit in cells:
        values = np.array([cost, benefit])
        if values.shape[1] < MIN_TRIALS or not (values > 0).all() or not np.isfinite(benefit).all():
            return None
    if not cells:
        return []
    random = np.random.default_rng(_SEED)
    chance = _Chance.of(random, len(cells[0][0]))
    drawn = np.stack(
        [
            _drawn(np.log([cost, benefit]), chance if paired else _Chance.of(random, len(cost)))
            for cost, benefit in cells
        ]
    )  # (cells, 2, draws)
    hits = np.zeros(len(cells))
    for draw in range(DRAWS):
        hits += non_dominated(drawn[:, 0, draw], drawn[:, 1, draw])
    return [float(share) for share in hits / DRAWS]


@dataclass(frozen=True)
class _Chance:
    """What is drawn for n trials, to be used for one cell or for all."""

    chosen: NDArray[np.int64]
    """Trials drawn again, shape (n, draws)."""
    normal: Floats
    """Shape (n, draws)."""
    tails: Floats
    """Student's √((n − 1) ÷ χ²), shape (draws,)."""

    @classmethod
    def of(cls, random: np.random.Generator, n: int) -> _Chance:
        return cls(
            random.integers(0, n, (n, DRAWS)),
            random.standard_normal((n, DRAWS)),
            np.sqrt((n - 1) / random.chisquare(n - 1, DRAWS)),
        )


def _drawn(logs: Floats, chance: _Chance) -> Floats:
    """Means that these trials (shape (2, n)) might have had, of shape (2, draws)."""
    n = logs.shape[1]
    if not np.isfinite(logs).all():
        resampled: Floats = logs[:, chance.chosen].mean(axis=1)
        return resampled
    centre = logs.mean(axis=1, keepdims=True)
    if n >= MIN_TRIALS_FOR_BOOTSTRAP:
        # Resampled means spread as if the variance had been divided by n, where n − 1 is due.
        off = (logs[:, chance.chosen].mean(axis=1) - centre) * math.sqrt(n / (n - 1))
    else:
        off = (logs - centre) @ chance.normal / math.sqrt(n * (n - 1)) * chance.tails
    means: Floats = centre + off
    return means
