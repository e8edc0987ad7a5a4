"""Traces from files: arrival stamps in CSV or JSONL, counts per interval, and public formats by name.

Every format yields times from the first arrival (counts: from the start of the window), in nanoseconds, and a
provenance with the file's SHA-256. What is wrong with a file is said with its line, its column and a remedy.

CSV is read twice over: by Arrow, fast, and, only where Arrow refuses or the result does not hold, row by row, which
either finds the line at fault or reads what Arrow would not. The row reader alone defines what is legal.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict, Unpack, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray
from pydantic import JsonValue

from tailrace.harness.errors import InputError
from tailrace.traces.statistics import NS_PER_S
from tailrace.traces.trace import MAX_ARRIVALS, MAX_NS, Trace, random_source

Unit = Literal["s", "ms", "us", "ns", "datetime"]
"""How a stamp is written: a number in that unit from any origin, or ISO 8601 (without a zone: UTC)."""

NS_PER_UNIT = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}

MAX_MODELS = 65_536
"""As many as a schedule can index; more means that the column holds something else, request ids say."""

MOONCAKE_QUANTUM_NS = 3 * NS_PER_S
MOONCAKE_TOLERANCE_NS = 100_000_000
"""The stamps of the Mooncake conversation trace lie 2.997 to 3.003 s apart; anything closer is another kind of file."""

LISTED_MISSING = 20
"""How many of the missing intervals are named in the provenance; their number always is."""


class ImportOptions(TypedDict, total=False):
    """How a file is to be read; an option that is absent or ``None`` takes its default, one that has no use is refused.

    - ``format`` (default ``csv``): one of :data:`FORMATS`.
    - ``column`` (``timestamp``): the column or field of the stamps; for counts, of the start of each interval.
    - ``unit`` (``s``): see :data:`Unit`.
    - ``model_column`` (none): csv and jsonl only; the model or tenant of each arrival.
    - ``count_column`` (``count``), ``interval_s`` (60): counts only.
    - ``start``, ``end`` (all of the file): counts and worldcup98 only; the window to import, written like a stamp.
    - ``seed`` (0): places arrivals inside their interval (counts, worldcup98) or quantum (mooncake).
    """

    format: str | None
    column: str | None
    unit: str | None
    model_column: str | None
    count_column: str | None
    interval_s: float | None
    start: str | float | None
    end: str | float | None
    seed: int | None


def import_file(path: Path, *, name: str | None = None, **options: Unpack[ImportOptions]) -> Trace:
    """Read ``path`` in the format that ``options`` declare; ``name`` is the trace's, by default the file's stem.

    Raises :class:`InputError` for an option that does not exist or has no use in that format, and for all that can be
    wrong with the file itself.
    """
    given = {key: value for key, value in options.items() if value is not None}
    fmt = str(given.pop("format", "csv"))
    if fmt not in _IMPORTERS:
        raise InputError(f"Trace format {fmt!r} does not exist.", remedy=f"use one of {', '.join(_IMPORTERS)}")
    importer, taken = _IMPORTERS[fmt]
    for key in given:
        if key not in taken:
            raise InputError(
                f"Trace format {fmt!r} has no use for {key!r}.",
                remedy=f"leave it out; this format takes {', '.join(sorted(taken)) or 'no options'}",
            )
    if given.get("unit", "s") not in get_args(Unit):
        raise InputError(f"Unit {given['unit']!r} does not exist.", remedy=f"use one of {', '.join(get_args(Unit))}")
    trace: Trace = importer(path, name=name, **given)
    return trace


def import_csv(
    path: Path,
    *,
    name: str | None = None,
    column: str = "timestamp",
    unit: Unit = "s",
    model_column: str | None = None,
) -> Trace:
    """A CSV file, its header naming the columns, one row per arrival, sorted by ``column``; equal stamps are legal.

    The first arrival becomes 0, and the span ends just after the last one, but never before 1 s. Numbers of seconds
    are read as 64-bit floats: exact to a nanosecond from 0, to a quarter of a microsecond from 1970.
    """
    table = _Table(path, column, unit, model_column)
    fingerprint = _fingerprint(path)
    header = _csv_header(table)
    read = _read_csv_with_arrow(table, header, fingerprint) or _read_rows(table, _csv_rows(table, header))
    return _arrivals(table, read, name, fingerprint.sha256, "csv")


def import_jsonl(
    path: Path,
    *,
    name: str | None = None,
    column: str = "timestamp",
    unit: Unit = "s",
    model_column: str | None = None,
) -> Trace:
    """JSON lines: one object per arrival with a field ``column``; otherwise as :func:`import_csv`."""
    table = _Table(path, column, unit, model_column)
    sha256 = _fingerprint(path).sha256
    return _arrivals(table, _read_rows(table, _jsonl_rows(table)), name, sha256, "jsonl")


def import_counts(
    path: Path,
    *,
    name: str | None = None,
    column: str = "timestamp",
    unit: Unit = "s",
    count_column: str = "count",
    interval_s: float = 60.0,
    start: str | float | None = None,
    end: str | float | None = None,
    seed: int = 0,
) -> Trace:
    """A CSV file of counts: ``column`` is the start of an interval of ``interval_s``, ``count_column`` its arrivals.

    Each interval's arrivals are placed uniformly in it by ``seed``: Poisson given the count, and every count stays
    exact. Intervals that the file leaves out hold no arrivals; the provenance says how many and which. ``start`` and
    ``end`` (exclusive), written like the file's stamps and on its intervals, choose a window. The trace begins at the
    start of the window and spans it all; its ``resolution_s`` is ``interval_s``.
    """
    if not 1e-9 <= interval_s <= MAX_NS / NS_PER_S:
        raise InputError(f"interval_s is {interval_s}.", remedy="give the length of an interval in seconds, above 0")
    table = _Table(path, column, unit, count_column)
    sha256 = _fingerprint(path).sha256
    interval_ns = round(interval_s * NS_PER_S)
    starts, counts = _read_counts(table, interval_ns)
    begin_ns, end_ns = _counts_window(table, starts, interval_ns, start, end)
    inside = (starts >= begin_ns) & (starts < end_ns)
    starts, counts = starts[inside] - begin_ns, counts[inside]
    total = int(counts.sum())
    if total > MAX_ARRIVALS:
        raise InputError(
            f"{path}: holds {total:,} arrivals, more than {MAX_ARRIVALS:,}.",
            remedy="import a window of it, with start and end",
        )
    random = random_source(seed, "place")
    arrivals = np.repeat(starts, counts)
    arrivals += random.integers(0, interval_ns, size=total, dtype=np.int64)
    arrivals.sort()
    intervals = (end_ns - begin_ns) // interval_ns
    present = set((starts // interval_ns).tolist())
    missing = (begin_ns + i * interval_ns for i in range(intervals) if i not in present)
    placement: dict[str, JsonValue] = {
        "kind": "place_counts",
        "method": "uniform inside each interval",
        "interval_s": interval_s,
        "seed": seed,
        "intervals": intervals,
        "missing_intervals": intervals - len(present),
        "missing_read_as": 0,
        "missing_at": [_stamp_text(at_ns, unit) for at_ns in islice(missing, LISTED_MISSING)],
    }
    return Trace(
        name=name or path.stem,
        arrivals_ns=arrivals,
        span_ns=end_ns - begin_ns,
        resolution_s=interval_s,
        provenance={
            **_provenance(table, sha256, "counts", total, begin_ns),
            "until": _stamp_text(end_ns, unit),
            "transformations": [placement],
        },
    )


def import_azure_llm_2023(path: Path, *, name: str | None = None) -> Trace:
    """The Azure LLM inference traces of 2023 (Patel et al., Splitwise, ISCA 2024): CSV, date-time ``TIMESTAMP``."""
    trace = import_csv(path, name=name, column="TIMESTAMP", unit="datetime")
    return replace(trace, provenance={**trace.provenance, "format": "azure_llm_2023"})


def import_mooncake(path: Path, *, name: str | None = None, seed: int = 0) -> Trace:
    """The Mooncake conversation trace (FAST 2025): JSONL in milliseconds, whose stamps stand only every 3 s.

    As written it would fire some ten requests at one instant every 3 s, an artefact. Each arrival is moved by a seeded
    uniform jitter inside its quantum; the true structure below 3 s is unknown, hence ``resolution_s`` is 3. The span
    ends with the last quantum. Refuses a file whose stamps are finer, which jitter would spoil.
    """
    raw = import_jsonl(path, name=name, unit="ms")
    steps = np.diff(np.unique(raw.arrivals_ns))
    if len(steps) > 0 and steps.min() < MOONCAKE_QUANTUM_NS - MOONCAKE_TOLERANCE_NS:
        raise InputError(
            f"{path}: has stamps {steps.min() / NS_PER_S:g} s apart, so it is not quantised to 3 s "
            "as the Mooncake conversation trace is.",
            remedy="import it with format jsonl, column timestamp and unit ms",
        )
    jitter = random_source(seed, "dequantise").integers(0, MOONCAKE_QUANTUM_NS, size=len(raw), dtype=np.int64)
    dequantised: dict[str, JsonValue] = {"kind": "dequantise", "quantum_s": 3.0, "jitter": "uniform", "seed": seed}
    return Trace(
        name=raw.name,
        arrivals_ns=np.sort(raw.arrivals_ns + jitter),
        span_ns=int(raw.arrivals_ns[-1]) + MOONCAKE_QUANTUM_NS,
        resolution_s=MOONCAKE_QUANTUM_NS / NS_PER_S,
        provenance={**raw.provenance, "format": "mooncake", "transformations": [dequantised]},
    )


def import_worldcup98(
    path: Path,
    *,
    name: str | None = None,
    start: str | float | None = None,
    end: str | float | None = None,
    seed: int = 0,
) -> Trace:
    """Requests per minute of the 1998 World Cup site (Arlitt and Jin, 1998): CSV of ``period`` (GMT) and ``count``.

    The whole file holds 1.35·10⁹ requests: choose a window, say ``start="1998-05-19 20:30", end="1998-05-19 21:30"``.
    Ten minutes are missing and read as 0: without them the counts already add up to the log's own total.
    """
    trace = import_counts(path, name=name, column="period", unit="datetime", start=start, end=end, seed=seed)
    return replace(trace, provenance={**trace.provenance, "format": "worldcup98"})


_STAMPED = frozenset({"column", "unit", "model_column"})
_WINDOWED = frozenset({"start", "end", "seed"})
_IMPORTERS: dict[str, tuple[Callable[..., Trace], frozenset[str]]] = {
    "csv": (import_csv, _STAMPED),
    "jsonl": (import_jsonl, _STAMPED),
    "counts": (import_counts, frozenset({"column", "unit", "count_column", "interval_s"}) | _WINDOWED),
    "azure_llm_2023": (import_azure_llm_2023, frozenset()),
    "mooncake": (import_mooncake, frozenset({"seed"})),
    "worldcup98": (import_worldcup98, _WINDOWED),
}
"""By format: who imports it, and the options that have a use there."""

FORMATS = tuple(_IMPORTERS)


# --- what a file is read into -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """What is wanted of a file: its stamps, and perhaps a second column (models, or counts)."""

    path: Path
    column: str
    unit: Unit
    second: str | None


@dataclass(frozen=True)
class _Read:
    """What a file held: absolute stamps in ns, sorted, and the model of each as an index into ``models``."""

    stamps_ns: NDArray[np.int64]
    model_index: NDArray[np.int64] | None
    models: list[str]


_Row = tuple[int, str, str | None]
"""Line number, stamp, and the second column where one is wanted."""


def _arrivals(table: _Table, read: _Read, name: str | None, sha256: str, fmt: str) -> Trace:
    first, last = int(read.stamps_ns[0]), int(read.stamps_ns[-1])
    if last - first >= MAX_NS:
        raise InputError(f"{table.path}: spans more than 292 years.", remedy="check the first and the last stamp")
    provenance = _provenance(table, sha256, fmt, len(read.stamps_ns), first)
    if read.model_index is not None:
        provenance["models"] = [*read.models]
    return Trace(
        name=name or table.path.stem,
        arrivals_ns=read.stamps_ns - first,
        span_ns=max(last - first + 1, NS_PER_S),
        model_index=read.model_index,
        provenance=provenance,
    )


def _provenance(table: _Table, sha256: str, fmt: str, rows: int, first_ns: int) -> dict[str, JsonValue]:
    return {
        "kind": "file",
        "file": table.path.name,
        "sha256": sha256,
        "format": fmt,
        "column": table.column,
        "unit": table.unit,
        "rows": rows,
        "begins": _stamp_text(first_ns, table.unit),
        "transformations": [],
    }


def _stamp_text(stamp_ns: int, unit: Unit) -> str:
    """An absolute time as the file would write it."""
    if unit == "datetime":
        return str(np.datetime64(stamp_ns, "ns")).rstrip("0").rstrip(".")
    text = f"{Decimal(stamp_ns) / NS_PER_UNIT[unit]:f}"
    return f"{text} {unit}"


@dataclass(frozen=True)
class _Fingerprint:
    """What one pass over the bytes of a file tells."""

    sha256: str
    lines: int
    quotes: int


def _fingerprint(path: Path) -> _Fingerprint:
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
    return _Fingerprint(digest.hexdigest(), lines + (last != b"\n"), quotes)


# --- values -----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DATETIME = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,9}))?)?(Z|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _CellError(ValueError):
    """Why a cell cannot be used, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def _nanoseconds(text: str, unit: Unit) -> int:
    """An absolute stamp in nanoseconds, rounded to the nearest; raises :class:`_CellError`."""
    text = text.strip()
    if unit == "datetime":
        return _datetime_ns(text)
    if text.isascii() and text.isdigit() and len(text) <= 18:  # most stamps; the rest is slower
        value: int | Decimal = int(text)
    elif _NUMBER.fullmatch(text):
        value = Decimal(text)
    else:
        bare = text.lstrip("+-").lower()
        if bare == "nan":
            raise _CellError("is not a number (NaN)", "remove that row, or give its time")
        if bare in {"inf", "infinity"}:
            raise _CellError("is infinite", "remove that row, or give its time")
        remedy = "remove that row, or give its time"
        if _DATETIME.fullmatch(text):
            remedy = "declare the unit datetime"
        raise _CellError("is not a number" if text else "is missing", remedy)
    if value < 0:
        raise _CellError("is negative", "count the stamps from their first, so that it is 0")
    if value > MAX_NS // NS_PER_UNIT[unit]:
        raise _CellError(
            f"{unit} is more than the 292 years that fit in nanoseconds",
            "check the unit: larger numbers are often in ms, us or ns",
        )
    return round(value * NS_PER_UNIT[unit])


