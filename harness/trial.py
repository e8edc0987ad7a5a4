"""The life of one trial: deploy → ready → verify → warm up → measure → drain → probe → stop, evidence on disk at each step."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from harness.adapter import Adapter, CapabilityMissingError, Deployment, DeployRequest, ServerEnvironment, WireProtocol
from harness.collectors import (
    Collector,
    EmulatedDevices,
    Host,
    NvidiaGpus,
    OwnProcess,
    Replicas,
    Sampler,
    ServerMetrics,
    ServerProcesses,
)
from harness.emulated_device import device_environment
from harness.errors import DeployError, ServerError, StorageError, TailraceError
from harness.exchange import check_answer, exchange
from harness.faults import Nemesis, PlannedFault
from harness.guardian import Guardian
from harness.machine import cpu_count
from harness.observer import Observer
from harness.processes import log_tail, port_open
from harness.replay.driver import LoadGenerator, Progress, ReplayResult
from harness.schedule import WARMUP_GAP_S, Phase, Schedule, build_schedule
from harness.spec import Experiment, TrialPlan
from harness.store import EventLog, TrialFolder, write_json
from harness.tables import finish_table
from harness.workload import PreparedWorkload

_VERIFIED_PAYLOADS = 16
"""Payloads whose answers are compared with the reference before the clock starts, per model."""
_ANSWER_TIMEOUT_S = 30.0
_PROBE_TIMEOUT_S = 5.0
_POLL_S = 0.01
_LEAD_S = 0.5
"""Between «go» and the first arrival: time for the load process to be asleep when it comes."""
_STOP_GRACE_S = 10.0


@dataclass(frozen=True)
class TrialSetup:
    """All that a trial needs, settled before the run begins."""

    experiment: Experiment
    plan: TrialPlan
    adapter: Adapter
    options: BaseModel
    environment: ServerEnvironment
    environment_s: float
    workload: PreparedWorkload
    protocol: WireProtocol
    slo_ms: float
    arrivals_ns: NDArray[np.int64]
    span_s: float
    transient: bool
    trace_name: str
    faults: tuple[PlannedFault, ...]

    @property
    def devices(self) -> int:
        """How many devices goodput is divided by: all of a machine's CPUs are one."""
        return 1 if self.workload.device == "cpu" else self.experiment.devices

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are served: one, under the workload's name."""
        return tuple(self.workload.references)

    def schedule(self) -> Schedule:
        """Warm-up and trace of this trial; the same for all cells of a block."""
        warmup = self.experiment.warmup
        mean_rate = len(self.arrivals_ns) / self.span_s
        return build_schedule(
            self.arrivals_ns,
            models=self.models,
            payload_count=len(self.workload.payloads),
            warmup_s=warmup.duration_s,
            warmup_rate=warmup.rate if warmup.rate is not None else max(1.0, mean_rate),
            seed=self.plan.seed,
        )

    @property
    def duration_s(self) -> float:
        """How long the schedule lasts, warm-up included."""
        return self.experiment.warmup.duration_s + WARMUP_GAP_S + self.span_s


