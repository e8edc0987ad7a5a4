"""One model and its replicas: processes that are started, asked, watched, replaced and retired."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .batching import NEVER, Batching, Request
from .frames import BATCH, FAILED, HEADER, OUTPUTS, READY, frame
from .queueing import Dispatcher
from .scaling import Autoscaler, Look, Scaler, SloTracking, TargetTracking

_log = logging.getLogger(__name__)
_BUFFER_BYTES = 4 << 20
_YOUNG_S = 10.0
"""Replicas that die younger are replaced later and later: at once, after 1 s, 2 s, 4 s, up to a minute."""
_LONGEST_BACKOFF_S = 60.0
_CLOSING = "shutting down"
_REQUESTS = ("requests_ok_total", "requests_failed_total", "requests_shed_total", "requests_retried_total")
_COUNTERS = (
    *_REQUESTS,
    "request_seconds_total",
    "batches_total",
    "items_total",
    "batch_seconds_total",
    "replica_deaths_total",
)


class LoadError(Exception):
    """A replica has ended before its model was loaded; the message is the model's own words."""


class ReplicaProcess:
    """A replica's process, and the connection to it."""

    def __init__(self, model: str, config: str) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-m", f"{__package__}.replica", model, config, str(descriptor)]
            self.process = subprocess.Popen(command, pass_fds=[descriptor])
        now_s = asyncio.get_running_loop().time()
        self.started_s = self.heard_s = now_s
        self.loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.retiring = False
        self._writer: asyncio.StreamWriter | None = None

    async def listen(
        self, said: Callable[[ReplicaProcess, int, bytes], None], gone: Callable[[ReplicaProcess], None]
    ) -> None:
        """Pass on what it says; that it says no more, as soon as it is so; and return when its process has ended."""
        reader, self._writer = await asyncio.open_connection(sock=self._ours, limit=_BUFFER_BYTES)
        reason = "its process ended"
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, length = HEADER.unpack(await reader.readexactly(HEADER.size))
                body = await reader.readexactly(length)
                self.heard_s = asyncio.get_running_loop().time()
                if kind == FAILED and not self.loaded.done():
                    reason = body.decode("utf-8", "replace")
                said(self, kind, body)
        self._writer.close()
        if not self.retiring:
            self.process.kill()
        gone(self)
        # In a thread: what a driver holds on to for long must not hold up the others. Until it is over, nothing replaces it, for
        # there may be no room for another on the device.
        code = await asyncio.get_running_loop().run_in_executor(None, self.process.wait)
        if not self.loaded.done():
            self.loaded.set_exception(LoadError(f"{reason} (exit code {code})"))
            self.loaded.exception()  # whoever waits for it is told; nobody need wait

    def give(self, batch: list[Request]) -> None:
        """Hand out a batch."""
        if self._writer is not None:
            self._writer.write(frame(BATCH, b"".join(request.body for request in batch)))

    def retire(self) -> None:
        """Let it end; it has nothing in hand."""
        self.retiring = True
        if not self.loaded.done():
            self.process.kill()
        elif self._writer is not None:
            self._writer.close()