def _datetime_ns(text: str) -> int:
    match = _DATETIME.fullmatch(text)
    if match is None:
        raise _CellError(
            "is not a date and time" if text else "is missing",
            "write it as 2023-11-16 18:17:03.979, or declare its unit",
        )
    day, clock, fraction, zone = match.groups()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone or '+00:00'}")
    except ValueError as error:
        raise _CellError(f"is not a date and time ({error})", "correct that row") from error
    stamp = (moment - _EPOCH) // timedelta(seconds=1) * NS_PER_S + int((fraction or "").ljust(9, "0"))
    if abs(stamp) > MAX_NS:
        raise _CellError("lies outside the years 1678 to 2261 that fit in nanoseconds", "correct that row")
    return stamp


def _fault(table: _Table, line: int, column: str | None, text: str, bad: _CellError) -> InputError:
    shown = repr(text if len(text) <= 40 else text[:39] + "…")
    return InputError(f"{table.path}, line {line}, column {column!r}: {shown} {bad}.", remedy=bad.remedy)


# --- the row readers: exact about what is wrong -----------------------------------------------------------------------


def _read_rows(table: _Table, rows: Iterator[_Row]) -> _Read:
    """Check and collect arrivals one by one."""
    stamps = array("q")
    indices = array("q")
    models: dict[str, int] = {}
    for line, stamp_ns, model in _stamped(table, rows):
        stamps.append(stamp_ns)
        if table.second is not None:
            indices.append(_model_index(table, line, model or "", models))
    return _Read(
        np.frombuffer(stamps, dtype=np.int64),
        None if table.second is None else np.frombuffer(indices, dtype=np.int64),
        list(models),
    )


