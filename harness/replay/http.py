"""Sends a shard over HTTP/1.1 on gevent's event loop: callbacks on sockets, no greenlet and no timer per request.

An idle connection carries the next arrival, the one used last first. Where none is idle, a new one is opened, up to
``max_connections``; past that the arrival is dropped. A connection is watched while it is idle, so that one which
the server has closed is not used. ``sent_ns`` is when the first byte is handed to the kernel: an arrival that has to
wait for its connection shows that wait as send lag, and one that never gets it was never sent. The client's timeout
counts, as any client's does, from when it begins: from the send, or from the connect where one is needed.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import gevent
from gevent.event import Event
from geventhttpclient._parser import HTTPParseError

from tailrace.harness.records.schema import Outcome
from tailrace.harness.replay.http_connection import Connection
from tailrace.harness.replay.pacer import Pacer
from tailrace.harness.replay.recorder import SMALL_BODY_BYTES, Answers, Recorder
from tailrace.harness.replay.wire import NONE, Shard, Target

PREOPENED = 32
"""Connections opened before the clock starts, so that the first arrivals do not pay for them."""
PREOPEN_GAP_S = 0.02
"""Between two of them: of a burst, one of several processes that accept on one socket may take all, and keep them."""
KNOWN_HEADS = 256
"""Heads of answers that are remembered; past that all are forgotten."""
HEAD_BYTES = 256 * 1024
ANSWER_BYTES = 64 * 1024 * 1024
"""An answer's head and whole size; one that exceeds them is an error."""
RECEIVE_BYTES = 64 * 1024
PRECONNECT_S = 2.0
HOUSEKEEPING_S = 0.02
"""How often timeouts are looked for and ``tick`` is called."""

_READ, _WRITE = 1, 2
_SHED = (429, 503)
_OUR_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
"""Failures to open a connection that are this machine's and not the server's."""


