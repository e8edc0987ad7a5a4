"""The neutral tuning in Ray Serve's own terms, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tailrace.harness.contract.adapter import Autoscale, DeployRequest, Tuning
from tailrace.harness.contract.control import agreed
from tailrace.harness.contract.multiplexing import MemoryPlan

DEPLOYMENT = "Model"
"""The deployment that takes the requests of an application: the model or, where Serve composes a pipeline, what calls the
deployments of its stages, which are called as the stages are."""
ROUTE = "/models/{model}"
MULTIPLEXED = "models"
"""The one application of models that share a memory, at the route before theirs."""
MODEL_HEADER = "serve_multiplexed_model_id"
"""Where Serve looks for the model that a request is for."""
_NODE_ADDRESS = "127.0.0.2"
"""Another loopback address: 127.0.0.1 Ray would replace by the machine's public one. All nodes of a cluster have it: replicas
listen on loopback, where HAProxy looks for those alone that are at its own node's address."""
_NODE_STORE_BYTES = 200 << 20
"""Of each worker node's object store; Ray's default is nearly a third of the machine's memory for every one of them."""
_EXACT_BATCH_SIZES = 64
_FORMING_BATCHES = 2
_PACE = {"up_after_s": "upscale_delay_s", "down_after_s": "downscale_delay_s", "averaged_over_s": "look_back_period_s"}
_REPORTS_PER_AVERAGE = 4


class Options(BaseModel):
    """The adapter's own options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    proxy: Literal["haproxy", "python"] | None = Field(
        default=None,
        description="haproxy: Ray's HAProxy data plane, requests go straight to the replicas; "
        "python: Ray's own default proxy; left out: haproxy, but python under `tuning: defaults` and with `multiplexing`",
    )


def files(request: DeployRequest) -> dict[str, str]:
    """``serve.json`` in the schema of ``serve deploy``; ``ray.json`` with what is Ray's and not Serve's."""
    tuning = request.tuning
    http_options: dict[str, Any] = {"host": request.listen}
    if tuning.server_timeout_s is not None:
        http_options["request_timeout_s"] = tuning.server_timeout_s
    serve = {
        "http_options": http_options,
        "logging_config": {"logs_dir": str(request.workdir / "logs" / "serve")},
        "applications": [application(request, name) for name in applications(request)],
    }
    # Logical CPUs, one per replica: Ray sets the model's OMP_NUM_THREADS to it. As many again for models that are
    # loaded later and for replicas that start while others end.
    num_cpus = 2 * _most_per_node(tuning) * len(applications(request)) * (1 + len(request.stages)) + 2
    num_gpus = request.devices if request.workload.device == "cuda" else 0
    ray: dict[str, Any] = {
        "init": {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "include_dashboard": False,
            "log_to_driver": False,
            "_node_ip_address": _NODE_ADDRESS,
        },
        "environment": environment(request),
    }
    if request.nodes > 1:
        serve["proxy_location"] = "HeadOnly"  # one way in; those of other nodes would want the same port
        # Without CPUs the head holds no replica, but Serve's controller and proxy, which take none.
        ray["init"] |= {"num_cpus": 0, "num_gpus": 0}
        ray |= {"nodes": request.nodes, "node": _node(num_cpus, num_gpus)}
    return {"serve.json": json.dumps(serve, indent=1) + "\n", "ray.json": json.dumps(ray, indent=1) + "\n"}


def _node(num_cpus: int, num_gpus: int) -> dict[str, int | str]:
    """The options of ``ray start`` for a worker node. A port of 0 is one that is free: nodes share this machine."""
    return {
        "num-cpus": num_cpus,
        "num-gpus": num_gpus,
        "object-store-memory": _NODE_STORE_BYTES,
        "node-ip-address": _NODE_ADDRESS,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "dashboard-agent-listen-port": 0,
        "include-log-monitor": "false",  # it would only send logs to the head, where nobody reads them
    }


def applications(request: DeployRequest) -> list[str]:
    """The names of Serve's applications: one for each model, or one for all that share a memory."""
    return [MULTIPLEXED] if request.memory is not None else list(request.models)


