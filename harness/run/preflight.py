"""Everything that can be known to go wrong is refused before the first server starts, with the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from pydantic import BaseModel

from tailrace.harness.contract.adapter import Adapter, ServerEnvironment, Tuning, WireProtocol
from tailrace.harness.contract.multiplexing import MIB, MemoryPlan, plan_memory
from tailrace.harness.contract.popularity import draw
from tailrace.harness.contract.workload import ArtifactKind, Composition, Device, PreparedWorkload, WorkloadSpec
from tailrace.harness.errors import InputError
from tailrace.harness.gpus import gpus
from tailrace.harness.machine import page_cache_refusal, raise_file_limit
from tailrace.harness.plan.cells import Cell, TrialPlan, cells, interleave
from tailrace.harness.plan.experiment import Experiment, ScalerChoice, Scenario
from tailrace.harness.plan.fault_choices import FaultSchedule
from tailrace.harness.plan.fault_kinds import FAULT_KINDS
from tailrace.harness.plan.keys import validated_options
from tailrace.harness.plan.prices import price_per_hour
from tailrace.harness.plan.schedule import most_at_once
from tailrace.harness.run.faults import PlannedFault, link_faults, plan_faults, refusal
from tailrace.harness.run.prepare import prepare, sharing_memory
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.ruler import NULL_SERVER
from tailrace.harness.run.trial import TrialSetup
from tailrace.harness.servers.cluster import Layout
from tailrace.harness.servers.environments import build
from tailrace.traces.catalogue import load as load_trace
from tailrace.traces.trace import Trace, compress_time, rescale, window, with_tail
from tailrace.workloads.catalogue import check_arithmetic, check_export, load_spec

_SPARE_FILES = 256
"""File descriptors that the generator needs beside its connections."""
_REPLICA_MIN_BYTES = 40 << 20
"""What any replica takes at the least: an interpreter with numpy."""


@dataclass(frozen=True)
class Contestant:
    """One adapter with its options validated and its protocol chosen."""

    adapter: Adapter
    options: BaseModel
    protocol: WireProtocol


@dataclass(frozen=True)
class Expressed:
    """The tuning of one cell as its framework can express it."""

    tuning: Tuning
    left_out: Mapping[str, str]
    """Knobs that were asked for and have no place there, each with the reason."""
    composition: Composition | None = None
    """How a pipeline is served; ``None`` for other workloads."""
    artifact: ArtifactKind = "python"
    """What of the model its servers run."""


@dataclass(frozen=True)
class Checked:
    """An experiment that passed every check which needs no server and no environment."""

    experiment: Experiment
    workload: WorkloadSpec
    device: Device
    contestants: Mapping[str, Contestant]
    tunings: Mapping[Cell, Expressed]
    memories: Mapping[Cell, MemoryPlan]
    """Of cells whose models share a limited memory."""
    plans: tuple[TrialPlan, ...]
    traces: Mapping[tuple[int, float | None], Trace]
    """One trace per seed and rate of a scenario: each block of trials draws its own arrivals."""

    @property
    def slo_ms(self) -> float:
        """The objective: the experiment's, else the workload's."""
        return (self.experiment.slo or self.workload.slo).latency_ms

    def trace_of(self, plan: TrialPlan) -> Trace:
        """The traffic of a trial."""
        return self.traces[_traffic(plan)]

    @property
    def traffic_s(self) -> float:
        """How long all trials send, warm-up included; what servers take to start comes on top."""
        return sum(self.trace_of(plan).span_s + self.experiment.warmup.duration_s for plan in self.plans)


def _traffic(plan: TrialPlan) -> tuple[int, float | None]:
    return plan.seed, plan.cell.scenario.mean_rate


def check(experiment: Experiment) -> Checked:
    """Validate an experiment against adapters, workload, traffic and machine.

    Raises :class:`InputError` with every reason that was found for one part, naming the key to change.
    """
    spec = load_spec(experiment.workload)
    device = experiment.device or spec.devices[0]
    _check_workload(experiment, spec, device)
    check_arithmetic(spec, experiment.precision, experiment.compile)
    check_export(spec, experiment.artifact, experiment.precision, experiment.compile)
    if experiment.artifact != "python" and experiment.models.count > 1:
        raise InputError(
            f"`artifact`: an export is of one model, and `models.count` is {experiment.models.count}: all would answer alike",
            remedy="use `artifact: python`, whose weights go by the model's name, or `models: 1`",
        )
    price_per_hour(experiment, device, gpus()[: experiment.devices] if device == "cuda" else [])
    contestants = {name: _contestant(experiment, name) for name in experiment.adapters}
    _check_environment(experiment, contestants)
    _check_nodes(experiment, device, contestants)
    _check_gpus_per_node(experiment, device, contestants)
    _check_mig(experiment, device, contestants)
    _check_replicas(experiment)
    tunings = {
        cell: _expressed(experiment, spec, contestants[cell.adapter], cell.scenario) for cell in cells(experiment)
    }
    memories: dict[Cell, MemoryPlan] = {}
    for cell, expressed in tunings.items():
        contestant = contestants[cell.adapter]
        if (memory := _memory(experiment, spec, device, contestant, cell.scenario, expressed.tuning)) is not None:
            memories[cell] = memory
        _check_faults(experiment, contestant.adapter, cell.scenario, expressed)
        _check_scaler(experiment, contestant.adapter, cell.scenario, expressed.tuning)
    plans = tuple(interleave(experiment))
    traces = {
        (seed, rate): make_trace(experiment, spec, seed, rate) for seed, rate in dict.fromkeys(map(_traffic, plans))
    }
    for trace in traces.values():
        _check_traffic(experiment, trace)
    checked = Checked(experiment, spec, device, contestants, tunings, memories, plans, traces)
    for plan in plans:
        faults_of(plan.cell.scenario, checked.trace_of(plan), plan.seed)
    return checked


def _check_workload(experiment: Experiment, spec: WorkloadSpec, device: Device) -> None:
    composed = [scenario.name for scenario in experiment.scenarios if scenario.composition]
    if composed and not spec.pipeline:
        raise InputError(
            f"`scenarios.{composed[0]}.composition`: the workload {spec.name} is no pipeline, there is nothing to compose",
            remedy="leave `composition` out, or choose a workload with `pipeline`, such as emulated_pipeline",
        )
    if device not in spec.devices:
        raise InputError(
            f"`device`: workload {spec.name} cannot run on {device!r}, only on {', '.join(spec.devices)}",
            remedy="change `device`, or leave it out",
        )
    if device == "cuda":
        found = len(gpus())
        if experiment.devices > found:
            raise InputError(
                f"`devices`: {experiment.devices} GPUs are asked for, this machine has {found}",
                remedy="lower `devices`, run on a machine with more, or look at CUDA_VISIBLE_DEVICES"
                if found
                else "use `device: cpu`; `tailrace doctor --gpu` says what is missing for `cuda`",
            )


def _contestant(experiment: Experiment, name: str) -> Contestant:
    adapter = get_adapter(name)
    options = validated_options(adapter, experiment.options.get(name, {}))
    protocol = experiment.client.protocol or adapter.protocols[0]
    if protocol not in adapter.protocols:
        raise InputError(
            f"`client.protocol`: {name} does not speak {protocol}, only {', '.join(adapter.protocols)}",
            remedy="leave `client.protocol` out: every adapter then uses its first",
        )
    return Contestant(adapter, options, protocol)


def _expressed(experiment: Experiment, spec: WorkloadSpec, contestant: Contestant, scenario: Scenario) -> Expressed:
    adapter = contestant.adapter
    asked = experiment.tuning_of(scenario)
    tuning, left_out = adapter.expressible(asked, contestant.options, contestant.protocol)
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
    return Expressed(tuning, left_out, composition, artifact)


def _memory(
    experiment: Experiment,
    spec: WorkloadSpec,
    device: Device,
    contestant: Contestant,
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
        reason = contestant.adapter.multiplexing_refusal(plan, tuning, contestant.protocol)
    if reason is not None:
        raise InputError(f"{where}: {reason}", remedy="change that, or leave `multiplexing` out")
    return plan


def _check_environment(experiment: Experiment, contestants: Mapping[str, Contestant]) -> None:
    if experiment.environment != "docker":
        return
    from tailrace.harness.servers.engine import Engine

    if missing := [name for name, contestant in contestants.items() if not contestant.adapter.dockerfile.is_file()]:
        raise InputError(
            f"`environment: docker`: no image can be built for {', '.join(missing)}, whose folder has no Dockerfile",
            remedy="use `environment: venv`, or write one (docs/containers.md)",
        )
    Engine.connect().check_local()


def _check_nodes(experiment: Experiment, device: Device, contestants: Mapping[str, Contestant]) -> None:
    if experiment.nodes == 1:
        return
    if device != "cpu" and experiment.devices % experiment.nodes:
        raise InputError(
            f"`nodes`: {experiment.devices} devices cannot be dealt out evenly to {experiment.nodes} nodes",
            remedy=f"use `devices: {experiment.nodes * max(1, experiment.devices // experiment.nodes)}`",
        )
    for name, contestant in contestants.items():
        adapter = contestant.adapter
        if not adapter.own_cluster and adapter.health_check(contestant.protocol) is None:
            raise InputError(
                f"`nodes`: {name} over {contestant.protocol} has no health check that a load balancer could ask",
                remedy=f"use `nodes: 1`, or remove {name} from `adapters`",
            )


def _check_gpus_per_node(experiment: Experiment, device: Device, contestants: Mapping[str, Contestant]) -> None:
    """CUDA lets a process have several GPUs, or one MIG instance; and not every framework deals replicas out over GPUs."""
    if device != "cuda" or (each := experiment.devices // experiment.nodes) == 1:
        return
    as_nodes = f"use `nodes: {experiment.devices}`, each of which has one"
    for name, contestant in contestants.items():
        if not contestant.adapter.deals_out_gpus:
            raise InputError(
                f"`devices`: a server of {name} puts all of its replicas on one GPU, and each is to have {each}",
                remedy=f"{as_nodes}, or remove {name} from `adapters`",
            )
    if any(gpu.instance is not None for gpu in gpus()[: experiment.devices]):
        raise InputError(
            f"`devices`: CUDA lets a process have one MIG instance, and each node is to have {each}", remedy=as_nodes
        )


def _check_mig(experiment: Experiment, device: Device, contestants: Mapping[str, Contestant]) -> None:
    if device != "cuda" or all(gpu.instance is None for gpu in gpus()[: experiment.devices]):
        return
    for name, contestant in contestants.items():
        if reason := contestant.adapter.no_mig:
            raise InputError(
                f"`device`: {name} cannot run on MIG instances: {reason}",
                remedy=f"remove {name} from `adapters`, or name whole GPUs in CUDA_VISIBLE_DEVICES",
            )


def _check_faults(experiment: Experiment, adapter: Adapter, scenario: Scenario, expressed: Expressed) -> None:
    tuning, containers = expressed.tuning, experiment.environment == "docker"
    for kind in scenario.fault_kinds:
        reason = refusal(
            kind,
            adapter,
            tuning,
            experiment.nodes,
            containers=containers,
            multiplexed=experiment.multiplexing_of(scenario) is not None,
        )
        if expressed.artifact != "python" and FAULT_KINDS[kind].scope == "replica":
            reason = (
                f"replicas of `artifact: {expressed.artifact}` are no processes of their own, but part of the server's"
            )
        if reason:
            raise InputError(
                f"`scenarios.{scenario.name}`: {kind} cannot be done to {adapter.name}: {reason}",
                remedy=f"remove the fault, or {adapter.name} from `adapters`",
            )
    if isinstance(scenario.faults, FaultSchedule):
        return
    for fault in scenario.faults:
        if fault.target == "random":
            continue
        known, what = {
            "replica": ((tuning.replicas or 0) * experiment.nodes, "replicas"),
            "model": (experiment.models.count, "models"),
        }.get(FAULT_KINDS[fault.kind].scope, (experiment.nodes, "nodes"))
        if known and fault.target >= known:
            raise InputError(
                f"`scenarios.{scenario.name}`: {fault.kind}: target {fault.target} does not exist, there are {known} "
                f"{what}, which count from 0",
                remedy="use " + (f"0 to {known - 1}" if known > 1 else "0") + ", or random",
            )


def _check_scaler(experiment: Experiment, adapter: Adapter, scenario: Scenario, tuning: Tuning) -> None:
    scaler = scenario.scaler
    if scaler is None:
        return
    if scaler.of == "replicas":
        reason = _unscalable_replicas(experiment.tuning_of(scenario), adapter)
    else:
        reason = _unscalable_nodes(scaler, experiment.nodes, adapter, tuning)
    if reason:
        raise InputError(
            f"`scenarios.{scenario.name}.scaler`: the {scaler.of} of {adapter.name} cannot be scaled: {reason}",
            remedy=f"change the scaler, or remove {adapter.name} from `adapters`",
        )


def _unscalable_replicas(asked: Tuning, adapter: Adapter) -> str | None:
    missing = [name for name in ("scale", "scrape") if name not in adapter.capabilities()]
    if missing:
        return f"its adapter does not have the capability `{'`, `'.join(missing)}`: scale its nodes instead"
    if asked.autoscale is not None:
        return "two scalers would work against each other: leave `tuning.autoscale` out"
    return None


def _unscalable_nodes(scaler: ScalerChoice, nodes: int, adapter: Adapter, tuning: Tuning) -> str | None:
    if adapter.own_cluster:
        return "its nodes are a cluster of its own, with a scaler of its own: use `tuning.autoscale`"
    if nodes != scaler.max:
        return f"`nodes` is {nodes}, and must be the scaler's `max`, {scaler.max}"
    if scaler.cold_start == "model":
        return refusal("model_reload", adapter, tuning, nodes)
    return page_cache_refusal() if scaler.cold_start == "page-cache" else None


def _check_replicas(experiment: Experiment) -> None:
    tunings = [experiment.tuning_of(scenario) for scenario in experiment.scenarios]
    scaled = [s.scaler.max for s in experiment.scenarios if s.scaler is not None and s.scaler.of == "replicas"]
    per_node = max(
        *(max(tuning.replicas or 1, tuning.autoscale.max if tuning.autoscale else 1) for tuning in tunings), *scaled, 1
    )
    most = experiment.nodes * per_node
    needed, available = most * _REPLICA_MIN_BYTES, psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"`tuning.replicas`: {most} replicas take at least {needed / 2**30:.1f} GiB "
            f"({_REPLICA_MIN_BYTES >> 20} MiB each), this machine has {available / 2**30:.1f} GiB free",
            remedy=f"use {available // _REPLICA_MIN_BYTES} or fewer",
        )


def _scaled(layout: Layout, scenario: Scenario) -> Layout:
    """The layout at the start of a trial under a scenario."""
    if scenario.scaler is None or scenario.scaler.of != "nodes":
        return layout
    scaler = scenario.scaler
    return replace(layout, active=scaler.min, warm=scaler.warm_pool, cold_start=scaler.cold_start)


def _balancer_environment(checked: Checked, on_progress: Callable[[str], None]) -> ServerEnvironment | None:
    """Where HAProxy is, if some framework's nodes stand behind it: the null server brings it along."""
    experiment = checked.experiment
    if experiment.nodes == 1 or all(contestant.adapter.own_cluster for contestant in checked.contestants.values()):
        return None
    null = get_adapter(NULL_SERVER)
    return build(experiment.own_interpreters, [null.requirements], name=null.name, on_progress=on_progress)