class Model:
    """A model that is served: its dispatcher, as many replicas as there should be, and what it counts."""

    def __init__(self, name: str, config_file: str, config: dict[str, Any]) -> None:
        self.name = name
        self.closing = False
        self.parts: dict[str, Any] = {name: self}
        """What metrics are told of."""
        self.counts = dict.fromkeys(_COUNTERS, 0.0)
        self._config_file = config_file
        self._output_bytes: int = config["output_bytes"]
        self._health_timeout_s: float = config["health_timeout_s"]
        system = config["system"]
        batching = system["batching"]
        self.dispatcher: Dispatcher[ReplicaProcess] = Dispatcher(
            Batching(batching["max_batch"], batching["window_ms"] / 1e3, batching["window_opens"]),
            system["router"],
            system["queue_limit"],
            admit_within_s=config["slo_ms"] / 1e3 if config["admission"] == "slo" else NEVER,
        )
        self.timeout_s: float | None = system.get("timeout_s")
        self.scaler = self._scaler_of(config)
        self._warm_pool: int = config["warm_pool"]
        """How many of the scaler's fewest are beyond those asked for."""
        self.target: int = system["replicas"]
        self.replicas: dict[ReplicaProcess, asyncio.Task[None]] = {}
        self._deaths = 0
        self._arrived = 0
        self._timer: asyncio.TimerHandle | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._looked_s = self._next_look_s = self._loop.time()

    # ------------------------------------------------------------------------------------------------- requests

    def infer(self, body: bytes, answer: Callable[[int, bytes, float], None]) -> Request | None:
        """Take a request. ``answer`` is called once, with status, body, and after how many seconds it is worth another try.
        Returns what :meth:`withdraw` takes; ``None`` where it has been answered already."""
        now_s = self._loop.time()
        self._arrived += 1
        request = Request(body, now_s, lambda status, said: answer(status, said, 0.0))
        retry_after_s = NEVER if self.closing else self.dispatcher.arrive(request, now_s)
        if retry_after_s is not None:
            self.counts["requests_shed_total"] += 1
            reason = _CLOSING if self.closing else "overloaded: the queue is full, or the answer would be too late"
            answer(503, reason.encode(), 1.0 if self.closing else retry_after_s)
            return None
        if self.timeout_s is not None:
            self._loop.call_later(self.timeout_s, self._expire, request)
        self._pump()
        return request

    def withdraw(self, request: Request) -> None:
        """Whoever asked has gone."""
        self.dispatcher.withdraw(request)
        self._settle(request, 0, b"")

    def _expire(self, request: Request) -> None:
        self.dispatcher.withdraw(request)
        self._settle(request, 504, b"not answered within the server's own timeout")

    def _settle(self, request: Request, status: int, body: bytes) -> None:
        """Answer a request, unless that has been done."""
        answer, request.answer = request.answer, _answered
        if answer is not _answered:
            self.counts["requests_ok_total" if status == 200 else "requests_failed_total"] += 1
            if status == 200:
                self.counts["request_seconds_total"] += self._loop.time() - request.arrived_s
            answer(status, body)

    def _pump(self) -> None:
        """Hand out every batch that is due, and come back when the next one is."""
        now_s = self._loop.time()
        for replica, batch in self.dispatcher.start(now_s):
            replica.give(batch)
        if self._timer is not None:
            self._timer.cancel()
        next_s = self.dispatcher.next_start_s()
        self._timer = None if next_s == NEVER else self._loop.call_at(next_s, self._pump)

    # ------------------------------------------------------------------------------------------------- replicas

    def _said(self, replica: ReplicaProcess, kind: int, body: bytes) -> None:
        """Something that a replica has said."""
        now_s = self._loop.time()
        if kind == READY:
            replica.loaded.set_result(None)
            if not replica.retiring:
                self.dispatcher.add(replica, now_s)
        elif kind == OUTPUTS or (kind == FAILED and replica.loaded.done()):
            seat = self.dispatcher.seats[replica]
            self.counts["batch_seconds_total"] += now_s - seat.begun_s
            batch = self.dispatcher.finish(replica, now_s)
            self.counts["batches_total"] += 1
            self.counts["items_total"] += len(batch)
            size = self._output_bytes
            for index, request in enumerate(batch):
                if kind == OUTPUTS:
                    self._settle(request, 200, body[index * size : (index + 1) * size])
                else:
                    self._settle(request, 500, body)
            if replica.retiring:
                self._retire(replica)
        else:
            return
        self._pump()

    def _gone(self, replica: ReplicaProcess) -> None:
        """What a replica holds when it dies is asked again elsewhere, once.

        A request whose batch had begun may then have been computed twice: the model must not mind, and a client still
        gets one answer, for of a dead replica nothing is read any more. When the second one dies, too, the request may be
        what kills them, and is answered with an error.
        """
        if replica not in self.dispatcher.seats:
            return
        held = self.dispatcher.remove(replica)
        for request in held:
            if request.retried:
                self._settle(request, 500, b"two replicas have died with this request")
        again = [request for request in held if request.answer is not _answered]
        for request in again:
            request.retried = True
        self.counts["requests_retried_total"] += len(again)
        self.dispatcher.put_back(again)
        self._pump()

    async def _run(self, replica: ReplicaProcess) -> None:
        """A replica's life, from its start until another has been sent for in its place."""
        await replica.listen(self._said, self._gone)
        del self.replicas[replica]
        if not replica.retiring:
            self._replace(replica)

    def _replace(self, dead: ReplicaProcess) -> None:
        """Another in place of one that has died: at once, or later and later where they die young."""
        self.counts["replica_deaths_total"] += 1
        reason = dead.loaded.exception() or "after it had loaded"
        _log.warning("%s: replica %d died: %s", self.name, dead.process.pid, reason)
        young = self._loop.time() - dead.started_s < _YOUNG_S
        self._deaths = self._deaths + 1 if young else 0
        backoff_s = min(2.0 ** (self._deaths - 2), _LONGEST_BACKOFF_S) if self._deaths > 1 else 0.0
        if self._restart is None:
            self._restart = self._loop.call_later(backoff_s, self._fill)

    def _fill(self) -> None:
        """Start as many replicas as are missing."""
        self._restart = None
        while not self.closing and len(self._staying()) < self.target:
            replica = ReplicaProcess(self.name, self._config_file)
            self.replicas[replica] = self._loop.create_task(self._run(replica))

    def _staying(self) -> list[ReplicaProcess]:
        return [replica for replica in self.replicas if not replica.retiring]

    @property
    def ready(self) -> int:
        """Replicas that can be given a batch."""
        return sum(not seat.leaving for seat in self.dispatcher.seats.values())

    async def scale(self, replicas: int) -> None:
        """Have so many replicas; returns when they are ready. Raises :class:`LoadError`, and then goes back to how many there
        were."""
        before, self.target = self.target, replicas
        self._fill()
        # The youngest go, idle ones first.
        spare = sorted(self._staying(), key=self._busy)[: max(0, len(self._staying()) - replicas)]
        for replica in spare:
            self._retire(replica)
        loading = [replica.loaded for replica in self._staying()]
        if loading:  # not gather, which would cancel them if this is cancelled
            await asyncio.wait(loading, return_when=asyncio.FIRST_EXCEPTION)
        for loaded in loading:
            if loaded.done() and (failure := loaded.exception()):
                self.target = before
                raise failure

    async def unload(self) -> None:
        """Have no replica; returns when their processes have ended. What waits goes on waiting."""
        self.target = 0
        for replica in self._staying():
            self._retire(replica)
        await asyncio.gather(*self.replicas.values())

    def refuse_waiting(self, reason: str) -> None:
        """Turn away all who wait."""
        for request in self.dispatcher.take_all():
            self._settle(request, 503, reason.encode())

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return self.dispatcher.waiting + self.dispatcher.in_hand > 0

    def _busy(self, replica: ReplicaProcess) -> tuple[bool, float]:
        seat = self.dispatcher.seats.get(replica)
        return seat is not None and bool(seat.in_hand), -replica.started_s

    def _retire(self, replica: ReplicaProcess) -> None:
        """Give it nothing more; it ends when it has done what it has in hand."""
        replica.retiring = True
        if replica in self.dispatcher.seats:
            self.dispatcher.leave(replica)
            if self.dispatcher.seats[replica].in_hand:
                return
            self.dispatcher.remove(replica)
        replica.retire()

    # ---------------------------------------------------------------------------------------- what happens by itself

    def look(self) -> None:
        """Every tenth of a second or so: is every replica still heard, and are there as many as are needed?"""
        now_s = self._loop.time()
        for replica in self.dispatcher.seats:
            if now_s - self._looked_s > 1.0:
                replica.heard_s = now_s  # this very process was stopped for a while, and has heard nobody
            elif now_s - replica.heard_s > self._health_timeout_s:
                _log.warning("%s: replica %d gives no sign of life", self.name, replica.process.pid)
                replica.process.kill()
        self._looked_s = now_s
        if self.scaler is None or self.closing or now_s < self._next_look_s:
            return
        self._next_look_s = max(self._next_look_s + self.scaler.period_s, now_s)
        dispatcher = self.dispatcher
        look = Look(now_s, dispatcher.waiting, dispatcher.in_hand, self._arrived, self.ready, self.target - self.ready)
        self._arrived = 0
        change = self.scaler.change(look)
        if change > 0:
            self.target += change
            self._fill()
        idle = [replica for replica, seat in dispatcher.seats.items() if not seat.load and not replica.retiring]
        for replica in itertools.islice(reversed(idle), max(0, -change)):
            self.target -= 1
            self._retire(replica)

    def figures(self) -> dict[str, float]:
        """The model's metrics by name."""
        dispatcher = self.dispatcher
        return {
            "queue_depth": dispatcher.waiting,
            "in_flight": dispatcher.waiting + dispatcher.in_hand,
            "replicas": self.ready,
            **self.counts,
        }

    def system(self) -> dict[str, Any]:
        """What it runs with at this moment, by the names that the configuration has."""
        told: dict[str, Any] = {
            "batching": asdict(self.dispatcher.batching),
            "router": self.dispatcher.router,
            "queue_limit": self.dispatcher.queue_limit,
            "replicas": self.ready,
            "timeout_s": self.timeout_s,
            "warm_pool": self._warm_pool,
        }
        if self.scaler is not None:
            told["scaler"] = {
                name: value for name, value in vars(self.scaler).items() if isinstance(value, int | float)
            }
        return told

    async def close(self) -> None:
        """Take nothing more, finish what is there, and let the replicas go."""
        self.closing = True
        while self.replicas and self.busy:
            await asyncio.sleep(0.01)
        self.refuse_waiting(_CLOSING)
        if self._restart is not None:
            self._restart.cancel()
        for replica in list(self.replicas):
            self._retire(replica)
        await asyncio.gather(*self.replicas.values())

    def abandon(self) -> None:
        """End the replicas, whatever they do."""
        self.closing = True
        for replica in self.replicas:
            with contextlib.suppress(ProcessLookupError):
                replica.process.kill()

    def _scaler_of(self, config: dict[str, Any]) -> Scaler | None:
        system = config["system"]
        if "autoscaler" in system:
            return Autoscaler(**system["autoscaler"])
        if "tracking" not in system:
            return None
        if config["scale_on"] != "slo":
            return TargetTracking(**system["tracking"])
        service, batching = self.dispatcher.service, self.dispatcher.batching
        return SloTracking(**system["tracking"], slo_s=config["slo_ms"] / 1e3, service=service, batching=batching)


def _answered(_status: int, _body: bytes) -> None:
    """In place of the answer of a request that has had one."""