def models_per_replica(memory: MemoryPlan, replicas: int) -> int:
    """``max_num_models_per_replica``: Serve counts models, not bytes, so that each has to be taken for the largest one; and its
    replicas know nothing of each other's, so that each has its share of the memory."""
    return memory.budget_bytes // max(memory.sizes.values()) // replicas


def application(request: DeployRequest, model: str) -> dict[str, Any]:
    """One model, or all that share a memory, as an entry of ``applications``. The tuning says what one node is to hold.

    Of a node that has died the replicas wait for its return. Without ``max_replicas_per_node`` Ray would start them on the
    nodes that are left, as far as their CPUs go; there they would share devices that are busy already.
    """
    workload = request.workload
    args: dict[str, Any] = {
        "model_file": str(workload.model_file),
        "artifact": str(workload.artifact),
        "name": model,
        "device": workload.device,
        "inputs": [spec.model_dump(mode="json") for spec in workload.spec.inputs],
        "outputs": [spec.model_dump(mode="json") for spec in workload.spec.outputs],
    }
    deployments = [_deployment(request, DEPLOYMENT, batches=True)]
    if request.memory is not None:
        args["models_per_replica"] = models_per_replica(request.memory, request.tuning.replicas or 1)
    if request.stages:
        args["stages"] = [stage.model_dump(mode="json") for stage in request.stages]
        stages = [_deployment(request, stage.name, batches=stage.on_device) for stage in request.stages]
        deployments = [_ingress(request), *stages]
    return {
        "name": model,
        "route_prefix": f"/{MULTIPLEXED}" if request.memory is not None else ROUTE.format(model=model),
        "import_path": "server:application",
        "args": args,
        "deployments": deployments,
    }


def _deployment(request: DeployRequest, name: str, *, batches: bool) -> dict[str, Any]:
    """A deployment of a model, or of a stage; one that does not batch takes one item at a time, and refuses none."""
    tuning = request.tuning
    deployment: dict[str, Any] = {"name": name, **_replicas(request)}
    if batches and request.workload.device == "cuda":
        sharing = sum(stage.on_device for stage in request.stages) if request.stages else 1
        replicas = _most_per_node(tuning) * len(request.models) * sharing
        deployment["ray_actor_options"] = {"num_gpus": gpu_share(replicas, request.devices)}
    if batches and tuning.queue_limit is not None:
        deployment["max_queued_requests"] = tuning.queue_limit
    if batches and tuning.max_batch is not None:
        # Ray's default of 5 would end every batch at 5: one batch runs while the next one forms. Where models share a memory,
        # those of each: requests wait for their model inside the replica, and must not keep out those for others.
        models = 1 if request.memory is None else len(request.memory.sizes)
        deployment["max_ongoing_requests"] = _FORMING_BATCHES * tuning.max_batch * models
        deployment["user_config"] = {"max_batch_size": tuning.max_batch}
        if tuning.batch_window_ms is not None:
            deployment["user_config"]["batch_wait_timeout_s"] = tuning.batch_window_ms / 1000
    return deployment


def _ingress(request: DeployRequest) -> dict[str, Any]:
    """What calls the stages must have under way what all replicas of all stages take, and what may wait for them."""
    tuning = request.tuning
    deployment = {"name": DEPLOYMENT, **_replicas(request)}
    if tuning.max_batch is not None:
        taken = _FORMING_BATCHES * tuning.max_batch * len(request.stages)
        deployment["max_ongoing_requests"] = taken + (tuning.queue_limit or 0)
    return deployment


def _replicas(request: DeployRequest) -> dict[str, Any]:
    tuning = request.tuning
    told: dict[str, Any] = {}
    if request.nodes > 1:
        told["max_replicas_per_node"] = _most_per_node(tuning)
    if tuning.replicas is not None or (request.nodes > 1 and tuning.autoscale is None):
        told["num_replicas"] = _most_per_node(tuning) * request.nodes
    if tuning.autoscale is not None:
        told["autoscaling_config"] = _autoscaling(tuning.autoscale, request.nodes)
    return told


