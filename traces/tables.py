"""Files of arrivals as tables, read row by row: exact about what is wrong with them, and where."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.errors import InputError
from tailrace.traces.stamps import CellError, Unit, nanoseconds

MAX_MODELS = 65_536
"""As many as a schedule can index; more means that the column holds something else, request ids say."""


@dataclass(frozen=True)
class Table:
    """What is wanted of a file: its stamps, and perhaps a second column (models, or counts)."""

    path: Path
    column: str
    unit: Unit
    second: str | None


@dataclass(frozen=True)
class Read:
    """What a file held: absolute stamps in ns, sorted, and the model of each as an index into ``models``."""

    stamps_ns: NDArray[np.int64]
    model_index: NDArray[np.int64] | None
    models: list[str]


Row = tuple[int, str, str | None]
"""Line number, stamp, and the second column where one is wanted."""


@dataclass(frozen=True)
class Fingerprint:
    """What one pass over the bytes of a file tells."""

    sha256: str
    lines: int
    quotes: int


def fingerprint(path: Path) -> Fingerprint:
    """Read the file once; raises :class:`InputError` where it cannot be read, is empty, or is no UTF-8."""
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, quotes, last = 0, 0, b""
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError as error:
                    line = 1 + lines + error.object[: error.start].count(b"\n")
                    raise InputError(
                        f"{path}, line {line}: is no UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}).",
                        remedy="save the file as UTF-8 text, or unpack it if it is compressed",
                    ) from error
                lines += chunk.count(b"\n")
                quotes += chunk.count(b'"')
                last = chunk[-1:]
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}.", remedy="check the path and its permissions"
        ) from error
    if not last:
        raise InputError(f"{path}: is empty.", remedy="give a file with at least one arrival")
    if decoder.getstate()[0]:
        raise InputError(
            f"{path}, line {lines + 1}: ends inside a UTF-8 character.", remedy="get the file again, whole"
        )
    return Fingerprint(digest.hexdigest(), lines + (last != b"\n"), quotes)


def fault(table: Table, line: int, column: str | None, text: str, bad: CellError) -> InputError:
    shown = repr(text if len(text) <= 40 else text[:39] + "…")
    return InputError(f"{table.path}, line {line}, column {column!r}: {shown} {bad}.", remedy=bad.remedy)


def read_rows(table: Table, rows: Iterator[Row]) -> Read:
    """Check and collect arrivals one by one."""
    stamps = array("q")
    indices = array("q")
    models: dict[str, int] = {}
    for line, stamp_ns, model in stamped(table, rows):
        stamps.append(stamp_ns)
        if table.second is not None:
            indices.append(_model_index(table, line, model or "", models))
    return Read(
        np.frombuffer(stamps, dtype=np.int64),
        None if table.second is None else np.frombuffer(indices, dtype=np.int64),
        list(models),
    )


def stamped(table: Table, rows: Iterator[Row]) -> Iterator[tuple[int, int, str | None]]:
    """Rows with their stamps in nanoseconds, sorted, at least one."""
    previous: int | None = None
    for line, text, second in rows:
        try:
            stamp_ns = nanoseconds(text, table.unit)
            if previous is not None and stamp_ns < previous:
                raise CellError("is earlier than the row before it", "sort the file by this column")
        except CellError as bad:
            raise fault(table, line, table.column, text, bad) from bad
        previous = stamp_ns
        yield line, stamp_ns, second
    if previous is None:
        raise InputError(f"{table.path}: holds no rows.", remedy="give a file with at least one arrival")


def _model_index(table: Table, line: int, model: str, models: dict[str, int]) -> int:
    index = models.setdefault(model, len(models))
    if not model:
        raise fault(table, line, table.second, model, CellError("names no model", "name one in every row"))
    if index >= MAX_MODELS:
        bad = CellError(f"is the {MAX_MODELS + 1:,}th different model", "choose a column of models, not of requests")
        raise fault(table, line, table.second, model, bad)
    return index


def csv_header(table: Table) -> list[str]:
    """The names of the columns, among which are those wanted, once each."""
    with table.path.open(encoding="utf-8-sig", newline="") as file:
        try:
            header = next((row for row in csv.reader(file) if row), [])
        except csv.Error as error:
            raise InputError(f"{table.path}, line 1: is no CSV ({error}).", remedy="check the format") from error
    for wanted in filter(None, (table.column, table.second)):
        if header.count(wanted) != 1:
            named = ", ".join(repr(name) for name in header[:20]) or "nothing"
            raise InputError(
                f"{table.path}, line 1: the header has {'no' if wanted not in header else 'more than one'} "
                f"column {wanted!r}; it names {named}.",
                remedy="declare which column to use, or write a header with comma-separated names",
            )
    return header


def csv_rows(table: Table, header: list[str]) -> Iterator[Row]:
    at = header.index(table.column)
    second_at = None if table.second is None else header.index(table.second)
    with table.path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        is_header = True
        try:
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{table.path}, line {reader.line_num}: has {len(row)} columns, the header {len(header)}.",
                        remedy="correct that row",
                    )
                if not is_header:
                    yield reader.line_num, row[at], None if second_at is None else row[second_at]
                is_header = False
        except csv.Error as error:
            raise InputError(
                f"{table.path}, line {reader.line_num}: is no CSV ({error}).", remedy="correct that row"
            ) from error


_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
"""Leaves numbers as text: :func:`nanoseconds` reads them exactly, and says what is wrong with them."""


def jsonl_rows(table: Table) -> Iterator[Row]:
    with table.path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = _JSON.decode(text)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{table.path}, line {line}: is no JSON ({error}).", remedy="write one JSON object per line"
                ) from error
            if not isinstance(record, dict):
                raise InputError(
                    f"{table.path}, line {line}: is no JSON object.", remedy="write one JSON object per line"
                )
            yield (
                line,
                _field(table, line, record, table.column),
                table.second and _field(table, line, record, table.second),
            )


def _field(table: Table, line: int, record: dict[str, object], name: str) -> str:
    if name not in record:
        named = ", ".join(repr(key) for key in list(record)[:20]) or "nothing"
        raise InputError(
            f"{table.path}, line {line}: has no field {name!r}; it names {named}.",
            remedy="declare which field to use, or give it in every line",
        )
    value = record[name]
    if not isinstance(value, str):
        bad = CellError("is neither a number nor text", "correct that line")
        raise fault(table, line, name, json.dumps(value), bad)
    return value