def make_trace(experiment: Experiment, spec: WorkloadSpec, seed: int, mean_rate: float | None = None) -> Trace:
    """The traffic of one block: loaded or generated, cut, rescaled (to ``mean_rate`` arrivals/s, else as the experiment
    says), and given its tail, in that order."""
    choice = experiment.trace
    trace = load_trace(choice.name, seed=seed, params=choice.params or None)
    if choice.window_s is not None:
        trace = window(trace, *choice.window_s)
    if choice.compress_time is not None:
        trace = compress_time(trace, choice.compress_time)
    rate = mean_rate or choice.mean_rate or experiment.rate_by_workload.get(spec.name)
    if rate is not None:
        trace = rescale(trace, rate, seed)
    if choice.tail_s > 0:
        trace = with_tail(trace, choice.tail_s, seed)
    return trace


def faults_of(scenario: Scenario, trace: Trace, seed: int) -> list[PlannedFault]:
    """The faults of a scenario on this trace's clock, by the trial's seed. Raises :class:`InputError` for one after its end."""
    faults = plan_faults(scenario.faults, span_s=trace.span_s, suggested_at_s=trace.fault_at_s, seed=seed)
    for fault in faults:
        if fault.at_s >= trace.span_s:
            raise InputError(
                f"`scenarios.{scenario.name}`: {fault.kind} at {fault.at_s:g} s comes after the trace {trace.name!r}, "
                f"which lasts {trace.span_s:g} s",
                remedy="choose an earlier `at_s`, or leave it out",
            )
    return faults


