"""The HTTP sender against scripted servers: every way an answer can come, not come, or come wrong."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gevent
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailrace.harness.contract.codecs import http_request
from tailrace.harness.processes import free_ports
from tailrace.harness.records.schema import Outcome
from tailrace.harness.replay import http, wire
from tailrace.harness.replay.http import HttpReplay
from tailrace.harness.replay.http_connection import Connection
from tailrace.harness.replay.recorder import Answers, Recorder

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok"


class ScriptedServer:
    """Accepts connections, reads whole requests, and lets ``answer(sock, number, body)`` do what it likes for each;
    ``number`` counts requests from 0. The connection is closed when ``answer`` returns False."""

    def __init__(self, answer: Callable[[socket.socket, int, bytes], bool | None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self.requests = 0
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.accepted += 1
                self._connections.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            stream = sock.makefile("rb")
            while line := stream.readline():
                length = 0
                while line not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                    line = stream.readline()
                body = stream.read(length)
                with self._lock:
                    number = self.requests
                    self.requests += 1
                if self._answer(sock, number, body) is False:
                    stream.close()
                    return

    def close(self) -> None:
        self._listener.close()
        for sock in self._connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving(answer: Callable[[socket.socket, int, bytes], bool | None] | bytes) -> Iterator[ScriptedServer]:
    if isinstance(answer, bytes):
        data = answer
        server = ScriptedServer(lambda sock, number, body: sock.sendall(data))
    else:
        server = ScriptedServer(answer)
    try:
        yield server
    finally:
        server.close()


@dataclass
class Replayed:
    """What a replay reported, in the order of the arrivals."""

    rows: np.ndarray[Any, Any]
    errors: list[str]
    answers: Answers
    engine: HttpReplay
    epoch_ns: int

    def outcomes(self) -> list[str]:
        return [Outcome(code).name.lower() for code in self.rows["outcome"]]

    def error(self, position: int) -> str:
        return self.errors[self.rows["error"][position]]

    def bodies(self) -> dict[bytes, int]:
        return {body: count for kept in self.answers._kept for (*_, body), count in kept.items()}


def replay(
    port: int,
    at_ms: Sequence[float],
    *,
    body: bytes = b"x" * 100,
    timeout_s: float = 20.0,
    max_connections: int = 64,
    stop_after_s: float | None = None,
) -> Replayed:
    """Replay one request per instant in ``at_ms``, in this process."""
    intended = (np.array(at_ms, dtype=np.float64) * 1e6).astype(np.int64)
    data = http_request("127.0.0.1", port, "/infer", body, {"Content-Type": "application/octet-stream"})
    shard = wire.Shard(np.arange(len(intended)), intended, np.zeros(len(intended), np.int32), (data,), ("",))
    messages: list[tuple[bytes, bytes]] = []
    recorder = Recorder(lambda kind, payload: messages.append((kind, payload)), shard.arrival_id)
    answers = Answers(1)
    target = wire.Target("http", "127.0.0.1", port, timeout_s, max_connections)
    engine = HttpReplay(shard, target, recorder, answers, lambda: None)
    engine.prepare()
    if stop_after_s is not None:
        gevent.spawn_later(stop_after_s, engine.stop)
    epoch_ns = time.monotonic_ns()
    engine.run(epoch_ns)
    rows = recorder.flush()
    errors = [text for kind, payload in messages if kind == wire.ERRORS for text in json.loads(payload)]
    return Replayed(np.sort(rows, order="arrival_id"), errors, answers, engine, epoch_ns)


def test_a_good_answer_is_recorded_with_its_times_and_sizes() -> None:
    with serving(OK) as server:
        result = replay(server.port, [0, 5, 20])
    assert result.outcomes() == ["ok"] * 3
    assert result.rows["arrival_id"].tolist() == [0, 1, 2]
    for row, at_ms in zip(result.rows, [0, 5, 20], strict=True):
        assert result.epoch_ns + at_ms * 1e6 <= row["sent_ns"] <= row["first_byte_ns"] <= row["done_ns"]
        assert row["status"] == 200
        assert row["error"] == -1
        assert row["bytes_sent"] == len(
            http_request("127.0.0.1", server.port, "/infer", b"x" * 100, {"Content-Type": "application/octet-stream"})
        )
        assert row["bytes_received"] == len(OK)
    assert result.answers._kept == [{("text/plain", None, b"ok"): 3}]


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: v\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "outcome", "status", "error"),
    [
        (answer("503 Busy", b"queue full"), "shed", 503, "HTTP 503: queue full"),
        (answer("429 Slow down"), "shed", 429, "HTTP 429"),
        (answer("404 Not Found", b"no model m"), "error", 404, "HTTP 404: no model m"),
        (answer("500 Oops", b"\xff\xfe" + b"y" * 10_000), "error", 500, "HTTP 500: \ufffd\ufffd" + "y" * 198),
        (answer("302 Found", b"", "Location: /x"), "error", 302, "HTTP 302"),
        (answer("204 No Content").replace(b"Content-Length: 0\r\n", b""), "error", 204, "HTTP 204"),
        (answer("202 Accepted", b"come back later"), "error", 202, "HTTP 202: come back later"),
        (CHUNKED, "ok", 200, None),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + OK, "ok", 200, None),
        (OK.replace(b"HTTP/1.1", b"HTTP/1.0"), "ok", 200, None),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", "ok", 200, None),
        (OK + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad", "ok", 200, None),
        (OK + b"garbage", "ok", 200, None),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "error", -1, "malformed answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", "error", -1, "malformed answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "error", -1, "malformed answer"),
        (CHUNKED.replace(b"chunked\r\n", b"chunked\r\nContent-Length: 9\r\n"), "error", -1, "malformed answer"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "error", -1, "malformed"),
        (OK.replace(b"Length: 2", b"Length: 9"), "connection", -1, "within the answer"),
        (CHUNKED[:-20], "connection", -1, "within the answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "connection", -1, "within the answer"),
        (b"", "connection", -1, "without an answer"),
    ],
)
def test_what_an_answer_counts_as(raw: bytes, outcome: str, status: int, error: str | None) -> None:
    def once_then_close(sock: socket.socket, number: int, body: bytes) -> bool:
        sock.sendall(raw)
        return False

    with serving(once_then_close) as server:
        result = replay(server.port, [0])
    assert result.outcomes() == [outcome]
    assert result.rows["status"].tolist() == [status]
    if error is None:
        assert result.errors == []
    else:
        assert error in result.error(0)
        assert len(result.error(0)) <= 260


def test_a_body_in_many_pieces_is_put_together() -> None:
    def drip(sock: socket.socket, number: int, body: bytes) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in CHUNKED:
            sock.sendall(bytes([byte]))

    with serving(drip) as server:
        result = replay(server.port, [0, 1, 2])
    assert result.outcomes() == ["ok"] * 3
    assert result.bodies() == {b"abcde": 3}


def test_an_answer_like_the_last_one_is_still_read_as_what_it_is() -> None:
    """Heads that were parsed before are recognised; whatever does not fit them exactly goes to the parser again."""
    half = answer("200 OK", b"wxyz")
    script = [OK, OK, OK + b"!", answer("200 OK", b"abcd"), half[:-2], half, answer("503 Busy", b"no"), CHUNKED, OK]

    def follow(sock: socket.socket, number: int, body: bytes) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(script[number])
        if script[number] == half[:-2]:
            time.sleep(0.02)
            sock.sendall(half[-2:])

    with serving(follow) as server:
        result = replay(server.port, [60 * index for index in range(len(script))], max_connections=4)
    assert result.outcomes() == ["ok"] * 6 + ["shed"] + ["ok"] * 2
    assert result.bodies() == {b"ok": 4, b"abcd": 1, b"wxyz": 2, b"abcde": 1}
    assert result.rows["bytes_received"].tolist() == [len(raw) for raw in [*script[:4], half, *script[5:]]]
    assert set(result.engine._heads) == {OK[:-2], half[:-4]}, "only of answers with a length that keep the connection"


def test_remembered_heads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KNOWN_HEADS", 3)

    def number_them(sock: socket.socket, number: int, body: bytes) -> None:
        sock.sendall(answer("200 OK", b"ok", f"X-Request: {number}"))

    with serving(number_them) as server:
        result = replay(server.port, range(0, 100, 10))
    assert result.outcomes() == ["ok"] * 10
    assert len(result.engine._heads) <= 3


def test_connections_are_reused_and_closed_when_the_server_says_so() -> None:
    with serving(OK) as server:
        replay(server.port, range(0, 100, 10), max_connections=1)
        assert server.accepted == 1
    with serving(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) as server:
        result = replay(server.port, range(0, 100, 20), max_connections=8)
        assert result.outcomes() == ["ok"] * 5
        assert result.engine.connections_opened >= 5


def test_bytes_after_an_answer_do_not_reach_the_next_arrival() -> None:
    with serving(OK + answer("200 OK", b"not yours")) as server:
        result = replay(server.port, [0, 60, 120], max_connections=4)
    assert result.outcomes() == ["ok"] * 3
    assert result.bodies() == {b"ok": 3}


def test_a_reset_within_the_answer_is_a_lost_connection() -> None:
    def reset(sock: socket.socket, number: int, body: bytes) -> bool:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nabc")
        time.sleep(0.05)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    with serving(reset) as server:
        result = replay(server.port, [0])
    assert result.outcomes() == ["connection"]
    assert "connection lost" in result.error(0)
    assert result.rows["sent_ns"][0] != wire.NONE


def test_refused_connections_were_never_sent() -> None:
    (port,) = free_ports(1)
    result = replay(port, [0, 10])
    assert result.outcomes() == ["connection"] * 2
    assert result.rows["sent_ns"].tolist() == [wire.NONE] * 2
    assert result.rows["bytes_sent"].tolist() == [0, 0]
    assert "refused" in result.error(0)


def test_a_connection_that_the_server_closed_while_idle_harms_nobody() -> None:
    def close_later(sock: socket.socket, number: int, body: bytes) -> bool:
        sock.sendall(OK)
        return False

    with serving(close_later) as server:
        result = replay(server.port, [0, 150, 300], max_connections=1)
    assert result.outcomes() == ["ok"] * 3
    assert result.engine.connections_opened == 3


def test_no_answer_within_the_timeout() -> None:
    release = threading.Event()

    def mute(sock: socket.socket, number: int, body: bytes) -> None:
        if number == 0:
            release.wait(30)
        else:
            sock.sendall(OK)

    with serving(mute) as server:
        result = replay(server.port, [0, 50, 100], timeout_s=0.3)
        release.set()
    assert result.outcomes() == ["timeout", "ok", "ok"]
    # The patience begins just before the stamp of sending.
    assert result.rows["done_ns"][0] - result.rows["sent_ns"][0] >= 0.299e9
    assert result.error(0) == "no answer within 0.3 s"


def test_a_slow_drip_does_not_outlive_the_timeout() -> None:
    def drip(sock: socket.socket, number: int, body: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(500):
            sock.sendall(b".")
            time.sleep(0.02)

    with serving(drip) as server:
        result = replay(server.port, [0], timeout_s=0.3)
    assert result.outcomes() == ["timeout"]
    assert result.rows["bytes_received"][0] > 0


def test_an_endless_head_is_an_error() -> None:
    def endless(sock: socket.socket, number: int, body: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            sock.sendall(b"X-Filler: " + b"y" * 4000 + b"\r\n")

    with serving(endless) as server:
        result = replay(server.port, [0])
    assert result.outcomes() == ["error"]
    assert "head exceeds" in result.error(0)


@pytest.mark.parametrize("head", [b"Content-Length: 99999999999\r\n", b"Transfer-Encoding: chunked\r\n", b""])
def test_an_endless_body_is_an_error(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ANSWER_BYTES", 1_000_000)

    def endless(sock: socket.socket, number: int, body: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        while True:
            sock.sendall(b"fff0\r\n" + b"y" * 0xFFF0 + b"\r\n")

    with serving(endless) as server:
        result = replay(server.port, [0])
    assert result.outcomes() == ["error"]
    assert "answer exceeds" in result.error(0)


def test_big_bodies_both_ways() -> None:
    body = np.random.default_rng(0).bytes(600_000)

    def echo(sock: socket.socket, number: int, received: bytes) -> None:
        time.sleep(0.01)
        sock.sendall(answer("200 OK", received))

    with serving(echo) as server:
        result = replay(server.port, [0, 1, 2, 3], body=body)
    assert result.outcomes() == ["ok"] * 4
    assert (result.rows["bytes_sent"] > 600_000).all()
    assert (result.rows["bytes_received"] > 600_000).all()
    assert set(result.bodies()) == {body}
    assert sum(result.bodies().values()) + result.answers.unchecked == 4


def test_a_server_that_refuses_without_reading_the_body() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.recv(1000)
                sock.sendall(answer("413 Too large", b"at most 1 MB"))
                threading.Timer(2, sock.close).start()

    threading.Thread(target=refuse, daemon=True).start()
    with listener:
        result = replay(listener.getsockname()[1], [0], body=b"x" * 20_000_000)
    assert result.outcomes() == ["error"]
    assert result.error(0) == "HTTP 413: at most 1 MB"
    assert 0 < result.rows["bytes_sent"][0] < 20_000_000


def test_sending_never_waits_for_answers() -> None:
    """The server answers nothing until it has every request: a sender that waits for answers would never end."""
    together = threading.Barrier(40)

    def all_or_nothing(sock: socket.socket, number: int, body: bytes) -> None:
        together.wait(20)
        sock.sendall(OK)

    with serving(all_or_nothing) as server:
        result = replay(server.port, range(0, 400, 10))
    assert result.outcomes() == ["ok"] * 40
    assert result.engine.peak_connections >= 40
    # The early ones show the wait for the late ones as response time.
    response = result.rows["done_ns"] - result.epoch_ns - np.arange(40) * 10_000_000
    assert response[0] >= 390e6


def test_arrivals_past_the_connection_limit_are_dropped_and_recorded() -> None:
    release = threading.Event()

    def wait(sock: socket.socket, number: int, body: bytes) -> None:
        release.wait(20)
        sock.sendall(OK)

    with serving(wait) as server:
        threading.Timer(0.5, release.set).start()
        result = replay(server.port, [0, 10, 20, 30, 40], max_connections=2)
    assert result.outcomes() == ["ok", "ok", "dropped", "dropped", "dropped"]
    assert result.error(2) == "all 2 connections are busy"
    assert (result.rows["sent_ns"][2:] == wire.NONE).all()
    assert (result.rows["status"][2:] == -1).all()


@pytest.mark.parametrize("at_ms", [[], [0], [7] * 50, [-20, -10, 0]])
def test_schedules_of_every_shape(at_ms: list[float]) -> None:
    with serving(OK) as server:
        result = replay(server.port, at_ms)
    assert result.outcomes() == ["ok"] * len(at_ms)


def test_a_server_that_does_not_accept_is_not_the_generators_lateness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue of connections is full until every arrival has been taken up; the kernel then tries again."""
    monkeypatch.setattr(http, "PREOPENED", 0)
    count = 8
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = listener.getsockname()[1]
    data = http_request("127.0.0.1", port, "/infer", b"x", {})
    shard = wire.Shard(np.arange(count), np.zeros(count, np.int64), np.zeros(count, np.int32), (data,), ("",))
    recorder = Recorder(lambda kind, payload: None, shard.arrival_id)
    target = wire.Target("http", "127.0.0.1", port, 200.0, 64)  # the kernel doubles its pause
    engine = HttpReplay(shard, target, recorder, Answers(1), lambda: None)
    began_accepting: list[int] = []

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.recv(1000)
            sock.sendall(OK)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    def release() -> None:
        while not engine.pacer.exhausted:
            gevent.sleep(0.01)
        gevent.sleep(0.1)
        began_accepting.append(time.monotonic_ns())
        threading.Thread(target=accept, daemon=True).start()

    gevent.spawn(release)
    with listener:
        engine.run(time.monotonic_ns())
    rows = recorder.flush()
    assert set(rows["outcome"]) == {Outcome.OK}
    assert rows["sent_ns"].max() > began_accepting[0]
    assert max(engine.pacer.began_ns) < began_accepting[0]
    assert all(engine.pacer.began_ns[row["arrival_id"]] <= row["sent_ns"] for row in rows)


