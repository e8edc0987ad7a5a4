"""What a sender keeps of its arrivals: packed rows, error texts once each, and the distinct answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.records.schema import Outcome
from tailrace.harness.replay import wire

ERROR_CHARS = 200
"""How much of a server's own text an error keeps."""
ERROR_TEXTS = 4096
"""Distinct error texts that are kept; past that an error keeps only its kind."""

SMALL_BODY_BYTES = 64 * 1024
"""Every answer up to this size is compared; of larger ones, one in ``LARGE_BODY_STRIDE``."""
LARGE_BODY_STRIDE = 16
DISTINCT_PER_REQUEST = 4
DISTINCT_BYTES = 64 * 1024 * 1024
"""The memory that distinct answers may take, all together."""

Emit = Callable[[bytes, bytes], None]
"""Takes one message (kind, payload) for the harness."""


class Recorder:
    """Packs one row per arrival into a buffer; :meth:`flush` hands it on."""

    def __init__(self, emit: Emit, arrival_id: NDArray[np.int64]) -> None:
        self._emit = emit
        self._ids = np.ascontiguousarray(arrival_id, dtype=np.int64).data
        self._buffer = bytearray(wire.ROW.size * 4096)
        self._used = 0
        self._errors: dict[str, int] = {}
        self._new_errors: list[str] = []
        self.done = self.ok = 0

    def row(
        self,
        position: int,
        sent_ns: int,
        first_byte_ns: int,
        done_ns: int,
        outcome: Outcome,
        status: int,
        error: int,
        bytes_sent: int,
        bytes_received: int,
    ) -> None:
        """Record what became of the arrival at ``position`` of the shard (``wire.NONE`` and -1 are null)."""
        if self._used == len(self._buffer):
            self._buffer.extend(bytes(len(self._buffer)))
        wire.ROW.pack_into(
            self._buffer,
            self._used,
            self._ids[position],
            sent_ns,
            first_byte_ns,
            done_ns,
            bytes_sent,
            bytes_received,
            outcome,
            error,
            status,
        )
        self._used += wire.ROW.size
        self.done += 1
        if outcome == Outcome.OK:
            self.ok += 1

    def error(self, kind: str, detail: str = "") -> int:
        """The number of an error text: what kind of failure, and the server's or the kernel's words for it."""
        detail = detail[:ERROR_CHARS].strip()
        text = f"{kind}: {detail}" if detail else kind
        if len(self._errors) >= ERROR_TEXTS and text not in self._errors:
            text = kind
        number = self._errors.get(text)
        if number is None:
            number = self._errors[text] = len(self._errors)
            self._new_errors.append(text)
        return number

    def flush(self) -> NDArray[np.void]:
        """Hand on what has come since the last time; returns those rows (dtype :data:`wire.ROW_DTYPE`)."""
        rows = bytes(memoryview(self._buffer)[: self._used])
        self._used = 0
        if self._new_errors:
            self._emit(wire.ERRORS, json.dumps(self._new_errors).encode())
            self._new_errors = []
        if rows:
            self._emit(wire.ROWS, rows)
        return np.frombuffer(rows, wire.ROW_DTYPE)


class Answers:
    """The distinct answers to each request, so that the harness can compare every one of them with its reference.

    Answers are equal when their bytes and the headers that give the bytes their meaning are. Per request the first
    three distinct answers stay, and the fourth place goes to a uniformly drawn one of all later ones, so that
    an answer that turns wrong late has its chance to be seen. What was not kept is counted as ``unchecked``.
    """

    def __init__(self, requests: int) -> None:
        self._kept: list[dict[tuple[str | None, str | None, bytes], int]] = [{} for _ in range(requests)]
        self._late = [0] * requests
        self._bytes = 0
        self._random = random.Random(0)  # noqa: S311 (a reproducible draw, not a secret)
        self.unchecked = 0

    def wanted(self, request: int, arrival: int) -> bool:
        """Whether to look at the answer to this arrival even if it is large."""
        # Fibonacci hashing spreads neighbouring arrivals, so that no pattern in the payloads falls in step with it.
        return not self._kept[request] or (arrival * 0x9E3779B1 & 0xFFFFFFFF) < 2**32 // LARGE_BODY_STRIDE

    def add(self, request: int, headers: tuple[str | None, str | None], body: bytes) -> None:
        """Count one answer: ``headers`` are ``content-type`` and ``inference-header-content-length``."""
        kept = self._kept[request]
        key = (*headers, body)
        if key in kept:
            kept[key] += 1
            return
        if len(kept) == DISTINCT_PER_REQUEST:
            self._late[request] += 1
            if self._random.random() * (self._late[request] + 1) >= 1:
                self.unchecked += 1
                return
            (*_, evicted), count = kept.popitem()
            self._bytes -= len(evicted)
            self.unchecked += count
        if self._bytes + len(body) > DISTINCT_BYTES:
            self.unchecked += 1
            return
        self._bytes += len(body)
        kept[key] = 1

    def pack(self) -> bytes:
        """All of them as the payload of an ``ANSWERS`` message."""
        entries, bodies = [], []
        for request, kept in enumerate(self._kept):
            for (content_type, header_length, body), count in kept.items():
                headers: Mapping[str, str | None] = {
                    "content-type": content_type,
                    "inference-header-content-length": header_length,
                }
                entries.append(
                    {
                        "request": request,
                        "count": count,
                        "headers": {name: value for name, value in headers.items() if value is not None},
                    }
                )
                bodies.append(body)
        return wire.pack({"answers": entries, "unchecked": self.unchecked}, bodies)
