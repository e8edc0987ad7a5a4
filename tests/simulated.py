"""Trials that a known simulated system would have recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from tailrace.harness.analysis.samples import Samples
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.simulator.engine import NS_PER_S, Simulated, simulate
from tailrace.simulator.fitting import Trial
from tailrace.simulator.system import Batching, Service, System
from tailrace.traces import catalogue
from tests.records import trial_summary

TUNING = {"max_batch": 16, "batch_window_ms": 10, "replicas": 3}
TRUE = System(
    service=Service(base_ms=12, per_item_ms=3), batching=Batching(), replicas=3, devices=3, overhead_ms=4, cycle_ms=1
)


def counted(simulated: Simulated, service: Service) -> Samples:
    """Readings of a device's counters, ten a second, as batches go by."""
    taken = simulated.started_ns >= 0
    starts, sizes = np.unique(simulated.started_ns[taken], return_counts=True)
    instants = np.arange(0, simulated.span_ns, NS_PER_S // 10)
    done = np.searchsorted(starts, instants)
    batches, items = done.astype(float), np.concatenate([[0], np.cumsum(sizes)])[done].astype(float)
    busy = (service.base_ms * batches + service.per_item_ms * items) / 1e3
    rows = [
        {"t_ns": int(t), "source": "device", "scope": "0", "metric": metric, "value": float(value), "unit": "1"}
        for metric, values in (("batches_total", batches), ("items_total", items), ("busy_s_total", busy))
        for t, value in zip(instants, values, strict=True)
    ]
    return Samples(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA))


def measured_trial(system: System, seed: int, *, counters: bool = True, **figures: Any) -> Trial:
    trace = catalogue.load("surge", seed=seed)
    simulated = simulate(system, trace.arrivals_ns, span_ns=trace.span_ns)
    told = simulated.figures(120)
    return Trial(
        id=f"trial-{seed}",
        arrivals_ns=trace.arrivals_ns,
        response_ms=simulated.response_ms(),
        span_ns=trace.span_ns,
        figures=trial_summary(
            **{
                "tuning": TUNING,
                "devices": 3,
                "slo_ms": 120,
                **{name: told[name] for name in ("p50_ms", "p99_ms", "goodput_rps", "slo_attainment")},
                "utilization": simulated.busy_ns / (simulated.span_ns * 3),
                "cold_start_phases_s": {"port_open_s": 2.0, "ready_s": 2.8, "first_answer_s": 2.9},
                **figures,
            }
        ),
        samples=counted(simulated, system.service) if counters else Samples(SAMPLE_SCHEMA.empty_table()),
    )
