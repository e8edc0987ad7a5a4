"""A TCP proxy in user space, on which the faults of a connection are done: latency, stalls, partition, reset.

Run as ``python -P -m tailrace.harness.servers.link_proxy CONFIG.json``; its other side is :mod:`.links`. The configuration names
the control socket and the links: ``{"control": PATH, "links": [{"name": …, "listen": [HOST, PORT], "target": [HOST, PORT]},
…]}``. Links of one name (all ports of a node) are one to every command. It says ``ready`` on stdout once all listen, and
ends on SIGTERM. The control socket takes one JSON command a line, ``{"link": NAME, "do": …}``, and answers each with
``{"ok": true, "connections": how many it found open}`` or ``{"error": …}``:

* ``latency`` (``round_trip_ms``): every chunk is held for half of it, in either direction.
* ``stalls`` (``share``, ``stall_ms``, ``seed``): each chunk, with that probability, is held for that long, and with it all
  that follows it in its direction, as behind a lost segment that is sent again after a timeout.
* ``partition``: nothing passes; connections stay open, and what is sent on them is held.
* ``reset``: open connections, and new ones while it lasts, get an RST on both sides; with ``once``, only the open ones.
* ``clear`` (``effect``: one of these, or left out for all): heal; what was held for it passes on, in order, at once.

Effects add up, except that a reset holds during a partition too. Where this differs from a network:

* The kernel shakes hands before the proxy knows. So a connection takes no round trip to open, one to a target that
  refuses is opened and then reset, and in a partition connections still open, where a real one would drop the SYN. They
  are connected onwards when it ends, unless the client has given up by then.
* A chunk is what one read returns: mostly one request or answer, at most 256 KiB.
* Bytes that the receiver's socket has taken already, up to some hundred KiB where the receiver is slow, are past the link.
* At most ``HELD_LIMIT_BYTES`` are held per direction of a connection, after which its sender is blocked. The RST of a sender that
  is blocked is noticed when there is room again.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import select
import selectors
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from tailrace.harness.machine import raise_file_limit

HELD_LIMIT_BYTES = 8 << 20
"""At a round trip of 50 ms this still lets more than 300 MB/s pass, on each connection."""
_BACKLOG = 4096
_LINGER_0 = struct.pack("ii", 1, 0)
"""With it, closing a socket sends an RST."""
_EFFECTS = ("latency", "stalls", "partition", "reset")

_Chunk = bytes | None
"""What came from a socket: bytes, ``b""`` for its FIN, ``None`` for its RST."""


class _PreciseSelector(selectors.EpollSelector):
    """epoll rounds a wait up to whole milliseconds; select, which can wait for an epoll, does not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class _Link:
    """The connections of one name, and what is done to them."""

    def __init__(self) -> None:
        self.connections: set[_End] = set()
        """The accepted ends."""
        self.plain = True
        """Whether every chunk passes at once."""
        self.passable = asyncio.Event()
        self.passable.set()
        self.resetting = False
        self._delay_s = 0.0
        self._share = 0.0
        self._stall_s = 0.0
        self._random = random.Random()  # noqa: S311 (a reproducible draw, not a secret)

    def draw_stall_s(self) -> float:
        """How long a new chunk stalls."""
        return self._stall_s if self._share and self._random.random() < self._share else 0.0

    def due_s(self, arrived_s: float, stall_s: float) -> float:
        """When a chunk may pass, as things stand now: what was held before an effect changed is held by the new one."""
        return arrived_s + self._delay_s + (stall_s if self._share else 0.0)

    def obey(self, request: Mapping[str, Any]) -> int:
        """Do a command; returns how many connections it found open. Raises ``ValueError`` for one that cannot be done."""
        found = len(self.connections)
        match request.get("do"):
            case "latency":
                self._delay_s = _number(request, "round_trip_ms") / 2000
            case "stalls":
                share, stall_s = _number(request, "share", 1.0), _number(request, "stall_ms") / 1000
                self._random.seed(_number(request, "seed"))
                self._share, self._stall_s = share, stall_s
            case "partition":
                self.passable.clear()
            case "reset":
                self.resetting = self.resetting or not request.get("once", False)
                for accepted in list(self.connections):
                    accepted.reset_both()
            case "clear":
                self._clear(request.get("effect"))
            case other:
                raise ValueError(f"there is no command {other!r}")
        self.plain = self.passable.is_set() and not self._delay_s and not self._share
        for accepted in list(self.connections):
            accepted.release()
            accepted.peer.release()
        return found

    def _clear(self, effect: str | None) -> None:
        if effect is not None and effect not in _EFFECTS:
            raise ValueError(f"there is no effect {effect!r}")
        if effect in ("latency", None):
            self._delay_s = 0.0
        if effect in ("stalls", None):
            self._share = 0.0
        if effect in ("partition", None):
            self.passable.set()
        if effect in ("reset", None):
            self.resetting = False


def _number(request: Mapping[str, Any], field: str, most: float = math.inf) -> float:
    value = request.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or math.isinf(value):
        raise ValueError(f"{field} must be a number from 0 to {most:g}, not {value!r}")
    return value