class HttpReplay:
    """One replay of one shard: :meth:`prepare`, then :meth:`run`. All in one thread, on its gevent hub.

    ``tick`` is called every :data:`HOUSEKEEPING_S` and must not block.
    """

    def __init__(
        self, shard: Shard, target: Target, recorder: Recorder, answers: Answers, tick: Callable[[], None]
    ) -> None:
        self._shard = shard
        self._request = shard.request.data
        self._recorder = recorder
        self._answers = answers
        self._tick = tick
        self._max_connections = target.max_connections
        self._timeout_ns = round(target.timeout_s * 1e9)
        self._timeout_s = target.timeout_s
        family, _, _, _, address = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)[0]
        self._family, self._address = family, address
        self._loop = gevent.get_hub().loop
        self._open: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._outstanding: dict[int, Connection] = {}
        self.pacer = Pacer(shard.intended_ns, self._start)
        self._finished = Event()
        self._bug: BaseException | None = None
        self.sent = 0
        self._heads: dict[bytes, tuple[int, dict[str, str]]] = {}
        """Heads that were parsed before, with the length of the body that they announce and the headers that matter."""
        self.connections_opened = 0
        self.peak_connections = 0
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def prepare(self) -> None:
        """Open the first connections; those that a server refuses now are left to the arrivals."""
        for _ in range(min(PREOPENED, self._max_connections, len(self._shard))):
            self._connect(-1)
            gevent.sleep(PREOPEN_GAP_S)
        deadline = monotonic_ns() + round(PRECONNECT_S * 1e9)
        while len(self._idle) < len(self._open) and monotonic_ns() < deadline:
            gevent.sleep(0.005)

    def run(self, epoch_ns: int) -> None:
        """Replay; returns when every arrival has its row (after :meth:`stop`: every arrival that was sent)."""
        self.pacer.begin(epoch_ns)
        pacing = self._loop.io(self.pacer.timer.fileno(), _READ)
        pacing.priority = self._loop.MAXPRI  # of all that is ready, an arrival that is due comes first
        housekeeping = self._loop.timer(HOUSEKEEPING_S, HOUSEKEEPING_S)
        try:
            pacing.start(self._guarded, self._fire, pacing)
            housekeeping.start(self._guarded, self._keep_house)
            self._check_finished()
            self._finished.wait()
        finally:
            for watcher in (pacing, housekeeping):
                watcher.stop()
                watcher.close()
            for connection in list(self._open):
                self._close(connection)
            self.pacer.close()
        if self._bug is not None:
            raise self._bug

    def stop(self) -> None:
        """Send nothing more and wait for nothing more; what was sent is recorded as a timeout. From the same thread."""
        if self._finished.is_set():
            return
        self.pacer.stop()
        for position, connection in list(self._outstanding.items()):
            if connection.sent_ns == NONE:
                del self._outstanding[position]
                self._close(connection)
            else:
                self._fail(connection, Outcome.TIMEOUT, "stopped before the answer", "", monotonic_ns())
        self._check_finished()

    # ── callbacks of the event loop ──

    def _guarded(self, callback: Callable[..., None], *arguments: Any) -> None:
        """A bug in a callback ends the replay; the event loop alone would print it and go on."""
        try:
            callback(*arguments)
        except Exception as error:
            self._bug = error
            self._finished.set()

    def _fire(self, watcher: Any) -> None:
        self.pacer.fire()
        if self.pacer.exhausted:
            watcher.stop()
            self._check_finished()

    def _keep_house(self) -> None:
        now = monotonic_ns()
        began_before = now - self._timeout_ns
        # The timeout is the same for all, so the oldest come first and no request needs a timer of its own.
        while self._outstanding:
            connection = next(iter(self._outstanding.values()))
            if connection.started_ns > began_before:
                break
            what = "no connection" if connection.sent_ns == NONE else "no answer"
            self._fail(connection, Outcome.TIMEOUT, f"{what} within {self._timeout_s:g} s", "", now)
        self._tick()

    def _connected(self, connection: Connection) -> None:
        connection.writer.stop()
        code = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code and connection.sock.getsockname()[:2] == self._address[:2]:
            # A port that nobody listens on may be picked as our own: TCP then connects the socket to itself.
            code = errno.ECONNREFUSED
        position = connection.position
        if code:
            self._fail(connection, Outcome.CONNECTION, "connect", os.strerror(code), monotonic_ns())
            return
        connection.reader.start(self._guarded, self._readable, connection)
        if position < 0:
            self._idle[connection] = None
        elif not self._send(connection):
            self._fail(connection, Outcome.CONNECTION, "send", "the connection was closed at once", monotonic_ns())

    def _writable(self, connection: Connection) -> None:
        rest = connection.rest
        if rest is None:
            return
        now = monotonic_ns()
        try:
            count = connection.sock.send(rest)
        except BlockingIOError:
            return
        except OSError:
            # The answer, or the reason why there is none, is waiting on the reading side.
            connection.writer.stop()
            connection.rest = None
            return
        if connection.sent_ns == NONE:
            connection.sent_ns = now
        connection.bytes_sent += count
        connection.rest = rest[count:] if count < len(rest) else None
        if connection.rest is None:
            connection.writer.stop()

    def _readable(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if connection.position < 0:
                self._close(connection)
            else:
                self._fail(
                    connection, Outcome.CONNECTION, "connection lost", os.strerror(error.errno or 0), monotonic_ns()
                )
            return
        now = monotonic_ns()
        if connection.position < 0:  # idle: the server has closed it, or says what nobody asked
            self._close(connection)
            return
        if data:
            if connection.first_byte_ns == NONE:
                connection.first_byte_ns = now
            connection.bytes_received += len(data)
        self._parse(connection, data, now)
        # Answers may come faster than they are read; what is due in the meantime does not wait for the last of them.
        if now >= self.pacer.due_ns:
            self.pacer.fire()

    # ── the life of one arrival ──

    def _start(self, position: int) -> None:
        now = monotonic_ns()
        request = self._request[position]
        limit = ANSWER_BYTES if self._answers.wanted(request, position) else SMALL_BODY_BYTES
        while self._idle:
            connection, _ = self._idle.popitem()
            connection.begin(position, request, now, limit)
            if self._send(connection):
                self._outstanding[position] = connection
                return
            self._close(connection)  # closed by the server just now, before anything was handed over
        if len(self._open) >= self._max_connections:
            self._drop(position, f"all {self._max_connections} connections are busy")
        else:
            self._connect(position, request, now, limit)

    def _connect(self, position: int, request: int = 0, now: int = 0, limit: int = 0) -> None:
        """Open a connection, for one arrival or (-1) ahead of time."""
        sock = None
        try:
            sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(self._address)
        except OSError as error:
            code = error.errno or errno.EIO
        if sock is None or code in _OUR_LIMITS:
            if sock is not None:
                sock.close()
            self._drop(position, f"no further connection can be opened: {os.strerror(code)}")
            return
        connection = Connection(sock, self._loop.io(sock.fileno(), _READ), self._loop.io(sock.fileno(), _WRITE))
        connection.begin(position, request, now, limit)
        self._open[connection] = None
        self.connections_opened += 1
        self.peak_connections = max(self.peak_connections, len(self._open))
        if position >= 0:
            self._outstanding[position] = connection
        if code in (0, errno.EINPROGRESS):
            connection.writer.start(self._guarded, self._connected, connection)
        else:
            self._fail(connection, Outcome.CONNECTION, "connect", os.strerror(code), monotonic_ns())

    def _send(self, connection: Connection) -> bool:
        """Hand a request to the kernel, the rest of it when there is room; False when the connection is gone."""
        data = self._shard.data[connection.request]
        now = monotonic_ns()
        try:
            count = connection.sock.send(data)
        except BlockingIOError:
            count = 0
        except OSError:
            return False
        self.sent += 1
        connection.bytes_sent = count
        if count:
            connection.sent_ns = now
        if count < len(data):
            connection.rest = memoryview(data)[count:]
            connection.writer.start(self._guarded, self._writable, connection)
        return True

    def _parse(self, connection: Connection, data: bytes, now: int) -> None:
        """Feed what came (nothing: the end of the stream) to the parser and settle the arrival when that decides it."""
        if connection.bytes_received == len(data) and self._answered_as_before(connection, data, now):
            return
        clean = bool(data)
        try:
            connection.feed(data)
        except HTTPParseError as error:
            clean = False
            if not connection.complete:
                if data:
                    self._fail(
                        connection, Outcome.ERROR, "malformed answer", str(error.args[0] if error.args else error), now
                    )
                else:
                    what = "within the answer" if connection.bytes_received else "without an answer"
                    self._fail(connection, Outcome.CONNECTION, "the server closed the connection", what, now)
                return
        if connection.complete:
            self._remember_head(connection, data)
            self._answered(connection, clean, now)
        elif not data:
            self._fail(connection, Outcome.CONNECTION, "the server closed the connection", "without an answer", now)
        elif connection.bytes_received > (ANSWER_BYTES if connection.head_done else HEAD_BYTES):
            part, limit = ("answer", ANSWER_BYTES) if connection.head_done else ("answer's head", HEAD_BYTES)
            self._fail(connection, Outcome.ERROR, "malformed answer", f"the {part} exceeds {limit} bytes", now)

    def _remember_head(self, connection: Connection, data: bytes) -> None:
        """Keep the head of a good answer that came in one piece and leaves the connection open."""
        head_bytes = data.find(b"\r\n\r\n") + 4
        plain = len(data) == head_bytes + connection.body_bytes  # and nothing between chunks
        whole = connection.bytes_received == len(data)
        if connection.status == 200 and whole and plain and connection.should_keep_alive():
            if len(self._heads) == KNOWN_HEADS:
                self._heads.clear()
            self._heads[data[:head_bytes]] = connection.body_bytes, connection.answer_headers

    def _answered_as_before(self, connection: Connection, data: bytes, now: int) -> bool:
        """Settle a whole answer whose head is, byte for byte, one that was parsed before; False for any other.

        Servers mostly repeat themselves, and a parser that calls back for every header is a tenth of what a request costs.
        """
        head_bytes = data.find(b"\r\n\r\n") + 4
        body_bytes, headers = self._heads.get(data[:head_bytes], (-1, None))
        if headers is None or len(data) - head_bytes != body_bytes or connection.rest is not None:
            return False
        if body_bytes <= connection.body_limit:
            self._answers.add(
                connection.request,
                (headers.get("content-type"), headers.get("inference-header-content-length")),
                data[head_bytes:],
            )
        else:
            self._answers.unchecked += 1
        self._settle(connection, Outcome.OK, 200, -1, now)
        connection.position = -1
        self._idle[connection] = None
        return True

    def _answered(self, connection: Connection, clean: bool, now: int) -> None:
        """A whole answer has come."""
        status = connection.status
        if status == 200:  # other successes, 204 say, bring no tensors
            outcome, error = Outcome.OK, -1
            self._look_at(connection)
        else:
            outcome = Outcome.SHED if status in _SHED else Outcome.ERROR
            text = b"".join(connection.body_parts or ()).decode("utf-8", "replace")
            error = self._recorder.error(f"HTTP {status}", text)
        # A request that was not even read to its end leaves the connection in the middle of nowhere.
        reusable = clean and connection.rest is None and connection.should_keep_alive()
        self._settle(connection, outcome, status, error, now)
        if reusable:
            connection.position = -1
            self._idle[connection] = None
        else:
            self._close(connection)

    def _look_at(self, connection: Connection) -> None:
        parts = connection.body_parts
        if parts is None:
            self._answers.unchecked += 1
            return
        headers = connection.answer_headers
        self._answers.add(
            connection.request,
            (headers.get("content-type"), headers.get("inference-header-content-length")),
            b"".join(parts),
        )

    def _fail(self, connection: Connection, outcome: Outcome, kind: str, detail: str, now: int) -> None:
        """No good answer will come: record why, and give the connection up."""
        if connection.position >= 0:
            status = connection.status
            self._settle(connection, outcome, status, self._recorder.error(kind, detail), now)
        self._close(connection)

    def _settle(self, connection: Connection, outcome: Outcome, status: int, error: int, now: int) -> None:
        position = connection.position
        self._recorder.row(
            position,
            connection.sent_ns,
            connection.first_byte_ns,
            now,
            outcome,
            status,
            error,
            connection.bytes_sent,
            connection.bytes_received,
        )
        del self._outstanding[position]
        if not self._outstanding:
            self._check_finished()

    def _drop(self, position: int, why: str) -> None:
        if position >= 0:
            self._recorder.row(
                position, NONE, NONE, monotonic_ns(), Outcome.DROPPED, -1, self._recorder.error(why), 0, 0
            )

    def _close(self, connection: Connection) -> None:
        # Stopping the watchers also breaks the reference cycle through their arguments: nobody collects garbage here.
        for watcher in (connection.reader, connection.writer):
            watcher.stop()
            watcher.close()
        connection.sock.close()
        del self._open[connection]
        self._idle.pop(connection, None)

    def _check_finished(self) -> None:
        if not self._outstanding and self.pacer.exhausted:
            self._finished.set()
