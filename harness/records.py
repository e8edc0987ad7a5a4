"""The run record: one row per arrival, as an Arrow stream while a trial runs and as Parquet once it is over."""

from __future__ import annotations

import os
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import StorageError


class Outcome(IntEnum):
    """What became of an arrival; exactly one for each (see ``results/README.md``)."""

    OK = 0
    ERROR = 1
    """The server answered, with anything but success: an HTTP status of 400 and above, a gRPC status, a malformed answer."""
    SHED = 2
    """The server refused the load: HTTP 429 or 503, gRPC ``RESOURCE_EXHAUSTED`` or ``UNAVAILABLE`` with an answer."""
    TIMEOUT = 3
    """No answer within the client's timeout: indeterminate, the server may still have done the work."""
    CONNECTION = 4
    """The connection was refused, reset or closed before a whole answer had come."""
    DROPPED = 5
    """The generator itself could not send it: our fault."""


OUTCOME_NAMES = [outcome.name.lower() for outcome in Outcome]
PHASE_NAMES = ["warmup", "measure", "drain"]

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("arrival_id", pa.int64(), nullable=False),
        pa.field("intended_ns", pa.int64(), nullable=False),
        pa.field("sent_ns", pa.int64()),
        pa.field("first_byte_ns", pa.int64()),
        pa.field("done_ns", pa.int64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("status", pa.int16()),
        pa.field("error", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("payload_id", pa.int32(), nullable=False),
        pa.field("bytes_sent", pa.int64(), nullable=False),
        pa.field("bytes_received", pa.int64(), nullable=False),
        pa.field("worker", pa.int16(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
    ]
)
"""``requests.parquet``; times in nanoseconds from the trial's epoch. ``sent_ns`` is null for what was dropped."""

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("scope", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
    ]
)
"""``samples.parquet``, tidy: ``source`` is who measured (host, server, device, scrape), ``scope`` what (a pid, a device, a model)."""


def read_records(path: Path) -> pa.Table:
    """The rows of a trial, from the finished Parquet or from the Arrow stream of a trial that runs or was killed.

    Of a stream that was cut off, every whole batch is read. Raises :class:`StorageError` when the file is neither, or
    holds other columns than :data:`REQUEST_SCHEMA`.
    """
    try:
        with path.open("rb") as handle:
            start = handle.read(4)
            handle.seek(0)
            if start == b"PAR1":
                table = pq.read_table(handle)
            elif b"\xff\xff\xff\xff".startswith(start):  # how each message of an Arrow stream begins
                table = _read_stream(handle)
            else:
                raise StorageError(f"{path} is neither Parquet nor an Arrow stream", remedy="restore it, or run again")
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path} cannot be read: {error}", remedy="restore it, or run again") from error
    if not table.schema.equals(REQUEST_SCHEMA):
        raise StorageError(
            f"{path} holds other columns than this version of tailrace knows: {', '.join(table.column_names)}",
            remedy="read it with the version that wrote it (see the run's manifest)",
        )
    return table


def _read_stream(handle: BinaryIO) -> pa.Table:
    batches = []
    try:
        with pa.ipc.open_stream(handle) as reader:
            if reader.schema != REQUEST_SCHEMA:
                return reader.schema.empty_table()
            while True:
                batches.append(reader.read_next_batch())
    except (StopIteration, OSError, pa.ArrowInvalid):
        # The end, or a message that its writer did not live to complete: all before it is whole.
        pass
    return pa.Table.from_batches(batches, REQUEST_SCHEMA)


def finish_records(stream_path: Path, parquet_path: Path) -> None:
    """Turn the stream of a trial into Parquet, sorted by ``arrival_id``, and remove the stream.

    The Parquet appears whole or not at all. Raises :class:`StorageError`; the stream is still there then.
    """
    table = read_records(stream_path).sort_by("arrival_id")
    partial = parquet_path.with_name(parquet_path.name + ".partial")
    try:
        with partial.open("wb") as handle:
            pq.write_table(table, handle, compression="zstd")
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(parquet_path)
        if stream_path != parquet_path:
            stream_path.unlink()
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"the records cannot be written to {parquet_path}: {error.strerror or error}",
            remedy=f"make room on that disk; the rows are still in {stream_path}",
        ) from error
