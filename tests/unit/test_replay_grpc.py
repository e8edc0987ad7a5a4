"""The gRPC sender against a small server in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import gevent
import grpc
import numpy as np
import pytest

from tailrace.harness.processes import free_ports
from tailrace.harness.records.schema import Outcome
from tailrace.harness.replay import wire
from tailrace.harness.replay.grpc import GrpcReplay, outcome_of
from tailrace.harness.replay.recorder import Answers, Recorder

SERVER = """
import sys, threading, time
from concurrent import futures
import grpc

together = threading.Barrier(12)

def answer(request, context):
    method = context.method
    if method == "/t/busy":
        context.abort(grpc.StatusCode.UNAVAILABLE, "all instances are busy")
    if method == "/t/full":
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
    if method == "/t/raise":
        raise RuntimeError("boom")
    if method == "/t/slow":
        time.sleep(5)
    if method == "/t/together":
        together.wait(20)
    if method == "/t/soon":
        time.sleep(0.3)
    return request[::-1]

class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method.startswith("/t/"):
            def call(request, context):
                context.method = details.method
                return answer(request, context)
            return grpc.unary_unary_rpc_method_handler(call)

server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
server.add_generic_rpc_handlers((Handler(),))
wait, port = sys.argv[1:]
if wait == "wait":
    print("waiting", flush=True)
    sys.stdin.readline()
