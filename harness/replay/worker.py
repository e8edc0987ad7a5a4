"""A load worker: ``python -m tailrace.harness.replay.worker [HOST:PORT]``, hosted by Locust.

Without an address it is the only one and speaks with the harness over stdin and stdout. With one it is one of several,
and speaks with their master there (:mod:`tailrace.harness.replay.master`), over Locust's own protocol.

Locust runs one user whose only task is the replay, and its statistics are fed from the rows, so that what a
trial shows live is Locust's. Nothing is monkey-patched (the parent sets ``LOCUST_SKIP_MONKEY_PATCH``): the senders use
event loops themselves. The process ends when its stdin does, for that means that whoever started it has gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import gevent
import numpy as np
from gevent.event import AsyncResult, Event
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import WorkerRunner
from locust.stats import RequestStats, StatsEntry
from numpy.typing import NDArray

from tailrace import __version__
from tailrace.harness.records.schema import Outcome
from tailrace.harness.replay import wire
from tailrace.harness.replay.clocks import clock_identity
from tailrace.harness.replay.grpc import GrpcReplay
from tailrace.harness.replay.http import HttpReplay
from tailrace.harness.replay.recorder import Answers, Recorder

FLUSH_S = 0.5
"""How often rows and live figures are sent to the harness."""
PIPE_BYTES = 1024 * 1024

REAL_TIME_PRIORITY = 1
NICENESS = -10
"""What a load worker asks for; refused without privileges."""


def take_precedence(real_time: bool) -> str:
    """Go before the servers that share this machine's cores, as far as that is permitted; returns what was had.

    The generator stands for clients on other machines. A thread that has to wait for its turn wakes some milliseconds
    late (a scheduler's slice); a real-time one wakes at once. The kernel leaves others a share of every second either way.
    """
    if real_time:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REAL_TIME_PRIORITY))
            return "real-time"
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    return f"nice {os.getpriority(os.PRIO_PROCESS, 0)}"


class Outbox(Protocol):
    """Messages on their way to the harness; neither of these ever blocks the sender."""

    def put(self, kind: bytes, payload: bytes = b"") -> None:
        """Queue one message."""

    def flush(self) -> None:
        """Send what can be sent now."""


class PipeOutbox:
    """Straight to the harness: what the pipe does not take now, waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting = bytearray()
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # a user's share of pipe memory may be used up; a small pipe will do
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def put(self, kind: bytes, payload: bytes = b"", worker: int = 0) -> None:
        """Queue one message."""
        self._waiting += wire.Frame(kind, payload, worker).pack()

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


class MasterOutbox:
    """To the master, as messages of Locust's. They may be put from any thread; the event loop sends them."""

    def __init__(self, runner: WorkerRunner) -> None:
        self._runner = runner
        self._waiting: deque[bytes] = deque()
        self._some = Event()
        self._wake = gevent.get_hub().loop.async_()
        self._wake.start(self._some.set)
        gevent.spawn(self._send)

    def put(self, kind: bytes, payload: bytes = b"") -> None:
        """Queue one message."""
        self._waiting.append(wire.Frame(kind, payload).pack())

    def flush(self) -> None:
        """Have the event loop send what waits."""
        self._wake.send()

    def _send(self) -> None:
        while True:
            self._some.wait()
            self._some.clear()
            while self._waiting:
                self._runner.send_message(wire.MESSAGE, {"frame": self._waiting.popleft()})


class LiveStatistics:
    """Feeds Locust's statistics from rows, many at a time, and reads the live percentile back from them.

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

    def p99_ms(self) -> float | None:
        """As :func:`current_p99_ms`; ``None`` also in one of several workers, whose figures the master joins."""
        return current_p99_ms(self._stats) if self._stats.use_response_times_cache else None


def current_p99_ms(stats: RequestStats) -> float | None:
    """The 99th percentile of the successes' response times over about ten seconds; ``None`` without any."""
    return stats.total.get_current_response_time_percentile(0.99) or None


def _count(values: NDArray[Any]) -> dict[Any, int]:
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


class Session:
    """One replay from plan to end, as Locust's user runs it."""

    def __init__(self, plan: bytes, outbox: Outbox, stats: RequestStats) -> None:
        self._shard, target = wire.unpack_plan(plan)
        self._priority = take_precedence(target.real_time and len(os.sched_getaffinity(0)) > 1)
        self._outbox = outbox
        self._recorder = Recorder(outbox.put, self._shard.arrival_id)
        self._answers = Answers(len(self._shard.data))
        self._live = LiveStatistics(stats, self._shard, target.protocol)
        engine: Callable[..., HttpReplay | GrpcReplay] = HttpReplay if target.protocol == "http" else GrpcReplay
        self._replay = engine(self._shard, target, self._recorder, self._answers, self._tick)
        self._epoch_ns = 0
        self._next_flush_ns = 0
        self._counts: deque[tuple[int, int]] = deque([(time.monotonic_ns(), 0)], maxlen=round(1 / FLUSH_S) + 1)
        """When rows were flushed in the last second or so, and how many there had been by then."""
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
            "priority": self._priority,
            "start_lag_p50_ms": start_lag_p50_ms,
            "start_lag_p99_ms": start_lag_p99_ms,
        }
        self._flush()
        self._outbox.put(wire.ANSWERS, self._answers.pack())
        self._outbox.put(wire.END, json.dumps(end).encode())
        self._outbox.flush()

    def stop(self) -> None:
        """End early: what has not been sent never will be."""
        if self.go.ready():
            self._replay.stop()
        else:
            self.go.set(None)

    def obey(self, frame: wire.Frame) -> None:
        """Follow a command."""
        if frame.kind == wire.GO:
            self.go.set(int(frame.payload))
        elif frame.kind == wire.STOP:
            self.stop()

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_flush_ns:
            self._next_flush_ns = now_ns + round(FLUSH_S * 1e9)
            self._flush()
        self._outbox.flush()  # what a full pipe did not take, if anything

    def _flush(self) -> None:
        self._live.feed(self._recorder.flush(), self._epoch_ns)
        now_ns = time.monotonic_ns()
        since_ns, done = self._counts[0]
        self._counts.append((now_ns, self._recorder.done))
        progress = {
            "t_s": (now_ns - self._epoch_ns) / 1e9,
            "intended": int(np.searchsorted(self._shard.intended_ns, now_ns - self._epoch_ns, side="right")),
            "sent": self._replay.sent,
            "done": self._recorder.done,
            "ok": self._recorder.ok,
            "rate_rps": (self._recorder.done - done) / max(now_ns - since_ns, 1) * 1e9,
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


def watch_stdin(handle: Callable[[wire.Frame], None]) -> None:
    """Follow commands from the event loop; the end of stdin ends the process."""
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
        for frame in frames.feed(data):
            handle(frame)

    gevent.get_hub().loop.io(stdin, 1).start(readable)


def _serve_harness(outbox: PipeOutbox) -> None:
    """The only worker: plan and commands come from stdin."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: commands follow
        first = wire.read_frame(stdin)
    if first is None:
        return
    environment = Environment(user_classes=[Replayer])
    session = Replayer.session = Session(first.payload, outbox, environment.stats)
    runner = environment.create_local_runner()
    watch_stdin(session.obey)
    runner.start(1, spawn_rate=1)
    error = session.over.get()
    if error is not None:
        raise error


def _serve_master(host: str, port: int) -> None:
    """One of several workers: plan and commands come from the master, which also says when it is over."""
    watch_stdin(lambda frame: None)
    environment = Environment(user_classes=[Replayer])
    runner = environment.create_worker_runner(host, port)
    outbox = MasterOutbox(runner)

    def told(msg: Any, **_: Any) -> None:
        frame = wire.Frame.unpack(msg.data["frame"])
        if frame.kind == wire.CLOCK:  # answered at once, for the way here and back is the uncertainty
            answer = {
                "asked": frame.payload.decode(),
                "mono_ns": time.monotonic_ns(),
                "clock": clock_identity(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "version": __version__,
            }
            runner.send_message(wire.MESSAGE, {"frame": wire.Frame(wire.CLOCK, json.dumps(answer).encode()).pack()})
        elif frame.kind == wire.PLAN:
            Replayer.session = Session(frame.payload, outbox, environment.stats)
            gevent.spawn(_tell_failure, Replayer.session, outbox)
        else:
            Replayer.session.obey(frame)

    runner.register_message(wire.MESSAGE, told)
    runner.greenlet.join()


def _tell_failure(session: Session, outbox: Outbox) -> None:
    error = session.over.get()
    if error is not None:
        traceback.print_exception(error)
        outbox.put(wire.FAILED, f"{type(error).__name__}: {error}".encode())
        outbox.flush()


def main() -> None:
    """Run one session, then leave without ceremony: native threads of gRPC do not always survive a tidy exit."""
    # The pipe is for messages alone: whatever a library prints goes to the log.
    outbox = PipeOutbox(os.dup(1))
    os.dup2(2, 1)
    code = 0
    try:
        if len(sys.argv) > 1:
            host, _, port = sys.argv[1].rpartition(":")
            _serve_master(host, int(port))
        else:
            _serve_harness(outbox)
    except BaseException as error:
        traceback.print_exc()
        outbox.put(wire.FAILED, f"{type(error).__name__}: {error}".encode())
        code = 1
    outbox.drain()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