def test_stopping_early_keeps_what_was_sent() -> None:
    def mute(sock: socket.socket, number: int, body: bytes) -> None:
        if number < 2:
            sock.sendall(OK)

    with serving(mute) as server:
        result = replay(server.port, [0, 20, 40, 60, 60_000, 60_001], stop_after_s=0.5)
    assert result.rows["arrival_id"].tolist() == [0, 1, 2, 3]
    assert result.outcomes() == ["ok", "ok", "timeout", "timeout"]
    assert result.error(2) == "stopped before the answer"


def test_connections_leave_no_garbage_behind() -> None:
    """The collector is off while it counts, so whatever hangs in a cycle would stay for the whole trial."""
    with serving(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) as server:
        gc.collect()
        gc.disable()
        try:
            result = replay(server.port, [0.5 * k for k in range(200)], max_connections=400)
            opened = result.engine.connections_opened
            del result
            unreachable = [thing for thing in _unreachable() if type(thing).__module__.startswith("tailrace.harness.")]
        finally:
            gc.enable()
    assert opened >= 200
    assert not [thing for thing in unreachable if isinstance(thing, Connection)]


def _unreachable() -> list[object]:
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = list(gc.garbage)
    gc.garbage.clear()
    return found


BEHAVIOURS: dict[str, Callable[[socket.socket], bool | None]] = {
    "good": lambda sock: sock.sendall(OK),
    "late": lambda sock: (time.sleep(0.02), sock.sendall(OK))[1],
    "shed": lambda sock: sock.sendall(answer("503 Busy")),
    "garbage": lambda sock: sock.sendall(b"\0\1\2\3"),
    "half": lambda sock: (sock.sendall(OK[:-1]), False)[1],
    "close": lambda sock: False,
    "good then close": lambda sock: (sock.sendall(OK), False)[1],
    "extra": lambda sock: sock.sendall(OK + OK),
    "mute": lambda sock: None,
}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    script=st.lists(st.sampled_from(sorted(BEHAVIOURS)), min_size=1, max_size=30),
    gaps_ms=st.lists(st.sampled_from([0, 0, 1, 3]), min_size=0, max_size=30),
    max_connections=st.integers(1, 8),
)
def test_every_arrival_has_exactly_one_row(script: list[str], gaps_ms: list[int], max_connections: int) -> None:
    at_ms = np.cumsum(gaps_ms).tolist()
    with serving(lambda sock, number, body: BEHAVIOURS[script[number % len(script)]](sock)) as server:
        result = replay(server.port, at_ms, timeout_s=0.2, max_connections=max_connections)
    assert result.rows["arrival_id"].tolist() == list(range(len(at_ms)))
    good = result.rows["outcome"] == Outcome.OK
    assert sum(result.bodies().values()) + result.answers.unchecked == good.sum()
    assert result.engine.peak_connections <= max_connections
    assert not result.engine._open
