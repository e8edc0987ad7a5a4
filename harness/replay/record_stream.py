"""The rows that load workers tell of, joined with their schedule and streamed to disk."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tailrace.harness.plan.schedule import Phase, Schedule
from tailrace.harness.records.schema import OUTCOME_NAMES, PHASE_NAMES, REQUEST_SCHEMA, Outcome
from tailrace.harness.records.tables import TableWriter
from tailrace.harness.replay import wire

FILL_ROWS = 100_000


class RecordStream:
    """Joins rows with their schedule and appends them to the table, one batch at a time."""

    def __init__(self, stem: Path, schedule: Schedule, workers: int, slo_ms: float = math.inf) -> None:
        self.path = stem.with_name(stem.name + ".arrow")
        self.epoch_ns = 0
        self.offsets_ns = [0] * workers
        """By how much each worker's clock is ahead of the harness's."""
        self.errors: list[list[str]] = [[] for _ in range(workers)]
        """The error texts of each worker, which its rows number."""
        self.written = 0
        self.measured = int(np.count_nonzero(schedule.phase == Phase.MEASURE))
        self.missed = 0
        """Of the measured arrivals, those that failed or were answered after ``slo_ms``."""
        self._slo_ns = slo_ms * 1e6
        self._stem = stem
        self._schedule = schedule
        self._seen = np.zeros(len(schedule), dtype=np.bool_)
        self._writer: TableWriter | None = None

    def open(self) -> None:
        """Create the file."""
        self._writer = TableWriter(self._stem, REQUEST_SCHEMA)
        # Where pandas is installed, Arrow imports it, for a second, at its first array: before the clock starts, please.
        self._batch(np.zeros(0, wire.ROW_DTYPE), 0)

    def append(self, rows: NDArray[np.void], worker: int) -> None:
        """Write a batch of a worker's rows (dtype :data:`wire.ROW_DTYPE`, times on its clock) and flush it."""
        if not len(rows) or self._writer is None:
            return
        self._writer.append(self._batch(rows, worker))
        self._seen[rows["arrival_id"]] = True
        self.written += len(rows)
        ids = rows["arrival_id"]
        response_ns = rows["done_ns"] - self.epoch_ns - self.offsets_ns[worker] - self._schedule.intended_ns[ids]
        missed = (rows["outcome"] != Outcome.OK) | (response_ns > self._slo_ns)
        self.missed += int(np.count_nonzero(missed & (self._schedule.phase[ids] == Phase.MEASURE)))

    def drop_rest(self, why: str, worker: int) -> None:
        """Record every arrival of a worker that has no row as dropped, at its intended start or now, whichever is later."""
        self.errors[worker].append(why)
        epoch_ns = self.epoch_ns + self.offsets_ns[worker]
        now_ns = time.monotonic_ns() + self.offsets_ns[worker]
        mine = np.arange(worker, len(self._schedule), len(self.errors))  # as wire.Shard.part deals them out
        missing = mine[~self._seen[mine]]
        for start in range(0, len(missing), FILL_ROWS):
            ids = missing[start : start + FILL_ROWS]
            rows = np.zeros(len(ids), wire.ROW_DTYPE)
            rows["arrival_id"] = ids
            rows["sent_ns"] = rows["first_byte_ns"] = wire.NONE
            rows["done_ns"] = np.maximum(self._schedule.intended_ns[ids] + epoch_ns, now_ns)
            rows["outcome"] = Outcome.DROPPED
            rows["error"] = len(self.errors[worker]) - 1
            rows["status"] = -1
            self.append(rows, worker)

    def close(self) -> None:
        """End the stream. Safe to call again."""
        if self._writer is not None:
            self._writer.close()

    def _batch(self, rows: NDArray[np.void], worker: int) -> pa.RecordBatch:
        ids = rows["arrival_id"]
        epoch_ns = self.epoch_ns + self.offsets_ns[worker]
        intended = self._schedule.intended_ns[ids]

        def time_ns(name: str) -> pa.Array:
            return pa.array(rows[name] - epoch_ns, mask=rows[name] == wire.NONE)

        columns = {
            "arrival_id": ids,
            "intended_ns": intended,
            "sent_ns": time_ns("sent_ns"),
            "first_byte_ns": time_ns("first_byte_ns"),
            "done_ns": rows["done_ns"] - epoch_ns,
            "outcome": _names(rows["outcome"], OUTCOME_NAMES),
            "status": pa.array(rows["status"], mask=rows["status"] == -1),
            "error": _names(rows["error"], self.errors[worker]),
            "model": _names(self._schedule.model[ids], self._schedule.models),
            "payload_id": self._schedule.payload_id[ids],
            "bytes_sent": rows["bytes_sent"],
            "bytes_received": rows["bytes_received"],
            "worker": np.full(len(rows), worker, np.int16),
            "phase": _names(self._schedule.phase[ids], PHASE_NAMES),
        }
        return pa.RecordBatch.from_arrays(
            [pa.array(columns[name]) for name in REQUEST_SCHEMA.names], schema=REQUEST_SCHEMA
        )


def _names(codes: NDArray[Any], names: list[str] | tuple[str, ...]) -> pa.Array:
    """Codes to strings; -1 becomes null."""
    indices = pa.array(codes.astype(np.int32), mask=codes.astype(np.int64) < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string())).cast(pa.string())