def _check_traffic(experiment: Experiment, trace: Trace) -> None:
    models = experiment.models
    if models.popularity.kind == "trace":
        draw(models.popularity, models.count, trace.arrivals_ns, trace.model_index, np.random.default_rng(0))
    if len(trace) == 0:
        raise InputError(
            f"trace {trace.name!r} has no arrivals in its {trace.span_s:g} s: there is nothing to measure",
            remedy="choose another window, or a higher rate",
        )
    client = experiment.client
    at_once = most_at_once(trace.arrivals_ns, client.timeout_s)
    if at_once > client.max_connections:
        raise InputError(
            f"`client.max_connections` is {client.max_connections}, but up to {at_once} arrivals fall into one client "
            f"timeout ({client.timeout_s:g} s): with a slow server the excess would be dropped, and booked on the server",
            remedy=f"raise client.max_connections to {at_once}, lower the rate, or shorten client.timeout_s",
        )
    limit = raise_file_limit()
    if min(at_once, client.max_connections) + _SPARE_FILES > limit:
        raise InputError(
            f"up to {at_once} connections may be open at once, but this process may open {limit} files",
            remedy=f"raise the limit (ulimit -n {at_once + _SPARE_FILES}), lower the rate, or shorten client.timeout_s",
        )


def _environment(
    experiment: Experiment, adapter: Adapter, requirements: Sequence[Path], on_progress: Callable[[str], None]
) -> ServerEnvironment:
    if experiment.environment != "docker":
        return build(experiment.environment, requirements, name=adapter.name, on_progress=on_progress)
    from tailrace.harness.servers.engine import Engine
    from tailrace.harness.servers.images import build as build_image

    base_image = experiment.containers.base_images.get(adapter.name)
    return build_image(Engine.connect(), adapter, requirements, base_image=base_image, on_progress=on_progress)