class Trial:
    """Runs one trial. :meth:`run` never loses what was measured: whatever is raised, files are closed first."""

    def __init__(self, setup: TrialSetup, folder: TrialFolder, observer: Observer) -> None:
        self._setup = setup
        self._folder = folder
        self._observer = observer
        self._collector_errors: list[BaseException] = []
        self._measuring = False
        self.facts: dict[str, Any] = {
            "id": setup.plan.id,
            "cell": setup.plan.cell.id,
            "adapter": setup.adapter.name,
            "scenario": setup.plan.cell.scenario.name,
            "number": setup.plan.number,
            "seed": setup.plan.seed,
            "state": "running",
            "error": None,
            "workload": setup.workload.spec.name,
            "trace": setup.trace_name,
            "transient": setup.transient,
            "device": setup.workload.device,
            "devices": setup.devices,
            "protocol": setup.protocol,
            "slo_ms": setup.slo_ms,
            "span_s": setup.span_s,
            "arrivals": len(setup.arrivals_ns),
            "models": list(setup.models),
            "cpu_count": cpu_count(),
            "tuning": setup.experiment.tuning.model_dump(mode="json"),
            "options": setup.options.model_dump(mode="json"),
            "planned_faults": len(setup.faults),
            "faults": [],
            "warnings": [],
        }

    def run(self) -> None:
        """Run the trial to its end.

        A server that does not come up, or an environment that fails, ends the trial with state ``failed`` and
        returns; :class:`StorageError` and interrupts are raised again after everything has been stopped and closed.
        """
        folder = self._folder.folder
        try:
            folder.mkdir(parents=True)
            (folder / "server").mkdir()
        except OSError as error:
            raise StorageError.of(folder, error) from error
        self._save()
        events = EventLog(folder / "events.jsonl")
        try:
            with Guardian() as guardian:
                self._run(guardian, events)
            self.facts["state"] = "done"
        except TailraceError as error:
            self._failed("failed", error, events)
            if isinstance(error, StorageError):
                raise
        except OSError as error:
            if error.filename is None:
                self._failed("failed", error, events)
            else:
                refused = StorageError.of(Path(error.filename), error)
                self._failed("failed", refused, events)
                raise refused from error
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._failed(state, error, events)
            raise
        finally:
            events.close()
            with contextlib.suppress(StorageError):
                finish_table(folder / "requests", sort_by="arrival_id")
                finish_table(folder / "samples", sort_by="t_ns")
            self._save()

    def _failed(self, state: str, error: BaseException, events: EventLog) -> None:
        message = error.message if isinstance(error, TailraceError) else f"{type(error).__name__}: {error}".strip(": ")
        self.facts["state"] = state
        self.facts["error"] = {
            "message": "interrupted by the user" if state == "interrupted" else message,
            "remedy": getattr(error, "remedy", None),
            "detail": getattr(error, "detail", None),
        }
        with contextlib.suppress(StorageError):
            events.write(f"trial-{state}", message=self.facts["error"]["message"])

    def _save(self) -> None:
        write_json(self._folder.facts_path, self.facts)

    def _run(self, guardian: Guardian, events: EventLog) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="tailrace-"))
        guardian.remove_later(glob.escape(str(scratch)))
        try:
            self._stage("deploy", events)
            deployment = self._deploy(guardian, events, scratch)
            try:
                self._bring_up(deployment, events)
                self._stage("verify", events)
                self._verify(deployment)
                self._check_applied(deployment)
                self._save()
                self._measure(deployment, guardian, events, scratch)
                self._probe(deployment, events)
            finally:
                self._stage("stop", events)
                # A Ctrl-C on its way must not be replaced by the failure of a server to stop.
                interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
                with contextlib.suppress(TailraceError) if interrupted else contextlib.nullcontext():
                    deployment.stop(_STOP_GRACE_S)
                    events.write("stopped")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if self._collector_errors:
            error = self._collector_errors[0]
            raise (
                error
                if isinstance(error, TailraceError)
                else TailraceError(
                    f"a collector failed: {type(error).__name__}: {error}", remedy="report this as a bug of tailrace"
                )
            )

    def _stage(self, name: str, events: EventLog) -> None:
        self._observer.stage(self._setup.plan, name)
        with contextlib.suppress(StorageError):  # told again, with its consequences, by whatever writes next
            events.write("stage", stage=name)

    # -- deploy and verify ---------------------------------------------------------------------------------------

    def _deploy(self, guardian: Guardian, events: EventLog, scratch: Path) -> Deployment:
        setup = self._setup
        devices = scratch / "devices"
        devices.mkdir()
        server_env = dict(device_environment(devices, setup.devices))
        if setup.workload.device == "cuda":
            server_env["CUDA_VISIBLE_DEVICES"] = ",".join(str(i) for i in range(setup.devices))
        request = DeployRequest(
            workload=setup.workload,
            models=setup.models,
            tuning=setup.experiment.tuning,
            options=setup.options,
            protocol=setup.protocol,
            environment=setup.environment,
            workdir=self._folder.server,
            scratch=scratch,
            server_env=server_env,
        )
        for name, text in setup.adapter.render(request).items():
            path = self._folder.server / "config" / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise StorageError.of(path, error) from error
        deployment = setup.adapter.deploy(request, guardian)
        self._spawned_ns = guardian.spawned_ns(deployment.process)
        events.write("spawned", mono_ns=self._spawned_ns, pid=deployment.process.pid)
        return deployment

    def _bring_up(self, deployment: Deployment, events: EventLog) -> None:
        """Cold start by phase: process spawned → port open → ready (so it says) → first correct answer."""
        endpoint, setup = deployment.endpoint, self._setup
        model = setup.models[0]
        request = endpoint.codec.encode(model, setup.workload.payloads[0])
        cold_start = {"environment_s": setup.environment_s}
        self.facts["cold_start"] = cold_start
        last_answer = "nothing"

        def answers() -> bool:
            nonlocal last_answer
            answer = exchange(endpoint, request, _ANSWER_TIMEOUT_S)
            if answer.ok:
                return True
            last_answer = answer.text
            return False

        phases: list[tuple[str, str, Callable[[], bool]]] = [
            ("port_open_s", "open its port", lambda: port_open(endpoint.host, endpoint.port)),
            ("ready_s", "say that it is ready", deployment.claims_ready),
            ("first_answer_s", "answer a request", answers),
        ]
        deadline = self._spawned_ns + setup.adapter.start_timeout_s * 1e9
        for key, purpose, reached in phases:
            while not reached():
                deployment.check_alive()
                if time.monotonic_ns() > deadline:
                    raise DeployError(
                        f"{setup.adapter.name} did not {purpose} within {setup.adapter.start_timeout_s:.0f} s"
                        + (f"; its last answer: {last_answer}" if key == "first_answer_s" else ""),
                        remedy=f"read the log: {deployment.log}",
                        detail=log_tail(deployment.log),
                    )
                time.sleep(_POLL_S)
            cold_start[key] = (time.monotonic_ns() - self._spawned_ns) / 1e9
            events.write(key.removesuffix("_s").replace("_", "-"))

    def _verify(self, deployment: Deployment) -> None:
        """Compare answers with the reference before the clock starts. Raises :class:`ServerError` on the first difference."""
        workload, endpoint = self._setup.workload, deployment.endpoint
        count = min(_VERIFIED_PAYLOADS, len(workload.payloads))
        for model in self._setup.models:
            for payload_id in range(count):
                request = endpoint.codec.encode(model, workload.payloads[payload_id])
                answer = exchange(endpoint, request, _ANSWER_TIMEOUT_S)
                if not answer.ok:
                    deployment.check_alive()
                    raise ServerError(
                        f"{self._setup.adapter.name} answered a verification request with {answer.text}",
                        remedy=f"read the log: {deployment.log}",
                        detail=log_tail(deployment.log),
                    )
                difference = check_answer(endpoint, workload, model, payload_id, answer.headers, answer.body)
                if difference is not None:
                    raise ServerError(
                        f"{self._setup.adapter.name} does not compute what the reference computes: {difference}",
                        remedy="the server runs another model, or the workload's tolerance is too tight for this device",
                    )
        self.facts["verified_before"] = count * len(self._setup.models)

    def _check_applied(self, deployment: Deployment) -> None:
        try:
            applied = deployment.applied()
        except CapabilityMissingError:
            return
        except (OSError, ServerError) as error:
            self.facts["warnings"].append(f"the server did not report its configuration: {error}")
            return
        asked = self._setup.experiment.tuning.model_dump(mode="json", exclude_none=True)
        self.facts["applied"] = applied
        self.facts["not_applied"] = [
            f"{knob}: asked for {value}, the server has {applied[knob]}"
            for knob, value in asked.items()
            if knob in applied and not _same_setting(applied[knob], value)
        ]

    # -- measure -------------------------------------------------------------------------------------------------

    def _measure(self, deployment: Deployment, guardian: Guardian, events: EventLog, scratch: Path) -> None:
        setup = self._setup
        schedule = setup.schedule()
        endpoint, client = deployment.endpoint, setup.experiment.client
        payloads = np.unique(schedule.payload_id)
        requests = {
            (index, int(payload_id)): endpoint.codec.encode(model, setup.workload.payloads[payload_id])
            for index, model in enumerate(setup.models)
            for payload_id in payloads
        }
        generator = LoadGenerator(
            schedule=schedule,
            requests=requests,
            protocol=endpoint.protocol,
            host=endpoint.host,
            port=endpoint.port,
            timeout_s=client.timeout_s,
            max_connections=client.max_connections,
            records=self._folder.folder / "requests",
            log=self._folder.folder / "load-generator.log",
        )
        with generator:
            generator.start()
            before_s = -int(schedule.intended_ns[0]) / 1e9 if len(schedule) and schedule.intended_ns[0] < 0 else 0.0
            epoch_ns = time.monotonic_ns() + int((before_s + _LEAD_S) * 1e9)
            self.facts["epoch_mono_ns"] = epoch_ns
            self._save()
            if before_s:
                self._stage("warm up", events)
            generator.go(epoch_ns)
            nemesis = Nemesis(setup.faults, deployment, guardian, events, epoch_ns=epoch_ns, seed=setup.plan.seed)
            with self._sampling(deployment, scratch, generator.pid, epoch_ns, events):
                nemesis.start()
                try:
                    result = self._replay(generator, events)
                    # Arrivals may end before the trace does; a late fault, and the quiet after it, belong to the trace.
                    _sleep_until(epoch_ns + int(setup.span_s * 1e9))
                finally:
                    nemesis.stop()
                    self.facts["faults"] = nemesis.done
        self._stage("drained", events)
        measured = int(np.count_nonzero(schedule.phase == Phase.MEASURE))
        self.facts["load_generator"] = {
            "cpu_us_per_request": result.cpu_s / len(schedule) * 1e6 if len(schedule) else None,
            "connections_opened": result.connections_opened,
            "peak_connections": result.peak_connections,
            "nice": result.nice,
            "start_lag_p50_ms": result.start_lag_p50_ms,
            "start_lag_p99_ms": result.start_lag_p99_ms,
            "measured_arrivals": measured,
        }
        if result.failure is not None:
            self.facts["warnings"].append(f"the load generator ended early: {result.failure}")
        self.facts["outputs"] = self._check_outputs(deployment, result)

    def _follow(self, progress: Progress, events: EventLog) -> None:
        if progress.t_s >= 0 and not self._measuring:
            self._measuring = True
            self._stage("measure", events)
        self._observer.progress(self._setup.plan, progress)

    def _replay(self, generator: LoadGenerator, events: EventLog) -> ReplayResult:
        """Wait for the replay; interrupted, keep what was recorded until then."""
        try:
            return generator.wait(lambda progress: self._follow(progress, events))
        except BaseException:
            generator.abort()
            with contextlib.suppress(TailraceError):
                generator.wait()
            raise

    @contextlib.contextmanager
    def _sampling(
        self, deployment: Deployment, scratch: Path, generator_pid: int | None, epoch_ns: int, events: EventLog
    ) -> Iterator[None]:
        setup = self._setup
        capabilities = setup.adapter.capabilities()
        collectors: list[Collector] = [
            Host(),
            ServerProcesses(deployment.process),
            OwnProcess("harness", os.getpid()),
        ]
        if generator_pid is not None:
            collectors.append(OwnProcess("load-generator", generator_pid))
        if "scrape" in capabilities:
            collectors.append(ServerMetrics(deployment))
        if "replicas" in capabilities:
            collectors.append(Replicas(deployment, events))
        if setup.workload.device == "emulated":
            collectors.append(EmulatedDevices(scratch / "devices", setup.devices))
        if setup.workload.device == "cuda":
            collectors.append(NvidiaGpus(setup.devices))
        sampler = Sampler(
            collectors,
            self._folder.folder / "samples",
            epoch_ns=epoch_ns,
            on_error=self._collector_errors.append,
        )
        sampler.start()
        try:
            yield
        finally:
            sampler.stop()

    def _check_outputs(self, deployment: Deployment, result: ReplayResult) -> dict[str, Any]:
        """Compare every distinct answer of the replay with the reference; counts are of requests, not of answers."""
        checked = mismatched = 0
        example = None
        for answer in result.answers:
            difference = check_answer(
                deployment.endpoint, self._setup.workload, answer.model, answer.payload_id, answer.headers, answer.body
            )
            checked += answer.count
            if difference is not None:
                mismatched += answer.count
                example = example or difference
        return {"checked": checked, "mismatched": mismatched, "unchecked": result.unchecked, "example": example}

    def _probe(self, deployment: Deployment, events: EventLog) -> None:
        """After the drain: does the server still live, say that it is ready, and answer? Told apart, for health can lie."""
        endpoint = deployment.endpoint
        request = endpoint.codec.encode(self._setup.models[0], self._setup.workload.payloads[0])
        answer = exchange(endpoint, request, _PROBE_TIMEOUT_S)
        probe = {
            "process_alive": deployment.process.alive(),
            "claims_ready": deployment.claims_ready(),
            "answers": answer.ok,
        }
        self.facts["final_probe"] = probe
        events.write("final-probe", **probe, answer=None if answer.ok else answer.text)


def _same_setting(reported: Any, asked: Any) -> bool:
    """Whether a server applied what was asked for; times may be rounded to the server's own unit."""
    if isinstance(reported, float) or isinstance(asked, float):
        return math.isclose(float(reported), float(asked), rel_tol=1e-3, abs_tol=1e-3)
    return bool(reported == asked)


def _sleep_until(mono_ns: int) -> None:
    remaining_s = (mono_ns - time.monotonic_ns()) / 1e9
    if remaining_s > 0:
        time.sleep(remaining_s)
