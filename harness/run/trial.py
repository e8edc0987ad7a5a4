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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tailrace.harness.contract.adapter import (
    CapabilityMissingError,
    Deployment,
    DeployRequest,
    Endpoint,
    ServerEnvironment,
)
from tailrace.harness.contract.exchange import check_answer, exchange
from tailrace.harness.contract.pipeline import pipeline_environment
from tailrace.harness.errors import DeployError, ServerError, StorageError, TailraceError, TrialPrunedError
from tailrace.harness.gpus import Gpu, gpus
from tailrace.harness.machine import cpu_count
from tailrace.harness.plan.experiment import Client
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.plan.schedule import Phase
from tailrace.harness.processes import descendants, log_tail
from tailrace.harness.records.probe import Probe
from tailrace.harness.records.store import EventLog, TrialFolder, write_json
from tailrace.harness.records.tables import finish_table
from tailrace.harness.replay.driver import LoadGenerator, Progress, ReplayResult, Workers
from tailrace.harness.run.collectors import (
    Collector,
    ContainerStatistics,
    EmulatedDevices,
    Host,
    Nodes,
    OwnProcesses,
    Publishers,
    Replicas,
    Sampler,
    ServerMetrics,
    ServerProcesses,
    SharedMemory,
    StageClocks,
)
from tailrace.harness.run.gpu_collectors import DCGM_PORT, DcgmExporter, NvidiaGpus
from tailrace.harness.run.nemesis import Nemesis
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.setup import TrialSetup
from tailrace.harness.run.wedge import SILENCE_S, WedgeWatch
from tailrace.harness.servers.cluster import Cluster, Layout
from tailrace.harness.servers.device_memory import limit_memory
from tailrace.harness.servers.devices import device_environment
from tailrace.harness.servers.guardian import Guardian
from tailrace.harness.servers.scaler import Scaler, label

if TYPE_CHECKING:
    from tailrace.harness.servers.containers import ContainerHost
    from tailrace.harness.servers.model_controller import ModelController

_VERIFIED_PAYLOADS = 16
"""Payloads whose answers are compared with the reference before the clock starts, per model."""
_ANSWER_TIMEOUT_S = 30.0
_RESTARTED_ANSWER_TIMEOUT_S = 2.0
_POLL_S = 0.01
_LEAD_S = 0.5
"""Between «go» and the first arrival: time for the load process to be asleep when it comes."""
_STOP_GRACE_S = 10.0


def device_folder(scratch: Path, node: int) -> Path:
    """Where the emulated devices of a node keep their locks and counters."""
    return scratch / "devices" / str(node)


def clock_folder(scratch: Path) -> Path:
    """Where the stages of a pipeline, on all nodes, keep their clocks."""
    return scratch / "stages"


def _layout(cell: ResolvedCell, balancer_environment: ServerEnvironment | None) -> Layout:
    """How the nodes of a cell stand at the start of a trial."""
    layout = Layout(
        nodes=cell.nodes,
        links=cell.links,
        restart=cell.supervision == "restart",
        backoff_s=cell.restart_backoff_s,
        balancer_environment=balancer_environment,
    )
    scaler = cell.scenario.scaler
    if scaler is None or scaler.of != "nodes":
        return layout
    return replace(layout, active=scaler.min, warm=scaler.warm_pool, cold_start=scaler.cold_start)


def load_workers(client: Client) -> Workers:
    """Who sends, by an experiment's ``client``."""
    return Workers(local=client.workers, remote=client.remote_workers, listen=client.listen)


