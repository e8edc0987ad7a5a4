"""KServe's Python model server as a contestant: how it is started, asked, measured from inside, and stopped.

Of KServe this is the process that an ``InferenceService`` runs in its pod. Batching, autoscaling and timeouts are the
business of its control plane, which needs Kubernetes.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from tailrace.adapters.kserve import config
from tailrace.harness.contract.adapter import (
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    HealthCheck,
    MetricSample,
    ProcessHost,
    Replica,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.control import (
    ControlConnection,
    OpenInferenceControl,
    choose_ports,
    open_inference_endpoint,
    process_environment,
    recognised,
)
from tailrace.harness.errors import ServerError
from tailrace.harness.processes import ProcessRef

_SERVING = "kserve-serving"
"""What the shim calls a process, in the process table, that has loaded the models."""
_PREDICTED = "request_predict_seconds_count"
_ANSWERED = "request_postprocess_seconds_count"


class KServeDeployment(Deployment):
    """A running model server; control goes over its REST port, whichever protocol is measured."""

    def __init__(
        self,
        host: ProcessHost,
        process: ProcessRef,
        endpoint: Endpoint,
        log: Path,
        *,
        request: DeployRequest,
        http_port: int,
        metrics_port: int,
    ) -> None:
        super().__init__(host, process, endpoint, log)
        self._control = OpenInferenceControl("kserve", endpoint.host, http_port, log)
        self._metrics = ControlConnection("kserve", endpoint.host, metrics_port, log)
        self._models = list(request.models)
        self._workers = request.tuning.replicas or 1
        self._complete = False

    def claims_ready(self) -> bool:
        """``/v2/health/ready`` and the ``ready`` of every loaded model, once as many workers as asked for have loaded.

        One worker answers for all, and the first to have loaded would answer for those that have not.
        """
        self._complete = self._complete or len(self._serving()) >= self._workers
        return self._complete and self.health() and all(map(self._control.model_ready, self._models))

    def health(self) -> bool:
        """``/v2/health/ready``: 200 whatever the models do, but only between two requests of the worker that is asked."""
        return self._control.ready()

    def replicas(self) -> list[Replica]:
        """Every worker that has loaded, oldest first, once for each model; of a single worker the main process is it."""
        return [Replica(f"{model}-{worker.pid}", model, worker) for worker in self._serving() for model in self._models]

    def scrape(self) -> list[MetricSample]:
        """KServe's metrics per model, summed over all workers that ever were.

        There are none of queues or of requests under way, and a request that KServe turns down before the model sees
        it (an unknown model, a body that it cannot read) is in no counter.
        """
        totals: dict[str, dict[str, float]] = {model: defaultdict(float) for model in self._models}
        for _, sample in self._metrics.samples():
            if sample.name in (_PREDICTED, _ANSWERED):
                totals.setdefault(sample.labels["model_name"], defaultdict(float))[sample.name] += sample.value
        return [
            sample
            for model, total in totals.items()
            for sample in (
                MetricSample("requests_ok_total", total[_ANSWERED], model),
                MetricSample("requests_failed_total", total[_PREDICTED] - total[_ANSWERED], model),
            )
        ]

    def applied(self) -> dict[str, object]:
        """The workers that have loaded and live; KServe itself reports nothing of its configuration."""
        return {"replicas": len(self._serving())}

    def load_model(self, model: str) -> None:
        """Load through the repository API; returns when the model's ``ready`` says so. Nothing else is answered meanwhile."""
        self._refuse_if_several("load")
        self._control.load(model, timeout_s=KServe.start_timeout_s)
        here = f"load the model {model!r}"
        self.wait_for(lambda: self._control.model_ready(model) is True, here, KServe.start_timeout_s)
        if model not in self._models:
            self._models.append(model)

    def unload_model(self, model: str) -> None:
        """Unload through the repository API; returns when the model's ``ready`` denies it."""
        self._refuse_if_several("unload")
        self._control.unload(model, timeout_s=KServe.start_timeout_s)
        gone = f"unload the model {model!r}"
        self.wait_for(lambda: self._control.model_ready(model) is False, gone, KServe.start_timeout_s)
        if model in self._models:
            self._models.remove(model)

    def _refuse_if_several(self, verb: str) -> None:
        if self._workers > 1:
            raise ServerError(
                f"kserve cannot {verb} a model in {self._workers} workers: its repository API changes the one that answers",
                remedy="use `replicas: 1`",
            )

    def _serving(self) -> list[ProcessRef]:
        """The processes that have loaded the models, oldest first."""
        return recognised([self.process], lambda reference, process: reference if process.name() == _SERVING else None)


