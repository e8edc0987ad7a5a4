"""What the harness and its load workers say to each other: framed messages, none of which can carry code.

One load process is spoken to over its stdin and stdout. Several are spoken to through a master process that passes their
frames on over Locust's protocol; a frame names the worker that it is for, or from.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import RawIOBase
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# To a worker: the plan, the epoch (the clock starts), an early end. End of file: the harness has gone.
PLAN, GO, STOP = b"P", b"G", b"S"
# From a worker: connections are open, packed rows, new error texts, live figures, distinct answers, the end, a bug.
READY, ROWS, ERRORS, PROGRESS, ANSWERS, END, FAILED = b"r", b"w", b"e", b"p", b"a", b"z", b"f"
# Between master and workers alone: what time is it? From the master: a worker has gone.
CLOCK, LOST = b"C", b"l"

MESSAGE = "tailrace"
"""The type, among Locust's messages, of those that carry a frame."""

_FRAME = struct.Struct("<cHQ")
_LENGTH = struct.Struct("<Q")

NONE = -(2**63)
"""Stands for null in a row's times."""

ROW = struct.Struct("<qqqqqqiih")
"""One arrival: id, sent, first byte, done (ns, monotonic clock), bytes sent and received, outcome, error, status."""

ROW_DTYPE = np.dtype(
    [
        ("arrival_id", "<i8"),
        ("sent_ns", "<i8"),
        ("first_byte_ns", "<i8"),
        ("done_ns", "<i8"),
        ("bytes_sent", "<i8"),
        ("bytes_received", "<i8"),
        ("outcome", "<i4"),
        ("error", "<i4"),
        ("status", "<i2"),
    ]
)
"""The same, for NumPy; ``error`` indexes the error texts in the order they came; -1 is null there and in ``status``."""


class Frame(NamedTuple):
    """One message. ``worker`` is the index of the worker that it is for, or from."""

    kind: bytes
    payload: bytes = b""
    worker: int = 0

    def pack(self) -> bytes:
        """The bytes of the message: kind (1 byte), worker (2 bytes), length (8 bytes), payload."""
        return _FRAME.pack(self.kind, self.worker, len(self.payload)) + self.payload

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        """The reverse of :meth:`pack`."""
        kind, worker, length = _FRAME.unpack_from(data)
        return cls(kind, data[_FRAME.size : _FRAME.size + length], worker)


def read_frame(stream: IO[bytes] | RawIOBase) -> Frame | None:
    """The next message of a blocking stream; ``None`` at its end, or when the end cuts a message short."""
    head = _read_exactly(stream, _FRAME.size)
    if head is None:
        return None
    kind, worker, length = _FRAME.unpack(head)
    payload = _read_exactly(stream, length)
    return None if payload is None else Frame(kind, payload, worker)


def _read_exactly(stream: IO[bytes] | RawIOBase, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = stream.read(count - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


class FrameBuffer:
    """Puts messages together from the pieces that a non-blocking reader gets."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add ``data``; yields every message that is now whole."""
        self._data += data
        while len(self._data) >= _FRAME.size:
            kind, worker, length = _FRAME.unpack_from(self._data)
            end = _FRAME.size + length
            if len(self._data) < end:
                return
            payload = bytes(self._data[_FRAME.size : end])
            del self._data[:end]
            yield Frame(kind, payload, worker)


def pack(meta: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """A JSON object and raw bytes in one payload."""
    header = json.dumps({**meta, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join([_LENGTH.pack(len(header)), header, *blobs])


def unpack(payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The reverse of :func:`pack`."""
    (length,) = _LENGTH.unpack_from(payload)
    offset = _LENGTH.size + length
    meta = json.loads(payload[_LENGTH.size : offset])
    blobs = []
    for size in meta.pop("sizes"):
        blobs.append(payload[offset : offset + size])
        offset += size
    return meta, blobs


@dataclass(frozen=True)
class Target:
    """Where a worker sends, how long it waits for one answer and how many requests it may have outstanding."""

    protocol: Literal["http", "grpc"]
    host: str
    port: int
    timeout_s: float
    max_connections: int
    real_time: bool = False
    """Whether the worker may go before everything else on its machine, which then needs a core of its own for the rest."""


@dataclass(frozen=True)
class Shard:
    """The arrivals of one worker, in order; arrays have one entry per arrival.

    ``arrival_id`` (int64) is the position in the whole schedule, ``intended_ns`` (int64) counts from the epoch,
    ``request`` (int32) indexes ``data`` and ``methods``, which hold one entry per distinct (model, payload).
    """

    arrival_id: NDArray[np.int64]
    intended_ns: NDArray[np.int64]
    request: NDArray[np.int32]
    data: tuple[bytes, ...]
    methods: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.arrival_id)

    def part(self, worker: int, workers: int) -> Shard:
        """What the worker of that index sends, of so many: every ``workers``-th arrival, at the instant that it has."""
        mine = slice(worker, None, workers)
        return replace(
            self, arrival_id=self.arrival_id[mine], intended_ns=self.intended_ns[mine], request=self.request[mine]
        )


def pack_plan(shard: Shard, target: Target) -> bytes:
    """A shard and where to send it; equal request bytes travel once."""
    blobs: dict[bytes, int] = {}
    which = [blobs.setdefault(data, len(blobs)) for data in shard.data]
    meta = {"target": vars(target), "methods": shard.methods, "which": which}
    arrays = [
        shard.arrival_id.astype("<i8").tobytes(),
        shard.intended_ns.astype("<i8").tobytes(),
        shard.request.astype("<i4").tobytes(),
    ]
    return pack(meta, [*arrays, *blobs])


def unpack_plan(payload: bytes) -> tuple[Shard, Target]:
    """The reverse of :func:`pack_plan`."""
    meta, (ids, intended, request, *blobs) = unpack(payload)
    shard = Shard(
        arrival_id=np.frombuffer(ids, "<i8"),
        intended_ns=np.frombuffer(intended, "<i8"),
        request=np.frombuffer(request, "<i4"),
        data=tuple(blobs[index] for index in meta["which"]),
        methods=tuple(meta["methods"]),
    )
    return shard, Target(**meta["target"])
