"""The reference server as a contestant: the baseline of every comparison, for what does a framework buy over this?

It is the system that the frameworks replace, built for real (``server/``): a router with a bounded queue, a dynamic batcher,
processes as replicas, health checks, rerouting and restart, an autoscaler, metrics, a graceful end.

Requests are raw tensors over HTTP. Whoever writes a server of his own knows both ends of the wire, and puts no JSON header
on it for the sake of a protocol; Ray Serve and TorchServe are raced over the same bytes. A baseline that paid for a parser
in Python would flatter the frameworks. Paths are the Open Inference Protocol's, so that clients find health and models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict, Field

from tailrace.adapters.reference.server.replica import PROCESS_NAME
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
    BatchCounts,
    OpenInferenceControl,
    agreed,
    choose_ports,
    process_environment,
    raw_endpoint,
    recognised,
)
from tailrace.harness.contract.multiplexing import Policy
from tailrace.harness.contract.workload import TensorSpec
from tailrace.harness.processes import ProcessRef
from tailrace.multiplexing import residency

CONFIG = "server.json"
SYSTEM = "system.json"
_CANONICAL = ("queue_depth", "in_flight", "replicas", "requests_ok_total", "requests_failed_total")
_DEFAULT_PACE = {"averaged_over_s": 2.0, "up_after_s": 0.0, "down_after_s": 10.0}


class Options(BaseModel):
    """The adapter's own options: policies to be compared under the same traffic."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    router: Literal["shared", "round_robin", "random", "power_of_two", "shortest_queue"] = Field(
        default="shared",
        description="shared: one queue for each model, from which idle replicas help themselves; else a queue for each "
        "replica, chosen in turn, at random, the shorter of two at random, or the shortest",
    )
    window_opens: Literal["arrival", "idle"] = Field(
        default="arrival",
        description="the batch window counts from the oldest request's arrival, or anew once a replica is idle",
    )
    admission: Literal["queue", "slo"] = Field(
        default="queue",
        description="queue: shed only what finds a full queue; slo: shed at once what would, as predicted, be answered too "
        "late",
    )
    scale_on: Literal["ongoing", "waiting", "slo"] = Field(
        default="ongoing",
        description="with autoscale: about target_ongoing requests for each replica; or one replica more when more than "
        "target_ongoing wait for each, and one fewer below a third of that; or the fewest whose predicted p99 meets the SLO",
    )
    slo_ms: float | None = Field(
        default=None, gt=0, description="the SLO that admission and scaling go by; left out: the workload's"
    )
    warm_pool: int = Field(default=0, ge=0, description="with autoscale: replicas kept ready beyond the fewest")
    period_s: float = Field(default=0.1, ge=0.05, description="with autoscale: how often it looks")
    health_timeout_s: float = Field(
        default=3.0, gt=0, description="a replica that gives no sign of life for so long is killed and replaced"
    )


class ReferenceDeployment(Deployment):
    """A running reference server; it is managed over the port on which it serves."""

    def __init__(self, host: ProcessHost, process: ProcessRef, endpoint: Endpoint, log: Path) -> None:
        super().__init__(host, process, endpoint, log)
        self._control = OpenInferenceControl(Reference.name, endpoint.host, endpoint.port, log)
        self._batches = BatchCounts()

    def claims_ready(self) -> bool:
        return self.health()

    def health(self) -> bool:
        """``/v2/health/ready``: 200 while every model has a replica that has loaded and is heard."""
        return self._control.ready()

    def replicas(self) -> list[Replica]:
        """The replica processes that have loaded their model, oldest first."""
        return recognised([self.process], _replica)

    def scrape(self) -> list[MetricSample]:
        """Its metrics per model, exact and of this moment. What is shed is in a counter of its own, and not among those that
        failed."""
        totals: dict[str, dict[str, float]] = {}
        for _, sample in self._control.samples():
            if "model" in sample.labels:  # others are of the memory that all models share
                totals.setdefault(sample.labels["model"], {})[sample.name] = sample.value
        samples = []
        for model, total in totals.items():
            if stage := model.partition("/")[2]:
                samples += _stage_samples(stage, total)
                continue
            samples += [MetricSample(metric, total[metric], model) for metric in _CANONICAL if metric in total]
            if "batches_total" in total:  # not of a pipeline, whose stages batch
                samples += self._batches.samples(model, batches=total["batches_total"], items=total["items_total"])
        return samples

    def applied(self) -> dict[str, object]:
        """From ``/v2/config``; should models disagree, a knob's value lists what they say."""
        return agreed(map(knobs_in, self._control.json("/v2/config").values()))

    def load_model(self, model: str) -> None:
        """Returns when as many replicas as a model has at first have loaded."""
        self._control.load(model, timeout_s=Reference.start_timeout_s)

    def unload_model(self, model: str) -> None:
        """Returns when what the model had to answer is answered, and its replicas have ended."""
        self._control.unload(model, timeout_s=Reference.start_timeout_s)

    def scale(self, replicas: int) -> None:
        """Returns when so many replicas of every model have loaded; those to spare end when they are done."""
        self._control.command("POST", f"/v2/replicas/{replicas}", timeout_s=Reference.start_timeout_s)


