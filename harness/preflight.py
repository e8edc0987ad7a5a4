"""Everything that can be known to go wrong is refused before the first server starts, with the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
from pydantic import BaseModel, ValidationError

from harness.adapter import Adapter, WireProtocol
from harness.environments import build
from harness.errors import InputError
from harness.faults import CAPABILITY_NEEDED, PlannedFault, plan_faults
from harness.machine import gpus, raise_file_limit
from harness.registry import get_adapter
from harness.schedule import most_at_once
from harness.spec import Experiment, Scenario, TrialPlan, explain, interleave
from harness.trial import TrialSetup
from harness.workload import Device, PreparedWorkload, WorkloadSpec
from traces.catalogue import load as load_trace
from traces.trace import Trace, compress_time, rescale, window, with_tail
from workloads.catalogue import load_spec, prepare

_SPARE_FILES = 256
"""File descriptors that the generator needs beside its connections."""
_REPLICA_MIN_BYTES = 40 << 20
"""What any replica takes at the least: an interpreter with numpy."""


@dataclass(frozen=True)
class Contestant:
    """One adapter of an experiment with its options validated and its protocol chosen."""

    adapter: Adapter
    options: BaseModel
    protocol: WireProtocol


@dataclass(frozen=True)
class Checked:
    """An experiment that passed every check which needs no server and no environment."""

    experiment: Experiment
    workload: WorkloadSpec
    device: Device
    contestants: Mapping[str, Contestant]
    plans: tuple[TrialPlan, ...]
    traces: Mapping[int, Trace]
    """One trace per seed: each block of trials draws its own arrivals."""

    @property
    def slo_ms(self) -> float:
        """The objective: the experiment's, else the workload's."""
        return (self.experiment.slo or self.workload.slo).latency_ms


def check(experiment: Experiment) -> Checked:
    """Validate an experiment against adapters, workload, traffic and machine.

    Raises :class:`InputError` with every reason that was found for one part, naming the key to change.
    """
    spec = load_spec(experiment.workload)
    device = experiment.device or spec.devices[0]
    _check_workload(experiment, spec, device)
    contestants = {name: _contestant(experiment, name) for name in experiment.adapters}
    for contestant in contestants.values():
        _check_faults(experiment, contestant.adapter)
    _check_replicas(experiment, device)
    plans = tuple(interleave(experiment))
    traces = {seed: make_trace(experiment, spec, seed) for seed in sorted({plan.seed for plan in plans})}
    for trace in traces.values():
        _check_traffic(experiment, trace)
    return Checked(experiment, spec, device, contestants, plans, traces)


def _check_workload(experiment: Experiment, spec: WorkloadSpec, device: Device) -> None:
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
                remedy="lower `devices`, or run on a machine with more" if found else "use `device: cpu`",
            )
        if experiment.devices > 1:
            raise InputError(
                "`devices`: adapters place replicas on one GPU so far, and goodput per device would be wrong",
                remedy="use `devices: 1`",
            )


def _contestant(experiment: Experiment, name: str) -> Contestant:
    adapter = get_adapter(name)
    try:
        options = adapter.Options.model_validate(experiment.options.get(name, {}))
    except ValidationError as error:
        raise InputError("\n".join(explain(error, adapter.Options, f"options.{name}"))) from error
    if refusals := adapter.refusals(experiment.tuning, options):
        raise InputError("\n".join(refusals), remedy=f"remove the knob from `tuning`, or {name} from `adapters`")
    protocol = experiment.client.protocol or adapter.protocols[0]
    if protocol not in adapter.protocols:
        raise InputError(
            f"`client.protocol`: {name} does not speak {protocol}, only {', '.join(adapter.protocols)}",
            remedy="leave `client.protocol` out: every adapter then uses its first",
        )
    return Contestant(adapter, options, protocol)


def _check_faults(experiment: Experiment, adapter: Adapter) -> None:
    for scenario in experiment.scenarios:
        for fault in scenario.faults:
            needed = CAPABILITY_NEEDED[fault.kind]
            if needed not in adapter.capabilities():
                raise InputError(
                    f"`scenarios.{scenario.name}`: {fault.kind} cannot be done to {adapter.name}, whose adapter does not "
                    f"have the capability `{needed}`",
                    remedy=f"remove the fault, or {adapter.name} from `adapters`",
                )
            replicas = experiment.tuning.replicas
            if isinstance(fault.target, int) and (fault.target < 0 or (replicas and fault.target >= replicas)):
                raise InputError(
                    f"`scenarios.{scenario.name}`: target {fault.target} does not exist, replicas count from 0",
                    remedy=f"use 0 to {replicas - 1}, or random" if replicas else "use 0 or more, or random",
                )


def _check_replicas(experiment: Experiment, device: Device) -> None:
    autoscale = experiment.tuning.autoscale
    most = max(experiment.tuning.replicas or 1, autoscale.max if autoscale else 1)
    needed, available = most * _REPLICA_MIN_BYTES, psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"`tuning.replicas`: {most} replicas take at least {needed / 2**30:.1f} GiB "
            f"({_REPLICA_MIN_BYTES >> 20} MiB each), this machine has {available / 2**30:.1f} GiB free",
            remedy=f"use {available // _REPLICA_MIN_BYTES} or fewer",
        )


def make_trace(experiment: Experiment, spec: WorkloadSpec, seed: int) -> Trace:
    """The traffic of one block: loaded or generated, cut, rescaled, and given its tail, in that order."""
    choice = experiment.trace
    trace = load_trace(choice.name, seed=seed, params=choice.params or None)
    if choice.window_s is not None:
        trace = window(trace, *choice.window_s)
    if choice.compress_time is not None:
        trace = compress_time(trace, choice.compress_time)
    rate = choice.mean_rate or experiment.rate_by_workload.get(spec.name)
    if rate is not None:
        trace = rescale(trace, rate, seed)
    if choice.tail_s > 0:
        trace = with_tail(trace, choice.tail_s, seed)
    return trace


def faults_of(scenario: Scenario, trace: Trace) -> list[PlannedFault]:
    """The faults of a scenario on this trace's clock. Raises :class:`InputError` for one after its end."""
    faults = plan_faults(scenario.faults, span_s=trace.span_s, suggested_at_s=trace.fault_at_s)
    for fault in faults:
        if fault.at_s >= trace.span_s:
            raise InputError(
                f"`scenarios.{scenario.name}`: {fault.kind} at {fault.at_s:g} s comes after the trace {trace.name!r}, "
                f"which lasts {trace.span_s:g} s",
                remedy="choose an earlier `at_s`, or leave it out",
            )
    return faults


