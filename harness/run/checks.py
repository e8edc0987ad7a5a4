"""What a machine, a scenario or its traffic make impossible, subject by subject, told with the numbers and the key to change."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import psutil

from tailrace.harness.contract.adapter import Adapter, Tuning
from tailrace.harness.contract.fault import Circumstances
from tailrace.harness.contract.popularity import draw
from tailrace.harness.contract.workload import Device, WorkloadSpec
from tailrace.harness.errors import InputError
from tailrace.harness.gpus import gpus
from tailrace.harness.machine import page_cache_refusal, raise_file_limit
from tailrace.harness.plan.experiment import Experiment, ScalerChoice
from tailrace.harness.plan.fault_kinds import fault_kinds, refusal
from tailrace.harness.plan.faults import FaultSchedule
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.plan.schedule import most_at_once
from tailrace.harness.run.resolve import Contestant
from tailrace.traces.trace import Trace

_SPARE_FILES = 256
"""File descriptors that the generator needs beside its connections."""
_REPLICA_MIN_BYTES = 40 << 20
"""What any replica takes at the least: an interpreter with numpy."""


def check_workload(experiment: Experiment, spec: WorkloadSpec, device: Device) -> None:
    """The workload can be composed as asked, and runs on a device that is there. Raises :class:`InputError`."""
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


def check_machine(experiment: Experiment, device: Device, contestants: Mapping[str, Contestant]) -> None:
    """This machine can hold the servers, and the frameworks its nodes, GPUs and containers. Raises :class:`InputError`."""
    _check_environment(experiment, contestants)
    _check_nodes(experiment, device, contestants)
    _check_gpus_per_node(experiment, device, contestants)
    _check_mig(experiment, device, contestants)
    _check_replicas(experiment)


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


def check_faults(adapter: Adapter, cell: ResolvedCell) -> None:
    """Each fault of a cell can be done to its servers, and what it is aimed at exists. Raises :class:`InputError`."""
    scenario = cell.scenario
    circumstances = Circumstances(
        adapter,
        cell.tuning,
        cell.nodes,
        containers=cell.environment == "docker",
        multiplexed=cell.memory is not None,
    )
    for kind in scenario.fault_kinds:
        reason = refusal(kind, circumstances)
        if cell.artifact != "python" and fault_kinds()[kind].scope == "replica":
            reason = f"replicas of `artifact: {cell.artifact}` are no processes of their own, but part of the server's"
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
            "replica": ((cell.tuning.replicas or 0) * cell.nodes, "replicas"),
            "model": (len(cell.models), "models"),
        }.get(fault_kinds()[fault.kind].scope, (cell.nodes, "nodes"))
        if known and fault.target >= known:
            raise InputError(
                f"`scenarios.{scenario.name}`: {fault.kind}: target {fault.target} does not exist, there are {known} "
                f"{what}, which count from 0",
                remedy="use " + (f"0 to {known - 1}" if known > 1 else "0") + ", or random",
            )


def check_scaler(adapter: Adapter, cell: ResolvedCell, asked: Tuning) -> None:
    """What a cell's scaler is to scale can be. ``asked`` are the knobs before any was left out. Raises :class:`InputError`."""
    scaler = cell.scenario.scaler
    if scaler is None:
        return
    if scaler.of == "replicas":
        reason = _unscalable_replicas(asked, adapter)
    else:
        reason = _unscalable_nodes(scaler, cell.nodes, adapter, cell.tuning)
    if reason:
        raise InputError(
            f"`scenarios.{cell.scenario.name}.scaler`: the {scaler.of} of {adapter.name} cannot be scaled: {reason}",
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
        return refusal("model_reload", Circumstances(adapter, tuning, nodes))
    return page_cache_refusal() if scaler.cold_start == "page-cache" else None


def check_traffic(experiment: Experiment, trace: Trace) -> None:
    """There is traffic, and this process can send it. Raises :class:`InputError`."""
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