def _autoscaling(wanted: Autoscale, nodes: int) -> dict[str, float]:
    scaling: dict[str, float] = {
        "min_replicas": wanted.min * nodes,
        "max_replicas": wanted.max * nodes,
        "target_ongoing_requests": wanted.target_ongoing,
    }
    scaling |= {key: value for knob, key in _PACE.items() if (value := getattr(wanted, knob)) is not None}
    if wanted.averaged_over_s is not None:
        # Replicas report every 10 s otherwise, and an average over less than that would be of nothing.
        scaling["metrics_interval_s"] = wanted.averaged_over_s / _REPORTS_PER_AVERAGE
    return scaling


def gpu_share(replicas: int, devices: int) -> float:
    """The ``num_gpus`` of one replica that spreads ``replicas`` evenly over ``devices``; at most one each."""
    per_device = math.ceil(replicas / devices)
    return math.floor(10_000 / per_device) / 10_000  # Ray counts in ten-thousandths; rounding up would not fit


def _most_per_node(tuning: Tuning) -> int:
    return tuning.autoscale.max if tuning.autoscale else tuning.replicas or 1


def environment(request: DeployRequest) -> dict[str, str]:
    """Ray's environment variables that are the same at every start of this configuration."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_worker_niceness": "0",  # 15 otherwise: any neighbour would outrank the server under test
        "RAY_metrics_report_interval_ms": "1000",  # 5 s of delay otherwise
    }
    if request.tuning.max_batch is not None:
        variables["RAY_SERVE_BATCH_SIZE_BUCKETS"] = ",".join(map(str, batch_size_bounds(request.tuning.max_batch)))
    if behind_haproxy(request):
        variables["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    return variables


def behind_haproxy(request: DeployRequest) -> bool:
    """Whether requests go through Ray's HAProxy data plane, which knows nothing of which replica has which model."""
    if not isinstance(request.options, Options) or request.options.proxy is None:
        return request.memory is None and bool(request.tuning.chosen())
    return request.options.proxy == "haproxy"


def batch_size_bounds(max_batch: int) -> list[int]:
    """Upper bounds of the histogram of batch sizes: every size up to 64, then 64 steps to the largest."""
    exact = list(range(1, min(max_batch, _EXACT_BATCH_SIZES) + 1))
    step = math.ceil((max_batch - len(exact)) / _EXACT_BATCH_SIZES) or 1
    beyond = list(range(len(exact) + step, max_batch, step))
    return exact + beyond + ([max_batch] if max_batch > _EXACT_BATCH_SIZES else [])


def knobs_in(report: Mapping[str, Any], nodes: int = 1) -> dict[str, object]:
    """The neutral knobs, per node, in what the server reports; a knob on which the applications differ lists what they have."""
    reports = [_knobs_of(reported, report["http_options"], nodes) for reported in report["applications"].values()]
    return agreed({knob: value for knob, value in knobs.items() if value is not None} for knobs in reports)


def _knobs_of(reported: Mapping[str, Any], http_options: Mapping[str, Any], nodes: int) -> dict[str, object]:
    config, batching = reported["deployment_config"], reported["batching"]
    window_s = batching.get("batch_wait_timeout_s")
    knobs: dict[str, object] = {
        "max_batch": batching.get("max_batch_size", 1),
        "batch_window_ms": None if window_s is None else round(window_s * 1000, 6),
        "queue_limit": config["max_queued_requests"] if config.get("max_queued_requests", -1) != -1 else None,
        "server_timeout_s": http_options.get("request_timeout_s"),
    }
    if scaling := config.get("autoscaling_config"):
        knobs["autoscale"] = {
            "min": scaling["min_replicas"] // nodes,
            "max": scaling["max_replicas"] // nodes,
            "target_ongoing": scaling["target_ongoing_requests"],
            **{knob: scaling[key] for knob, key in _PACE.items() if key in scaling},
        }
    else:
        knobs["replicas"] = reported["running"] // nodes
    return knobs
