"""One connection of the HTTP replay, and the answer that is being read from it: the parser's callbacks."""

from __future__ import annotations

import socket
from typing import Any

from geventhttpclient._parser import HTTPParseError, HTTPResponseParser

from tailrace.harness.replay.recorder import ERROR_CHARS
from tailrace.harness.replay.wire import NONE


class Connection(HTTPResponseParser):
    """One connection, and the answer that is being read from it."""

    __slots__ = (
        "answer_headers",
        "body_bytes",
        "body_limit",
        "body_parts",
        "bytes_received",
        "bytes_sent",
        "complete",
        "first_byte_ns",
        "head_done",
        "header_name",
        "header_value",
        "position",
        "reader",
        "request",
        "rest",
        "sent_ns",
        "sock",
        "started_ns",
        "status",
        "writer",
    )

    def __init__(self, sock: socket.socket, reader: Any, writer: Any) -> None:
        super().__init__()
        self.sock = sock
        self.reader = reader
        self.writer = writer
        self.begin(-1, 0, 0, 0)

    def begin(self, position: int, request: int, started_ns: int, body_limit: int) -> None:
        """Make ready for the answer to one arrival (-1: for none, the connection idles)."""
        self.position = position
        self.request = request
        self.started_ns = started_ns
        self.body_limit = body_limit
        self.sent_ns = NONE
        self.first_byte_ns = NONE
        self.bytes_sent = 0
        self.bytes_received = 0
        self.rest: memoryview | None = None
        self.complete = False
        self.status = -1
        self._begin_message()

    def _begin_message(self) -> None:
        self.head_done = False
        self.header_name = ""
        self.header_value: str | None = None
        self.answer_headers: dict[str, str] = {}
        self.body_bytes = 0
        self.body_parts: list[bytearray] | None = []

    # What follows is called by the parser.
    def _on_message_begin(self) -> None:
        if self.complete:
            raise HTTPParseError("bytes after the end of the answer")
        self._begin_message()

    def _on_status(self, reason: str) -> None:
        pass

    def _on_header_field(self, text: str) -> None:
        if self.head_done:  # a trailer
            return
        if self.header_value is None:
            self.header_name += text
        else:
            self._keep_header()
            self.header_name = text

    def _on_header_value(self, text: str) -> None:
        if not self.head_done:
            self.header_value = text if self.header_value is None else self.header_value + text

    def _keep_header(self) -> None:
        name = self.header_name.lower()
        if name in ("content-type", "inference-header-content-length"):
            self.answer_headers[name] = self.header_value or ""
        self.header_name = ""
        self.header_value = None

    def _on_headers_complete(self) -> bool:
        self._keep_header()
        self.head_done = True
        if self.get_code() != 200:
            self.body_limit = 4 * ERROR_CHARS  # an error's text, in characters of up to four bytes
        return False

    def _on_body(self, piece: bytearray) -> None:
        self.body_bytes += len(piece)
        if self.body_parts is not None:
            if self.body_bytes <= self.body_limit:
                self.body_parts.append(piece)
            elif self.get_code() == 200:
                self.body_parts = None  # too long to be looked at
            elif len(self.body_parts) == 0:
                self.body_parts.append(piece[: self.body_limit])

    def _on_message_complete(self) -> None:
        status = self.get_code()
        if status >= 200:  # what comes before is interim (100 Continue)
            self.status = status
            self.complete = True