class KServe(Adapter):
    """The adapter."""

    name: ClassVar[str] = "kserve"
    title: ClassVar[str] = "KServe"
    homepage: ClassVar[str] = "https://kserve.github.io/website/"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http", "grpc")
    port_names: ClassVar[tuple[str, ...]] = ("HTTP", "gRPC", "metrics")
    Options: ClassVar[type[BaseModel]] = config.Options
    deployment_type: ClassVar[type[Deployment]] = KServeDeployment
    knobs: ClassVar[Mapping[str, str]] = {"replicas": "--workers (of HTTP; gRPC has one)"}
    refused: ClassVar[Mapping[str, str]] = {
        "max_batch": "the Python model server has no batcher; KServe's is a sidecar that its control plane adds",
        "batch_window_ms": "the Python model server has no batcher; KServe's is a sidecar that its control plane adds",
        "queue_limit": "the Python model server takes every request; limits are the control plane's (containerConcurrency)",
        "server_timeout_s": "the Python model server lets every request run to its end; timeouts are the control plane's",
        "autoscale": "control plane only",
    }
    serves_needs: ClassVar[Mapping[str, str]] = {
        "scale-to-zero": "its control plane scales to zero; what is measured here is its model server alone",
        "canary": "its control plane splits traffic between revisions; what is measured here is its model server alone",
    }
    traits: ClassVar[Mapping[str, str]] = {
        "batching": "none in the Python model server, each request is one call of the model; the control plane can put a "
        "batcher in front of it as a sidecar",
        "scaling": "nothing by itself: the number of workers is fixed at the start; the control plane adds pods by "
        "concurrency or request rate (Knative), or by CPU or other metrics (HPA, KEDA)",
        "models": "many per server, each loaded in every worker, one request at a time in a worker; loaded and unloaded "
        "through its API where there is one worker",
        "pipelines": "its model server has none: an InferenceGraph of the control plane calls one service after the other",
        "kubernetes": "its home: an InferenceService with canary traffic, scale to zero and model storage; the Python model "
        "server raced here runs in its pods, and alone",
    }

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """Beside what is the control plane's: several workers over gRPC."""
        refusals = super().refusals(tuning, options, protocol)
        if protocol == "grpc" and (tuning.replicas or 1) > 1:
            refusals["replicas"] = (
                f"kserve has no place for `replicas: {tuning.replicas}` over gRPC: its workers serve HTTP alone, "
                "and gRPC is served by its main process"
            )
        return refusals

    def health_check(self, protocol: WireProtocol) -> HealthCheck | None:
        """What its control plane's readiness probe asks."""
        return HealthCheck("HTTP", "/v2/health/ready")

    def fault_refusals(self, tuning: Tuning) -> dict[str, str]:
        """Its repository API changes the one worker that answers."""
        if (tuning.replicas or 1) > 1:
            return {"model_reload": "kserve loads and unloads models through its API where there is one worker alone"}
        return {}

    def render(self, request: DeployRequest) -> dict[str, str]:
        """KServe's options, and what the shim is to load."""
        return config.files(request)

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start the model server."""
        http_port, grpc_port, metrics_port = choose_ports(self, request)
        log = request.workdir / "logs" / "kserve.log"
        process = host.spawn(
            "kserve",
            [
                str(request.environment.python),
                str(self.folder / "server.py"),
                *config.flags(request),
                f"--models={request.workdir / 'config' / 'models.json'}",
                f"--host={request.listen}",
                f"--http_port={http_port}",
                f"--grpc_port={grpc_port}",
                f"--metrics_port={metrics_port}",
            ],
            env={
                **process_environment(request),
                # Set, this makes the Prometheus client of every worker keep its counts in files there.
                "PROMETHEUS_MULTIPROC_DIR": tempfile.mkdtemp(prefix="kserve-metrics-", dir=request.scratch),
            },
            cwd=request.workdir,
            log=log,
            ports=(http_port, grpc_port, metrics_port),
        )
        endpoint = open_inference_endpoint(request, http_port, grpc_port)
        return KServeDeployment(
            host, process, endpoint, log, request=request, http_port=http_port, metrics_port=metrics_port
        )


ADAPTER = KServe()