def _replica(reference: ProcessRef, process: psutil.Process) -> Replica | None:
    command = process.cmdline()  # python -m server.replica MODEL[/STAGE] CONFIG DESCRIPTOR
    if process.name() != PROCESS_NAME or len(command) < 4:
        return None
    part = command[3]
    return Replica(f"{part.replace('/', '-')}-{reference.pid}", part.partition("/")[0], reference)


def _stage_samples(stage: str, total: Mapping[str, float]) -> list[MetricSample]:
    return [
        MetricSample("stage_answers_total", total["requests_ok_total"], stage),
        MetricSample("stage_answer_s_total", total["request_seconds_total"], stage, "s"),
    ]


def knobs_in(system: Mapping[str, Any]) -> dict[str, object]:
    """The neutral knobs in what the server reports of one model."""
    scaler = system.get("scaler")
    knobs: dict[str, object] = {
        "max_batch": system["batching"]["max_batch"],
        "batch_window_ms": round(system["batching"]["window_s"] * 1e3, 6),
        "queue_limit": system["queue_limit"],
        "server_timeout_s": system["timeout_s"],
        "replicas": system["replicas"] if scaler is None else None,
    }
    if scaler is not None:
        target = scaler["target_ongoing"] if "target_ongoing" in scaler else scaler["up_above"]
        pace = {name: scaler[name] for name in _DEFAULT_PACE if name in scaler}
        fewest = scaler["min"] - system["warm_pool"]
        knobs["autoscale"] = {"min": fewest, "max": scaler["max"], "target_ongoing": target, **pace}
    return {knob: value for knob, value in knobs.items() if value is not None}


class Reference(Adapter):
    """The adapter."""

    name: ClassVar[str] = "reference"
    title: ClassVar[str] = "Reference server"
    homepage: ClassVar[str] = "part of tailrace"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http",)
    port_names: ClassVar[tuple[str, ...]] = ("HTTP",)
    Options: ClassVar[type[BaseModel]] = Options
    deployment_type: ClassVar[type[Deployment]] = ReferenceDeployment
    knobs: ClassVar[Mapping[str, str]] = {
        "max_batch": "batching.max_batch",
        "batch_window_ms": "batching.window_ms",
        "replicas": "replicas",
        "queue_limit": "queue_limit",
        "server_timeout_s": "timeout_s",
        "autoscale": "tracking, or autoscaler with `scale_on: waiting`",
    }
    refused: ClassVar[Mapping[str, str]] = {}
    traits: ClassVar[Mapping[str, str]] = {
        "batching": "in its one front process, per model: up to `max_batch` or until the oldest has waited for the window; on by "
        "default",
        "scaling": "ongoing requests per replica, by its own scaler; or what waits, or the p99 that it predicts",
        "models": "many per server, each with replicas of its own, loaded and unloaded through its API",
        "kubernetes": "none: a health endpoint, a metrics page and a graceful end on SIGTERM",
        "pipelines": "in its front process: every stage has a queue, a batcher and replicas of its own, and requests are handed "
        "on as bytes",
    }
    residency: ClassVar[Mapping[Policy, str]] = {
        "lru": "memory.policy",
        "lfu": "memory.policy",
        "gdsf": "memory.policy",
    }
    baseline: ClassVar[bool] = True
    composes: ClassVar[bool] = True
    start_timeout_s: ClassVar[float] = 120.0

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """A fixed number of replicas that is to change."""
        refusals = super().refusals(tuning, options, protocol)
        if tuning.autoscale is not None and tuning.replicas is not None:
            refusals["replicas"] = (
                "reference has no place for `replicas` beside `autoscale`: it starts with the fewest and its warm pool"
            )
        return refusals

    def health_check(self, protocol: WireProtocol) -> HealthCheck | None:
        return HealthCheck(self.port_names[0], "/v2/health/ready")

    def render(self, request: DeployRequest) -> dict[str, str]:
        """``server.json``, all that the server goes by; ``system.json``, its mechanisms alone, which is what `tailrace simulate`
        takes as a system."""
        spec, options = request.workload.spec, _options(request)
        system = system_of(request.tuning, options)
        config = {
            "models": list(request.models),
            "model_file": str(request.workload.model_file),
            "artifact": str(request.workload.artifact),
            "device": request.workload.device,
            "inputs": _layout(spec.inputs),
            "outputs": _layout(spec.outputs),
            "input_bytes": _item_bytes(spec.inputs),
            "output_bytes": _item_bytes(spec.outputs),
            "system": system,
            "admission": options.admission,
            "scale_on": options.scale_on,
            "warm_pool": _warm_pool(request.tuning, options),
            "slo_ms": options.slo_ms or spec.slo.latency_ms,
            "health_timeout_s": options.health_timeout_s,
        }
        if request.memory is not None:
            config["memory"] = asdict(request.memory)
        if request.stages:
            config |= {"input_sizes": _sizes(spec.inputs), "stages": stages_of(request, system)}
        return {CONFIG: json.dumps(config, indent=1), SYSTEM: json.dumps(system, indent=1)}

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        (port,) = choose_ports(self, request)
        log = request.workdir / "logs" / "server.log"
        process = host.spawn(
            self.name,
            [
                *(str(request.environment.python), "-m", "server"),
                *(str(request.workdir / "config" / CONFIG), request.host, str(port)),
            ],
            env={
                **process_environment(request),
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": f"{self.folder}:{Path(residency.__file__).parent}",
            },
            cwd=request.scratch,
            log=log,
        )
        return ReferenceDeployment(host, process, raw_endpoint(request, port, "/v2/models/{model}/infer"), log)


