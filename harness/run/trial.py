"""The life of one trial: deploy → ready → verify → warm up → measure → drain → probe → stop, evidence on disk at each step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from tailrace.harness.contract.adapter import Endpoint
from tailrace.harness.errors import ServerError, StorageError, TailraceError, TrialPrunedError
from tailrace.harness.gpus import gpus
from tailrace.harness.plan.schedule import Phase, Schedule
from tailrace.harness.processes import log_tail
from tailrace.harness.records.facts import ColdStart, LoadGeneratorFacts, LoadWorker, State
from tailrace.harness.records.probe import Probe
from tailrace.harness.records.store import EventLog, TrialFolder
from tailrace.harness.records.tables import finish_table
from tailrace.harness.replay.driver import LoadGenerator, Progress, ReplayResult
from tailrace.harness.run.answers import answers_rightly, ask_state, check_applied, check_outputs, verify
from tailrace.harness.run.collectors import Collector
from tailrace.harness.run.deploy import deploy_request, deployed, scratch_folder
from tailrace.harness.run.facts import ended_by, first_facts
from tailrace.harness.run.features.containers import server_host
from tailrace.harness.run.features.controller import models_controlled
from tailrace.harness.run.features.faults import faults_injected
from tailrace.harness.run.features.gpus import gpu_collectors, nvml_opened
from tailrace.harness.run.features.load import load_generator
from tailrace.harness.run.features.nodes import nodes_watched
from tailrace.harness.run.features.sampling import (
    failures_raised,
    model_collectors,
    process_collectors,
    samples_taken,
    server_collectors,
)
from tailrace.harness.run.features.scaling import servers_scaled
from tailrace.harness.run.nemesis import Nemesis
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.setup import TrialSetup
from tailrace.harness.run.start import ServerStart
from tailrace.harness.run.wedge import SILENCE_S, WedgeWatch
from tailrace.harness.servers.cluster import Cluster
from tailrace.harness.servers.guardian import Guardian

_LEAD_S = 0.5
"""Between «go» and the first arrival: time for the load process to be asleep when it comes."""


class Trial:
    """Runs one trial. :meth:`run` never loses what was measured: whatever is raised, files are closed first."""

    def __init__(self, setup: TrialSetup, folder: TrialFolder, observer: Observer) -> None:
        self._setup = setup
        self._folder = folder
        self._observer = observer
        self._gpus = gpus()[: setup.cell.devices] if setup.cell.device == "cuda" else []
        self._measuring = False
        self._wedged: Probe | None = None
        self.facts = first_facts(setup, self._gpus)

    def run(self) -> None:
        """Run the trial to its end.

        A server that does not come up, or an environment that fails, ends the trial with state ``failed`` and
        returns; :class:`StorageError` and interrupts are raised again after everything has been stopped and closed.
        """
        folder = self._folder.folder
        try:
            folder.mkdir(parents=True)
            self._folder.server.mkdir()
        except OSError as error:
            raise StorageError.of(folder, error) from error
        self._save()
        self._events = EventLog(folder / "events.jsonl")
        try:
            with Guardian() as guardian:
                self._run(guardian)
            self.facts.state = "done"
        except TailraceError as error:
            self._failed("pruned" if isinstance(error, TrialPrunedError) else "failed", error)
            if isinstance(error, StorageError):
                raise
        except OSError as error:
            if error.filename is None:
                self._failed("failed", error)
            else:
                refused = StorageError.of(Path(error.filename), error)
                self._failed("failed", refused)
                raise refused from error
        except BaseException as error:
            self._failed("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error)
            raise
        finally:
            self._events.close()
            with contextlib.suppress(StorageError):
                finish_table(folder / "requests", sort_by="arrival_id")
                finish_table(folder / "samples", sort_by="t_ns")
            self._save()

    def _failed(self, state: State, error: BaseException) -> None:
        self.facts.state = state
        self.facts.error = ended_by(error)
        with contextlib.suppress(StorageError):
            self._events.write(f"trial-{state}", message=self.facts.error.message)

    def _save(self) -> None:
        self._folder.write(self.facts)

    def _stage(self, name: str) -> None:
        self._observer.stage(self._setup.plan, name)
        with contextlib.suppress(StorageError):  # told again, with its consequences, by whatever writes next
            self._events.write("stage", stage=name)

    # -- the phases, and what goes beside them -------------------------------------------------------------------

    def _run(self, guardian: Guardian) -> None:
        """What is entered here goes on until the end, and is left in reverse order, however that comes."""
        setup, cell, facts, events = self._setup, self._setup.cell, self.facts, self._events
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            told = enter(failures_raised())
            scratch = enter(scratch_folder(guardian))
            self._stage("deploy")
            nvidia = enter(nvml_opened(cell, self._gpus, events))
            servers = enter(server_host(setup, guardian, scratch, self._folder.server, facts))
            request = deploy_request(setup, scratch, self._folder.server, self._gpus)
            cluster = enter(deployed(setup, request, servers.host, guardian, tell=self._ending))
            self._bring_up(cluster, servers.host.spawned_ns(cluster.process))
            enter(models_controlled(cell, setup.adapter, cluster))
            self._stage("verify")
            self._verify(cluster)
            enter(nodes_watched(cluster, events, self._answers_rightly))
            collectors = [
                *servers.collectors,
                *server_collectors(cluster, setup.adapter.capabilities(), events),
                *model_collectors(cell, scratch, events),
                *gpu_collectors(nvidia, cell, self._gpus, cluster, facts),
            ]
            schedule = setup.schedule()
            result = self._measure(cluster, schedule, collectors, told)
            self._stage("drained")
            self._account(cluster, schedule, result)
            self._probe(cluster)

    def _measure(
        self,
        cluster: Cluster,
        schedule: Schedule,
        collectors: Sequence[Collector],
        on_error: Callable[[BaseException], None],
    ) -> ReplayResult:
        """Warm up and replay; what is entered here accompanies the load alone. ``on_error`` is told of collectors that fail."""
        setup, cell, facts, events = self._setup, self._setup.cell, self.facts, self._events
        folder = self._folder.folder
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            generator = enter(load_generator(setup, schedule, cluster.endpoint, folder))
            generator.start()
            epoch_ns = self._go(generator, schedule)
            reading = [*process_collectors(cluster, generator.pid), *collectors]
            enter(samples_taken(reading, folder / "samples", epoch_ns, on_error))
            enter(servers_scaled(cell.scenario.scaler, cluster, events, facts))
            nemesis = enter(faults_injected(setup, cluster, events, epoch_ns, facts))
            result = self._replay(generator, cluster, nemesis)
            # Arrivals may end before the trace does; a late fault, and the quiet after it, belong to the trace.
            if self._wedged is None:
                _sleep_until(epoch_ns + int(setup.trace.span_s * 1e9))
        return result

    # -- each phase ----------------------------------------------------------------------------------------------

    def _ending(self, what: Literal["stop", "stopped"]) -> None:
        if what == "stop":
            self._stage("stop")
        else:
            self._events.write("stopped")

    def _bring_up(self, cluster: Cluster, spawned_ns: int) -> None:
        """Cold start by phase: process spawned → port open → ready (so it says) → first correct answer."""
        setup, facts, events = self._setup, self.facts, self._events
        facts.warnings += cluster.notes
        events.write("spawned", mono_ns=spawned_ns, pid=cluster.process.pid)
        cold_start = facts.cold_start = ColdStart(environment_s=setup.environment_s)

        def reached(phase: str, seconds: float) -> None:
            setattr(cold_start, phase, seconds)
            events.write(phase.removesuffix("_s").replace("_", "-"))

        start = ServerStart(setup, cluster, spawned_ns, reached)
        start.come_up()
        start.first_answer()

    def _verify(self, cluster: Cluster) -> None:
        self.facts.verified_before = verify(self._setup, cluster)
        check_applied(self._setup, cluster, self.facts)
        self._save()

    def _answers_rightly(self, endpoint: Endpoint) -> bool:
        return answers_rightly(self._setup, endpoint)

    def _go(self, generator: LoadGenerator, schedule: Schedule) -> int:
        """Let the load begin; returns the trial's epoch, the first instant of the trace."""
        before_s = -int(schedule.intended_ns[0]) / 1e9 if len(schedule) and schedule.intended_ns[0] < 0 else 0.0
        epoch_ns = time.monotonic_ns() + int((before_s + _LEAD_S) * 1e9)
        self.facts.epoch_mono_ns = epoch_ns
        self._save()
        if before_s:
            self._stage("warm up")
        generator.go(epoch_ns)
        return epoch_ns

    def _replay(self, generator: LoadGenerator, cluster: Cluster, nemesis: Nemesis) -> ReplayResult:
        """Wait for the replay; interrupted, or with a server that is wedged, keep what was recorded until then."""
        watch = WedgeWatch(
            lambda: ask_state(self._setup, cluster)[0],
            excused=lambda: any(fault["injected_s"] is not None for fault in nemesis.done),
            on_wedged=generator.abort,
        )
        try:
            with watch:
                return generator.wait(lambda progress: self._follow(progress, watch))
        except BaseException:
            generator.abort()
            with contextlib.suppress(TailraceError):
                generator.wait()
            raise
        finally:
            self._wedged = watch.found

    def _follow(self, progress: Progress, watch: WedgeWatch) -> None:
        if progress.t_s >= 0 and not self._measuring:
            self._measuring = True
            self._stage("measure")
        watch.follow(progress)
        self._observer.progress(self._setup.plan, progress)

    def _account(self, cluster: Cluster, schedule: Schedule, result: ReplayResult) -> None:
        """What the load took, and whether the answers to it were right."""
        self.facts.load_generator = LoadGeneratorFacts(
            cpu_us_per_request=result.cpu_s / len(schedule) * 1e6 if len(schedule) else None,
            connections_opened=result.connections_opened,
            peak_connections=result.peak_connections,
            priority=result.priority,
            workers=[LoadWorker.model_validate(asdict(worker)) for worker in result.workers],
            start_lag_p50_ms=result.start_lag_p50_ms,
            start_lag_p99_ms=result.start_lag_p99_ms,
            measured_arrivals=int(np.count_nonzero(schedule.phase == Phase.MEASURE)),
        )
        if result.failure is not None:
            self.facts.warnings.append(f"the load generator ended early: {result.failure}")
        self.facts.outputs = check_outputs(self._setup, cluster, result)

    def _probe(self, cluster: Cluster) -> None:
        """After the drain: does the server still live, say that it is ready, and answer? Told apart, for health can lie.

        Raises :class:`ServerError` when the trial was ended early because the server was wedged.
        """
        probe, answer = (self._wedged, None) if self._wedged is not None else ask_state(self._setup, cluster)
        self.facts.final_probe = probe
        self._events.write("final-probe", **probe.dump(), answer=answer)
        if self._wedged is not None:
            raise ServerError(
                f"{self._setup.cell.adapter} is wedged: {probe.contradiction}, for {SILENCE_S:.0f} s and a probe; the "
                "trial was ended",
                remedy=f"read the log: {cluster.log}; report it upstream",
                detail=log_tail(cluster.log),
            )


def _sleep_until(mono_ns: int) -> None:
    remaining_s = (mono_ns - time.monotonic_ns()) / 1e9
    if remaining_s > 0:
        time.sleep(remaining_s)
