"""Who competes, and what each cell comes to: the tuning that its framework can express, and what its models share."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from tailrace.harness.contract.adapter import Adapter, Tuning, WireProtocol
from tailrace.harness.contract.multiplexing import MIB, MemoryPlan, plan_memory
from tailrace.harness.contract.workload import Device, WorkloadSpec
from tailrace.harness.errors import InputError
from tailrace.harness.gpus import gpus
from tailrace.harness.plan.experiment import Experiment, Scenario
from tailrace.harness.plan.faults import link_faults
from tailrace.harness.plan.keys import validated_options
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.run.registry import get_adapter


@dataclass(frozen=True)
class Contestant:
    """One adapter with its options validated and its protocol chosen."""

    adapter: Adapter
    options: BaseModel
    protocol: WireProtocol


def contestant(experiment: Experiment, name: str) -> Contestant:
    """An adapter with what the experiment says to it. Raises :class:`InputError` for options or a protocol it has not."""
    adapter = get_adapter(name)
    options = validated_options(adapter, experiment.options.get(name, {}))
    protocol = experiment.client.protocol or adapter.protocols[0]
    if protocol not in adapter.protocols:
        raise InputError(
            f"`client.protocol`: {name} does not speak {protocol}, only {', '.join(adapter.protocols)}",
            remedy="leave `client.protocol` out: every adapter then uses its first",
        )
    return Contestant(adapter, options, protocol)


def resolve(
    experiment: Experiment,
    spec: WorkloadSpec,
    device: Device,
    entrant: Contestant,
    scenario: Scenario,
    price_per_hour: float | None,
) -> ResolvedCell:
    """All that a cell's trials have in common. Raises :class:`InputError` for what its framework cannot do, unless the
    experiment leaves that out."""
    adapter = entrant.adapter
    tuning, left_out = adapter.expressible(experiment.tuning_of(scenario), entrant.options, entrant.protocol)
    composition = (scenario.composition or experiment.composition) if spec.pipeline else None
    if composition == "framework" and (reason := adapter.composition_refusal()):
        left_out, composition = {**left_out, "composition": reason}, "one-process"
    artifact = experiment.artifact
    if reason := adapter.artifact_refusal(artifact):
        left_out, artifact = {**left_out, "artifact": reason}, "python"
    if left_out and experiment.when_refused == "stop":
        raise InputError(
            "\n".join(left_out.values()),
            remedy=f"remove the knob from `tuning`, or {adapter.name} from `adapters`, "
            "or set `when_refused: leave_out` to run it without"
            + (", the stages in one process" if "composition" in left_out else "")
            + (", by its Python code" if "artifact" in left_out else ""),
        )
    memory = _memory(experiment, spec, device, entrant, scenario, tuning)
    return ResolvedCell(
        adapter=adapter.name,
        scenario=scenario,
        workload=spec.name,
        models=tuple(experiment.models.names(spec.name)),
        popularity=experiment.models.popularity,
        stages=tuple(stage.name for stage in spec.pipeline),
        device=device,
        devices=1 if device == "cpu" else experiment.devices,
        device_price_per_hour=price_per_hour,
        dcgm_exporter=experiment.dcgm_exporter,
        nodes=experiment.nodes,
        # In all scenarios or in none, so that they differ in the fault alone.
        links=link_faults(kind for one in experiment.scenarios for kind in one.fault_kinds),
        supervision=experiment.supervision,
        restart_backoff_s=experiment.restart_backoff_s,
        environment=experiment.environment,
        containers=experiment.containers,
        server_host=experiment.server_host,
        protocol=entrant.protocol,
        options=entrant.options,
        tuning=tuning,
        left_out=left_out,
        artifact=artifact,
        composition=composition,
        memory=memory,
        controlled=memory is not None and not adapter.residency,
        slo_ms=(experiment.slo or spec.slo).latency_ms,
        client=experiment.client,
        warmup=experiment.warmup,
    )


def _memory(
    experiment: Experiment,
    spec: WorkloadSpec,
    device: Device,
    entrant: Contestant,
    scenario: Scenario,
    tuning: Tuning,
) -> MemoryPlan | None:
    """What the models of a cell have to share, if they have to."""
    choice = experiment.multiplexing_of(scenario)
    if choice is None:
        return None
    where = "`multiplexing`" if scenario.multiplexing is None else f"`scenarios.{scenario.name}.multiplexing`"
    models = experiment.models
    plan = plan_memory(choice, models.names(spec.name), models.sizes_mb(), where)
    reason = None
    if spec.pipeline:
        reason = f"the workload {spec.name} is a pipeline, whose stages cannot be loaded and unloaded as one model"
    elif device == "emulated" and "load_gb_per_s" not in spec.cost:
        reason = (
            f"the workload {spec.name} does not say what loading costs on the emulated device (`load_ms` and "
            "`load_gb_per_s` of its `cost`)"
        )
    elif experiment.artifact != "python":
        reason = "an export is loaded by the server itself, and nobody sees what it takes: use `artifact: python`"
    elif device == "cuda" and plan.budget_bytes > (has := gpus()[0].memory_bytes):
        reason = f"`memory_mb` is {choice.memory_mb:g}, and the GPU has {has / MIB:,.0f} MiB"
    elif experiment.devices > 1 or experiment.nodes > 1:
        reason = "models share the memory of one device: use `devices: 1` and `nodes: 1`"
    elif scenario.scaler is not None:
        reason = (
            "a scaler changes how many copies of every model there are, and their memory is one copy's: leave it out"
        )
    else:
        reason = entrant.adapter.multiplexing_refusal(plan, tuning, entrant.protocol)
    if reason is not None:
        raise InputError(f"{where}: {reason}", remedy="change that, or leave `multiplexing` out")
    return plan
