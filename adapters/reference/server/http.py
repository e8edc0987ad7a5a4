"""HTTP/1.1 for a server that is open to anybody: every limit is here, and what breaks one is told so and hung up on.

One request at a time on a connection: what is pipelined waits, unparsed and within a bound, for the answer before it.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

HEAD_BYTES = 16 << 10
PATIENCE_S = 10.0
"""How long a request may take to arrive once it has begun."""
_PIPELINED_BYTES = 64 << 10

TEXT = {"Content-Type": "text/plain"}
TENSORS = {"Content-Type": "application/octet-stream"}
Answer = Callable[[int, bytes, Mapping[str, str]], None]
"""``answer(status, body, headers)``."""


class RefusedError(Exception):
    """A request that is not taken: its status, and why. The connection is closed, for where it ends is not certain."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Head:
    """What matters in the head of a request."""

    method: str
    path: str
    length: int
    keep_alive: bool
    expects_continue: bool


@functools.lru_cache(maxsize=256)
def parse_head(head: bytes) -> Head:
    """A request's head, without the empty line. Raises :class:`RefusedError`."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[0].isalpha() or not words[1].startswith("/"):
        raise RefusedError(400, "the request line is not METHOD /path HTTP/1.1")
    if words[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise RefusedError(505, "this server speaks HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or "\n" in line or "\r" in line or "\0" in line:
            raise RefusedError(400, "a header line is not NAME: VALUE")
        name, value = name.lower(), value.strip(" \t")
        if headers.setdefault(name, value) != value and name in ("content-length", "host"):
            raise RefusedError(400, f"two {name} that differ")
    # Two readers that disagree on where a request ends let the second one in by the back door.
    if "transfer-encoding" in headers:
        raise RefusedError(501, "no transfer-encoding is supported: send a content-length")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise RefusedError(400, "content-length is no number")
    if words[2] == "HTTP/1.1" and "host" not in headers:
        raise RefusedError(400, "there is no host")
    connection = headers.get("connection", "").lower()
    keep_alive = "keep-alive" in connection if words[2] == "HTTP/1.0" else "close" not in connection
    expects_continue = headers.get("expect", "").lower() == "100-continue"
    return Head(words[0], words[1], int(length), keep_alive, expects_continue)


class Connection(asyncio.Protocol):
    """One connection. ``handle(method, path, body, answer)`` calls ``answer`` once, now or later, and returns what is to be
    called should the client go away before, or nothing."""

    def __init__(
        self,
        handle: Callable[[str, str, bytes, Answer], Callable[[], None] | None],
        body_bytes: int,
        open_connections: set[Connection],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handle = handle
        self._body_bytes = body_bytes
        self._open = open_connections
        self._now_s = now_s
        self._buffer = bytearray()
        self._head: Head | None = None
        self._begun_s = math.inf
        self._answering = False
        self._blocked = False
        self._handling = False
        self._gave_up: Callable[[], None] | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        if self._answering and self._gave_up is not None:
            self._gave_up()

    def pause_writing(self) -> None:
        self._blocked = True  # somebody who asks and does not read the answers

    def resume_writing(self) -> None:
        self._blocked = False
        self._transport.resume_reading()
        self._advance()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._answering or self._blocked:
            if len(self._buffer) > _PIPELINED_BYTES:
                self._transport.pause_reading()
        else:
            self._advance()

    def overdue(self) -> None:
        """Hang up on a request that does not come to an end."""
        if not self._answering and self._now_s() - self._begun_s > PATIENCE_S:
            self._refuse(RefusedError(408, f"the request has not arrived within {PATIENCE_S:g} s"))

    def _advance(self) -> None:
        """Take the requests that have arrived, one after the other."""
        try:
            while not (self._answering or self._blocked or self._transport.is_closing()):
                if not self._take():
                    break
        except RefusedError as refused:
            self._refuse(refused)

    def _take(self) -> bool:
        """Take one request, if it is there as a whole. Raises :class:`RefusedError`."""
        if not self._buffer and self._head is None:
            self._begun_s = math.inf
            return False
        if self._begun_s == math.inf:
            self._begun_s = self._now_s()
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n", 0, HEAD_BYTES + 4)
            if end < 0:
                if len(self._buffer) > HEAD_BYTES:
                    raise RefusedError(431, f"a head has at most {HEAD_BYTES} bytes")
                return False
            self._head = parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if self._head.length > self._body_bytes:
                raise RefusedError(413, f"a body has at most {self._body_bytes} bytes")
            if self._head.expects_continue and len(self._buffer) < self._head.length:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = self._head
        if len(self._buffer) < head.length:
            return False
        body = bytes(self._buffer[: head.length])
        del self._buffer[: head.length]
        self._head, self._begun_s, self._answering = None, math.inf, True

        def answer(status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self._answering, self._gave_up = False, None
            self._write(status, body, headers, head.keep_alive)
            self._transport.resume_reading()
            if not self._handling:  # else whoever has called this goes on by itself
                self._advance()

        self._handling = True
        self._gave_up = self._handle(head.method, head.path, body, answer)
        self._handling = False
        return True

    def _refuse(self, refused: RefusedError) -> None:
        self._write(refused.status, str(refused).encode(), TEXT, False)

    def _write(self, status: int, body: bytes, headers: Mapping[str, str], keep_alive: bool) -> None:
        if self._transport.is_closing():
            return
        lines = [f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if not keep_alive:
            lines.append("Connection: close")
        self._transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        if not keep_alive:
            self._transport.close()
