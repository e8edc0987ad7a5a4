"""Which cells nobody beats: non-dominated points of cost against benefit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
