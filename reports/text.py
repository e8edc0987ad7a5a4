"""Numbers and verdicts in words: every figure that a reader sees as text is written here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"
"""What stands where there is nothing to say."""
_THIN = "\u202f"
"""Narrow no-break space, between a number and its unit."""
_NO_BREAK = "\u00a0"


def significant(value: float, digits: int = 3) -> str:
    """A finite number with so many significant digits, never in exponent form, thousands set off."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{value:,.{decimals}f}"


def quantity(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A value with its unit; ``∞`` where failures own it, a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞"
    shown = significant(value, digits)
    return f"{shown}{_THIN}{unit}" if unit else shown


def milliseconds(value: float | None) -> str:
    """A latency."""
    return quantity(value, "ms")


def seconds(value: float | None) -> str:
    """A duration."""
    return quantity(value, "s")


def per_second(value: float | None) -> str:
    """A rate of requests."""
    return quantity(value, "req/s")


def share(value: float | None) -> str:
    """A share as per cent, rounded down, so that 100 % means all and nothing less."""
    if value is None or math.isnan(value):
        return NOTHING
    percent = value * 100
    decimals = 1
    while decimals < 4 and 0 < 100 - percent < 10**-decimals:
        decimals += 1
    floored = math.floor(percent * 10**decimals + 1e-6) / 10**decimals
    shown = "100" if value >= 1 else f"{min(floored, 100 - 10**-decimals):.{decimals}f}"
    return f"{shown}{_THIN}%"


def interval(ends: Sequence[float] | None, *, digits: int = 3) -> str:
    """An interval in brackets, or nothing."""
    return f"[{quantity(ends[0], digits=digits)},{_NO_BREAK}{quantity(ends[1], digits=digits)}]" if ends else ""


def count(number: int, singular: str, plural: str | None = None) -> str:
    """``3 trials``."""
    return f"{number:,}{_NO_BREAK}{singular if number == 1 else plural or singular + 's'}"


def listing(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def tied(text: str) -> str:
    """The text with numbers held to their units, so that no line breaks between them."""
    return _NUMBER_AND_UNIT.sub(_NO_BREAK, text)


_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:%|[mµn]?s|min|h|req/s|requests/s|[KMGT]i?B|B|MHz|GHz)(?![\w%]))")


def humanly(identifier: str) -> str:
    """``kill_replica`` → ``kill replica``."""
    return identifier.replace("_", " ").replace("-", " ")


def bytes_size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None or math.isnan(value):
        return NOTHING
    power = min(4, int(math.log2(value) // 10)) if value >= 1 else 0
    return f"{significant(value / 1024**power)}{_THIN}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def sources(record: Mapping[str, Any] | None) -> str:
    """A mapping as ``key value, key value``; for versions."""
    return ", ".join(f"{key} {value}" for key, value in (record or {}).items())


def markdown_safe(text: str) -> str:
    """The text as itself: on one line, without a meaning for Markdown or HTML, and nobody is mentioned by it. Servers, traces
    and hardware may be called anything."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


_MARKUP = re.compile(r"[\\`*\[\]<>|#~&@!]|(?<![^\W_])_|_(?![^\W_])")
"""Underscores within a word mean nothing."""


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, everything in it :func:`markdown_safe`."""
    dashes = " | ".join("---" for _ in headings)
    lines = [" | ".join(markdown_safe(cell) for cell in row) for row in (headings, *rows)]
    return [f"| {line} |" for line in (lines[0], dashes, *lines[1:])]


def printable(text: str) -> str:
    """The text without what no page may hold: control characters, lone surrogates, and marks that turn the direction of
    writing, with which a server could make the words around its own read backwards."""
    return _UNPRINTABLE.sub("\ufffd", text)


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
