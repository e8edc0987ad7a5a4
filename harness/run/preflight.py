"""Everything that can be known to go wrong is refused before the first server starts, with the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tailrace.harness.contract.workload import Device, WorkloadSpec
from tailrace.harness.errors import InputError
from tailrace.harness.gpus import gpus
from tailrace.harness.plan.cells import Cell, TrialPlan, cells, interleave
from tailrace.harness.plan.experiment import Experiment, Scenario
from tailrace.harness.plan.faults import PlannedFault, plan_faults
from tailrace.harness.plan.prices import price_per_hour
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.run.checks import check_faults, check_machine, check_scaler, check_traffic, check_workload
from tailrace.harness.run.resolve import Contestant, contestant, resolve
from tailrace.traces.catalogue import load as load_trace
from tailrace.traces.trace import Trace, compress_time, rescale, window, with_tail
from tailrace.workloads.catalogue import check_arithmetic, check_export, load_spec


@dataclass(frozen=True)
class Checked:
    """An experiment that passed every check which needs no server and no environment."""

    experiment: Experiment
    workload: WorkloadSpec
    device: Device
    contestants: Mapping[str, Contestant]
    cells: Mapping[Cell, ResolvedCell]
    plans: tuple[TrialPlan, ...]
    traces: Mapping[tuple[int, float | None], Trace]
    """One trace per seed and rate of a scenario: each block of trials draws its own arrivals."""

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
    check_workload(experiment, spec, device)
    check_arithmetic(spec, experiment.precision, experiment.compile)
    check_export(spec, experiment.artifact, experiment.precision, experiment.compile)
    if experiment.artifact != "python" and experiment.models.count > 1:
        raise InputError(
            f"`artifact`: an export is of one model, and `models.count` is {experiment.models.count}: all would answer alike",
            remedy="use `artifact: python`, whose weights go by the model's name, or `models: 1`",
        )
    price = price_per_hour(experiment, device, gpus()[: experiment.devices] if device == "cuda" else [])
    contestants = {name: contestant(experiment, name) for name in experiment.adapters}
    check_machine(experiment, device, contestants)
    resolved: dict[Cell, ResolvedCell] = {}
    for cell in cells(experiment):
        entrant = contestants[cell.adapter]
        resolved[cell] = resolve(experiment, spec, device, entrant, cell.scenario, price)
        check_faults(entrant.adapter, resolved[cell])
        check_scaler(entrant.adapter, resolved[cell], experiment.tuning_of(cell.scenario))
    plans = tuple(interleave(experiment))
    traces = {
        (seed, rate): make_trace(experiment, spec, seed, rate) for seed, rate in dict.fromkeys(map(_traffic, plans))
    }
    for trace in traces.values():
        check_traffic(experiment, trace)
    checked = Checked(experiment, spec, device, contestants, resolved, plans, traces)
    for plan in plans:
        faults_of(plan.cell.scenario, checked.trace_of(plan), plan.seed)
    return checked


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