def set_up(checked: Checked, on_progress: Callable[[str], None]) -> list[TrialSetup]:
    """Build environments and the workload's artifact, and settle every trial, in the order in which they will run."""
    experiment = checked.experiment
    environments: dict[str, tuple[ServerEnvironment, float]] = {}

    def build_for(name: str, *workload_requirements: Path) -> ServerEnvironment:
        adapter = checked.contestants[name].adapter
        started_ns = time.monotonic_ns()
        environment = _environment(experiment, adapter, [adapter.requirements, *workload_requirements], on_progress)
        environments[name] = (environment, (time.monotonic_ns() - started_ns) / 1e9)
        return environment

    # First, for an export takes minutes and is of no use to a server that cannot run it. Who can needs none of what the
    # model's Python code does.
    for name in {cell.adapter: None for cell, told in checked.tunings.items() if told.artifact != "python"}:
        if reason := checked.contestants[name].adapter.artifact_refusal(experiment.artifact, build_for(name)):
            raise InputError(
                reason,
                remedy="use `environment: docker` on the vendor's own image (no `containers.base_images` for it), or "
                "`artifact: python`",
            )
    workload: PreparedWorkload = prepare(
        experiment.workload,
        models=experiment.models.names(checked.workload.name),
        device=checked.device,
        seed=experiment.seed,
        options=experiment.workload_options,
        precision=experiment.precision,
        compiled=experiment.compile,
        artifact=experiment.artifact if environments else "python",
        environment_kind=experiment.own_interpreters,
        on_progress=on_progress,
    )
    for name in checked.contestants:
        if name not in environments:
            build_for(name, *filter(None, [workload.requirements]))
    layout = Layout(
        nodes=experiment.nodes,
        # In all scenarios or in none, so that they differ in the fault alone.
        links=link_faults(kind for scenario in experiment.scenarios for kind in scenario.fault_kinds),
        restart=experiment.supervision == "restart",
        backoff_s=experiment.restart_backoff_s,
        balancer_environment=_balancer_environment(checked, on_progress),
    )
    setups = []
    for plan in checked.plans:
        trace = checked.trace_of(plan)
        contestant = checked.contestants[plan.cell.adapter]
        environment, environment_s = environments[plan.cell.adapter]
        memory = checked.memories.get(plan.cell)
        setups.append(
            TrialSetup(
                experiment=experiment,
                plan=plan,
                adapter=contestant.adapter,
                options=contestant.options,
                environment=environment,
                environment_s=environment_s,
                workload=workload if memory is None else sharing_memory(workload),
                protocol=contestant.protocol,
                slo_ms=checked.slo_ms,
                arrivals_ns=trace.arrivals_ns,
                trace_models=trace.model_index,
                span_s=trace.span_s,
                transient=trace.transient,
                trace_name=trace.name,
                layout=_scaled(layout, plan.cell.scenario),
                faults=tuple(faults_of(plan.cell.scenario, trace, plan.seed)),
                tuning=checked.tunings[plan.cell].tuning,
                left_out=checked.tunings[plan.cell].left_out,
                composition=checked.tunings[plan.cell].composition,
                memory=memory,
                artifact=checked.tunings[plan.cell].artifact,
            )
        )
    return setups
