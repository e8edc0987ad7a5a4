"""Metrics of nodes that come and go, as one server's."""

from __future__ import annotations

from tailrace.harness.contract.adapter import MetricSample
from tailrace.harness.servers.node_metrics import NodeMetrics


def answered(value: float) -> MetricSample:
    return MetricSample("requests_ok_total", value, "alpha")


def test_what_a_node_or_a_model_had_counted_before_it_went_stays_counted() -> None:
    metrics = NodeMetrics()

    def told(**by_node: float) -> float:
        samples = []
        for name, value in by_node.items():
            metrics.count(int(name[-1]), [answered(value)])
            samples.append(answered(value))
        (found,) = metrics.summed(samples)
        return found.value

    assert told(node0=10, node1=5) == 15
    metrics.forget(1)
    assert told(node0=12) == 17
    assert told(node0=12, node1=2) == 19, "it has come back, and counts anew"
    assert told(node0=3, node1=2) == 22, "its model was unloaded, and counts anew"


def test_gauges_are_summed_and_batch_sizes_averaged() -> None:
    told = [MetricSample(metric, value) for metric in ("queue_depth", "batch_size") for value in (2.0, 4.0)]
    assert {sample.metric: sample.value for sample in NodeMetrics().summed(told)} == {"queue_depth": 6, "batch_size": 3}