class _End(asyncio.Protocol):
    """One socket of a connection, and what came from it and has not passed to its peer yet.

    asyncio itself sets TCP_NODELAY.
    """

    peer: _End

    def __init__(self, link: _Link) -> None:
        self.transport: asyncio.Transport | None = None
        self.full = False
        """Whether its socket takes no more for now."""
        self.over = False
        """Whether it is closed, or will never be opened."""
        self._link = link
        self._ended = False
        self._passed_end = False
        self._doomed = False
        self._held: deque[tuple[float, float, _Chunk]] = deque()
        """When it arrived (s), for how long it stalls (s), and what it is."""
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self._doomed:
            self.reset()
        else:
            self.peer.release()

    def data_received(self, data: bytes) -> None:
        peer = self.peer
        if self._link.plain and not self._held and peer.transport is not None and peer.connected and not peer.full:
            peer.transport.write(data)
        else:
            self._hold(data)

    def eof_received(self) -> bool:
        self._ended = True
        self._hold(b"")
        return True  # asyncio is not to close: the other direction goes on

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        if exc is not None:  # not closed by us
            self._ended = True
            self._hold(None)
        if self.peer.over:
            self._link.connections -= {self, self.peer}

    def pause_writing(self) -> None:
        self.full = True
        self.peer._balance()

    def resume_writing(self) -> None:
        self.full = False
        self.peer.release()

    @property
    def connected(self) -> bool:
        """Whether what is written to it goes anywhere."""
        return self.transport is not None and not self.over and not self._doomed

    def release(self) -> None:
        """Pass on what is due, as far as the peer has room."""
        self._cancel_timer()
        peer, link = self.peer, self._link
        loop = asyncio.get_running_loop()
        # Once this end is gone, its RST does not wait for a peer that does not read, as in TCP.
        while self._held and link.passable.is_set() and peer.connected and (self.over or not peer.full):
            arrived_s, stall_s, chunk = self._held[0]
            due_s = link.due_s(arrived_s, stall_s)
            if due_s > loop.time():
                self._timer = loop.call_at(due_s, self.release)
                break
            self._held.popleft()
            self._held_bytes -= len(chunk or b"")
            self._pass_on(chunk)
        self._balance()

    def reset(self) -> None:
        """Send an RST, now or as soon as it is connected."""
        self._doomed = True
        self._cancel_timer()
        self._held.clear()
        self._held_bytes = 0
        if self.transport is not None and not self.over:
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            self.transport.abort()

    def reset_both(self) -> None:
        """Send an RST on both sides."""
        self.reset()
        self.peer.reset()

    def _hold(self, chunk: _Chunk) -> None:
        stall_s = self._link.draw_stall_s() if chunk else 0.0
        self._held.append((asyncio.get_running_loop().time(), stall_s, chunk))
        self._held_bytes += len(chunk or b"")
        if self._timer is None:
            self.release()
        else:
            self._balance()

    def _pass_on(self, chunk: _Chunk) -> None:
        to = self.peer.transport
        if to is None or self.transport is None:
            return
        if chunk:
            to.write(chunk)
        elif chunk is None:
            self.peer.reset()
        else:
            self._passed_end = True
            with suppress(OSError):  # it has been reset, which reading it will tell
                to.write_eof()
            if self.peer._passed_end:
                to.close()
                self.transport.close()

    def _balance(self) -> None:
        """Read on only while there is room for it: what is not read blocks the sender in the end."""
        if self.transport is None or self._ended:
            return
        if not self.peer.full and self._held_bytes < HELD_LIMIT_BYTES:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Accepted(_End):
    """The socket that was accepted; its peer is the one to the target."""

    _connecting: asyncio.Task[None]

    def __init__(self, link: _Link, target: tuple[str, int]) -> None:
        super().__init__(link)
        self.peer = _End(link)
        self.peer.peer = self
        self._target = target

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._doomed = self.peer.over = self._link.resetting
        super().connection_made(transport)
        if not self._doomed:
            self._link.connections.add(self)
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    def reset_both(self) -> None:
        if self._connecting.cancel() and self.peer.transport is None:
            self.peer.over = True
        super().reset_both()

    async def _connect(self) -> None:
        try:
            if not self._link.passable.is_set():
                await self._link.passable.wait()
                if self._ended:
                    raise ConnectionAbortedError("the client gave up meanwhile")
            await asyncio.get_running_loop().create_connection(lambda: self.peer, *self._target)
        except OSError:
            self.peer.over = True
            self._link.connections.discard(self)
            self.reset()


class _Control(asyncio.Protocol):
    """A connection of the control socket."""

    def __init__(self, links: Mapping[str, _Link]) -> None:
        self._links = links
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._transport.write(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a command is a JSON object")
            link = self._links.get(str(request.get("link")))
            if link is None:
                raise ValueError(f"there is no link {request.get('link')!r}")
            return {"ok": True, "connections": link.obey(request)}
        except ValueError as error:
            return {"error": str(error)}


async def _serve(config: Mapping[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    links: dict[str, _Link] = {}
    for entry in config["links"]:
        link = links.setdefault(entry["name"], _Link())
        accept = partial(_Accepted, link, tuple(entry["target"]))
        await loop.create_server(accept, *entry["listen"], backlog=_BACKLOG)
    await loop.create_unix_server(lambda: _Control(links), config["control"])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await ended.wait()


def main(path: str) -> None:
    """Entry point of the proxy process: the path of its configuration."""
    raise_file_limit()
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_PreciseSelector())) as runner:
        try:
            runner.run(_serve(config))
        except OSError as error:
            sys.exit(f"the link proxy cannot listen: {error.strerror or error}")


if __name__ == "__main__":
    main(sys.argv[1])
