"""What collectors have read in a trial, as series and as figures over the trace."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tailrace.harness.analysis.metrics import NS_PER_S, Floats


class Samples:
    """Readings of the collectors, by source, scope and metric."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def scopes(self, source: str, metric: str) -> list[str]:
        """The scopes for which a source gave a metric."""
        return sorted(set(self._select(source, metric)["scope"].to_pylist()))

    def all_scopes(self, source: str) -> list[str]:
        """The scopes of which a source gave anything."""
        return sorted(set(self._table.filter(pc.equal(self._table["source"], source))["scope"].to_pylist()))

    def _select(self, source: str, metric: str, scope: str | None = None) -> pa.Table:
        chosen = pc.and_(pc.equal(self._table["source"], source), pc.equal(self._table["metric"], metric))
        if scope is not None:
            chosen = pc.and_(chosen, pc.equal(self._table["scope"], scope))
        return self._table.filter(chosen).sort_by("t_ns")

    def series(self, source: str, metric: str, scope: str | None = None) -> tuple[Floats, Floats]:
        """Times in seconds from the epoch, and values, in order."""
        table = self._select(source, metric, scope)
        return table["t_ns"].to_numpy() / NS_PER_S, np.asarray(table["value"].to_numpy(), dtype=np.float64)

    def mean(self, source: str, metric: str, span_s: float, scope: str | None = None) -> float | None:
        """The mean of a gauge over the trace; ``None`` without readings."""
        t_s, values = self.series(source, metric, scope)
        values = values[(t_s >= 0) & (t_s <= span_s)]
        return float(values.mean()) if len(values) else None

    def halves(self, source: str, metric: str, span_s: float) -> float | None:
        """Relative change of a gauge's mean from the first half of the trace to the second; ``None`` where one of them
        has fewer than three readings."""
        t_s, values = self.series(source, metric)
        first, second = values[(t_s >= 0) & (t_s < span_s / 2)], values[(t_s >= span_s / 2) & (t_s <= span_s)]
        return float(second.mean() / first.mean() - 1) if min(len(first), len(second)) >= 3 else None

    def peak(self, source: str, metric: str, span_s: float, scope: str | None = None) -> float | None:
        """The largest reading over the trace; ``None`` without readings."""
        t_s, values = self.series(source, metric, scope)
        values = values[(t_s >= 0) & (t_s <= span_s)]
        return float(values.max()) if len(values) else None

    def grown(self, source: str, metric: str) -> float | None:
        """By how much a counter grew from its first reading to its last, over all scopes; ``None`` without readings."""
        series = [self.series(source, metric, scope)[1] for scope in self.scopes(source, metric)]
        return float(sum(values[-1] - values[0] for values in series)) if series else None

    def rate(self, source: str, metric: str, span_s: float, scope: str | None = None) -> float | None:
        """The mean increase per second of a counter over the trace, by linear interpolation at its ends."""
        t_s, values = self.series(source, metric, scope)
        if len(t_s) < 2 or span_s <= 0:
            return None
        start, end = max(0.0, float(t_s[0])), min(span_s, float(t_s[-1]))
        if end <= start:
            return None
        at_start, at_end = np.interp([start, end], t_s, values)
        return float(at_end - at_start) / (end - start)
