"""The harness's side of load generation: starts the load workers, hands them their plans, streams their rows to disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from tailrace.harness.contract.codecs import PreparedRequest, WireProtocol
from tailrace.harness.errors import StorageError, TailraceError
from tailrace.harness.machine import cpu_count
from tailrace.harness.plan.schedule import Schedule
from tailrace.harness.processes import free_ports, log_tail
from tailrace.harness.replay import wire
from tailrace.harness.replay.record_stream import RecordStream

START_TIMEOUT_S = 60.0
END_GRACE_S = 30.0
"""How long after an answer must have come, or the timeout in its place, a load process may take to report it."""
WAKE_S = 1.0
"""How often :meth:`LoadGenerator.wait` looks up while nothing comes, for an abort brings the deadline forward."""


@dataclass(frozen=True)
class Progress:
    """How a trial stands. Counts are of arrivals, from the warm-up on."""

    t_s: float
    """Seconds since the epoch; negative while warming up."""
    intended: int
    """Arrivals whose intended start has passed."""
    sent: int
    done: int
    """Arrivals that have their row, whatever became of them."""
    ok: int
    failed: int
    rate_rps: float
    """Arrivals that ended in the last whole second."""
    p99_ms: float | None
    """Of the successes' response times over about the last ten seconds; ``None`` while there are none."""
    measured: int = 0
    """Arrivals of the trace, the warm-up's left out, that there will be."""
    missed: int = 0
    """Of those, how many have failed already, or were answered later than the objective."""


@dataclass(frozen=True)
class CountedAnswer:
    """One of the distinct successful answers to one request; ``count`` arrivals got exactly this one.

    ``headers`` have lower-case names and hold ``content-type`` and ``inference-header-content-length`` where the
    server sent them; for gRPC they are empty and ``body`` is the message.
    """

    model: str
    payload_id: int
    headers: dict[str, str]
    body: bytes
    count: int


@dataclass(frozen=True)
class LoadWorker:
    """What one load worker said of itself at its end; where it did not live to say, ``lost`` says why."""

    host: str | None
    cpu_s: float | None
    """CPU time from the go to the last row, all its threads."""
    start_lag_p50_ms: float | None
    start_lag_p99_ms: float | None
    """How long after its intended start it took an arrival up, the generator's own part of the send lag: nearest-rank
    percentiles over its measured arrivals (over all when there are none). ``None`` when nothing was due."""
    clock_offset_ms: float | None
    clock_uncertainty_ms: float | None
    """By how much its monotonic clock was ahead of the harness's, and how wrong an instant converted with that may be.
    Both 0 on the same clock; an uncertainty of ``None`` is unknown."""
    lost: str | None


@dataclass(frozen=True)
class Workers:
    """Who sends the load: worker processes on this machine, and ``remote`` others that connect to ``listen``
    (HOST:PORT; port 0: a free one)."""

    local: int = 1
    remote: int = 0
    listen: str = "127.0.0.1:0"

    @property
    def count(self) -> int:
        """All of them."""
        return self.local + self.remote


@dataclass(frozen=True)
class ReplayResult:
    """What a replay left behind. Of several workers the CPU times and connections are summed; lags are the worst one's."""

    records: Path
    """The Arrow stream with the rows; :func:`finish_table` makes it Parquet."""
    recorded: int
    """Rows written: one per arrival, fewer only after :meth:`LoadGenerator.abort`."""
    answers: tuple[CountedAnswer, ...]
    unchecked: int
    """Successful answers that were not kept: beyond the first few distinct ones, or large and not in the sample."""
    connections_opened: int
    peak_connections: int
    cpu_s: float
    priority: str | None
    """The precedence over other processes that the workers had: ``real-time`` or ``nice N``; ``None`` when none lived to
    say."""
    start_lag_p50_ms: float | None
    start_lag_p99_ms: float | None
    workers: tuple[LoadWorker, ...]
    aborted: bool
    failure: str | None
    """Why a load worker ended before its time (what it had not recorded is recorded as dropped); else ``None``."""


