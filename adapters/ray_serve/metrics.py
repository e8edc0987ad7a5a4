"""Ray's and HAProxy's Prometheus pages under canonical names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tailrace.harness.contract.adapter import MetricSample

_BATCH_SIZES = "ray_serve_actual_batch_size_bucket"
_HTTP_REQUESTS = "ray_serve_num_http_requests_total"
_PROCESSING = "ray_serve_replica_processing_queries"
_QUEUED = "ray_serve_deployment_queued_queries"
_AT_REPLICAS = "ray_serve_num_ongoing_requests_at_replicas"
_SESSIONS = "haproxy_backend_current_sessions"
_RESPONSES = "haproxy_backend_http_responses_total"
_STATUS = "haproxy_server_status"
_BACKEND = "http-"
"""What Ray puts before an application's name to name its backend in HAProxy."""


class Metrics:
    """Reads the pages of one deployment. It remembers counters: those of a dead replica vanish from Ray's page, and a
    total that goes backwards would be taken for a restart of the server."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] = {}
        self._totals: dict[str, dict[str, float]] = defaultdict(dict)

    def read(self, models: Iterable[str], ray_page: str, haproxy_page: str | None) -> list[MetricSample]:
        """The readings of each model; ``haproxy_page`` is ``None`` when requests go through the Python proxy.

        What Ray does not report yet, or not at all (batches, where there is no batching), is left out.
        """
        ray = _samples(ray_page, (_BATCH_SIZES, _HTTP_REQUESTS, _PROCESSING, _QUEUED, _AT_REPLICAS))
        haproxy = _samples(haproxy_page, (_SESSIONS, _RESPONSES, _STATUS)) if haproxy_page is not None else None
        before = {model: dict(self._totals[model]) for model in models}
        self._count_batches(ray)
        if haproxy is None:
            self._count_requests(ray)
        else:
            self._count_responses(haproxy)
        readings = []
        for model, last in before.items():
            values = dict(self._totals[model])
            batches, items = (values.get(k, 0) - last.get(k, 0) for k in ("batches_total", "items_total"))
            if batches:
                values["batch_size"] = items / batches
            values |= _in_python_proxy(model, ray) if haproxy is None else _in_haproxy(model, ray, haproxy)
            readings += [MetricSample(metric, value, model) for metric, value in values.items()]
        return readings

    def _count_batches(self, ray: Sequence[Sample]) -> None:
        histograms: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
        for sample in ray:
            if sample.name == _BATCH_SIZES:
                labels = sample.labels
                # Of models that share a memory each has a function of its own.
                key = (labels["application"], labels["replica"], labels.get("function_name", ""))
                histograms[key].append((float(labels["le"]), sample.value))
        for (model, *series), buckets in histograms.items():
            batches, items = batches_and_items(buckets)
            self._add(model, "batches_total", batches, *series)
            self._add(model, "items_total", items, *series)

    def _count_requests(self, ray: Sequence[Sample]) -> None:
        for sample in ray:
            if sample.name == _HTTP_REQUESTS:
                labels = sample.labels
                metric = "requests_ok_total" if labels["status_code"].startswith("2") else "requests_failed_total"
                series = (labels["WorkerId"], labels["method"], labels["route"], labels["status_code"])
                self._add(labels["application"], metric, sample.value, *series)

    def _count_responses(self, haproxy: Sequence[Sample]) -> None:
        """HAProxy's own counts: those that Ray makes of HAProxy's log lose some of its lines."""
        for sample in haproxy:
            if sample.name == _RESPONSES and sample.labels["proxy"].startswith(_BACKEND):
                metric = "requests_ok_total" if sample.labels["code"] == "2xx" else "requests_failed_total"
                self._add(sample.labels["proxy"].removeprefix(_BACKEND), metric, sample.value, sample.labels["code"])

    def _add(self, model: str, metric: str, value: float, *series: str) -> None:
        key = (model, metric, *series)
        last = self._last.get(key, 0.0)
        total = self._totals[model].get(metric, 0.0)
        self._totals[model][metric] = total + (value - last if value >= last else value)
        self._last[key] = value


def batches_and_items(buckets: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How many batches, of how many items in all, by a cumulative histogram ``(upper bound, count)`` of batch sizes.

    Exact where bounds are consecutive whole numbers; a wider bucket counts as its middle, the last, open one as
    its lower end.
    """
    batches = items = lower = 0.0
    for bound, cumulative in sorted(buckets):
        size = lower + 1 if math.isinf(bound) else (lower + 1 + bound) / 2
        items += size * (cumulative - batches)
        batches, lower = cumulative, bound
    return batches, items


def _samples(page: str, names: tuple[str, ...]) -> list[Sample]:
    # Ray's page has thousands of lines, and parsing is slow: only what is asked for.
    lines = "".join(line + "\n" for line in page.splitlines() if line.startswith(names))
    return [sample for family in text_string_to_metric_families(lines) for sample in family.samples]


def _total(samples: Iterable[Sample], name: str, model: str) -> float:
    return sum(s.value for s in samples if s.name == name and s.labels.get("application") == model)


def _in_python_proxy(model: str, ray: Sequence[Sample]) -> dict[str, float]:
    waiting = _total(ray, _QUEUED, model)
    return {"queue_depth": waiting, "in_flight": waiting + _total(ray, _AT_REPLICAS, model)}


def _in_haproxy(model: str, ray: Sequence[Sample], haproxy: Sequence[Sample]) -> dict[str, float]:
    """Behind HAProxy requests wait inside the replicas, in no metric of Ray's: those that HAProxy has open less those
    that the replicas say they work on."""
    mine = [sample for sample in haproxy if sample.labels["proxy"] == _BACKEND + model]
    in_flight = sum(sample.value for sample in mine if sample.name == _SESSIONS)
    up = sum(
        sample.value
        for sample in mine
        if sample.name == _STATUS
        and sample.labels["state"] == "UP"
        and sample.labels["server"].startswith("SERVE_REPLICA")
    )
    return {
        "queue_depth": max(0.0, in_flight - _total(ray, _PROCESSING, model)),
        "in_flight": in_flight,
        "replicas": up,
    }
