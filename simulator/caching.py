"""What theory says of a memory that does not hold all models: LRU in expectation, and the fewest loads that could do.

All of it is about a cache that answers one request after the other, at once. A server that lets requests wait for their model
may load it once for several of them, and so do with fewer loads than a sequence of requests seems to need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from tailrace.harness.analysis.metrics import Floats

__all__ = ["LeastLoads", "least_loads", "lru_hit_rates"]


def lru_hit_rates(shares: Floats, sizes: Floats, capacity: float, pinned: int = 0) -> Floats:
    """How often each model is in memory when it is asked for, under LRU and independent requests, by Che's approximation.

    A model stays for as long as it takes until others of the memory's size have been asked for, which is nearly the same time
    T for all: it is there with probability 1 − exp(−share·T), and T is such that what is there fills the memory (Che, Tung and
    Wang, «Hierarchical Web Caching Systems», IEEE JSAC 20(7), 2002; for objects of any size Fricker, Robert and Roberts, «A
    Versatile and Accurate Approximation for LRU Cache Performance», ITC 24, 2012).

    ``shares`` of the requests and ``sizes`` are by model; the first ``pinned`` models are always there, and take their size
    off ``capacity``. Models come in wholly or not at all: of models of one size the memory holds a whole number, which this
    counts; where sizes differ, what is left over at the end of the memory is not accounted for, and the rates are a little too
    high. A model without a share is never there.
    """
    rates = np.where(np.arange(len(shares)) < pinned, 1.0, 0.0)
    asked = np.flatnonzero((np.arange(len(shares)) >= pinned) & (shares > 0))
    room = capacity - float(sizes[:pinned].sum())
    share, size = shares[asked], sizes[asked]
    if len(asked) and (size == size[0]).all():
        room = _whole(room, float(size[0])) * float(size[0])
    if float(size.sum()) <= room:
        rates[asked] = 1.0
        return rates
    if room <= 0:
        return rates

    def overfull(log_t: float) -> float:
        return float(size @ -np.expm1(-share * math.exp(log_t))) - room

    # At T = 1 / the largest share ÷ e⁴⁰ nothing is there, at e⁴⁰ / the smallest share everything.
    log_t = brentq(overfull, -math.log(share.max()) - 40, -math.log(share.min()) + 40, xtol=1e-12)
    rates[asked] = -np.expm1(-share * math.exp(log_t))
    return rates


@dataclass(frozen=True)
class LeastLoads:
    """With how few loads a sequence of requests can be answered in its order, by whoever knows it beforehand."""

    loads: int
    exact: bool
    """Whether somebody can do it; else it is a bound, and the fewest that can be done may be more."""


def least_loads(sequence: Sequence[int], sizes: Floats, capacity: float) -> LeastLoads:
    """The fewest loads for these models, asked for in this order, with the best choice of what is in memory at first.

    Of models of one size it is Belady's MIN: who is asked for last in the future goes, which nobody does better (Belady, «A
    Study of Replacement Algorithms for a Virtual-Storage Computer», IBM Systems Journal 5(2), 1966; Mattson et al., ibid. 9(2),
    1970). Where sizes differ, it is a bound in the manner of PFOO-L (Berger, Beckmann and Harchol-Balter, «Practical Bounds on
    Optimal Caching with Variable Object Sizes», SIGMETRICS 2018), tightened for a server that must load what is asked for.

    ``sequence`` holds positions in ``sizes``; every one of them must fit into ``capacity``.
    """
    used = sizes[np.unique(np.asarray(sequence, dtype=np.int64))]
    if not len(used) or (used == used[0]).all():
        slots = _whole(capacity, float(used[0])) if len(used) else 0
        return LeastLoads(_min_loads(sequence, slots), exact=True)
    return LeastLoads(_bounded_loads(sequence, sizes, capacity), exact=False)


def _whole(capacity: float, size: float) -> int:
    """How many of a size there is room for, whatever binary fractions make of it."""
    return max(0, math.floor(capacity / size + 1e-9))


def _min_loads(sequence: Sequence[int], slots: int) -> int:
    """Belady's MIN. What fills a place that is free at first could have been there."""
    next_use = _next_uses(sequence)
    inside: dict[int, float] = {}
    loads = 0
    for model, following in zip(sequence, next_use, strict=True):
        if model not in inside:
            if len(inside) < slots:
                loads -= 1
            else:
                del inside[max(inside, key=inside.__getitem__)]
            loads += 1
        inside[model] = following
    return loads


def _bounded_loads(sequence: Sequence[int], sizes: Floats, capacity: float) -> int:
    """Each request that needs no load costs memory over time: its model's size, from after the model's last request (or from
    the beginning) until it. The cheapest are granted until the memory over the whole time is spent; that much memory at every
    instant is nowhere asked, and so nobody has fewer loads.

    Time counts requests. Just after one its model is in memory whatever is chosen, so that this costs nothing and is of no use to
    others.
    """
    last: dict[int, int] = {}
    costs = []
    for now, model in enumerate(sequence):
        # From `since` to `now` there are so many instants at which the model is there for this request alone.
        since = last.get(model, -1)
        costs.append(float(sizes[model]) * (now - since - (model in last)))
        last[model] = now
    # One instant before all requests, and one after each but the last.
    budget = capacity * len(sequence) - float(sizes[np.asarray(sequence[:-1], dtype=np.int64)].sum())
    granted = int(np.searchsorted(np.cumsum(np.sort(costs)), budget * (1 + 1e-12), side="right"))
    return len(sequence) - granted


def _next_uses(sequence: Sequence[int]) -> list[float]:
    """For each request the place of the next one for the same model; +∞ where there is none."""
    following: dict[int, float] = {}
    found = []
    for place in range(len(sequence) - 1, -1, -1):
        found.append(following.get(sequence[place], math.inf))
        following[sequence[place]] = place
    return found[::-1]
