"""Figures of each GPU over the trace, from the readings of NVML and of the DCGM exporter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailrace.harness.analysis.samples import Samples
from tailrace.harness.records.summary import GpuFigures

_MEANS = (
    "utilization",
    "power_w",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "other_utilization",
    "throttled",
    "throttled_thermal",
    "throttled_power",
    "throttled_hardware",
)
_PEAKS = ("memory_bytes", "server_memory_bytes", "other_memory_bytes", "other_processes", "temperature_c")
_DCGM = ("sm_active", "tensor_active", "dram_active")


def gpu_figures(samples: Samples, span_s: float) -> list[GpuFigures]:
    """One entry for each GPU that was read.

    Energy is that of the GPU's own counter, or without one the mean of its power over the trace, times its length;
    ``energy_from`` says which.
    """
    return [_figures(samples, scope, span_s) for scope in samples.all_scopes("gpu")]


def _figures(samples: Samples, scope: str, span_s: float) -> GpuFigures:
    figures: dict[str, Any] = {"gpu": scope, "lost": scope in samples.scopes("gpu", "lost")}
    figures |= {metric: samples.mean("gpu", metric, span_s, scope) for metric in _MEANS}
    figures |= {metric: samples.peak("gpu", metric, span_s, scope) for metric in _PEAKS}
    figures |= {metric: samples.mean("dcgm", metric, span_s, scope) for metric in _DCGM}
    for kind in ("corrected", "uncorrected"):
        rate = samples.rate("gpu", f"ecc_{kind}_total", span_s, scope)
        figures[f"ecc_{kind}"] = None if rate is None else round(rate * span_s)
    counted_w = samples.rate("gpu", "energy_j_total", span_s, scope)
    watts = figures["power_w"] if counted_w is None else counted_w
    figures["energy_j"] = None if watts is None else watts * span_s
    figures["energy_from"] = None if watts is None else "power" if counted_w is None else "counter"
    return GpuFigures.model_validate(figures)


def gpus_power_w(gpus: Sequence[GpuFigures], devices: int, span_s: float) -> float | None:
    """Mean power of all GPUs together over the trace, watts; ``None`` unless each of them told its own, for a part of the
    power would flatter."""
    known = [gpu.energy_j / span_s for gpu in gpus if gpu.energy_j is not None]
    return sum(known) if len(known) == devices else None
