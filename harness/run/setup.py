"""Environments, the workload's artifact and every trial, settled before the first server starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tailrace.harness.contract.adapter import Adapter, ServerEnvironment
from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.errors import InputError
from tailrace.harness.plan.cells import TrialPlan
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.faults import PlannedFault
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.plan.schedule import WARMUP_GAP_S, Schedule, build_schedule
from tailrace.harness.run.preflight import Checked, faults_of
from tailrace.harness.run.prepare import prepare, sharing_memory
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.ruler import NULL_SERVER
from tailrace.harness.servers.environments import build
from tailrace.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class ServerSetup:
    """A resolved cell, and what its servers need that is no plain data."""

    cell: ResolvedCell
    adapter: Adapter
    environment: ServerEnvironment
    environment_s: float = 0.0
    """How long it took to have that ready."""
    balancer_environment: ServerEnvironment | None = None
    """Where HAProxy is, if the nodes stand behind it."""
    workload: PreparedWorkload


@dataclass(frozen=True, kw_only=True)
class TrialSetup(ServerSetup):
    """One trial of a cell: what is sent to its servers, and what goes wrong meanwhile."""

    plan: TrialPlan
    trace: Trace
    faults: tuple[PlannedFault, ...] = ()

    def schedule(self) -> Schedule:
        """Warm-up and trace of this trial; the same for all cells of a block."""
        warmup, trace = self.cell.warmup, self.trace
        return build_schedule(
            trace.arrivals_ns,
            models=self.cell.models,
            popularity=self.cell.popularity,
            trace_models=trace.model_index,
            payload_count=len(self.workload.payloads),
            warmup_s=warmup.duration_s,
            warmup_rate=warmup.rate if warmup.rate is not None else max(1.0, len(trace) / trace.span_s),
            seed=self.plan.seed,
        )

    @property
    def duration_s(self) -> float:
        """How long the schedule lasts, warm-up included."""
        return self.cell.warmup.duration_s + WARMUP_GAP_S + self.trace.span_s


def _balancer_environment(checked: Checked, on_progress: Callable[[str], None]) -> ServerEnvironment | None:
    """Where HAProxy is, if some framework's nodes stand behind it: the null server brings it along."""
    experiment = checked.experiment
    if experiment.nodes == 1 or all(contestant.adapter.own_cluster for contestant in checked.contestants.values()):
        return None
    null = get_adapter(NULL_SERVER)
    return build(experiment.own_interpreters, [null.requirements], name=null.name, on_progress=on_progress)


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
    for name in {cell.adapter: None for cell in checked.cells.values() if cell.artifact != "python"}:
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
    balancer_environment = _balancer_environment(checked, on_progress)
    setups = []
    for plan in checked.plans:
        cell, trace = checked.cells[plan.cell], checked.trace_of(plan)
        environment, environment_s = environments[cell.adapter]
        setups.append(
            TrialSetup(
                cell=cell,
                plan=plan,
                adapter=checked.contestants[cell.adapter].adapter,
                environment=environment,
                environment_s=environment_s,
                balancer_environment=balancer_environment,
                workload=workload if cell.memory is None else sharing_memory(workload),
                trace=trace,
                faults=tuple(faults_of(cell.scenario, trace, plan.seed)),
            )
        )
    return setups
