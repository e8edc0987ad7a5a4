"""Quantities as people type them (``120ms``, ``0.8s``, ``99%``, ``base=12ms,per_item=3ms``), and as they read them."""

from __future__ import annotations

import math
import re

from tailrace.harness.errors import InputError

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min|h)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def seconds(text: str, where: str) -> float:
    """A duration in seconds. ``where`` names the option in the :class:`InputError` of anything else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not math.isfinite(float(match[1])):
        raise InputError(f"{where}: {text!r} is no duration", remedy="write a number and its unit: 120ms, 0.8s, 2min")
    return float(match[1]) * _UNITS_S[match[2]]


def share(text: str, where: str) -> float:
    """A share in (0, 1] of a text such as ``99%``."""
    match = _SHARE.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) <= 100:
        raise InputError(f"{where}: {text!r} is no share", remedy="write a percentage above 0%: 99%")
    return float(match[1]) / 100


def assignments(text: str, where: str, known: tuple[str, ...]) -> dict[str, str]:
    """The parts of ``key=value,key=value``, each key one of ``known``."""
    found: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        if not separator or key not in known:
            raise InputError(
                f"{where}: {part.strip()!r} is not KEY=VALUE with one of {', '.join(known)}",
                remedy=f"for example {where} {','.join(f'{name}=…' for name in known)}",
            )
        if key in found:
            raise InputError(f"{where}: {key} is given twice", remedy="leave one of them out")
        found[key] = value
    return found


def figure(value: object, shape: str = "") -> str:
    """A value for reading: a number in this shape (without one: four significant digits, thousands set off), ∞ where failures
    own it, a dash where there is nothing to say; words as they are."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "∞" if math.isinf(value) else format(value, shape or ",.4g")
    return format(value, shape or ",") if isinstance(value, int) else str(value)


def milliseconds(value: float | None) -> str:
    """A latency for reading: three significant digits, ∞ where failures own the rank, «not claimed» for ``None``."""
    if value is None:
        return "not claimed"
    return figure(value, ".0f" if value >= 100 else ".1f" if value >= 10 else ".2f")


def percent(value: float | None) -> str:
    """A share for reading, rounded down: 99.97 % is not 100 %."""
    return figure(None if value is None else math.floor(value * 1000) / 1000 if math.isfinite(value) else value, ".1%")