class LoadGenerator:
    """One replay of a schedule by a load process of its own, or by several workers.

    ``with LoadGenerator(…) as load: load.start(); load.go(epoch_ns); result = load.wait(…)``. ``requests`` must hold
    every (index into ``schedule.models``, payload id) that the schedule uses. ``timeout_s`` is the client's, counted
    from when it starts to send; ``max_connections`` bounds the requests outstanding (each of several workers has its share,
    rounded up), an arrival past it is ``dropped``.
    ``records`` is the stem of the table that gets the rows (:data:`REQUEST_SCHEMA`), flushed with
    every batch.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        requests: Mapping[tuple[int, int], PreparedRequest],
        protocol: WireProtocol,
        host: str,
        port: int,
        timeout_s: float,
        max_connections: int,
        slo_ms: float = math.inf,
        records: Path,
        log: Path,
        workers: Workers = Workers(),
    ) -> None:
        self._schedule = schedule
        self._workers = workers
        self._timeout_s = timeout_s
        self._log = log
        pairs = np.stack([schedule.model.astype(np.int64), schedule.payload_id.astype(np.int64)], axis=1)
        distinct, which = np.unique(pairs, axis=0, return_inverse=True)
        self._pairs = [(int(model), int(payload)) for model, payload in distinct]
        prepared = [requests[pair] for pair in self._pairs]
        shard = wire.Shard(
            arrival_id=np.arange(len(schedule), dtype=np.int64),
            intended_ns=schedule.intended_ns,
            request=which.reshape(-1).astype(np.int32),
            data=tuple(request.data for request in prepared),
            methods=tuple(request.method for request in prepared),
        )
        target = wire.Target(
            protocol,
            host,
            port,
            timeout_s,
            max_connections=-(-max_connections // workers.count),
            real_time=workers.local < cpu_count(),
        )
        self._plans = [wire.pack_plan(shard.part(index, workers.count), target) for index in range(workers.count)]
        self._records = RecordStream(records, schedule, workers.count, slo_ms)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._progress: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._latest: dict[int, dict[str, Any]] = {}
        """The live figures of each worker."""
        self._ends: dict[int, dict[str, Any]] = {}
        self._lost: dict[int, str] = {}
        self._answers: list[CountedAnswer] = []
        self._unchecked = 0
        self._failure: str | None = None
        self._storage_error: StorageError | None = None
        self._went_ns: int | None = None
        self._aborted_s: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The load process, or the master of several, once it is started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the workers, hand them their plans, and wait until their connections are open.

        Raises :class:`StorageError` when the records or the log cannot be written, :class:`TailraceError` when they do not
        get ready.
        """
        self._records.open()
        try:
            log = self._log.open("ab")
        except OSError as error:
            raise StorageError.of(self._log, error) from error
        with log:
            self._process = subprocess.Popen(
                # -P: a file called locust.py in the user's folder is not Locust.
                [sys.executable, "-P", "-m", *self._module()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "LOCUST_SKIP_MONKEY_PATCH": "1"},
            )
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="records", daemon=True)
        self._reader.start()
        # A plan does not fit into a pipe: a process that does not read it is as late as one that is never ready.
        patience = threading.Timer(START_TIMEOUT_S, self._give_up_start)
        patience.daemon = True
        patience.start()
        try:
            while self._plans:
                self._say(wire.PLAN, self._plans.pop(0))
            self._ready.wait()
        finally:
            patience.cancel()
        if self._ended.is_set():
            self.close()
            why = self._failure or "it was closed"
            raise TailraceError(f"the load process did not start: {why}", detail=log_tail(self._log))

    def _module(self) -> list[str]:
        workers = self._workers
        if workers.count == 1 and not workers.remote:
            return ["tailrace.harness.replay.worker"]
        host, _, port = workers.listen.rpartition(":")
        address = f"{host}:{int(port) or free_ports(1, host)[0]}"
        return ["tailrace.harness.replay.master", address, str(workers.local), str(workers.remote)]

    def go(self, epoch_ns: int) -> None:
        """Start the clock: ``epoch_ns`` is the trace's first instant on ``time.monotonic_ns``; warm-up precedes it."""
        self._went_ns = epoch_ns
        self._records.epoch_ns = epoch_ns
        self._say(wire.GO, str(epoch_ns).encode())

    def wait(self, on_progress: Callable[[Progress], None] | None = None) -> ReplayResult:
        """Wait until every arrival has its row; ``on_progress`` is called here about twice a second.

        Raises :class:`StorageError` when the records could not be written; what was written stays readable.
        """
        done = 0
        moved_s = time.monotonic()
        while True:
            left_s = self._deadline_s(moved_s) - time.monotonic()
            try:
                progress = self._progress.get(timeout=min(max(left_s, 0.0), WAKE_S))
            except queue.Empty:
                if left_s <= 0:
                    silent_s = time.monotonic() - moved_s
                    self._failure = f"the load process recorded nothing for {silent_s:.0f} s and was killed"
                    self._kill()
                    moved_s = time.monotonic()
                continue
            if progress is None:
                self._progress.put(None)  # for whoever waits again, having aborted
                break
            if progress.done > done:
                done = progress.done
                moved_s = time.monotonic()
            if on_progress is not None:
                on_progress(progress)
        if self._storage_error is not None:
            raise self._storage_error
        ends = list(self._ends.values())
        return ReplayResult(
            records=self._records.path,
            recorded=self._records.written,
            answers=tuple(self._answers),
            unchecked=self._unchecked,
            connections_opened=sum(end["connections_opened"] for end in ends),
            peak_connections=sum(end["peak_connections"] for end in ends),
            cpu_s=sum(end["cpu_s"] for end in ends),
            priority=", ".join(sorted({end["priority"] for end in ends})) or None,
            start_lag_p50_ms=_largest(end["start_lag_p50_ms"] for end in ends),
            start_lag_p99_ms=_largest(end["start_lag_p99_ms"] for end in ends),
            workers=tuple(self._about(index) for index in range(self._workers.count)),
            aborted=self._aborted_s is not None,
            failure=self._failure or "; ".join(self._lost.values()) or None,
        )

    def _about(self, worker: int) -> LoadWorker:
        end = self._ends.get(worker, {})
        same_clock = 0 if end else None  # the only worker has the harness's; of others their master says more
        offset_ns = end.get("clock_offset_ns", same_clock)
        uncertainty_ns = end.get("clock_uncertainty_ns", same_clock)
        return LoadWorker(
            host=end.get("host"),
            cpu_s=end.get("cpu_s"),
            start_lag_p50_ms=end.get("start_lag_p50_ms"),
            start_lag_p99_ms=end.get("start_lag_p99_ms"),
            clock_offset_ms=None if offset_ns is None else offset_ns / 1e6,
            clock_uncertainty_ms=None if uncertainty_ns is None else uncertainty_ns / 1e6,
            lost=self._lost.get(worker),
        )

    def abort(self) -> None:
        """Stop early: what was sent is recorded (without an answer, as a timeout), what was not is not recorded.

        :meth:`wait` then returns soon.
        """
        if self._aborted_s is None:
            self._aborted_s = time.monotonic()
        self._say(wire.STOP)

    def close(self) -> None:
        """End the load process at once, however it stands, and close the records. Safe to call again.

        For an end that keeps what is under way, call :meth:`abort` and then :meth:`wait` first.
        """
        if self._process is None:
            self._records.close()
            return
        if not self._ended.is_set() and self._aborted_s is None:
            self._aborted_s = time.monotonic()
        if not self._ready.is_set():
            self._kill()  # it may not be reading, and what is left of the plan would wait for it
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # which ends it
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process.wait()
        if self._reader is not None:
            self._reader.join()

    def _deadline_s(self, moved_s: float) -> float:
        """When a load process whose last row came at ``moved_s`` counts as hung (both on ``time.monotonic``)."""
        if self._went_ns is None or not len(self._schedule):
            return moved_s + END_GRACE_S
        last_s = (self._went_ns + int(self._schedule.intended_ns[-1])) / 1e9
        if self._aborted_s is not None:
            last_s = min(last_s, self._aborted_s)
        return max(last_s + self._timeout_s, moved_s) + END_GRACE_S

    def _give_up_start(self) -> None:
        if not self._ready.is_set():
            self._failure = f"it was not ready after {START_TIMEOUT_S:g} s"
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _say(self, kind: bytes, payload: bytes = b"") -> None:
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("the load generator has not been started")
        # A load process that has gone is noticed where its messages end.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(wire.Frame(kind, payload).pack())
            self._process.stdin.flush()

    # ── the reader thread ──

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        try:
            if process.stdout is not None:
                with process.stdout as stream:
                    while message := wire.read_frame(stream):
                        self._take(message)
            self._finish(process)
        except StorageError as error:
            self._storage_error = error
            self._kill()
        except Exception as error:  # a bug, which must not leave wait() waiting
            self._failure = f"{type(error).__name__}: {error}"
            self._kill()
        finally:
            self._ended.set()
            self._ready.set()
            self._progress.put(None)

    def _take(self, message: wire.Frame) -> None:
        kind, payload, worker = message
        if kind == wire.ROWS:
            self._records.append(np.frombuffer(payload, wire.ROW_DTYPE), worker)
        elif kind == wire.ERRORS:
            self._records.errors[worker] += json.loads(payload)
        elif kind == wire.PROGRESS:
            self._latest[worker] = json.loads(payload)
            self._progress.put(_combined(list(self._latest.values()), self._records))
        elif kind == wire.READY:
            if payload:
                self._records.offsets_ns = json.loads(payload)
            self._ready.set()
        elif kind == wire.ANSWERS:
            meta, bodies = wire.unpack(payload)
            self._unchecked += meta["unchecked"]
            self._answers += (
                CountedAnswer(self._schedule.models[model], payload_id, entry["headers"], body, entry["count"])
                for entry, body in zip(meta["answers"], bodies, strict=True)
                for model, payload_id in [self._pairs[entry["request"]]]
            )
        elif kind == wire.END:
            self._ends[worker] = json.loads(payload)
        elif kind == wire.LOST:
            self._lost[worker] = payload.decode()
            if self._went_ns is not None:
                self._records.drop_rest("load worker lost", worker)
        elif kind == wire.FAILED:
            self._failure = payload.decode()

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        left = [index for index in range(self._workers.count) if index not in self._ends and index not in self._lost]
        if left and self._aborted_s is None:
            self._failure = self._failure or f"the load process ended (exit code {process.wait()})"
        if self._went_ns is not None and self._aborted_s is None:
            for index in [*left, *self._lost]:  # one that was lost before the go has no rows yet
                self._records.drop_rest("load generator ended", index)
        self._records.close()


def _combined(figures: list[dict[str, Any]], records: RecordStream) -> Progress:
    """The live figures of all workers as one."""
    counts = {key: sum(each[key] for each in figures) for key in ("intended", "sent", "done", "ok", "rate_rps")}
    return Progress(
        **counts,
        t_s=max(each["t_s"] for each in figures),
        failed=counts["done"] - counts["ok"],
        p99_ms=_largest(each["p99_ms"] for each in figures),
        measured=records.measured,
        missed=records.missed,
    )


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
