"""What a search wants: an objective for the tail or the attainment, and which of two settings is the better one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tailrace.harness.analysis.metrics import nearest_rank
from tailrace.harness.errors import InputError
from tailrace.harness.quantities import seconds, share


class Attained(Protocol):
    """What an objective asks for: of a trial's or a cell's summary, or :class:`Expected`."""

    @property
    def p99_ms(self) -> float | None: ...

    @property
    def slo_attainment(self) -> float | None: ...


@dataclass(frozen=True)
class Expected:
    """The same, as the simulator expects it."""

    p99_ms: float
    slo_attainment: float

    @classmethod
    def of(cls, figures: Mapping[str, float]) -> Expected:
        """Of a simulation's figures."""
        return cls(figures["p99_ms"], figures["slo_attainment"])


@dataclass(frozen=True)
class Objective:
    """Within it: p99 at most ``p99_ms`` and attainment (good ÷ offered, good being an answer within ``p99_ms``) at least
    ``attainment``."""

    p99_ms: float
    attainment: float | None = None

    def met(self, figures: Attained) -> bool:
        """Whether such figures are within it. A p99 that is not claimed is not."""
        p99_ms, attained = figures.p99_ms, figures.slo_attainment
        within = p99_ms is not None and p99_ms <= self.p99_ms
        return within and (self.attainment is None or (attained is not None and attained >= self.attainment))

    def affordable(self, arrivals: int) -> int:
        """How many of so many arrivals may miss ``p99_ms``; with one more, whatever comes, the objective is not met."""
        missed = arrivals - nearest_rank(arrivals, 0.99) if arrivals else 0
        return missed if self.attainment is None else min(missed, math.floor(arrivals * (1 - self.attainment) + 1e-9))

    def score(self, figures: Attained) -> float:
        """The larger, the better: settings within the objective before all others; then by attainment, which at the same
        offered load is goodput; then by the tail."""
        p99_ms, attained = figures.p99_ms, figures.slo_attainment
        base = 0.0 if attained is None or math.isnan(attained) else float(attained)
        return base + 1 + 0.1 * (1 - (p99_ms or 0.0) / self.p99_ms) if self.met(figures) else base

    @property
    def words(self) -> str:
        """For a sentence."""
        more = "" if self.attainment is None else f" and {self.attainment:.4g} attained"
        return f"p99 ≤ {self.p99_ms:g} ms{more}"


def parse_objective(texts: Sequence[str]) -> Objective:
    """``p99=120ms`` and perhaps ``attainment=99%``. Raises :class:`InputError`."""
    found: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in ("p99", "attainment") or name in found:
            raise InputError(
                f"--slo {text!r}: write p99=DURATION, and perhaps attainment=SHARE, each once",
                remedy="for example --slo p99=120ms --slo attainment=99%",
            )
        found[name] = value
    if "p99" not in found:
        raise InputError("--slo: the objective of the tail is missing", remedy="for example --slo p99=120ms")
    attained = share(found["attainment"], "--slo attainment") if "attainment" in found else None
    p99_ms = seconds(found["p99"], "--slo p99") * 1e3
    if p99_ms <= 0:
        raise InputError("--slo: nothing is answered within p99=0", remedy="for example --slo p99=120ms")
    return Objective(p99_ms, attained)