def _stamped(table: _Table, rows: Iterator[_Row]) -> Iterator[tuple[int, int, str | None]]:
    """Rows with their stamps in nanoseconds, sorted, at least one."""
    previous: int | None = None
    for line, text, second in rows:
        try:
            stamp_ns = _nanoseconds(text, table.unit)
            if previous is not None and stamp_ns < previous:
                raise _CellError("is earlier than the row before it", "sort the file by this column")
        except _CellError as bad:
            raise _fault(table, line, table.column, text, bad) from bad
        previous = stamp_ns
        yield line, stamp_ns, second
    if previous is None:
        raise InputError(f"{table.path}: holds no rows.", remedy="give a file with at least one arrival")


def _model_index(table: _Table, line: int, model: str, models: dict[str, int]) -> int:
    index = models.setdefault(model, len(models))
    if not model:
        raise _fault(table, line, table.second, model, _CellError("names no model", "name one in every row"))
    if index >= MAX_MODELS:
        bad = _CellError(f"is the {MAX_MODELS + 1:,}th different model", "choose a column of models, not of requests")
        raise _fault(table, line, table.second, model, bad)
    return index


def _csv_header(table: _Table) -> list[str]:
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


def _csv_rows(table: _Table, header: list[str]) -> Iterator[_Row]:
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
"""Leaves numbers as text: :func:`_nanoseconds` reads them exactly, and says what is wrong with them."""