port = server.add_insecure_port("127.0.0.1:" + port)
server.start()
print(port, flush=True)
sys.stdin.read()
"""


class Server:
    """A gRPC server that answers with its request reversed, unless the method's name says otherwise."""

    def __init__(self, wait: bool = False, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "wait" if wait else "now", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = port if wait else int(line)

    def listen(self) -> None:
        """Begin to serve, for one that was told to wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.kill()


def replay(
    port: int,
    calls: Sequence[tuple[float, str, bytes]],
    *,
    timeout_s: float = 20.0,
    max_connections: int = 64,
    stop_after_s: float | None = None,
) -> tuple[np.ndarray, list[str], Answers, GrpcReplay]:
    """Replay ``(instant in ms, method, message)``; rows by arrival, error texts, answers."""
    intended = np.array([at_ms * 1e6 for at_ms, _, _ in calls], np.int64)
    shard = wire.Shard(
        np.arange(len(calls)),
        intended,
        np.arange(len(calls), dtype=np.int32),
        tuple(data for _, _, data in calls),
        tuple(method for _, method, _ in calls),
    )
    messages: list[tuple[bytes, bytes]] = []
    recorder = Recorder(lambda kind, payload: messages.append((kind, payload)), shard.arrival_id)
    answers = Answers(len(calls))
    target = wire.Target("grpc", "127.0.0.1", port, timeout_s, max_connections)
    engine = GrpcReplay(shard, target, recorder, answers, lambda: None)
    engine.prepare()
    if stop_after_s is not None:
        gevent.spawn_later(stop_after_s, engine.stop)
    engine.run(time.monotonic_ns())
    rows = recorder.flush()
    errors = [text for kind, payload in messages if kind == wire.ERRORS for text in json.loads(payload)]
    return np.sort(rows, order="arrival_id"), errors, answers, engine


def names(rows: np.ndarray) -> list[str]:
    return [Outcome(code).name.lower() for code in rows["outcome"]]


def test_answers_and_their_times(server: Server) -> None:
    big = np.random.default_rng(0).bytes(600_000)
    rows, errors, answers, engine = replay(server.port, [(0, "/t/ok", b"abc"), (5, "/t/ok", big)])
    assert names(rows) == ["ok", "ok"]
    assert rows["arrival_id"].tolist() == [0, 1]
    assert rows["status"].tolist() == [0, 0]
    assert rows["bytes_sent"].tolist() == rows["bytes_received"].tolist() == [3, 600_000]
    assert (rows["first_byte_ns"] == wire.NONE).all()
    assert (rows["sent_ns"] <= rows["done_ns"]).all()
    assert errors == []
    meta, bodies = wire.unpack(answers.pack())
    assert bodies == [b"cba", big[::-1]]
    assert [entry["headers"] for entry in meta["answers"]] == [{}, {}]
    assert engine.connections_opened == 4


def test_what_a_status_counts_as(server: Server) -> None:
    methods = ["/t/busy", "/t/full", "/t/raise", "/none/such", "/t/slow", "/t/ok"]
    rows, errors, _, _ = replay(server.port, [(0, method, b"x") for method in methods], timeout_s=1.0)
    assert names(rows) == ["shed", "shed", "error", "error", "timeout", "ok"]
    assert rows["status"].tolist() == [14, 8, 2, 12, 4, 0]
    texts = [errors[number] if number >= 0 else "" for number in rows["error"]]
    assert texts[0] == "gRPC UNAVAILABLE: all instances are busy"
    assert "boom" in texts[2]
    assert rows["done_ns"][4] - rows["sent_ns"][4] >= 0.9e9


def test_nobody_there() -> None:
    (port,) = free_ports(1)
    rows, errors, _, _ = replay(port, [(0, "/t/ok", b"x"), (20, "/t/ok", b"x")])
    assert names(rows) == ["connection", "connection"]
    assert rows["status"].tolist() == [14, 14]
    assert "failed to connect" in errors[0]


def test_a_server_killed_amid_calls() -> None:
    doomed = Server()
    gevent.spawn_later(0.8, doomed.kill)
    rows, _, _, _ = replay(doomed.port, [(0, "/t/soon", b"a"), (10, "/t/slow", b"b")])
    assert names(rows) == ["ok", "connection"]


def test_a_server_that_comes_back_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's own patience between two attempts grows to two minutes; an outage must not be prolonged by it."""
    monkeypatch.setattr("tailrace.harness.replay.grpc.PRECONNECT_S", 0.1)
    (port,) = free_ports(1)
    late = Server(wait=True, port=port)
    gevent.spawn_later(1.0, late.listen)
    rows, _, _, _ = replay(port, [(100 * k, "/t/ok", b"x") for k in range(40)])
    late.kill()
    outcomes = names(rows)
    assert set(outcomes) == {"connection", "ok"}
    assert outcomes[0] == "connection"
    assert outcomes[-4:] == ["ok"] * 4  # one on each channel


def test_calls_past_the_limit_are_dropped(server: Server) -> None:
    rows, errors, _, engine = replay(server.port, [(0, "/t/soon", b"x")] * 4, max_connections=2)
    assert names(rows) == ["ok", "ok", "dropped", "dropped"]
    assert rows["sent_ns"].tolist()[2:] == [wire.NONE] * 2
    assert errors == ["2 calls are outstanding"]
    assert engine.connections_opened == 2


def test_calls_do_not_wait_for_each_other(server: Server) -> None:
    """None of the twelve is answered before all are there."""
    rows, _, _, _ = replay(server.port, [(10 * k, "/t/together", b"x") for k in range(12)])
    assert names(rows) == ["ok"] * 12
    assert rows["sent_ns"].max() < rows["done_ns"].min()


def test_an_empty_schedule(server: Server) -> None:
    rows, _, _, _ = replay(server.port, [])
    assert len(rows) == 0


def test_stopping_early_keeps_what_was_sent(server: Server) -> None:
    calls = [(0, "/t/ok", b"x"), (1, "/t/slow", b"x"), (60_000, "/t/ok", b"x")]
    rows, errors, _, _ = replay(server.port, calls, stop_after_s=0.5)
    assert names(rows) == ["ok", "timeout"]
    assert errors == ["stopped before the answer"]


def idle_engine(port: int, at_ms: list[float], tick: Callable[[], None]) -> tuple[GrpcReplay, Recorder]:
    shard = wire.Shard(
        np.arange(len(at_ms)),
        (np.array(at_ms) * 1e6).astype(np.int64),
        np.zeros(len(at_ms), np.int32),
        (b"x",),
        ("/t/ok",),
    )
    recorder = Recorder(lambda kind, payload: None, shard.arrival_id)
    engine = GrpcReplay(shard, wire.Target("grpc", "127.0.0.1", port, 20.0, 64), recorder, Answers(1), tick)
    engine.prepare()
    return engine, recorder


def test_a_call_stopped_before_it_began_was_never_sent(server: Server) -> None:
    """Fired and stopped in one turn of the loop: none of its code ever runs."""
    stopped = False

    def fire_and_stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            engine.pacer.begin(time.monotonic_ns() - 1)
            engine.pacer.fire()
            assert len(engine._outstanding) == 2
            engine._stop()

    engine, recorder = idle_engine(server.port, [0, 0, 60_000], fire_and_stop)
    with gevent.Timeout(30):
        engine.run(time.monotonic_ns() + 3_600_000_000_000)
    assert stopped
    assert engine._outstanding == {}
    assert engine.sent == 0
    assert len(recorder.flush()) == 0


def test_a_stop_before_the_replay_runs_is_not_lost(server: Server) -> None:
    engine, recorder = idle_engine(server.port, [3_600_000], lambda: None)
    engine.stop()
    with gevent.Timeout(30):
        engine.run(time.monotonic_ns())
    assert len(recorder.flush()) == 0


def test_a_bug_while_recording_ends_the_replay(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, recorder = idle_engine(server.port, [0, 3_600_000], lambda: None)
    monkeypatch.setattr(recorder, "row", lambda *row: 1 // 0)
    with gevent.Timeout(30), pytest.raises(ZeroDivisionError):
        engine.run(time.monotonic_ns())


def test_an_arrival_begins_when_it_is_handed_over(server: Server) -> None:
    rows, _, _, engine = replay(server.port, [(0, "/t/soon", b"x")] * 3, max_connections=2)
    assert engine.pacer.began_ns[:2].tolist() == rows["sent_ns"][:2].tolist()
    assert 0 < engine.pacer.began_ns[2] <= rows["done_ns"][2]  # dropped


@pytest.mark.parametrize(
    ("code", "details", "outcome"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: …", Outcome.CONNECTION),
        (grpc.StatusCode.UNAVAILABLE, "Stream removed (Socket closed)", Outcome.CONNECTION),
        (grpc.StatusCode.UNAVAILABLE, "Connection reset by peer", Outcome.CONNECTION),
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", Outcome.SHED),
        (grpc.StatusCode.UNAVAILABLE, "", Outcome.SHED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", Outcome.SHED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (5 vs. 4)", Outcome.ERROR),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Outcome.TIMEOUT),
        (grpc.StatusCode.INTERNAL, "boom", Outcome.ERROR),
    ],
)
def test_status_and_words_decide(code: grpc.StatusCode, details: str, outcome: Outcome) -> None:
    assert outcome_of(code, details) is outcome
