"""The facts of a trial that has not begun, and how what ended one is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from tailrace.harness.errors import TailraceError
from tailrace.harness.gpus import Gpu
from tailrace.harness.machine import cpu_count
from tailrace.harness.records.facts import GpuName, Memory, TrialError, TrialFacts
from tailrace.harness.run.setup import TrialSetup


def first_facts(setup: TrialSetup, gpus: Sequence[Gpu]) -> TrialFacts:
    """What is known before anything starts; ``gpus`` are those of the cell."""
    cell, plan, trace = setup.cell, setup.plan, setup.trace
    return TrialFacts(
        id=plan.id,
        cell=cell.id,
        adapter=cell.adapter,
        scenario=cell.scenario.name,
        mean_rate=cell.scenario.mean_rate,
        number=plan.number,
        seed=plan.seed,
        state="running",
        error=None,
        workload=cell.workload,
        trace=trace.name,
        transient=trace.transient,
        device=cell.device,
        devices=cell.devices,
        gpus=[GpuName(gpu=gpu.scope, name=gpu.name, uuid=gpu.uuid) for gpu in gpus],
        device_price_per_hour=cell.device_price_per_hour,
        protocol=cell.protocol,
        slo_ms=cell.slo_ms,
        span_s=trace.span_s,
        arrivals=len(trace),
        models=list(cell.models),
        popularity=cell.popularity.model_dump(mode="json", exclude_none=True),
        cpu_count=cpu_count(),
        tuning=cell.tuning.model_dump(mode="json"),
        left_out=dict(cell.left_out),
        composition=cell.composition,
        memory=None
        if cell.memory is None
        else Memory.model_validate({**asdict(cell.memory), "controlled": cell.controlled}),
        artifact=cell.artifact,
        stages=list(cell.stages),
        options=cell.options.model_dump(mode="json"),
        nodes=cell.nodes,
        supervision=cell.supervision,
        planned_faults=len(setup.faults),
        faults=[],
        warnings=[],
        resolved=cell.model_dump(mode="json"),
    )


def ended_by(error: BaseException) -> TrialError:
    """What a record says of the error that ended a trial."""
    if isinstance(error, KeyboardInterrupt):
        return TrialError(message="interrupted by the user", remedy=None, detail=None)
    if isinstance(error, TailraceError):
        return TrialError(message=error.message, remedy=error.remedy, detail=error.detail)
    return TrialError(message=f"{type(error).__name__}: {error}".strip(": "), remedy=None, detail=None)
