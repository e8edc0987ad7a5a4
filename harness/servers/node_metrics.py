"""The metrics of several nodes as one server's, although nodes come and go."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

from tailrace.harness.contract.deployment import MetricSample

_COUNTERS = (
    *("requests_ok_total", "requests_failed_total", "batches_total", "items_total"),
    *("stage_answers_total", "stage_answer_s_total"),
)


class NodeMetrics:
    """Sums over nodes. What a node had counted before it went, or a model before it was unloaded, stays counted."""

    def __init__(self) -> None:
        self._ended: dict[tuple[int, str, str], float] = defaultdict(float)
        self._last: dict[tuple[int, str, str], float] = {}
        self._lock = threading.Lock()

    def forget(self, index: int) -> None:
        """A node goes, and counts anew should it come back."""
        with self._lock:
            for key, value in self._last.items():
                if key[0] == index:
                    self._ended[key] += value
            self._last = {key: value for key, value in self._last.items() if key[0] != index}

    def count(self, index: int, samples: Iterable[MetricSample]) -> None:
        """Remember what a node's counters say now."""
        with self._lock:
            for sample in samples:
                if sample.metric in _COUNTERS:
                    key = (index, sample.scope, sample.metric)
                    if sample.value < (last := self._last.get(key, 0.0)):
                        self._ended[key] += last  # of a model that was unloaded, and counts anew
                    self._last[key] = sample.value

    def summed(self, told: Iterable[MetricSample]) -> list[MetricSample]:
        """Of what the nodes say now: its sums, the mean of batch sizes, and in place of counters all that was counted."""
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        units: dict[str, str] = {}
        for sample in told:
            units[sample.metric] = sample.unit
            if sample.metric not in _COUNTERS:
                found[sample.scope, sample.metric].append(sample.value)
        with self._lock:
            for counted in (self._last, self._ended):
                for (_, scope, metric), value in counted.items():
                    found[scope, metric].append(value)
        return [
            MetricSample(metric, sum(values) / (len(values) if metric == "batch_size" else 1), scope, units[metric])
            for (scope, metric), values in found.items()
            if metric in units
        ]
