"""Tables that survive a crash: an Arrow stream while they grow, Parquet by rename once they are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from tailrace.harness.errors import StorageError


class TableWriter:
    """Appends batches to ``STEM.arrow`` (Arrow IPC stream), each flushed to the kernel as it is written."""

    def __init__(self, stem: Path, schema: pa.Schema) -> None:
        self.path = stem.with_name(stem.name + ".arrow")
        try:
            self._file = self.path.open("wb")
            self._stream = pa.ipc.new_stream(self._file, schema)
            self._file.flush()
        except OSError as error:
            raise StorageError.of(self.path, error) from error
        self._refused = False

    def append(self, batch: pa.RecordBatch) -> None:
        """Append one batch. Raises :class:`StorageError` when the disk refuses; what was written stays readable."""
        if self._refused:
            return  # told once; whatever followed a torn batch could not be read
        try:
            self._stream.write_batch(batch)
            self._file.flush()
        except OSError as error:
            self._refused = True
            raise StorageError.of(self.path, error) from error

    def close(self) -> None:
        """End the stream; a full disk at this point costs nothing but the end marker. Safe to call again."""
        with contextlib.suppress(OSError):
            if not self._refused:
                self._stream.close()
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def finish_table(stem: Path, *, sort_by: str) -> None:
    """Turn ``STEM.arrow`` into ``STEM.parquet``, sorted by a column, by rename; does nothing when there is no stream."""
    stream = stem.with_name(stem.name + ".arrow")
    if not stream.exists():
        return
    table = _read_stream(stream)
    if table is None:
        return
    parquet = stem.with_name(stem.name + ".parquet")
    staged = stem.with_name(stem.name + ".parquet.tmp")
    try:
        with staged.open("wb") as handle:
            pq.write_table(table.sort_by(sort_by), handle, compression="zstd")
            handle.flush()
            os.fsync(handle.fileno())
        staged.replace(parquet)
        stream.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise StorageError.of(parquet, error) from error


def read_table(stem: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The table ``STEM``: from Parquet, else from the stream as far as it was written; ``None`` when neither exists.

    With ``columns``, only those, and texts among them as dictionaries: ten million repetitions of a word are then ten
    million small numbers. Raises :class:`StorageError` when a Parquet file is damaged, or when the columns are not those
    of ``schema``.
    """
    parquet, stream = (stem.with_name(stem.name + ending) for ending in (".parquet", ".arrow"))
    texts = [name for name in columns or () if pa.types.is_string(schema.field(name).type)]
    if parquet.exists():
        try:
            with parquet.open("rb") as handle:
                _check_columns(stem, pq.ParquetFile(handle).schema_arrow, schema)
                return pq.ParquetFile(handle, read_dictionary=texts).read(columns)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"{parquet} is damaged: {error}",
                remedy="the trial cannot be analysed; delete its folder and run it again",
            ) from error
    table = _read_stream(stream) if stream.exists() else None
    if table is None:
        return None
    _check_columns(stem, table.schema, schema)
    table = table if columns is None else table.select(list(columns))
    for name in texts:
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    return table


def _check_columns(stem: Path, found: pa.Schema, schema: pa.Schema) -> None:
    if not found.equals(schema):
        raise StorageError(
            f"{stem}: the columns are not those that this version of tailrace knows: {', '.join(found.names)}",
            remedy="read it with the version that wrote it (tailrace_version in the run's manifest.json)",
        )


def _read_stream(path: Path) -> pa.Table | None:
    """Every whole batch of a stream that may end anywhere; ``None`` when it ends before the first could begin."""
    batches: list[pa.RecordBatch] = []
    with path.open("rb") as handle:
        try:
            reader = pa.ipc.open_stream(handle)
        except (OSError, pa.ArrowException):
            return None
        with contextlib.suppress(OSError, pa.ArrowException, StopIteration):
            while True:
                batches.append(reader.read_next_batch())
        return pa.Table.from_batches(batches, schema=reader.schema)