def _check_traffic(experiment: Experiment, trace: Trace) -> None:
    for scenario in experiment.scenarios:
        faults_of(scenario, trace)
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


def set_up(checked: Checked, on_progress: Callable[[str], None]) -> list[TrialSetup]:
    """Build environments and the workload's artifact, and settle every trial, in the order in which they will run."""
    experiment = checked.experiment
    workload: PreparedWorkload = prepare(
        experiment.workload,
        models=[checked.workload.name],
        device=checked.device,
        seed=experiment.seed,
        options=experiment.workload_options,
        environment_kind=experiment.environment,
        on_progress=on_progress,
    )
    environments = {}
    for name, contestant in checked.contestants.items():
        requirements = [contestant.adapter.requirements]
        if workload.requirements is not None:
            requirements.append(workload.requirements)
        started_ns = time.monotonic_ns()
        environment = build(experiment.environment, requirements, name=name, on_progress=on_progress)
        environments[name] = (environment, (time.monotonic_ns() - started_ns) / 1e9)
    setups = []
    for plan in checked.plans:
        trace = checked.traces[plan.seed]
        contestant = checked.contestants[plan.cell.adapter]
        environment, environment_s = environments[plan.cell.adapter]
        setups.append(
            TrialSetup(
                experiment=experiment,
                plan=plan,
                adapter=contestant.adapter,
                options=contestant.options,
                environment=environment,
                environment_s=environment_s,
                workload=workload,
                protocol=contestant.protocol,
                slo_ms=checked.slo_ms,
                arrivals_ns=trace.arrivals_ns,
                span_s=trace.span_s,
                transient=trace.transient,
                trace_name=trace.name,
                faults=tuple(faults_of(plan.cell.scenario, trace)),
            )
        )
    return setups
