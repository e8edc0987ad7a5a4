"""What must be the same before cells may be compared: workload, traffic, devices, objective and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tailrace.harness.records.summary import CellSummary
from tailrace.reports.text import bytes_size, count, listing, milliseconds, quantity, sources


@dataclass(frozen=True)
class Conditions:
    """Under what a cell was measured, each in words; equal words mean equal conditions."""

    workload: str
    trace: str
    """With everything that was made of it; not the seed, for repetitions differ in that too."""
    device: str
    nodes: str
    """How many, and who starts one again that has died."""
    objective: str
    hardware: str

    @classmethod
    def of(cls, manifest: Mapping[str, Any], summary: CellSummary) -> Conditions:
        """Those of a cell, from its run's manifest and its summary."""
        return cls(
            workload=_workload(manifest, summary),
            trace=_traffic(manifest, summary),
            device=count(summary.devices, f"{summary.device} device"),
            nodes=_nodes(summary),
            objective=milliseconds(summary.slo_ms),
            hardware=_hardware(manifest.get("hardware") or {}),
        )


def _workload(manifest: Mapping[str, Any], summary: CellSummary) -> str:
    models = manifest["experiment"].get("models") or {"count": 1}
    if models["count"] == 1:
        return str(summary.workload)
    popularity = {key: value for key, value in models["popularity"].items() if value is not None}
    return f"{summary.workload} ({models['count']} models, {sources(popularity)})"


def _nodes(summary: CellSummary) -> str:
    restarted = "restarted when it dies" if summary.supervision == "restart" else "not restarted"
    return f"{count(summary.nodes, 'node')}, {restarted}"


def _traffic(manifest: Mapping[str, Any], summary: CellSummary) -> str:
    experiment = manifest["experiment"]
    asked = dict(experiment["trace"])
    rate = asked.get("mean_rate") or (experiment.get("rate_by_workload") or {}).get(summary.workload)
    changes = {
        **(asked.get("params") or {}),
        "compress_time": asked.get("compress_time"),
        "tail_s": asked.get("tail_s"),
    }
    told = [sources({key: value for key, value in changes.items() if value})] if any(changes.values()) else []
    told += [f"mean {quantity(rate, 'req/s')}"] if rate else []
    told += ["seconds {} to {}".format(*asked["window_s"])] if asked.get("window_s") else []
    origin = (manifest.get("trace") or {}).get("provenance") or {}
    told += [f"file {origin['sha256'][:12]}"] if origin.get("sha256") else []
    return f"{summary.trace} ({', '.join(told)})" if told else str(summary.trace)


def _hardware(facts: Mapping[str, Any]) -> str:
    """What sets the pace; kernel and system are under «Machine and versions»."""
    if not facts:
        return "unknown hardware"
    gpus = [str(gpu) for gpu in facts.get("gpus") or []]
    told = [f"{facts.get('cpu_count')} × {facts.get('cpu_model')}", bytes_size(facts.get("memory_bytes"))]
    return ", ".join([*told, *gpus])


_DIFFERENT = {
    "workload": "with different workloads",
    "trace": "under different traffic",
    "device": "on different devices",
    "nodes": "on other nodes",
    "objective": "against different objectives",
    "hardware": "on different hardware",
}


def differences(runs: Sequence[tuple[str, Conditions]]) -> list[str]:
    """Sentences that name in what runs, given by name, differ; none where all of them may be compared."""
    told = []
    for name, words in _DIFFERENT.items():
        values: dict[str, list[str]] = {}
        for title, conditions in runs:
            values.setdefault(getattr(conditions, name), []).append(title)
        if len(values) > 1:
            titles = listing(list(dict.fromkeys(title for title, _ in runs)))
            each = "; ".join(f"{listing(list(dict.fromkeys(who)))}: {value}" for value, who in values.items())
            told.append(f"Runs {titles} were made {words} ({each}); do not read across.")
    return told


def distinction(one: Conditions, others: Sequence[Conditions]) -> str:
    """What sets these conditions apart from others, fit for a title; nothing where there are no others."""
    apart = [name for name in _DIFFERENT if any(getattr(one, name) != getattr(other, name) for other in others)]
    return " · ".join(f"objective {one.objective}" if name == "objective" else getattr(one, name) for name in apart)
