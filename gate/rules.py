"""Rules: what candidate ÷ baseline of a figure may be, and on which side of that an interval lies."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tailrace.harness.errors import InputError, nearest

FIGURES = (
    *("p50_ms", "p90_ms", "p99_ms", "p50_ok_ms", "p99_ok_ms", "p50_service_ms", "p99_service_ms"),
    *("goodput_rps", "goodput_rps_per_device", "throughput_rps", "slo_attainment"),
    *("cold_start_s", "utilization", "server_cpu_cores", "server_memory_bytes", "gpu_memory_bytes", "gpu_power_w"),
)
"""The figures of a trial's summary of which a ratio means something, and which a saved baseline keeps."""
DEFAULT_RULES = ("p99_ms <= 1.10", "goodput_rps_per_device >= 0.95")
_RULE = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(\d+(?:\.\d+)?)\s*")

Side = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Rule:
    """``figure <= bound`` or ``figure >= bound``, of the ratio candidate ÷ baseline."""

    figure: str
    at_most: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.figure} {'<=' if self.at_most else '>='} {self.bound:g}"

    def side(self, ends: tuple[float, float]) -> Side:
        """Where an interval of the ratio lies: wholly within the rule, wholly outside of it, or on both sides."""
        low, high = ends
        if high <= self.bound if self.at_most else low >= self.bound:
            return "pass"
        if low > self.bound if self.at_most else high < self.bound:
            return "fail"
        return "inconclusive"

    def distance(self, ratio: float) -> float:
        """How far a ratio is from the bound, on logarithms; never negative."""
        return abs(math.log(ratio / self.bound))


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    """Rules as they are typed, each once. Raises :class:`InputError` that names the rule and the remedy."""
    return [_parse(text) for text in dict.fromkeys(texts)]


def _parse(text: str) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None or float(match[3]) == 0:
        raise InputError(
            f"--rule {text!r} is not FIGURE <= RATIO or FIGURE >= RATIO",
            remedy=f"the ratio is candidate ÷ baseline and above 0: --rule '{DEFAULT_RULES[0]}'",
        )
    if match[1] not in FIGURES:
        near = nearest(match[1], FIGURES)
        raise InputError(
            f"--rule {text!r}: there is no figure {match[1]!r} to gate on",
            remedy=f"did you mean {near!r}?" if near else f"one of {', '.join(FIGURES)}",
        )
    return Rule(match[1], match[2] == "<=", float(match[3]))
