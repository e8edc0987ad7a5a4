"""Neutral knobs to TorchServe's configuration files, and back again from what a running server reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harness.adapter import DeployRequest
from harness.workload import TensorSpec

PORTS = ("inference", "management", "metrics", "gRPC inference", "gRPC management")
"""In the order in which a request names them."""
WITHOUT_TORCH = "without_torch"
"""The folder of a stand-in for torch, for environments that have none."""
_FOLDER = Path(__file__).parent
_HANDLER = "handler.py"
_MODEL_CONFIG = "model-config.yaml"
_BODY_LIMIT_BYTES = 6_553_500
"""TorchServe's default for requests, and for the answer of a worker to a whole batch."""

_LOGGING = """\
# All to the console, which is the server's log. As TorchServe ships it, it would write six lines a request, each twice.
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{ISO8601} [%-5p] %t %c - %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
logger.access.name = ACCESS_LOG
logger.access.level = off
logger.apache.name = org.apache
logger.apache.level = off
logger.netty.name = io.netty
logger.netty.level = error
logger.answers.name = org.pytorch.serve.wlm.BatchAggregator
logger.answers.level = warn
logger.metrics.name = org.pytorch.serve.wlm.WorkerLifeCycle
logger.metrics.level = warn
"""


def port_variable(name: str) -> str:
    """The environment variable from which ``config.properties`` takes a port."""
    return f"TAILRACE_TORCHSERVE_{name.replace(' ', '_').upper()}_PORT"


def server_files(request: DeployRequest) -> dict[str, str]:
    """The files of the server itself: path below the configuration folder → text."""
    return {
        "config.properties": "".join(f"{key}={value}\n" for key, value in _properties(request).items()),
        "metrics.yaml": (_FOLDER / "metrics.yaml").read_text(encoding="utf-8"),
        "log4j2.properties": _LOGGING,
        f"{WITHOUT_TORCH}/torch.py": (_FOLDER / "torch_stand_in.py").read_text(encoding="utf-8"),
    }


def model_files(request: DeployRequest, model: str) -> dict[str, str]:
    """A model's folder in the model store, in the layout of a model archive that is not zipped."""
    manifest = {
        "runtime": "python",
        "archiverVersion": "0.12.0",
        "model": {"modelName": model, "modelVersion": "1.0", "handler": _HANDLER, "configFile": _MODEL_CONFIG},
    }
    return {
        f"models/{model}/MAR-INF/MANIFEST.json": json.dumps(manifest, indent=1) + "\n",
        f"models/{model}/{_MODEL_CONFIG}": yaml.safe_dump(_model_config(request), sort_keys=False, allow_unicode=True),
        f"models/{model}/{_HANDLER}": (_FOLDER / _HANDLER).read_text(encoding="utf-8"),
    }


def knobs_in(description: Mapping[str, Any]) -> dict[str, object]:
    """The neutral knobs in the answer of ``GET /models/MODEL``."""
    queue = description["jobQueueStatus"]
    return {
        "max_batch": description["batchSize"],
        "batch_window_ms": float(description["maxBatchDelay"]),
        "replicas": ready_workers(description),
        "queue_limit": queue["remainingCapacity"] + queue["pendingRequests"],
        "server_timeout_s": float(description["responseTimeout"]),
    }


def ready_workers(description: Mapping[str, Any]) -> int:
    """How many workers of a model have loaded it, as ``GET /models/MODEL`` says."""
    return sum(worker["status"] == "READY" for worker in description["workers"])


def _properties(request: DeployRequest) -> dict[str, str]:
    inference, management, metrics, grpc_inference, grpc_management = (f"$${port_variable(name)}$$" for name in PORTS)
    properties = {
        "inference_address": f"http://{request.listen}:{inference}",
        "management_address": f"http://{request.listen}:{management}",
        "metrics_address": f"http://{request.listen}:{metrics}",
        "grpc_inference_address": request.listen,
        "grpc_inference_port": grpc_inference,
        "grpc_management_address": request.listen,
        "grpc_management_port": grpc_management,
        "disable_token_authorization": "true",
        "enable_model_api": "true",  # models come and go through it
        "enable_envvars_config": "false",
        "install_py_dep_per_model": "false",
        "allowed_urls": "file://.*",
        "model_store": "models",
        "load_models": ",".join(f"{model}={model}" for model in request.models),
        "metrics_mode": "prometheus",
        "metrics_config": "metrics.yaml",
        # A Python process every minute, for figures that are collected anyway.
        "disable_system_metrics": "true",
    }
    # Workers are dealt out over so many, in turn.
    properties["number_of_gpu"] = str(request.devices if request.workload.device == "cuda" else 0)
    spec, largest_batch = request.workload.spec, request.tuning.max_batch or 1
    for key, size_bytes in (
        ("max_request_size", _item_bytes(spec.inputs)),
        ("max_response_size", largest_batch * _item_bytes(spec.outputs)),
    ):
        if size_bytes * 1.01 > _BODY_LIMIT_BYTES:  # a response has some bytes of frame around its items
            properties[key] = str(math.ceil(size_bytes * 1.01))
    return properties


def _item_bytes(specs: Sequence[TensorSpec]) -> int:
    return sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)


def _model_config(request: DeployRequest) -> dict[str, Any]:
    tuning, workload = request.tuning, request.workload
    config: dict[str, Any] = {}
    if tuning.replicas is not None:
        config |= {"minWorkers": tuning.replicas, "maxWorkers": tuning.replicas}
    if tuning.max_batch is not None:
        config["batchSize"] = tuning.max_batch
    if tuning.batch_window_ms is not None:
        config["maxBatchDelay"] = int(tuning.batch_window_ms)
    if tuning.queue_limit is not None:
        config["jobQueueSize"] = tuning.queue_limit
    if tuning.server_timeout_s is not None:
        config["responseTimeout"] = int(tuning.server_timeout_s)
    config["tailrace"] = {
        "model_file": str(workload.model_file),
        "artifact": str(workload.artifact),
        "device": workload.device,
        "inputs": [spec.model_dump(mode="json") for spec in workload.spec.inputs],
        "outputs": [spec.model_dump(mode="json") for spec in workload.spec.outputs],
    }
    return config