def _jsonl_rows(table: _Table) -> Iterator[_Row]:
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


def _field(table: _Table, line: int, record: dict[str, object], name: str) -> str:
    if name not in record:
        named = ", ".join(repr(key) for key in list(record)[:20]) or "nothing"
        raise InputError(
            f"{table.path}, line {line}: has no field {name!r}; it names {named}.",
            remedy="declare which field to use, or give it in every line",
        )
    value = record[name]
    if not isinstance(value, str):
        bad = _CellError("is neither a number nor text", "correct that line")
        raise _fault(table, line, name, json.dumps(value), bad)
    return value


# --- counts -----------------------------------------------------------------------------------------------------------


def _read_counts(table: _Table, interval_ns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts of the intervals (absolute ns, on the grid of the first one, none twice) and their counts."""
    starts, counts = array("q"), array("q")
    for line, start_ns, text in _stamped(table, _csv_rows(table, _csv_header(table))):
        if starts:
            steps, rest = divmod(start_ns - starts[0], interval_ns)
            bad = None
            if rest:
                bad = _CellError(
                    f"is not a whole number of intervals of {interval_ns / NS_PER_S:g} s after the first",
                    "declare the interval's length, or correct that row",
                )
            elif start_ns == starts[-1]:
                bad = _CellError("starts the same interval as the row before it", "add their counts up in one row")
            elif steps * interval_ns >= MAX_NS - interval_ns:
                bad = _CellError("lies more than 292 years after the first", "correct that row")
            if bad:
                raise _fault(table, line, table.column, _stamp_text(start_ns, table.unit), bad)
        starts.append(start_ns)
        counts.append(_count(table, line, text or ""))
    return np.frombuffer(starts, dtype=np.int64), np.frombuffer(counts, dtype=np.int64)


def _count(table: _Table, line: int, text: str) -> int:
    stripped = text.strip()
    if not (stripped.isascii() and stripped.isdigit()):
        bad = _CellError("is not a count", "give a whole number of 0 or more")
        raise _fault(table, line, table.second, text, bad)
    if len(stripped.lstrip("0")) > 12:
        raise _fault(table, line, table.second, text, _CellError("is more than 10¹² arrivals", "correct that row"))
    return int(stripped)


def _counts_window(
    table: _Table, starts: NDArray[np.int64], interval_ns: int, start: str | float | None, end: str | float | None
) -> tuple[int, int]:
    """Absolute bounds of the window, whole intervals inside the file."""
    first, last = int(starts[0]), int(starts[-1]) + interval_ns

    def bound(label: str, value: str | float | None, default: int) -> int:
        if value is None:
            return default
        try:
            bound_ns = _nanoseconds(str(value), table.unit)
        except _CellError as bad:
            raise InputError(f"{label} {value!r} {bad}.", remedy=bad.remedy) from bad
        if (bound_ns - first) % interval_ns:
            raise InputError(
                f"{label} {value!r} is not on an interval of {table.path}.",
                remedy=f"choose a multiple of {interval_ns / NS_PER_S:g} s after {_stamp_text(first, table.unit)}",
            )
        return bound_ns

    begin_ns, end_ns = bound("start", start, first), bound("end", end, last)
    if not first <= begin_ns < end_ns <= last:
        raise InputError(
            f"The window {_stamp_text(begin_ns, table.unit)} to {_stamp_text(end_ns, table.unit)} "
            f"is empty or leaves {table.path}.",
            remedy=f"the file covers {_stamp_text(first, table.unit)} to {_stamp_text(last, table.unit)}",
        )
    return begin_ns, end_ns


# --- the fast way -----------------------------------------------------------------------------------------------------


def _read_csv_with_arrow(table: _Table, header: list[str], fingerprint: _Fingerprint) -> _Read | None:
    """The same as the row reader where all is well; ``None`` where it is not, or not surely."""
    if table.column == table.second or len(set(header)) < len(header):
        return None
    columns = _arrow_columns(table)
    # A stray quote swallows what follows, and Arrow lets it: every row must be one line, and the quotes must pair.
    if columns is None or len(columns) + 1 != fingerprint.lines or fingerprint.quotes % 2:
        return None
    stamps_ns = _whole_nanoseconds(columns[table.column], table.unit)
    if stamps_ns is None:
        return None
    if table.second is None:
        return _Read(stamps_ns, None, [])
    coded = pc.dictionary_encode(columns[table.second].combine_chunks())
    models = coded.dictionary.to_pylist()
    if "" in models or len(models) > MAX_MODELS:
        return None
    return _Read(stamps_ns, coded.indices.to_numpy().astype(np.int64), models)


def _arrow_columns(table: _Table) -> pa.Table | None:
    """The wanted columns, the stamps as the first type that fits all of them."""
    types = {
        "s": [pa.float64()],
        "datetime": [pa.timestamp("ns"), pa.timestamp("ns", tz="UTC")],
    }.get(table.unit, [pa.int64(), pa.float64()])
    wanted = [name for name in (table.column, table.second) if name is not None]
    for stamp_type in types:
        convert = pa_csv.ConvertOptions(
            column_types={wanted[-1]: pa.string(), table.column: stamp_type},
            include_columns=wanted,
            null_values=[],
        )
        try:
            return pa_csv.read_csv(table.path, convert_options=convert)
        except pa.ArrowException:
            continue
    return None


def _whole_nanoseconds(column: pa.ChunkedArray, unit: Unit) -> NDArray[np.int64] | None:
    """Absolute stamps in ns; ``None`` unless all are finite, not negative, sorted and small enough."""
    if len(column) == 0:
        return None
    if unit == "datetime":
        moments: NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
        return None if bool(np.any(moments[1:] < moments[:-1])) else moments
    values: NDArray[np.int64] | NDArray[np.float64] = column.to_numpy()
    scale = NS_PER_UNIT[unit]
    ordered = not bool(np.any(values[1:] < values[:-1]))
    # NaN makes every comparison false, so a NaN in between is looked for by itself.
    if not ordered or bool(np.isnan(values).any()) or not (values[0] >= 0 and values[-1] <= MAX_NS // scale - 1):
        return None
    if values.dtype == np.int64:
        return values.astype(np.int64) * scale
    # The first stamp is taken off before scaling: 1.7·10⁹ s in nanoseconds would lose what the difference still has.
    origin = values[0]
    offsets: NDArray[np.int64] = np.rint((values - origin) * scale).astype(np.int64)
    return offsets + round(float(origin) * scale)
