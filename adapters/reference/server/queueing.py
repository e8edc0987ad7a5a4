"""When a batch starts, and on which replica: the simulator's mechanisms under the simulator's names (docs/mechanisms.md).

Nothing here knows a clock, a socket or a process: the time is told, and what is decided is returned. So the same code
serves here and is held against the simulator, event by event, in a test. Why the simulator has them a second time is said in
``simulator/event_loop.py``. Times are seconds.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

from .batching import NEVER, Batching, Line, Request, Seat
from .prediction import Service, response_s

Replica = TypeVar("Replica")


class Dispatcher(Generic[Replica]):
    """One model's queues, the router before them and the batcher behind them.

    ``router``: one ``shared`` queue from which idle replicas help themselves; or a queue for each replica, chosen in turn
    (``round_robin``), at ``random``, the shorter of two at random (``power_of_two``), or the shortest (``shortest_queue``).
    """

    def __init__(
        self, batching: Batching, router: str, queue_limit: int, *, admit_within_s: float = NEVER, seed: int = 7
    ) -> None:
        self.batching = batching
        self.router = router
        self.queue_limit = queue_limit
        self.admit_within_s = admit_within_s
        """Admission control: what would be answered later than this is turned away at once."""
        self.service = Service()
        self.seats: dict[Replica, Seat] = {}
        self._common: Line = OrderedDict()
        """The shared queue; with a queue for each replica, where requests wait while no replica is ready."""
        self._turn = 0
        self._random = random.Random(seed)  # noqa: S311 - routing, not a secret

    @property
    def waiting(self) -> int:
        """Requests in all queues."""
        return sum(map(len, self._lines()))

    @property
    def in_hand(self) -> int:
        """Requests that replicas are computing."""
        return sum(len(seat.in_hand) for seat in self.seats.values())

    def arrive(self, request: Request, now_s: float) -> float | None:
        """Queue a request. Where the queue is full, or the answer would come too late, it is not queued: then this returns
        in how many seconds it is worth another try."""
        line, seats = self._route()
        full = len(line) >= self.queue_limit
        if full or self.admit_within_s < NEVER:
            within_s = response_s(self.service, self.batching, len(line), seats, now_s)
            if full or within_s > self.admit_within_s:
                return max(0.0, within_s - self.admit_within_s) if self.admit_within_s < NEVER else within_s
        line[request] = None
        return None

    def put_back(self, requests: Iterable[Request]) -> None:
        """Requests whose replica has gone, oldest first, go to the head of another queue, however long that is."""
        for request in reversed(list(requests)):
            line, _ = self._route()
            line[request] = None
            line.move_to_end(request, last=False)

    def withdraw(self, request: Request) -> None:
        """Nobody waits for this answer any more. What is in a replica's hands stays there."""
        for line in self._lines():
            line.pop(request, None)

    def add(self, replica: Replica, now_s: float) -> None:
        """A replica is ready."""
        if self.router == "shared":
            self.seats[replica] = Seat(self._common, now_s)
            return
        self.seats[replica] = Seat(OrderedDict(), now_s)
        held, self._common = list(self._common), OrderedDict()
        self.put_back(held)

    def leave(self, replica: Replica) -> None:
        """A replica is to go when it has done what it has in hand: what waits for it alone waits for others."""
        seat = self.seats[replica]
        seat.leaving = True
        if self.router != "shared":
            waiting, seat.line = list(seat.line), OrderedDict()
            self.put_back(waiting)

    def remove(self, replica: Replica) -> list[Request]:
        """A replica has gone: what waited for it alone waits for others. Returns what it had in hand, oldest first."""
        self.leave(replica)
        return self.seats.pop(replica).in_hand

    def take_all(self) -> list[Request]:
        """Everything that waits, which then waits no more."""
        taken = [request for line in self._lines() for request in line]
        for request in taken:
            self.withdraw(request)
        return taken

    def start(self, now_s: float) -> list[tuple[Replica, list[Request]]]:
        """The batches that begin now. Of idle replicas the one that was added first helps itself first."""
        begun = []
        for replica, seat in self.seats.items():
            if seat.idle and self._due_s(seat) <= now_s:
                size = min(len(seat.line), self.batching.max_batch)
                seat.in_hand = [seat.line.popitem(last=False)[0] for _ in range(size)]
                seat.begun_s = now_s
                begun.append((replica, seat.in_hand))
        return begun

    def next_start_s(self) -> float:
        """When the next batch begins if nothing else happens."""
        return min((self._due_s(seat) for seat in self.seats.values() if seat.idle), default=NEVER)

    def finish(self, replica: Replica, now_s: float) -> list[Request]:
        """A replica is done with its batch, which is returned, and idle."""
        seat = self.seats[replica]
        batch, seat.in_hand, seat.idle_since_s = seat.in_hand, [], now_s
        self.service.learn(len(batch), now_s - seat.begun_s)
        return batch

    def _due_s(self, seat: Seat) -> float:
        idle_since_s = seat.idle_since_s
        if self.router == "shared":  # all of them look at one queue: it has had somebody idle since the first was
            idle_since_s = min(other.idle_since_s for other in self.seats.values() if other.idle)
        return self.batching.due_s(seat.line, idle_since_s)

    def _route(self) -> tuple[Line, list[Seat]]:
        """The queue for the next arrival, and who takes from it."""
        seats = [seat for seat in self.seats.values() if not seat.leaving]
        if self.router == "shared" or not seats:
            return self._common, seats
        if self.router == "round_robin":
            seat = seats[self._turn % len(seats)]
            self._turn += 1
        elif self.router == "random":
            seat = self._random.choice(seats)
        elif self.router == "power_of_two":
            seat = min(self._random.choices(seats, k=2), key=lambda one: one.load)
        else:
            seat = min(seats, key=lambda one: one.load)
        return seat.line, [seat]

    def _lines(self) -> list[Line]:
        return [self._common] if self.router == "shared" else [self._common, *(s.line for s in self.seats.values())]
