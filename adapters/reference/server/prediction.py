"""What a request that comes now can expect, from what batches took so far: for admission control and for scaling on the SLO."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .batching import Batching, Seat

_MEMORY = 0.98
"""The weight of a batch against the one after it: some fifty batches are remembered."""
_P99 = 2.33
"""Standard deviations above the mean below which 99 % of a normal distribution lie."""
_FULL_LOAD = 0.9
"""Of what full batches could serve; beyond, queues grow without a bound that would be of use."""


class Service:
    """How long a replica takes for a batch of n, base + per item · n: least squares over the batches that were, recent ones
    weigh more. The time is the dispatcher's, from handing a batch out to its answers, waiting for the device included."""

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def learn(self, n: int, took_s: float) -> None:
        """A batch of n has taken so long."""
        added = (1.0, n, took_s, n * n, n * took_s)
        sums = (self._weight, self._n, self._t, self._nn, self._nt)
        self._weight, self._n, self._t, self._nn, self._nt = (
            old * _MEMORY + new for old, new in zip(sums, added, strict=True)
        )

    def time_s(self, n: float) -> float:
        """For a batch of n; 0 while nothing is known."""
        if not self._weight:
            return 0.0
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - mean_n**2
        together = self._nt / self._weight - mean_n * mean_t
        # Neither is ever below 0, whatever a noisy machine makes of a few batches of about the same size.
        per_item_s = min(max(0.0, together / spread), mean_t / mean_n) if spread > 1e-6 else 0.0
        return mean_t + per_item_s * (n - mean_n)


def response_s(service: Service, batching: Batching, waiting: int, seats: Sequence[Seat], now_s: float) -> float:
    """Until a request that comes now is answered, behind so many that wait for these replicas: full batches before it, each
    on the replica that is free first, and its own. 0 where nothing is known yet."""
    if not seats:
        return 0.0
    full_s = service.time_s(batching.max_batch)
    free_s = sorted(
        max(now_s, seat.begun_s + service.time_s(len(seat.in_hand))) if seat.in_hand else now_s for seat in seats
    )
    rounds, place = divmod(waiting // batching.max_batch, len(free_s))
    starts_s = free_s[place] + rounds * full_s - now_s
    if starts_s > batching.window_s:
        return starts_s + full_s  # others will have joined it by then
    return batching.window_s + service.time_s(waiting % batching.max_batch + 1)


def p99_s(service: Service, batching: Batching, rate: float, waiting: int, replicas: int) -> float:
    """The p99 of the response time of ``rate`` arrivals/s on so many replicas, with so many waiting already; infinite where
    that is more than they can do.

    While one batch is computed the next gathers, so that its size b solves b = rate ÷ replicas · time(b); at worst, a
    request waits for a whole batch and the window before its own. The 99 % batch is that of a Poisson process.
    """
    each, full_s = rate / replicas, service.time_s(batching.max_batch)
    if each * full_s > _FULL_LOAD * batching.max_batch:
        return math.inf
    gathered = 1.0
    for _ in range(30):
        gathered = min(max(1.0, each * max(service.time_s(gathered), batching.window_s)), batching.max_batch)
    batch_s = service.time_s(min(gathered + _P99 * math.sqrt(gathered), batching.max_batch))
    return batching.window_s + 2 * batch_s + waiting / (replicas * batching.max_batch) * full_s