def system_of(tuning: Tuning, options: Options) -> dict[str, Any]:
    """The server's mechanisms under the simulator's names. What is left out is the server's own default: the simulator's
    batches, and a bound for the queue."""
    system: dict[str, Any] = {
        "batching": {
            "max_batch": tuning.max_batch or 16,
            "window_ms": 10.0 if tuning.batch_window_ms is None else tuning.batch_window_ms,
            "window_opens": options.window_opens,
        },
        "router": options.router,
        "replicas": tuning.replicas or 1,
        "queue_limit": tuning.queue_limit or 1024,
    }
    if tuning.server_timeout_s is not None:
        system["timeout_s"] = tuning.server_timeout_s
    if (scale := tuning.autoscale) is not None:
        fewest = scale.min + _warm_pool(tuning, options)
        limits = {"min": fewest, "max": scale.max, "period_s": options.period_s}
        system["replicas"] = fewest
        if options.scale_on == "waiting":
            system["autoscaler"] = {**limits, "up_above": scale.target_ongoing, "down_below": scale.target_ongoing / 3}
        else:
            chosen = {name: value for name in _DEFAULT_PACE if (value := getattr(scale, name)) is not None}
            system["tracking"] = {**limits, "target_ongoing": scale.target_ongoing, **_DEFAULT_PACE, **chosen}
    return system


def _warm_pool(tuning: Tuning, options: Options) -> int:
    """What is kept beyond the fewest, within the most."""
    scale = tuning.autoscale
    return 0 if scale is None else min(options.warm_pool, scale.max - scale.min)


def stages_of(request: DeployRequest, system: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a pipeline by name: on the device they have the mechanisms that the tuning asks for, elsewhere these without
    batches."""
    alone = {**system, "batching": {**system["batching"], "max_batch": 1, "window_ms": 0.0}}
    told = {}
    for stage in request.stages:
        inputs = [request.workload.spec.tensors[name] for name in stage.inputs]
        told[stage.name] = {
            "inputs": _layout(inputs),
            "outputs": _layout(stage.outputs),
            "output_sizes": _sizes(stage.outputs),
            "output_bytes": _item_bytes(stage.outputs),
            "when": stage.when,
            "on_device": stage.on_device,
            "system": dict(system) if stage.on_device else alone,
        }
    return told


def _layout(tensors: Sequence[TensorSpec]) -> list[tuple[str, str, list[int]]]:
    return [(tensor.name, tensor.dtype, list(tensor.shape)) for tensor in tensors]


def _sizes(tensors: Sequence[TensorSpec]) -> list[tuple[str, int]]:
    return [(tensor.name, _item_bytes([tensor])) for tensor in tensors]


def _item_bytes(tensors: Sequence[TensorSpec]) -> int:
    return sum(np.dtype(tensor.dtype).itemsize * math.prod(tensor.shape) for tensor in tensors)


def _options(request: DeployRequest) -> Options:
    return request.options if isinstance(request.options, Options) else Options()


ADAPTER = Reference()
