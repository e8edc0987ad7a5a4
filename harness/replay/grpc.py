"""Sends a shard as gRPC unary calls, bytes in and bytes out, on an asyncio loop in a thread of its own.

gRPC's gevent mode hands every completion through a thread pool: on two cores it answers in 10 to 300 ms at 2,000 calls
per second where ``grpc.aio`` needs 2 ms, and its client may not start a call from a callback of gevent's loop.
So nothing is patched here, and the calls run where gRPC is at home.

``sent_ns`` is when the call is handed to gRPC; gRPC does not tell when an answer's first byte comes, so that is null.
``status`` is the gRPC code. Message sizes stand for bytes sent and received, without gRPC's framing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import grpc
import grpc.aio
from gevent.threadpool import ThreadPool

from tailrace.harness.records.schema import Outcome
from tailrace.harness.replay.pacer import Pacer
from tailrace.harness.replay.recorder import SMALL_BODY_BYTES, Answers, Recorder
from tailrace.harness.replay.wire import NONE, Shard, Target

CHANNELS = 4
"""HTTP/2 connections, so that one connection's flow control or stream limit is not what is measured."""
PRECONNECT_S = 2.0
HOUSEKEEPING_S = 0.02
"""How often ``tick`` is called."""
ANSWER_BYTES = 64 * 1024 * 1024

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # else all channels share one connection
    ("grpc.enable_http_proxy", 0),  # a proxy set for the user's browser is not part of the race
    ("grpc.enable_retries", 0),
    # The default backs off for up to two minutes: after a server's outage that would be our absence, not its.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", ANSWER_BYTES),
]

_LOST = (
    "failed to connect",
    "stream removed",
    "socket closed",
    "connection reset",
    "connection refused",
    "connection timed out",
    "broken pipe",
    "transport closed",
    "goaway",
    "recvmsg",
    "sendmsg",
    "endpoint clos",
    "keepalive",
    "dns resolution failed",
)
"""How gRPC's core words an ``UNAVAILABLE`` of its own making; any other comes from the server, which refused the load.

There is no better sign: metadata are empty either way, and the channel's state lags behind.
"""


def outcome_of(code: grpc.StatusCode, details: str) -> Outcome:
    """What a failed call counts as. ``RESOURCE_EXHAUSTED`` and a server's own ``UNAVAILABLE`` are refusals."""
    words = details.lower()
    if code is grpc.StatusCode.UNAVAILABLE:
        return Outcome.CONNECTION if any(sign in words for sign in _LOST) else Outcome.SHED
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # The same code says that an answer was larger than this client takes.
        return Outcome.ERROR if "larger than max" in words else Outcome.SHED
    return Outcome.TIMEOUT if code is grpc.StatusCode.DEADLINE_EXCEEDED else Outcome.ERROR


