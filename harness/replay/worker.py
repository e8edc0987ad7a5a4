"""The load process: ``python -m harness.replay.worker``, hosted by Locust, spoken to over its stdin and stdout.

Locust runs one user whose only task is the replay, and its statistics are fed from the rows, so that what a
trial shows live is Locust's. Nothing is monkey-patched (the parent sets ``LOCUST_SKIP_MONKEY_PATCH``): the senders use
event loops themselves. The process ends when its stdin does, for that means that the harness has gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

import gevent
import numpy as np
from gevent.event import AsyncResult
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser
from locust.stats import RequestStats, StatsEntry
from numpy.typing import NDArray

from harness.records import Outcome
from harness.replay import wire
from harness.replay.grpc import GrpcReplay
from harness.replay.http import HttpReplay
from harness.replay.recorder import Answers, Recorder

FLUSH_S = 0.5
"""How often rows and live figures are sent to the harness."""
PIPE_BYTES = 1024 * 1024


PRIORITY = -10
"""The niceness that the load process asks for; refused without privileges, and kept with the run either way."""


class Outbox:
    """Messages on their way to the harness. Writing never blocks the sender: what the pipe does not take now, waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting = bytearray()
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # a user's share of pipe memory may be used up; a small pipe will do
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def put(self, kind: bytes, payload: bytes = b"") -> None:
        """Queue one message."""
        self._waiting += wire.frame(kind, payload)

    def flush(self) -> None:
        """Write what the pipe takes. A broken pipe ends the process: there is nobody left to measure for."""
        try:
            while self._waiting:
                del self._waiting[: os.write(self._fd, self._waiting)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            os._exit(1)

    def drain(self) -> None:
        """Write everything, however long the harness takes to read it."""
        os.set_blocking(self._fd, True)
        self.flush()


class LiveStatistics:
    """Feeds Locust's statistics from rows, many at a time, and reads the live figures back from them.

    Response times count from the intended start; a failure has none, so that it cannot make a percentile look good.
    """

    def __init__(self, stats: RequestStats, shard: wire.Shard, protocol: str) -> None:
        self._stats = stats
        self._name = ("replay", protocol.upper())
        # Rows carry ids of the whole schedule; this process knows the intended starts of its shard alone.
        self._first_id = int(shard.arrival_id[0]) if len(shard) else 0
        span = int(shard.arrival_id[-1]) - self._first_id + 1 if len(shard) else 0
        self._intended = np.zeros(span, np.int64)
        self._intended[shard.arrival_id - self._first_id] = shard.intended_ns

    def feed(self, rows: NDArray[np.void], epoch_ns: int) -> None:
        """Add a batch of rows (dtype :data:`wire.ROW_DTYPE`)."""
        if not len(rows):
            return
        failed = rows["outcome"] != Outcome.OK
        entry = StatsEntry(self._stats, *self._name)
        entry.num_requests = len(rows)
        entry.num_none_requests = entry.num_failures = int(failed.sum())
        entry.last_request_timestamp = now_s = time.time()
        # Locust's seconds are those of the wall clock; the rows' are not.
        seconds = (now_s - (time.monotonic_ns() - rows["done_ns"]) / 1e9).astype(int)
        entry.num_reqs_per_sec = _count(seconds)
        entry.num_fail_per_sec = _count(seconds[failed])
        entry.total_content_length = int(rows["bytes_received"].sum())
        good = rows[~failed]
        if len(good):
            response_ms = (good["done_ns"] - epoch_ns - self._intended[good["arrival_id"] - self._first_id]) / 1e6
            entry.total_response_time = int(response_ms.sum())
            entry.min_response_time = int(response_ms.min())
            entry.max_response_time = int(response_ms.max())
            # Two significant digits, as Locust rounds, but also below a millisecond.
            unit = 10.0 ** (np.floor(np.log10(np.maximum(response_ms, 1e-3))) - 1)
            entry.response_times = _count(np.rint(response_ms / unit) * unit)
        self._stats.total.extend(entry)
        self._stats.entries[self._name].extend(entry)

    def rate_rps(self) -> float:
        """Arrivals that ended in the last whole second, failures included."""
        return float(self._stats.total.num_reqs_per_sec.get(int(time.time()) - 1, 0))

    def p99_ms(self) -> float | None:
        """The 99th percentile of the successes' response times over about ten seconds; ``None`` without any."""
        return self._stats.total.get_current_response_time_percentile(0.99) or None


def _count(values: NDArray[Any]) -> dict[Any, int]:
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


class Session:
    """One replay from plan to end, as Locust's user runs it."""

    def __init__(self, plan: bytes, outbox: Outbox, stats: RequestStats) -> None:
        self._shard, endpoint = wire.unpack_plan(plan)
        self._outbox = outbox
        self._recorder = Recorder(outbox.put, self._shard.arrival_id)
        self._answers = Answers(len(self._shard.data))
        self._live = LiveStatistics(stats, self._shard, endpoint.protocol)
        engine: Callable[..., HttpReplay | GrpcReplay] = HttpReplay if endpoint.protocol == "http" else GrpcReplay
        self._replay = engine(self._shard, endpoint, self._recorder, self._answers, self._tick)
        self._epoch_ns = 0
        self._next_flush_ns = 0
        self.go: AsyncResult = AsyncResult()
        """Set to the epoch when the clock starts, to ``None`` when it shall not."""
        self.over: AsyncResult = AsyncResult()
        """Set when the replay has ended, to the exception that ended it or to ``None``."""

    def run(self) -> None:
        """Prepare, wait for the epoch, replay, report."""
        self._replay.prepare()
        gc.collect()
        gc.freeze()
        gc.disable()  # a collector's pause would be a late arrival; the senders leave no cycles behind
        self._outbox.put(wire.READY)
        self._outbox.flush()
        epoch_ns = self.go.get()
        cpu_s = time.process_time()
        if epoch_ns is not None:
            self._epoch_ns = epoch_ns
            self._replay.run(epoch_ns)
        cpu_s = time.process_time() - cpu_s
        start_lag_p50_ms, start_lag_p99_ms = self._replay.pacer.start_lag_ms()
        end = {
            "cpu_s": cpu_s,
            "connections_opened": self._replay.connections_opened,
            "peak_connections": self._replay.peak_connections,
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "start_lag_p50_ms": start_lag_p50_ms,
            "start_lag_p99_ms": start_lag_p99_ms,
        }
        self._flush()
        self._outbox.put(wire.ANSWERS, self._answers.pack())
        self._outbox.put(wire.END, json.dumps(end).encode())

    def stop(self) -> None:
        """End early: what has not been sent never will be."""
        if self.go.ready():
            self._replay.stop()
        else:
            self.go.set(None)

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_flush_ns:
            self._next_flush_ns = now_ns + round(FLUSH_S * 1e9)
            self._flush()
        self._outbox.flush()  # what a full pipe did not take, if anything

    def _flush(self) -> None:
        self._live.feed(self._recorder.flush(), self._epoch_ns)
        now_ns = time.monotonic_ns() - self._epoch_ns
        progress = {
            "t_s": now_ns / 1e9,
            "intended": int(np.searchsorted(self._shard.intended_ns, now_ns, side="right")),
            "sent": self._replay.sent,
            "done": self._recorder.done,
            "ok": self._recorder.ok,
            "rate_rps": self._live.rate_rps(),
            "p99_ms": self._live.p99_ms(),
        }
        self._outbox.put(wire.PROGRESS, json.dumps(progress).encode())


class Replayer(User):
    """The user that Locust runs: its one task is the session's replay."""

    session: ClassVar[Session]

    @task
    def replay(self) -> None:
        try:
            self.session.run()
            self.session.over.set(None)
        except BaseException as error:
            self.session.over.set(error)
        raise StopUser


def _listen(session: Session) -> None:
    """Follow the harness's commands from the event loop; the end of stdin ends the process."""
    stdin = sys.stdin.fileno()
    os.set_blocking(stdin, False)
    frames = wire.FrameBuffer()

    def readable() -> None:
        try:
            data = os.read(stdin, 65536)
        except BlockingIOError:
            return
        if not data:
            os._exit(1)
        for kind, payload in frames.feed(data):
            if kind == wire.GO:
                session.go.set(int(payload))
            elif kind == wire.STOP:
                session.stop()

    gevent.get_hub().loop.io(stdin, 1).start(readable)


def main() -> None:
    """Run one session, then leave without ceremony: native threads of gRPC do not always survive a tidy exit."""
    # The pipe is for messages alone: whatever a library prints goes to the log.
    outbox = Outbox(os.dup(1))
    os.dup2(2, 1)
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: commands follow
        first = wire.read_frame(stdin)
    if first is None:
        return
    # The generator stands for clients on other machines: where it may, it goes before the servers that share its cores.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    code = 0
    try:
        environment = Environment(user_classes=[Replayer])
        session = Replayer.session = Session(first[1], outbox, environment.stats)
        runner = environment.create_local_runner()
        _listen(session)
        runner.start(1, spawn_rate=1)
        error = session.over.get()
        if error is not None:
            raise error
    except BaseException as error:
        traceback.print_exc()
        outbox.put(wire.FAILED, f"{type(error).__name__}: {error}".encode())
        code = 1
    outbox.drain()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
