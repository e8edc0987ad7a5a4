"""How many replicas there should be: the simulator's two scalers under its names, and one that goes by the SLO.

They only say how many more or fewer; :class:`server.model.Model` starts and ends processes, and a cold start takes as long as
it takes. Like the queues they know no clock, and stand in ``simulator/event_loop.py`` a second time. Times are seconds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from .batching import Batching
from .prediction import Service, p99_s


@dataclass(frozen=True)
class Look:
    """One model as a scaler sees it."""

    now_s: float
    waiting: int
    in_hand: int
    arrived: int
    """Since the last look."""
    ready: int
    starting: int


class Scaler(Protocol):
    """Is asked once a period, and says how many replicas are to come (or to go, below 0: idle ones only)."""

    min: int
    max: int
    period_s: float

    def change(self, look: Look) -> int: ...


@dataclass
class Autoscaler:
    """One more when more than ``up_above`` requests wait for each ready replica and none is coming; one fewer below
    ``down_below``."""

    min: int
    max: int
    period_s: float
    up_above: float
    down_below: float

    def change(self, look: Look) -> int:
        depth = look.waiting / max(1, look.ready)
        if look.waiting and not look.ready + look.starting:
            return 1  # from none at all: whoever waits would wait for ever
        if depth > self.up_above and not look.starting and look.ready < self.max:
            return 1
        return -1 if depth < self.down_below and look.ready > self.min else 0


@dataclass
class TargetTracking:
    """About ``target_ongoing`` requests for each replica, waiting ones and those in hand, in the mean of ``averaged_over_s``:
    all that are missing come at once when they have been wanted for ``up_after_s``, idle ones go after ``down_after_s``."""

    min: int
    max: int
    period_s: float
    target_ongoing: float
    averaged_over_s: float
    up_after_s: float
    down_after_s: float
    _looks: deque[Look] = field(init=False)
    _more_since_s: float = math.inf
    _fewer_since_s: float = math.inf

    def __post_init__(self) -> None:
        self._looks = deque(maxlen=max(1, round(self.averaged_over_s / self.period_s)))

    def change(self, look: Look) -> int:
        self._looks.append(look)
        missing = min(max(self.wanted(), self.min), self.max) - look.ready - look.starting
        self._more_since_s = min(self._more_since_s, look.now_s) if missing > 0 else math.inf
        self._fewer_since_s = min(self._fewer_since_s, look.now_s) if missing < 0 else math.inf
        if missing > 0 and look.now_s - self._more_since_s >= self.up_after_s:
            self._more_since_s = math.inf
            return missing
        return missing if missing < 0 and look.now_s - self._fewer_since_s >= self.down_after_s else 0

    def wanted(self) -> int:
        """How many replicas the last looks call for."""
        return math.ceil(self.mean_ongoing() / self.target_ongoing)

    def mean_ongoing(self) -> float:
        """Requests waiting and in hand, in the mean of the last looks."""
        return sum(look.waiting + look.in_hand for look in self._looks) / len(self._looks)


@dataclass
class SloTracking(TargetTracking):
    """Like its parent, but what it wants are the fewest replicas whose predicted p99 is within the SLO; the target counts
    only until a first batch has told how long batches take."""

    slo_s: float = math.inf
    service: Service = field(default_factory=Service)
    batching: Batching = field(default_factory=lambda: Batching(1, 0.0, "arrival"))

    def wanted(self) -> int:
        if not self.service.time_s(1):
            return super().wanted()
        rate = sum(look.arrived for look in self._looks) / (len(self._looks) * self.period_s)
        waiting = self._looks[-1].waiting
        if not rate and not waiting:
            return self.min
        fits = (n for n in range(max(1, self.min), self.max + 1) if self._p99_s(rate, waiting, n) <= self.slo_s)
        return next(fits, self.max)

    def _p99_s(self, rate: float, waiting: int, replicas: int) -> float:
        return p99_s(self.service, self.batching, rate, waiting, replicas)
