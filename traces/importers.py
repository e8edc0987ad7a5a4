"""Traces from files: arrival stamps in CSV or JSONL, counts per interval, and public formats by name.

Every format yields times from the first arrival (counts: from the start of the window), in nanoseconds, and a
provenance with the file's SHA-256. What is wrong with a file is said with its line, its column and a remedy.

CSV is read twice over: by Arrow, fast, and, only where Arrow refuses or the result does not hold, row by row, which
either finds the line at fault or reads what Arrow would not. The row reader alone defines what is legal.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tailrace.harness.errors import InputError
from tailrace.traces.fast_csv import read_csv_with_arrow
from tailrace.traces.stamps import CellError, Unit, nanoseconds, stamp_text
from tailrace.traces.statistics import NS_PER_S
from tailrace.traces.tables import Read, Table, csv_header, csv_rows, fault, fingerprint, jsonl_rows, read_rows, stamped
from tailrace.traces.trace import MAX_ARRIVALS, MAX_NS, Trace, random_source

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
    table = Table(path, column, unit, model_column)
    told = fingerprint(path)
    header = csv_header(table)
    read = read_csv_with_arrow(table, header, told) or read_rows(table, csv_rows(table, header))
    return _arrivals(table, read, name, told.sha256, "csv")


def import_jsonl(
    path: Path,
    *,
    name: str | None = None,
    column: str = "timestamp",
    unit: Unit = "s",
    model_column: str | None = None,
) -> Trace:
    """JSON lines: one object per arrival with a field ``column``; otherwise as :func:`import_csv`."""
    table = Table(path, column, unit, model_column)
    sha256 = fingerprint(path).sha256
    return _arrivals(table, read_rows(table, jsonl_rows(table)), name, sha256, "jsonl")


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
    table = Table(path, column, unit, count_column)
    sha256 = fingerprint(path).sha256
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
        "missing_at": [stamp_text(at_ns, unit) for at_ns in islice(missing, LISTED_MISSING)],
    }
    return Trace(
        name=name or path.stem,
        arrivals_ns=arrivals,
        span_ns=end_ns - begin_ns,
        resolution_s=interval_s,
        provenance={
            **_provenance(table, sha256, "counts", total, begin_ns),
            "until": stamp_text(end_ns, unit),
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


def _arrivals(table: Table, read: Read, name: str | None, sha256: str, fmt: str) -> Trace:
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


def _provenance(table: Table, sha256: str, fmt: str, rows: int, first_ns: int) -> dict[str, JsonValue]:
    return {
        "kind": "file",
        "file": table.path.name,
        "sha256": sha256,
        "format": fmt,
        "column": table.column,
        "unit": table.unit,
        "rows": rows,
        "begins": stamp_text(first_ns, table.unit),
        "transformations": [],
    }


def _read_counts(table: Table, interval_ns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts of the intervals (absolute ns, on the grid of the first one, none twice) and their counts."""
    starts, counts = array("q"), array("q")
    for line, start_ns, text in stamped(table, csv_rows(table, csv_header(table))):
        if starts:
            steps, rest = divmod(start_ns - starts[0], interval_ns)
            bad = None
            if rest:
                bad = CellError(
                    f"is not a whole number of intervals of {interval_ns / NS_PER_S:g} s after the first",
                    "declare the interval's length, or correct that row",
                )
            elif start_ns == starts[-1]:
                bad = CellError("starts the same interval as the row before it", "add their counts up in one row")
            elif steps * interval_ns >= MAX_NS - interval_ns:
                bad = CellError("lies more than 292 years after the first", "correct that row")
            if bad:
                raise fault(table, line, table.column, stamp_text(start_ns, table.unit), bad)
        starts.append(start_ns)
        counts.append(_count(table, line, text or ""))
    return np.frombuffer(starts, dtype=np.int64), np.frombuffer(counts, dtype=np.int64)


def _count(table: Table, line: int, text: str) -> int:
    stripped = text.strip()
    if not (stripped.isascii() and stripped.isdigit()):
        bad = CellError("is not a count", "give a whole number of 0 or more")
        raise fault(table, line, table.second, text, bad)
    if len(stripped.lstrip("0")) > 12:
        raise fault(table, line, table.second, text, CellError("is more than 10¹² arrivals", "correct that row"))
    return int(stripped)


def _counts_window(
    table: Table, starts: NDArray[np.int64], interval_ns: int, start: str | float | None, end: str | float | None
) -> tuple[int, int]:
    """Absolute bounds of the window, whole intervals inside the file."""
    first, last = int(starts[0]), int(starts[-1]) + interval_ns

    def bound(label: str, value: str | float | None, default: int) -> int:
        if value is None:
            return default
        try:
            bound_ns = nanoseconds(str(value), table.unit)
        except CellError as bad:
            raise InputError(f"{label} {value!r} {bad}.", remedy=bad.remedy) from bad
        if (bound_ns - first) % interval_ns:
            raise InputError(
                f"{label} {value!r} is not on an interval of {table.path}.",
                remedy=f"choose a multiple of {interval_ns / NS_PER_S:g} s after {stamp_text(first, table.unit)}",
            )
        return bound_ns

    begin_ns, end_ns = bound("start", start, first), bound("end", end, last)
    if not first <= begin_ns < end_ns <= last:
        raise InputError(
            f"The window {stamp_text(begin_ns, table.unit)} to {stamp_text(end_ns, table.unit)} "
            f"is empty or leaves {table.path}.",
            remedy=f"the file covers {stamp_text(first, table.unit)} to {stamp_text(last, table.unit)}",
        )
    return begin_ns, end_ns
