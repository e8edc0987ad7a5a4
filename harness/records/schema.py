"""The run record: one row per arrival, as an Arrow stream while a trial runs and as Parquet once it is over."""

from __future__ import annotations

from enum import IntEnum

import pyarrow as pa


class Outcome(IntEnum):
    """What became of an arrival; exactly one for each (see ``docs/record.md``)."""

    OK = 0
    ERROR = 1
    """The server answered, with anything but success: an HTTP status outside 2xx, a gRPC status, a malformed answer."""
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
"""``requests.parquet``; times in nanoseconds from the trial's epoch. ``sent_ns`` is null for what was never sent:
what was dropped, and what found no connection."""

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
"""``samples.parquet``, tidy: ``source`` is who measured (host, server, device, scrape), ``scope`` what (a pid, a
device, a model)."""
