"""Requests that wait, the replicas that they wait for, and when a batch starts. Times are seconds, and told."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

NEVER = math.inf


@dataclass(eq=False, slots=True)
class Request:
    """One item on its way through the server."""

    body: bytes
    arrived_s: float
    answer: Callable[[int, bytes], None]
    """Called once, with an HTTP status and the outputs or a reason."""
    retried: bool = False
    """Whether the replica that had it in hand has died once already."""


Line = OrderedDict[Request, None]
"""Requests that wait, oldest first; any of them can be withdrawn at once."""


@dataclass(frozen=True)
class Batching:
    """An idle replica starts a batch once it would be full, or its oldest request has waited for the window."""

    max_batch: int
    window_s: float
    window_opens: str
    """``arrival``: the window counts from the oldest request's arrival; ``idle``: anew once a replica is idle."""

    def due_s(self, line: Line, idle_since_s: float) -> float:
        """When a replica that is idle starts on a line if nothing else happens."""
        if not line:
            return NEVER
        if len(line) >= self.max_batch:
            return idle_since_s
        oldest_s = next(iter(line)).arrived_s
        opens_s = max(idle_since_s, oldest_s) if self.window_opens == "idle" else oldest_s
        return max(idle_since_s, opens_s + self.window_s)


@dataclass(eq=False, slots=True)
class Seat:
    """A replica that is ready, as the dispatcher sees it."""

    line: Line
    """Whence it takes its batches: its own queue, or the one that all share."""
    idle_since_s: float
    begun_s: float = 0.0
    in_hand: list[Request] = field(default_factory=list)
    leaving: bool = False
    """Whether it gets nothing more once it has done what it has in hand."""

    @property
    def idle(self) -> bool:
        """Whether it can begin a batch."""
        return not self.in_hand and not self.leaving

    @property
    def load(self) -> int:
        """Requests that wait for it or are in its hands."""
        return len(self.line) + len(self.in_hand)
