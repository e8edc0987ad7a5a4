"""Instants as files write them: from text to nanoseconds, exactly, and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Literal

import numpy as np

from tailrace.traces.statistics import NS_PER_S
from tailrace.traces.trace import MAX_NS

Unit = Literal["s", "ms", "us", "ns", "datetime"]
"""How a stamp is written: a number in that unit from any origin, or ISO 8601 (without a zone: UTC)."""

NS_PER_UNIT = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DATETIME = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,9}))?)?(Z|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class CellError(ValueError):
    """Why a cell cannot be used, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def nanoseconds(text: str, unit: Unit) -> int:
    """An absolute stamp in nanoseconds, rounded to the nearest; raises :class:`CellError`."""
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
            raise CellError("is not a number (NaN)", "remove that row, or give its time")
        if bare in {"inf", "infinity"}:
            raise CellError("is infinite", "remove that row, or give its time")
        remedy = "remove that row, or give its time"
        if _DATETIME.fullmatch(text):
            remedy = "declare the unit datetime"
        raise CellError("is not a number" if text else "is missing", remedy)
    if value < 0:
        raise CellError("is negative", "count the stamps from their first, so that it is 0")
    if value > MAX_NS // NS_PER_UNIT[unit]:
        raise CellError(
            f"{unit} is more than the 292 years that fit in nanoseconds",
            "check the unit: larger numbers are often in ms, us or ns",
        )
    return round(value * NS_PER_UNIT[unit])


def _datetime_ns(text: str) -> int:
    match = _DATETIME.fullmatch(text)
    if match is None:
        raise CellError(
            "is not a date and time" if text else "is missing",
            "write it as 2023-11-16 18:17:03.979, or declare its unit",
        )
    day, clock, fraction, zone = match.groups()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone or '+00:00'}")
    except ValueError as error:
        raise CellError(f"is not a date and time ({error})", "correct that row") from error
    stamp = (moment - _EPOCH) // timedelta(seconds=1) * NS_PER_S + int((fraction or "").ljust(9, "0"))
    if abs(stamp) > MAX_NS:
        raise CellError("lies outside the years 1678 to 2261 that fit in nanoseconds", "correct that row")
    return stamp


def stamp_text(stamp_ns: int, unit: Unit) -> str:
    """An absolute time as the file would write it."""
    if unit == "datetime":
        return str(np.datetime64(stamp_ns, "ns")).rstrip("0").rstrip(".")
    text = f"{Decimal(stamp_ns) / NS_PER_UNIT[unit]:f}"
    return f"{text} {unit}"
