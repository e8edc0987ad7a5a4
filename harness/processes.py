"""Processes by pid *and* start time, so that a recycled pid is never mistaken for one of ours."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 10_000
"""Below lie the ports of well-known services."""
_ROOM_NEEDED = 2_000
_CLOSED_WITHIN_S = 0.02


@dataclass(frozen=True)
class ProcessRef:
    """One process: its pid and its start time in clock ticks since boot (``/proc/PID/stat``, field 22)."""

    pid: int
    started_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessRef:
        """The reference of a living process. Raises ``ProcessLookupError`` when there is none."""
        ticks = _start_ticks(pid)
        if ticks is None:
            raise ProcessLookupError(pid)
        return cls(pid, ticks)

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not count as running)."""
        return _start_ticks(self.pid) == self.started_ticks


def inner_pid(process: ProcessRef) -> int:
    """The pid that a process has for itself: in a container another one than here. That of here when it has gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return process.pid
    pids = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
    return int(pids[-1]) if pids else process.pid


def _start_ticks(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and parentheses; the fields proper begin after the last ')'.
    fields = stat[stat.rindex(")") + 2 :].split()
    state, ticks = fields[0], int(fields[19])
    return None if state in "ZX" else ticks


def descendants(root: ProcessRef) -> Iterator[tuple[ProcessRef, psutil.Process]]:
    """Every living process below ``root``, ``root`` first; empty when ``root`` has gone."""
    if not root.alive():
        return
    try:
        top = psutil.Process(root.pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            yield ProcessRef.of(process.pid), process
        except ProcessLookupError:
            continue


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """``count`` distinct TCP ports that are free now. All are held open while choosing, so that they differ.

    Not among those that the kernel gives to outgoing connections, where there is room for others: the load itself makes so
    many of these that one would now and then have the port of a server that is only about to listen, or to come back.
    """
    held: list[socket.socket] = []
    try:
        for port in _candidates(count):
            listener = socket.socket()
            held.append(listener)
            try:
                listener.bind((host, port))
            except OSError:
                held.pop().close()
            if len(held) == count:
                break
        return [listener.getsockname()[1] for listener in held]
    finally:
        for listener in held:
            listener.close()


def _candidates(count: int) -> Iterator[int]:
    """Ports to try, at random; in the end whatever the kernel gives."""
    try:
        lowest_outgoing = int(_OUTGOING_PORTS.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        lowest_outgoing = 0
    below = range(_LOWEST_PORT, lowest_outgoing)
    if len(below) > _ROOM_NEEDED:
        yield from random.SystemRandom().sample(below, _ROOM_NEEDED)
    yield from itertools.repeat(0, count)


def port_open(host: str, port: int, timeout_s: float = 0.2, *, published: bool = False) -> bool:
    """Whether something accepts TCP connections there.

    ``published``: it is the port of a container, where the engine itself accepts every connection at once, and closes it
    again when nobody listens inside. Servers wait for a request, or speak first.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            return not published or _stays_open(connection)
    except OSError:
        return False


def _stays_open(connection: socket.socket) -> bool:
    connection.settimeout(_CLOSED_WITHIN_S)
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True


def log_tail(path: Path, lines: int = 30) -> str:
    """The last lines of a log file, for an error message; says so when there is none."""
    try:
        with path.open("rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - 64_000))
            text = handle.read().decode("utf-8", "replace")
    except OSError as error:
        return f"(no log at {path}: {error.strerror})"
    return "\n".join(text.splitlines()[-lines:]) or f"(the log {path} is empty)"
