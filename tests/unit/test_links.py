"""The link proxy between sockets of the test's own: what passes, what each fault does, and that it heals."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tailrace.harness.errors import DeployError, TailraceError
from tailrace.harness.processes import ProcessRef, free_ports, log_tail
from tailrace.harness.servers.guardian import Guardian
from tailrace.harness.servers.link_proxy import HELD_LIMIT_BYTES
from tailrace.harness.servers.links import Link, Links
from tests.conftest import wait_until

HOST = "127.0.0.1"
PATIENCE_S = 60.0
"""For what must happen; a wait for what must not is short."""
BRIEFLY_S = 0.3


class EchoServer:
    """Sends back what it gets, and closes when the other side has ended."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server((HOST, port), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guardian]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILRACE_STATE", str(tmp_path_factory.mktemp("state")))
        guardian = Guardian()
    with guardian:
        yield guardian


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="links-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.close()


class Bench:
    """A proxy with a link ``node-0`` of two ports to the echo server and one ``node-1`` to a listener of the test's own."""

    def __init__(self, host: Guardian, folder: Path, echo: EchoServer) -> None:
        self.listener = socket.create_server((HOST, 0))
        self.listener.settimeout(PATIENCE_S)
        self.port, self.other_port, self.raw_port = free_ports(3)
        self.log = folder / "proxy.log"
        chosen = [
            Link("node-0", (HOST, self.port), (HOST, echo.port)),
            Link("node-0", (HOST, self.other_port), (HOST, echo.port)),
            Link("node-1", (HOST, self.raw_port), (HOST, self.listener.getsockname()[1])),
        ]
        self.links = Links.start(host, chosen, folder, self.log)

    def connect(self, port: int | None = None) -> socket.socket:
        connection = socket.create_connection((HOST, port or self.port), timeout=PATIENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def connect_raw(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a connection through ``node-1``: the client's and the server's."""
        client = self.connect(self.raw_port)
        server, _ = self.listener.accept()
        server.settimeout(PATIENCE_S)
        return client, server

    def open_connections(self, name: str) -> int:
        """How many there are; clearing what is not in force changes nothing."""
        return self.links.clear(name, "reset")


@pytest.fixture
def bench(host: Guardian, folder: Path, echo: EchoServer) -> Iterator[Bench]:
    started = Bench(host, folder, echo)
    yield started
    complaints = log_tail(started.log)
    started.links.stop()
    started.listener.close()
    assert complaints == "ready", complaints


def receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        data = connection.recv(min(1 << 20, size - len(parts)))
        assert data, f"the connection ended after {len(parts)} of {size} bytes"
        parts += data
    return bytes(parts)


def round_trip_s(connection: socket.socket, body: bytes = b"ping") -> float:
    begun = time.monotonic()
    connection.sendall(body)
    assert receive(connection, len(body)) == body
    return time.monotonic() - begun


def silent(connection: socket.socket) -> bool:
    """Whether nothing comes for a while, not even an end."""
    connection.settimeout(BRIEFLY_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_S)
    return False


def abort(connection: socket.socket) -> None:
    """Close it with an RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_reset(connection: socket.socket) -> bool:
    """Whether the next thing that comes is an RST."""
    with contextlib.suppress(ConnectionResetError):
        connection.recv(1)
        return False
    return True


def new_one_is_reset(port: int) -> bool:
    """Whether a new connection is reset; that may show before ``connect`` returns."""
    try:
        with socket.create_connection((HOST, port), timeout=PATIENCE_S) as connection:
            return is_reset(connection)
    except ConnectionResetError:
        return True


def send_until_blocked(connection: socket.socket, limit: int) -> int:
    """How much a sender gets rid of before it has been blocked for a while; ``limit`` when it never is."""
    connection.settimeout(2.0)
    sent = 0
    try:
        while sent < limit:
            sent += connection.send(bytes(1 << 18))
    except TimeoutError:
        pass
    connection.settimeout(PATIENCE_S)
    return sent


@pytest.mark.parametrize("size", [1, 1000, 65_536, 262_145, 9_000_000])
def test_bytes_pass_unchanged_in_both_directions(bench: Bench, size: int) -> None:
    body = random.Random(size).randbytes(size)
    with bench.connect() as connection:
        sender = threading.Thread(target=connection.sendall, args=(body,))
        sender.start()
        assert receive(connection, size) == body
        sender.join()


def test_many_connections_at_once_do_not_mix(bench: Bench) -> None:
    def converse(number: int) -> bool:
        rng = random.Random(number)
        with bench.connect(bench.port if number % 2 else bench.other_port) as connection:
            for _ in range(20):
                round_trip_s(connection, rng.randbytes(rng.randrange(1, 30_000)))
            return True

    with ThreadPoolExecutor(50) as pool:
        assert all(pool.map(converse, range(200)))
    wait_until(lambda: bench.open_connections("node-0") == 0, "what was closed is forgotten")


@pytest.mark.parametrize("client_first", [True, False])
def test_a_half_close_passes_and_the_other_direction_goes_on(bench: Bench, client_first: bool) -> None:
    client, server = bench.connect_raw()
    first, second = (client, server) if client_first else (server, client)
    with client, server:
        first.sendall(b"last words")
        first.shutdown(socket.SHUT_WR)
        assert receive(second, 10) == b"last words"
        assert second.recv(1) == b""
        second.sendall(b"answer")
        assert receive(first, 6) == b"answer"
        second.shutdown(socket.SHUT_WR)
        assert first.recv(1) == b""
        wait_until(lambda: bench.open_connections("node-1") == 0, "the connection is over")


@pytest.mark.parametrize("client_first", [True, False])
def test_a_reset_of_one_side_passes_as_a_reset(bench: Bench, client_first: bool) -> None:
    client, server = bench.connect_raw()
    first, second = (client, server) if client_first else (server, client)
    with client, server:
        abort(first)
        assert is_reset(second)
        wait_until(lambda: bench.open_connections("node-1") == 0, "the connection is over")


def test_latency_is_added_to_every_round_trip_until_it_is_cleared(bench: Bench) -> None:
    with bench.connect() as open_before, bench.connect(bench.other_port) as other:
        round_trip_s(open_before)
        assert bench.links.latency("node-0", 120) == 2
        with bench.connect() as new:
            for connection in (open_before, other, new):
                assert min(round_trip_s(connection) for _ in range(3)) >= 0.120
            bench.links.clear("node-0", "latency")
            for connection in (open_before, other, new):
                assert min(round_trip_s(connection) for _ in range(20)) < 0.120


def test_a_link_is_another_ones_and_feels_nothing(bench: Bench) -> None:
    bench.links.partition("node-0")
    client, server = bench.connect_raw()
    with client, server:
        client.sendall(b"x")
        assert receive(server, 1) == b"x"


def test_many_chunks_are_in_flight_under_latency(bench: Bench) -> None:
    """If each waited for the one before, a hundred would take ten seconds."""
    bench.links.latency("node-0", 200)
    with bench.connect() as connection:
        begun = time.monotonic()
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.001)
        assert receive(connection, 100) == b"x" * 100
        assert 0.2 <= time.monotonic() - begun < 8
        begun = time.monotonic()
        body = random.Random(0).randbytes(3 * HELD_LIMIT_BYTES)
        threading.Thread(target=connection.sendall, args=(body,), daemon=True).start()
        assert receive(connection, len(body)) == body, "more than may be held passes too"


def test_bytes_and_their_end_keep_their_order_under_all_that_holds_them(bench: Bench) -> None:
    bench.links.latency("node-0", 10)
    bench.links.stalls("node-0", 0.3, 20, 7)
    numbers = b"".join(struct.pack(">I", number) for number in range(20_000))

    def send(connection: socket.socket) -> None:
        for begin in range(0, len(numbers), 2000):
            connection.sendall(numbers[begin : begin + 2000])
            time.sleep(0.001)
        connection.shutdown(socket.SHUT_WR)

    with bench.connect() as connection:
        sender = threading.Thread(target=send, args=(connection,))
        sender.start()
        assert receive(connection, len(numbers)) == numbers
        assert connection.recv(1) == b""
        sender.join()


def test_stalls_hold_a_share_of_the_chunks_and_add_to_latency(bench: Bench) -> None:
    with bench.connect() as connection:
        bench.links.stalls("node-0", 0.25, 60, 7)
        times = [round_trip_s(connection) for _ in range(100)]
        assert min(times) < 0.060
        # Either way may stall: 1 - 0.75² = 44 of 100. A slow machine can only add to those.
        assert sum(seconds >= 0.060 for seconds in times) >= 25
        bench.links.stalls("node-0", 1, 60, 7)
        bench.links.latency("node-0", 80)
        assert round_trip_s(connection) >= 0.200
        bench.links.clear("node-0", "stalls")
        assert min(round_trip_s(connection) for _ in range(20)) >= 0.080
        bench.links.clear("node-0", "latency")
        assert min(round_trip_s(connection) for _ in range(20)) < 0.080


def test_what_latency_and_stalls_hold_passes_at_once_when_they_are_cleared(bench: Bench) -> None:
    bench.links.latency("node-0", 2 * 3600_000)
    bench.links.stalls("node-0", 1, 3600_000, 1)
    with bench.connect() as connection:
        connection.sendall(b"early")
        assert silent(connection)
        bench.links.clear("node-0", "latency")
        assert silent(connection)
        bench.links.clear("node-0", "stalls")
        assert receive(connection, 5) == b"early"


def test_a_partition_holds_everything_and_releases_it_in_order(bench: Bench) -> None:
    client, server = bench.connect_raw()
    with client, server:
        bench.links.partition("node-1")
        client.sendall(b"one ")
        server.sendall(b"answer")
        new = bench.connect(bench.raw_port)
        new.sendall(b"from the new one")
        assert silent(client)
        assert silent(server)
        client.sendall(b"two")
        client.shutdown(socket.SHUT_WR)
        assert silent(server)
        bench.listener.settimeout(BRIEFLY_S)
        with pytest.raises(TimeoutError):
            bench.listener.accept()
        bench.listener.settimeout(PATIENCE_S)
        assert bench.links.clear("node-1", "partition") == 2
        assert receive(server, 7) == b"one two"
        assert server.recv(1) == b""
        assert receive(client, 6) == b"answer"
        with new, bench.listener.accept()[0] as accepted:
            accepted.settimeout(PATIENCE_S)
            assert receive(accepted, 16) == b"from the new one"


def test_who_gives_up_during_a_partition_is_not_connected_when_it_ends(bench: Bench) -> None:
    bench.links.partition("node-1")
    with bench.connect(bench.raw_port) as impatient:
        impatient.sendall(b"too late")
    with bench.connect(bench.raw_port) as patient:
        wait_until(lambda: bench.open_connections("node-1") == 2, "both are accepted")
        patient.sendall(b"in time")
        bench.links.clear("node-1")
        with bench.listener.accept()[0] as accepted:
            accepted.settimeout(PATIENCE_S)
            assert receive(accepted, 7) == b"in time"
        wait_until(lambda: bench.open_connections("node-1") <= 1, "the other one is forgotten")


def test_a_partition_and_latency_are_cleared_each_on_its_own(bench: Bench) -> None:
    with bench.connect() as connection:
        round_trip_s(connection)
        bench.links.latency("node-0", 150)
        bench.links.partition("node-0")
        connection.sendall(b"held")
        assert silent(connection)
        bench.links.clear("node-0", "partition")
        assert receive(connection, 4) == b"held"
        assert round_trip_s(connection) >= 0.150


def test_reset_hits_open_connections_and_new_ones_while_it_lasts(bench: Bench) -> None:
    client, server = bench.connect_raw()
    with client, server:
        client.sendall(b"x")
        assert receive(server, 1) == b"x"
        assert bench.links.reset("node-1", once=False) == 1
        assert is_reset(client)
        assert is_reset(server)
    for _ in range(3):
        assert new_one_is_reset(bench.raw_port)
    assert bench.open_connections("node-1") == 0  # and clears it
    client, server = bench.connect_raw()
    with client, server:
        server.sendall(b"again")
        assert receive(client, 5) == b"again"


def test_reset_once_hits_only_open_connections(bench: Bench) -> None:
    with bench.connect() as first, bench.connect(bench.other_port) as second:
        round_trip_s(first)
        round_trip_s(second)
        assert bench.links.reset("node-0", once=True) == 2
        assert is_reset(first)
        assert is_reset(second)
    with bench.connect() as new:
        round_trip_s(new)


def test_reset_ends_what_a_partition_holds(bench: Bench) -> None:
    client, server = bench.connect_raw()
    with client, server:
        bench.links.partition("node-1")
        client.sendall(b"held for good")
        waiting = bench.connect(bench.raw_port)
        wait_until(lambda: bench.open_connections("node-1") == 2, "both are accepted")
        bench.links.reset("node-1", once=True)
        assert is_reset(client)
        assert is_reset(waiting)
        assert is_reset(server)
        wait_until(lambda: bench.open_connections("node-1") == 0, "they are over, and the partition is not")


def test_a_target_that_is_down_resets_and_one_that_comes_up_answers(host: Guardian, folder: Path) -> None:
    port, target_port = free_ports(2)
    links = Links.start(host, [Link("node-0", (HOST, port), (HOST, target_port))], folder, folder / "log")
    for _ in range(3):
        assert new_one_is_reset(port)
    server = EchoServer(target_port)
    with socket.create_connection((HOST, port), timeout=PATIENCE_S) as connection:
        round_trip_s(connection)
    server.close()
    links.stop()


def test_a_reader_that_does_not_read_blocks_the_sender_and_fills_no_memory(bench: Bench) -> None:
    proxy = psutil.Process(bench.links.process.pid)
    client, server = bench.connect_raw()
    with client, server:
        before = proxy.memory_info().rss
        sent = send_until_blocked(client, 256 << 20)
        assert sent < 256 << 20, "never blocked"
        assert proxy.memory_info().rss - before < HELD_LIMIT_BYTES / 2
        assert receive(server, sent) == bytes(sent), "what was sent arrives"
        client.sendall(b"more")
        assert receive(server, 4) == b"more"


def test_a_partition_holds_no_more_than_its_limit(bench: Bench) -> None:
    proxy = psutil.Process(bench.links.process.pid)
    client, server = bench.connect_raw()
    with client, server:
        bench.links.partition("node-1")
        before = proxy.memory_info().rss
        sent = send_until_blocked(client, 256 << 20)
        assert HELD_LIMIT_BYTES <= sent < 256 << 20
        assert proxy.memory_info().rss - before < 4 * HELD_LIMIT_BYTES
        bench.links.clear("node-1")
        assert receive(server, sent) == bytes(sent)


def read_until_reset(connection: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        while connection.recv(1 << 20):
            pass


def test_a_reset_behind_what_a_slow_reader_has_not_read_reaches_it(bench: Bench) -> None:
    client, server = bench.connect_raw()
    with client, server:
        send_until_blocked(client, 256 << 20)
        abort(client)
        read_until_reset(server)
        wait_until(lambda: bench.open_connections("node-1") == 0, "it is over")


def test_a_reset_that_a_partition_held_waits_for_no_reader_when_it_ends(bench: Bench) -> None:
    client, server = bench.connect_raw()
    with client, server:
        bench.links.partition("node-1")
        send_until_blocked(client, HELD_LIMIT_BYTES // 8 * 7)
        abort(client)
        assert silent(server)
        bench.links.clear("node-1")
        wait_until(lambda: bench.open_connections("node-1") == 0, "it is over, though the server has read nothing")
        read_until_reset(server)


@pytest.mark.parametrize("both", [True, False])
def test_what_is_in_flight_to_a_client_that_has_gone_is_dropped(bench: Bench, both: bool) -> None:
    client, server = bench.connect_raw()
    with client, server:
        bench.links.latency("node-1", 400)
        for _ in range(10):
            server.sendall(b"x")
            time.sleep(0.002)
        abort(client)
        if both:
            abort(server)
        else:
            read_until_reset(server)
        wait_until(lambda: bench.open_connections("node-1") == 0, "it is over")
        time.sleep(BRIEFLY_S)  # a complaint of the proxy when all that is due fails the test


def test_a_reset_hits_connections_of_which_one_side_has_gone(bench: Bench) -> None:
    client, server = bench.connect_raw()
    with client, server:
        client.sendall(b"x")
        assert receive(server, 1) == b"x"
        bench.links.latency("node-1", 3600_000)
        abort(client)
        assert silent(server)
        bench.links.reset("node-1", once=True)
        assert is_reset(server)


COMMANDS: dict[str, tuple[Callable[[Links], object], str]] = {
    "link": (lambda links: links.partition("node-9"), "no link 'node-9'"),
    "effect": (lambda links: links.clear("node-0", "gravity"), "no effect 'gravity'"),
    "share": (lambda links: links.stalls("node-0", 1.5, 10, 1), "share must be a number from 0 to 1"),
    "negative": (lambda links: links.latency("node-0", -1), "round_trip_ms must be a number"),
    "not a number": (lambda links: links.latency("node-0", float("nan")), "round_trip_ms must be a number"),
    "command": (lambda links: links._command("node-0", "explode"), "no command 'explode'"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_cannot_be_done_is_an_error_and_the_proxy_lives_on(bench: Bench, case: str) -> None:
    command, message = COMMANDS[case]
    with pytest.raises(TailraceError, match=message):
        command(bench.links)
    with bench.connect() as connection:
        round_trip_s(connection)


def test_what_is_no_command_at_all_is_an_error_too(bench: Bench, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as control, control.makefile("rb") as answers:
        control.connect(str(folder / "links.sock"))
        for line in (b"\xff{", b"[1]", b"{}", b'{"link": ["node-0"], "do": {}}', b'{"link": "node-0", "do": {}}'):
            control.sendall(line + b"\n")
            assert b'"error"' in answers.readline(), line
        control.sendall(b'{"link": "node-0", "do": "clear"}\n')
        assert answers.readline() == b'{"ok": true, "connections": 0}\n'


def test_a_port_in_use_and_a_long_path_are_told(host: Guardian, folder: Path, echo: EchoServer) -> None:
    taken = [Link("node-0", (HOST, echo.port), (HOST, echo.port))]
    with pytest.raises(DeployError, match="in use"):
        Links.start(host, taken, folder, folder / "log")
    deep = folder / ("x" * 100)
    with pytest.raises(DeployError, match="too long"):
        Links.start(host, taken, deep, folder / "log")


def test_a_proxy_that_has_ended_is_told_with_its_log(host: Guardian, folder: Path) -> None:
    links = Links.start(host, [Link("node-0", (HOST, free_ports(1)[0]), (HOST, 9))], folder, folder / "log")
    links.stop()
    links.stop()  # once more is nothing more
    with pytest.raises(TailraceError, match="no answer"):
        links.partition("node-0")


def test_it_ends_in_order_on_sigterm(bench: Bench, host: Guardian) -> None:
    with bench.connect() as connection:
        round_trip_s(connection)
        assert host.signal(bench.links.process, signal.SIGTERM)
        wait_until(lambda: not bench.links.process.alive(), "it has ended")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_the_guardians_end_is_the_proxys(folder: Path, echo: EchoServer) -> None:
    with Guardian() as own:
        link = Link("node-0", (HOST, free_ports(1)[0]), (HOST, echo.port))
        process: ProcessRef = Links.start(own, [link], folder, folder / "log").process
        assert process.alive()
        os.kill(own._process.pid, signal.SIGKILL)
        wait_until(lambda: not process.alive(), "it has ended")