class Trial:
    """Runs one trial. :meth:`run` never loses what was measured: whatever is raised, files are closed first."""

    def __init__(self, setup: TrialSetup, folder: TrialFolder, observer: Observer) -> None:
        self._setup = setup
        self._folder = folder
        self._observer = observer
        self._collector_errors: list[BaseException] = []
        self._measuring = False
        self._wedged: Probe | None = None
        self._gpus: list[Gpu] = gpus()[: setup.cell.devices] if setup.cell.device == "cuda" else []
        self._nvidia: NvidiaGpus | None = None
        self._containers: ContainerHost | None = None
        self._controller: ModelController | None = None
        cell, trace = setup.cell, setup.trace
        self.facts: dict[str, Any] = {
            "id": setup.plan.id,
            "cell": cell.id,
            "adapter": cell.adapter,
            "scenario": cell.scenario.name,
            "mean_rate": cell.scenario.mean_rate,
            "number": setup.plan.number,
            "seed": setup.plan.seed,
            "state": "running",
            "error": None,
            "workload": cell.workload,
            "trace": trace.name,
            "transient": trace.transient,
            "device": cell.device,
            "devices": cell.devices,
            "gpus": [{"gpu": gpu.scope, "name": gpu.name, "uuid": gpu.uuid} for gpu in self._gpus],
            "device_price_per_hour": cell.device_price_per_hour,
            "protocol": cell.protocol,
            "slo_ms": cell.slo_ms,
            "span_s": trace.span_s,
            "arrivals": len(trace),
            "models": list(cell.models),
            "popularity": cell.popularity.model_dump(mode="json", exclude_none=True),
            "cpu_count": cpu_count(),
            "tuning": cell.tuning.model_dump(mode="json"),
            "left_out": dict(cell.left_out),
            "composition": cell.composition,
            "memory": cell.memory and {**asdict(cell.memory), "controlled": cell.controlled},
            "artifact": cell.artifact,
            "stages": list(cell.stages),
            "options": cell.options.model_dump(mode="json"),
            "nodes": cell.nodes,
            "supervision": cell.supervision,
            "planned_faults": len(setup.faults),
            "faults": [],
            "warnings": [],
            "resolved": cell.model_dump(mode="json"),
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
            self._failed("pruned" if isinstance(error, TrialPrunedError) else "failed", error, events)
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
        setup = self._setup
        scratch = Path(tempfile.mkdtemp(prefix="tailrace-"))
        guardian.remove_later(glob.escape(str(scratch)))
        with contextlib.ExitStack() as opened:
            opened.callback(shutil.rmtree, scratch, ignore_errors=True)
            self._stage("deploy", events)
            if setup.cell.device == "cuda":
                if len(self._gpus) < setup.cell.devices:
                    raise DeployError(
                        f"{setup.cell.devices} GPUs are asked for, and NVML tells of {len(self._gpus)} by now",
                        remedy="tailrace doctor --gpu; look for «Xid» in dmesg",
                    )
                self._nvidia = NvidiaGpus(self._gpus, events.write)
                opened.callback(self._nvidia.close)
            deployment = self._deploy(guardian, events, scratch)
            try:
                self._bring_up(deployment, events)
                if setup.cell.memory is not None and setup.cell.controlled:
                    from tailrace.harness.servers.model_controller import ModelController

                    self._controller = ModelController(deployment, setup.cell.memory, setup.adapter.capabilities())
                    self._controller.start()
                    deployment.endpoint = self._controller.endpoint
                self._stage("verify", events)
                self._verify(deployment)
                self._check_applied(deployment)
                self._save()
                deployment.watch(events, self._answers_rightly)
                self._measure(deployment, guardian, events, scratch)
                self._probe(deployment, events)
            finally:
                deployment.stop_watching()  # nothing is started again from here on
                self._stage("stop", events)
                if self._controller is not None:
                    self._controller.stop()
                # A Ctrl-C on its way must not be replaced by the failure of a server to stop.
                interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
                with contextlib.suppress(TailraceError) if interrupted else contextlib.nullcontext():
                    deployment.stop(_STOP_GRACE_S)
                    events.write("stopped")
                if self._containers is not None:
                    self.facts["containers_ended"] = self._containers.endings()
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

    def _deploy(self, guardian: Guardian, events: EventLog, scratch: Path) -> Cluster:
        setup, cell = self._setup, self._setup.cell
        node_envs = [self._device_environment(scratch, index) for index in range(setup.cell.nodes)]
        request = DeployRequest(
            workload=setup.workload,
            models=cell.models_at_start,
            memory=cell.memory,
            tuning=cell.tuning,
            options=cell.options,
            protocol=cell.protocol,
            environment=setup.environment,
            workdir=self._folder.server,
            scratch=scratch,
            server_env={**node_envs[0], **pipeline_environment(setup.workload, clock_folder(scratch))},
            host=cell.server_host,
            devices=cell.devices_per_node,
            stages=setup.workload.spec.pipeline if cell.composition == "framework" else (),
            artifact=cell.artifact,
            node_envs=tuple(node_envs),
        )
        servers = self._server_host(guardian, scratch)
        cluster = Cluster(setup.adapter, request, servers, guardian, _layout(cell, setup.balancer_environment))
        self.facts["warnings"] += cluster.notes
        self._spawned_ns = servers.spawned_ns(cluster.process)
        events.write("spawned", mono_ns=self._spawned_ns, pid=cluster.process.pid)
        return cluster

    def _server_host(self, guardian: Guardian, scratch: Path) -> Guardian | ContainerHost:
        """Who runs the servers: the guardian itself, or containers of its own."""
        setup = self._setup
        if not setup.environment.image:
            return guardian
        from tailrace.harness.servers.containers import ContainerHost, Limits
        from tailrace.harness.servers.engine import Engine

        chosen, workload = setup.cell.containers, setup.workload
        self._containers = ContainerHost(
            guardian,
            Engine.connect(),
            setup.environment.image,
            reads=[setup.adapter.folder, *workload.code_folders, workload.artifact],
            writes=[self._folder.server.absolute(), scratch],
            limits=Limits(chosen.cpus, None if chosen.memory_mb is None else chosen.memory_mb << 20),
            address=setup.cell.server_host,
            gpus=workload.device == "cuda",
            one_network=setup.adapter.own_cluster and setup.cell.nodes > 1,
        )
        return self._containers

    def _device_environment(self, scratch: Path, node: int) -> dict[str, str]:
        """What a node's processes must know of the devices that are its own."""
        each = self._setup.cell.devices_per_node
        folder = device_folder(scratch, node)
        folder.mkdir(parents=True)
        workload = self._setup.workload
        if self._setup.cell.memory is not None:
            limit_memory(folder, self._setup.cell.memory, workload.own_model_file)
        own = self._gpus[node * each : (node + 1) * each]
        return device_environment(workload.device, folder, own, each)

    def _bring_up(self, deployment: Cluster, events: EventLog) -> None:
        """Cold start by phase: process spawned → port open → ready (so it says) → first correct answer."""
        endpoint, setup = deployment.endpoint, self._setup
        model = setup.cell.models[0]
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

        phases: list[tuple[str, str, Callable[[], bool], Callable[[], str]]] = [
            ("port_open_s", "open its port", deployment.open, lambda: ""),
            (
                "ready_s",
                "say that it is ready",
                deployment.claims_ready,
                lambda: ", though it answers requests: it is wedged" if answers() else "",
            ),
            (
                "first_answer_s",
                "answer a request",
                answers,
                lambda: f", though it says that it is ready: it is wedged; its last answer: {last_answer}",
            ),
        ]
        deadline = self._spawned_ns + setup.adapter.start_timeout_s * 1e9
        for key, purpose, reached, excuse in phases:
            while not reached():
                deployment.check_alive()
                if time.monotonic_ns() > deadline:
                    raise DeployError(
                        f"{setup.adapter.name} did not {purpose} within {setup.adapter.start_timeout_s:.0f} s{excuse()}",
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
        # The most popular last: they are in memory then, if not all are.
        for model in reversed(self._setup.cell.models):
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
        self.facts["verified_before"] = count * len(self._setup.cell.models)

    def _check_applied(self, deployment: Deployment) -> None:
        try:
            applied = deployment.applied()
        except CapabilityMissingError:
            return
        except (OSError, ServerError) as error:
            self.facts["warnings"].append(f"the server did not report its configuration: {error}")
            return
        asked = self._setup.cell.tuning.model_dump(mode="json", exclude_none=True)
        self.facts["applied"] = applied
        self.facts["not_applied"] = [
            f"{knob}: asked for {value}, the server has {applied[knob]}"
            for knob, value in asked.items()
            if knob in applied and not _same_setting(applied[knob], value)
        ]

    # -- measure -------------------------------------------------------------------------------------------------

    def _answers_rightly(self, endpoint: Endpoint) -> bool:
        """Whether a server that was started again answers as the reference does."""
        model, workload = self._setup.cell.models[0], self._setup.workload
        answer = exchange(endpoint, endpoint.codec.encode(model, workload.payloads[0]), _RESTARTED_ANSWER_TIMEOUT_S)
        return answer.ok and check_answer(endpoint, workload, model, 0, answer.headers, answer.body) is None

    def _measure(self, deployment: Cluster, guardian: Guardian, events: EventLog, scratch: Path) -> None:
        setup = self._setup
        schedule = setup.schedule()
        endpoint, client = deployment.endpoint, setup.cell.client
        payloads = np.unique(schedule.payload_id)
        requests = {
            (index, int(payload_id)): endpoint.codec.encode(model, setup.workload.payloads[payload_id])
            for index, model in enumerate(setup.cell.models)
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
            slo_ms=setup.cell.slo_ms,
            records=self._folder.folder / "requests",
            log=self._folder.folder / "load-generator.log",
            workers=load_workers(client),
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
            nemesis = Nemesis(setup.faults, deployment, events, epoch_ns=epoch_ns, seed=setup.plan.seed)
            with self._sampling(deployment, scratch, generator.pid, epoch_ns, events):
                nemesis.start()
                scaler = self._scaler(deployment, events)
                try:
                    result = self._replay(generator, deployment, nemesis, events)
                    # Arrivals may end before the trace does; a late fault, and the quiet after it, belong to the trace.
                    if self._wedged is None:
                        _sleep_until(epoch_ns + int(setup.trace.span_s * 1e9))
                finally:
                    nemesis.stop()
                    if scaler is not None:
                        scaler.stop()
                    self.facts["faults"] = nemesis.done
                    self.facts["node_deaths"] = deployment.deaths
        self._stage("drained", events)
        measured = int(np.count_nonzero(schedule.phase == Phase.MEASURE))
        self.facts["load_generator"] = {
            "cpu_us_per_request": result.cpu_s / len(schedule) * 1e6 if len(schedule) else None,
            "connections_opened": result.connections_opened,
            "peak_connections": result.peak_connections,
            "priority": result.priority,
            "workers": [asdict(worker) for worker in result.workers],
            "start_lag_p50_ms": result.start_lag_p50_ms,
            "start_lag_p99_ms": result.start_lag_p99_ms,
            "measured_arrivals": measured,
        }
        if result.failure is not None:
            self.facts["warnings"].append(f"the load generator ended early: {result.failure}")
        self.facts["outputs"] = self._check_outputs(deployment, result)

    def _scaler(self, deployment: Cluster, events: EventLog) -> Scaler | None:
        policy = self._setup.cell.scenario.scaler
        if policy is None:
            return None
        self.facts["warnings"].append(label(policy))
        scaler = Scaler(policy, deployment, events)
        scaler.start()
        return scaler

    def _follow(self, progress: Progress, watch: WedgeWatch, events: EventLog) -> None:
        if progress.t_s >= 0 and not self._measuring:
            self._measuring = True
            self._stage("measure", events)
        watch.follow(progress)
        self._observer.progress(self._setup.plan, progress)

    def _replay(
        self, generator: LoadGenerator, deployment: Cluster, nemesis: Nemesis, events: EventLog
    ) -> ReplayResult:
        """Wait for the replay; interrupted, or with a server that is wedged, keep what was recorded until then."""
        watch = WedgeWatch(
            lambda: self._ask_state(deployment)[0],
            excused=lambda: any(fault["injected_s"] is not None for fault in nemesis.done),
            on_wedged=generator.abort,
        )
        watch.start()
        try:
            return generator.wait(lambda progress: self._follow(progress, watch, events))
        except BaseException:
            generator.abort()
            with contextlib.suppress(TailraceError):
                generator.wait()
            raise
        finally:
            watch.stop()
            self._wedged = watch.found

    @contextlib.contextmanager
    def _sampling(
        self, deployment: Cluster, scratch: Path, generator_pid: int | None, epoch_ns: int, events: EventLog
    ) -> Iterator[None]:
        setup = self._setup
        capabilities = setup.adapter.capabilities()
        collectors: list[Collector] = [
            Host(),
            ServerProcesses(deployment.trees),
            OwnProcesses("harness", os.getpid(), descend=False),
            *(OwnProcesses(name, process.pid) for name, process in deployment.companions().items()),
        ]
        if generator_pid is not None:
            collectors.append(OwnProcesses("load-generator", generator_pid))
        if self._containers is not None:
            collectors += [ContainerStatistics(self._containers.statistics), Publishers(self._containers.publishers)]
        if "scrape" in capabilities:
            collectors.append(ServerMetrics(deployment))
        if deployment.node_count > 1:
            collectors.append(Nodes(deployment))
        if "replicas" in capabilities:
            collectors.append(Replicas(deployment, events))
        if setup.workload.device == "emulated":
            collectors.append(
                EmulatedDevices(
                    [device_folder(scratch, node) for node in range(setup.cell.nodes)], setup.cell.devices_per_node
                )
            )
        if setup.cell.memory is not None:
            collectors.append(SharedMemory(device_folder(scratch, 0), setup.cell.memory.budget_bytes, events))
        if self._nvidia is not None:
            self._nvidia.serve(lambda: [ref.pid for root in deployment.trees() for ref, _ in descendants(root)])
            collectors.append(self._nvidia)
            exporter = DcgmExporter(setup.cell.dcgm_exporter or f"127.0.0.1:{DCGM_PORT}", self._gpus)
            if exporter.answers():
                collectors.append(exporter)
            elif setup.cell.dcgm_exporter is not None:
                self.facts["warnings"].append(f"no DCGM exporter answers at {setup.cell.dcgm_exporter}")
        if setup.cell.stages:
            collectors.append(StageClocks(clock_folder(scratch)))
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

    def _probe(self, deployment: Cluster, events: EventLog) -> None:
        """After the drain: does the server still live, say that it is ready, and answer? Told apart, for health can lie.

        Raises :class:`ServerError` when the trial was ended early because the server was wedged.
        """
        probe, answer = (self._wedged, None) if self._wedged is not None else self._ask_state(deployment)
        self.facts["final_probe"] = probe.dump()
        events.write("final-probe", **probe.dump(), answer=answer)
        if self._wedged is not None:
            raise ServerError(
                f"{self._setup.adapter.name} is wedged: {probe.contradiction}, for {SILENCE_S:.0f} s and a probe; the "
                "trial was ended",
                remedy=f"read the log: {deployment.log}; report it upstream",
                detail=log_tail(deployment.log),
            )

    def _ask_state(self, deployment: Cluster) -> tuple[Probe, str | None]:
        """How the server stands, and what it said in place of an answer.

        An overloaded server is given the time to come to this request, and after it to health checks that wait behind
        others that nobody wants any more.
        """
        request = deployment.endpoint.codec.encode(self._setup.cell.models[0], self._setup.workload.payloads[0])
        before = _work_done(deployment)
        answer = exchange(deployment.endpoint, request, _ANSWER_TIMEOUT_S)
        busy = not answer.ok and before is not None and (_work_done(deployment) or 0.0) > before
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while (ready := deployment.claims_ready()) != answer.ok and answer.ok and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        alive = deployment.alive()
        probe = Probe(process_alive=alive, claims_ready=ready, answers=answer.ok, busy=busy)
        return probe, None if answer.ok else answer.text


def _work_done(deployment: Deployment) -> float | None:
    """How many requests the server has ended by its own counters; ``None`` where it does not say."""
    try:
        return sum(s.value for s in deployment.scrape() if s.metric in ("requests_ok_total", "requests_failed_total"))
    except (OSError, CapabilityMissingError):
        return None


def _same_setting(reported: Any, asked: Any) -> bool:
    """Whether a server applied what was asked for; times may be rounded to the server's own unit, and of a knob with
    several parts it may report more than was asked for."""
    if isinstance(reported, dict) and isinstance(asked, dict):
        return all(key in reported and _same_setting(reported[key], value) for key, value in asked.items())
    if isinstance(reported, float) or isinstance(asked, float):
        return math.isclose(float(reported), float(asked), rel_tol=1e-3, abs_tol=1e-3)
    return bool(reported == asked)


def _sleep_until(mono_ns: int) -> None:
    remaining_s = (mono_ns - time.monotonic_ns()) / 1e9
    if remaining_s > 0:
        time.sleep(remaining_s)