class GrpcReplay:
    """One replay of one shard: :meth:`prepare`, then :meth:`run`, from one greenlet; the work is done in a thread.

    ``max_connections`` bounds the calls outstanding, as it does over HTTP; an arrival past it is dropped.
    ``tick`` is called in that thread every :data:`HOUSEKEEPING_S` and must not block.
    """

    def __init__(
        self, shard: Shard, target: Target, recorder: Recorder, answers: Answers, tick: Callable[[], None]
    ) -> None:
        self._shard = shard
        self._request = shard.request.data
        self._recorder = recorder
        self._answers = answers
        self._tick = tick
        host = f"[{target.host}]" if ":" in target.host else target.host
        self._target = f"{host}:{target.port}"
        self._timeout_s = target.timeout_s
        self._max_outstanding = target.max_connections
        self._channels: list[grpc.aio.Channel] = []
        self._methods: list[list[Any]] = []
        self._outstanding: dict[int, asyncio.Task[None]] = {}
        self.pacer = Pacer(shard.intended_ns, self._start)
        self._finished = asyncio.Event()
        self._bug: BaseException | None = None
        self._thread = ThreadPool(1)
        self._runner = asyncio.Runner()
        self.sent = 0
        self.connections_opened = 0
        self.peak_connections = 0

    def prepare(self) -> None:
        """Open the channels and wait a moment for their connections; a server that is away is left to the arrivals."""
        self._thread.apply(self._runner.run, (self._prepare(),))

    def run(self, epoch_ns: int) -> None:
        """Replay; returns when every arrival has its row (after :meth:`stop`: every arrival that was sent)."""
        self._thread.apply(self._runner.run, (self._run(epoch_ns),))
        self._thread.apply(self._runner.close)
        self._thread.kill()
        if self._bug is not None:
            raise self._bug

    def stop(self) -> None:
        """Send nothing more and wait for nothing more; what was sent is recorded as a timeout. From any thread."""
        self._runner.get_loop().call_soon_threadsafe(self._stop)

    async def _prepare(self) -> None:
        for _ in range(min(CHANNELS, self._max_outstanding)):
            channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
            self._channels.append(channel)
            known = {method: channel.unary_unary(method) for method in set(self._shard.methods)}
            self._methods.append([known[method] for method in self._shard.methods])
        self.connections_opened = self.peak_connections = len(self._channels)
        waiting = [asyncio.ensure_future(channel.channel_ready()) for channel in self._channels]
        _, late = await asyncio.wait(waiting, timeout=PRECONNECT_S)
        for task in late:
            task.cancel()

    async def _run(self, epoch_ns: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.pacer.begin(epoch_ns)
        self._loop.add_reader(self.pacer.timer.fileno(), self._fire)
        housekeeper = asyncio.ensure_future(self._keep_house())
        try:
            self._check_finished()
            await self._finished.wait()
        finally:
            housekeeper.cancel()
            self._loop.remove_reader(self.pacer.timer.fileno())
            self.pacer.close()
            for channel in self._channels:
                await channel.close()

    def _stop(self) -> None:
        if not self._finished.is_set():
            self.pacer.stop()
            for task in self._outstanding.values():
                task.cancel()
            self._check_finished()

    def _fail(self, bug: BaseException) -> None:
        self._bug = bug
        self._finished.set()

    async def _keep_house(self) -> None:
        try:
            while True:
                self._tick()
                await asyncio.sleep(HOUSEKEEPING_S)
        except Exception as error:
            self._fail(error)

    def _fire(self) -> None:
        try:
            self.pacer.fire()
            if self.pacer.exhausted:
                self._loop.remove_reader(self.pacer.timer.fileno())
                self._check_finished()
        except Exception as error:
            self._fail(error)

    def _start(self, position: int) -> None:
        if len(self._outstanding) < self._max_outstanding:
            task = self._outstanding[position] = self._loop.create_task(self._call(position))
            task.add_done_callback(functools.partial(self._called, position))
        else:
            error = self._recorder.error(f"{self._max_outstanding} calls are outstanding")
            self._recorder.row(position, NONE, NONE, monotonic_ns(), Outcome.DROPPED, -1, error, 0, 0)

    async def _call(self, position: int) -> None:
        request = self._request[position]
        data = self._shard.data[request]
        outcome, status, error, received = Outcome.OK, 0, -1, 0
        self.sent += 1
        sent_ns = self.pacer.began_ns[position] = monotonic_ns()
        try:
            answer = await self._methods[position % len(self._channels)][request](data, timeout=self._timeout_s)
            done_ns = monotonic_ns()
            received = len(answer)
            if received <= SMALL_BODY_BYTES or self._answers.wanted(request, position):
                self._answers.add(request, (None, None), answer)
            else:
                self._answers.unchecked += 1
        except grpc.aio.AioRpcError as failure:
            done_ns = monotonic_ns()
            details = failure.details() or ""
            outcome, status = outcome_of(failure.code(), details), failure.code().value[0]
            error = self._recorder.error(f"gRPC {failure.code().name}", details)
        except asyncio.CancelledError:
            done_ns = monotonic_ns()
            outcome, status = Outcome.TIMEOUT, -1
            error = self._recorder.error("stopped before the answer")
        self._recorder.row(position, sent_ns, NONE, done_ns, outcome, status, error, len(data), received)

    def _called(self, position: int, task: asyncio.Task[None]) -> None:
        """A call is over; one that was stopped before it began ends here only, and was never sent."""
        del self._outstanding[position]
        bug = None if task.cancelled() else task.exception()
        if bug is not None:
            self._fail(bug)
        self._check_finished()

    def _check_finished(self) -> None:
        if not self._outstanding and self.pacer.exhausted:
            self._finished.set()
