"""Neutral knobs to TorchServe's configuration files, and back again from what a running server reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tailrace.harness.contract.adapter import DeployRequest
from tailrace.harness.contract.workload import StageSpec, TensorSpec, WorkloadSpec

PORTS = ("inference", "management", "metrics", "gRPC inference", "gRPC management")
"""In the order in which a request names them."""
WITHOUT_TORCH = "without_torch"
"""The folder of a stand-in for torch, for environments that have none."""
_FOLDER = Path(__file__).parent
_HANDLER = "handler.py"
_MODEL_CONFIG = "model-config.yaml"
_DEFAULT_BATCH_DELAY_MS = 100
"""TorchServe's own for models; a workflow's would be another."""
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
logger.nodes.name = org.pytorch.serve.ensemble
logger.nodes.level = warn
logger.workflows.name = org.pytorch.serve.workflow
logger.workflows.level = warn
"""


def stage_folder(model: str, stage: StageSpec) -> str:
    """Where the model of a workflow's node lies in the model store."""
    return f"{model}-{stage.name}"


def node(model: str, stage: StageSpec) -> str:
    """TorchServe's own name for the model of a workflow's node."""
    return f"{model}__{stage.name}"


def workflow_file(model: str) -> str:
    """The specification of a workflow, below the configuration folder."""
    return f"workflows/{model}.yaml"


def workflow_parts(model: str, specification: str) -> dict[str, str]:
    """What a workflow's archive holds beside its specification. The file of functions is wanted, even if no node is one."""
    manifest = {
        "createdOn": "01/01/2026 00:00:00",
        "runtime": "python",
        "workflow": {"workflowName": model, "specFile": specification, "handler": "functions.py"},
        "archiverVersion": "0.2.15",
    }
    return {"WAR-INF/MANIFEST.json": json.dumps(manifest, indent=1), "functions.py": ""}


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
    """A model's folder in the model store, in the layout of a model archive that is not zipped; of a pipeline that TorchServe
    composes one for each stage, and the specification of the workflow."""
    if not request.stages:
        return _folder_files(model, _model_config(request))
    files = {workflow_file(model): yaml.safe_dump(_workflow(request, model), sort_keys=False)}
    for index, stage in enumerate(request.stages):
        files |= _folder_files(stage_folder(model, stage), _stage_config(request, model, index))
    return files


def _folder_files(folder: str, config: dict[str, Any]) -> dict[str, str]:
    manifest = {
        "runtime": "python",
        "archiverVersion": "0.12.0",
        "model": {"modelName": folder, "modelVersion": "1.0", "handler": _HANDLER, "configFile": _MODEL_CONFIG},
    }
    return {
        f"models/{folder}/MAR-INF/MANIFEST.json": json.dumps(manifest, indent=1) + "\n",
        f"models/{folder}/{_MODEL_CONFIG}": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        f"models/{folder}/{_HANDLER}": (_FOLDER / _HANDLER).read_text(encoding="utf-8"),
    }


def _workflow(request: DeployRequest, model: str) -> dict[str, Any]:
    """A chain of nodes, one for each stage. What a worker is told otherwise in its model's configuration a workflow tells."""
    models = {}
    for stage in request.stages:
        tuned = _model_config(request) if stage.on_device else _alone(request)
        keys = {
            "min-workers": tuned.get("minWorkers", 1),
            "max-workers": tuned.get("maxWorkers", 1),
            "batch-size": tuned.get("batchSize", 1),
            "max-batch-delay": tuned.get("maxBatchDelay", _DEFAULT_BATCH_DELAY_MS),
        }
        models[stage.name] = {"url": stage_folder(model, stage), **keys}
    names = [stage.name for stage in request.stages]
    return {"models": models, "dag": {name: [*names[index + 1 : index + 2]] for index, name in enumerate(names)}}


def _stage_config(request: DeployRequest, model: str, index: int) -> dict[str, Any]:
    """The configuration of a node's model: it gets what the stages after it need, and gives it on."""
    stage = request.stages[index]
    config = _model_config(request) if stage.on_device else _alone(request)
    config["tailrace"] |= {
        "name": model,
        "stage": stage.name,
        "inputs": [spec.model_dump(mode="json") for spec in carried(request.workload.spec, index)],
        "outputs": [spec.model_dump(mode="json") for spec in carried(request.workload.spec, index + 1)],
    }
    return config


def carried(spec: WorkloadSpec, index: int) -> tuple[TensorSpec, ...]:
    """The tensors that an item carries when it comes to a stage of a pipeline: those that are there and still wanted; behind the
    last stage, the outputs."""
    if index == len(spec.pipeline):
        return spec.outputs
    if index == 0:
        return spec.inputs
    there = {t.name for t in spec.inputs} | {t.name for stage in spec.pipeline[:index] for t in stage.outputs}
    wanted = {t.name for t in spec.outputs}
    for stage in spec.pipeline[index:]:
        # What a stage with a rule gives, the items that it is not for must have already.
        kept = [t.name for t in stage.outputs] if stage.when else []
        wanted |= {*stage.inputs, *([stage.when] if stage.when else []), *kept}
    return tuple(tensor for name, tensor in spec.tensors.items() if name in there & wanted)


def _alone(request: DeployRequest) -> dict[str, Any]:
    """The configuration of a stage that is not on the device: one item at a time."""
    tuning = request.tuning.model_copy(update={"max_batch": None, "batch_window_ms": None})
    return _model_config(replace(request, tuning=tuning))


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
        # Workflows are registered once the server is up.
        **(
            {"workflow_store": "workflows"}
            if request.stages
            else {"load_models": ",".join(f"{m}={m}" for m in request.models)}
        ),
        "metrics_mode": "prometheus",
        "metrics_config": "metrics.yaml",
        # A Python process every minute, for figures that are collected anyway.
        "disable_system_metrics": "true",
    }
    # Workers are dealt out over so many, in turn.
    properties["number_of_gpu"] = str(request.devices if request.workload.device == "cuda" else 0)
    spec, largest_batch = request.workload.spec, request.tuning.max_batch or 1
    answers = [spec.outputs, *(carried(spec, index) for index in range(1, len(request.stages)))]
    for key, size_bytes in (
        ("max_request_size", _item_bytes(spec.inputs)),
        ("max_response_size", largest_batch * max(map(_item_bytes, answers))),
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
