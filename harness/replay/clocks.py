"""By how much the monotonic clock of another machine is ahead, and how wrong that may be."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

READINGS = 40
"""How often a worker's clock is read; the reading with the shortest way counts."""


def clock_identity() -> str:
    """What tells one monotonic clock from another: the boot of the kernel and the time namespace of the process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:
        return f"unknown {os.urandom(8).hex()}"


@dataclass(frozen=True)
class ClockReading:
    """By how much a worker's monotonic clock is ahead of the master's, give or take the uncertainty (ns)."""

    offset_ns: int
    uncertainty_ns: int


def read_clock(ask: Callable[[], tuple[int, int, int]], readings: int = READINGS) -> ClockReading:
    """The offset of a clock by the reading with the shortest way (Cristian 1989; NTP's clock filter, RFC 5905).

    ``ask`` returns when it asked, what the other clock showed, and when the answer was there (ns). The other clock was
    read somewhere between, so the middle is wrong by half the way at most.
    """
    asked_ns, other_ns, answered_ns = min((ask() for _ in range(readings)), key=lambda times: times[2] - times[0])
    return ClockReading(
        offset_ns=other_ns - (asked_ns + answered_ns) // 2, uncertainty_ns=-(-(answered_ns - asked_ns) // 2)
    )


SAME_CLOCK = ClockReading(0, 0)


def uncertainty_ns(before: ClockReading, after: ClockReading) -> int:
    """By how much an instant of the replay may be wrong when it is converted with the offset from before it: what either
    reading did not know, and how far the clocks have drifted apart in between."""
    return max(before.uncertainty_ns, after.uncertainty_ns) + abs(after.offset_ns - before.offset_ns)
