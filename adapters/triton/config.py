"""Neutral knobs to Triton's model configuration and flags, and back again from what a running server reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.adapter import DeployRequest, Tuning
from harness.workload import TensorSpec

_DATA_TYPES = {
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
}
_SHIM = Path(__file__).with_name("shim.py")


def model_files(request: DeployRequest, model: str) -> dict[str, str]:
    """A model's folder in the repository: path below the configuration folder → text."""
    return {
        f"models/{model}/config.pbtxt": model_config(request, model),
        f"models/{model}/1/model.py": _SHIM.read_text(encoding="utf-8"),
    }


def flags(request: DeployRequest) -> list[str]:
    """The server's flags, without those that differ from start to start (ports, backend folder, shared memory)."""
    chosen = [
        "--model-repository=models",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in request.models),
        # The configuration is complete; completing it would start every model once more, and count as cold start.
        "--disable-auto-complete-config",
        # A model that was unloaded on purpose is no illness of the server: readiness is asked per model.
        "--strict-readiness=false",
        "--exit-timeout-secs=5",
        f"--http-address={request.listen}",
        f"--grpc-address={request.listen}",
        f"--metrics-address={request.listen}",
    ]
    if request.workload.device != "cuda":
        chosen += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
    return chosen


def model_config(request: DeployRequest, model: str) -> str:
    """The text of ``config.pbtxt``.

    Requests always carry a batch axis of 1. With ``max_batch`` it is Triton's own batch axis; without, Triton does
    not batch (``max_batch_size: 0``) and the axis is part of the shape.
    """
    workload, tuning = request.workload, request.tuning
    batches = tuning.max_batch is not None
    parameters = {
        "artifact": str(workload.artifact),
        "device": workload.device,
        "model_file": str(workload.model_file),
    }
    lines = [
        f"name: {_quoted(model)}",
        'backend: "python"',
        f"max_batch_size: {tuning.max_batch or 0}",
        *_tensors("input", workload.spec.inputs, batches),
        *_tensors("output", workload.spec.outputs, batches),
        *_instance_group(request),
        *_dynamic_batching(tuning),
    ]
    for key, value in parameters.items():
        lines += [f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"]
    return "\n".join(lines) + "\n"


def knobs_in(config: dict[str, Any]) -> dict[str, object]:
    """The neutral knobs in the answer of ``/v2/models/MODEL/config``; those that it does not set are left out."""
    knobs: dict[str, object] = {
        "max_batch": max(1, config["max_batch_size"]),  # 0: no batching, which is one request at a time
        "replicas": sum(group["count"] * max(1, len(group["gpus"])) for group in config["instance_group"]),
    }
    batching = config.get("dynamic_batching")
    if batching is not None:
        knobs["batch_window_ms"] = int(batching["max_queue_delay_microseconds"]) / 1e3
        policy = batching.get("default_queue_policy") or {}
        if queue_limit := int(policy.get("max_queue_size", 0)):
            knobs["queue_limit"] = queue_limit
        if timeout_us := int(policy.get("default_timeout_microseconds", 0)):
            knobs["server_timeout_s"] = timeout_us / 1e6
    return knobs


def _tensors(field: str, specs: tuple[TensorSpec, ...], batches: bool) -> list[str]:
    lines = []
    for spec in specs:
        dims = ", ".join(str(size) for size in (spec.shape if batches else (1, *spec.shape)))
        lines.append(f"{field} {{ name: {_quoted(spec.name)} data_type: {_DATA_TYPES[spec.dtype]} dims: [ {dims} ] }}")
    return lines


def _instance_group(request: DeployRequest) -> list[str]:
    replicas = request.tuning.replicas
    if request.workload.device != "cuda":
        return [f"instance_group {{ kind: KIND_CPU{'' if replicas is None else f' count: {replicas}'} }}"]
    if replicas is None:
        return [_on_gpus(range(request.devices))]  # Triton's default: one on each
    # Triton counts instances per GPU of a group; what does not come out even makes a second one.
    each, more = divmod(replicas, request.devices)
    return [
        *([_on_gpus(range(request.devices), each)] if each else []),
        *([_on_gpus(range(more), 1)] if more else []),
    ]


def _on_gpus(gpus: range, count: int | None = None) -> str:
    """A group on GPUs by their number among those that the server sees."""
    numbered = ", ".join(map(str, gpus))
    return f"instance_group {{ kind: KIND_GPU gpus: [ {numbered} ]{'' if count is None else f' count: {count}'} }}"


def _dynamic_batching(tuning: Tuning) -> list[str]:
    """Triton's batcher, the only place for a queue's limits too: present as soon as one of them is asked for."""
    batching, policy = [], []
    if tuning.batch_window_ms is not None:
        batching.append(f"max_queue_delay_microseconds: {round(tuning.batch_window_ms * 1e3)}")
    if tuning.queue_limit is not None:
        policy.append(f"max_queue_size: {tuning.queue_limit}")
    if tuning.server_timeout_s is not None:
        # 0 would mean no timeout. It limits the time in the queue; what has begun is finished.
        policy += [
            f"default_timeout_microseconds: {max(1, round(tuning.server_timeout_s * 1e6))}",
            "timeout_action: REJECT",
        ]
    if policy:
        batching.append(f"default_queue_policy {{ {' '.join(policy)} }}")
    if not batching and (tuning.max_batch or 1) == 1:
        return []
    return ["dynamic_batching {", *(f"  {line}" for line in batching), "}"]


def _quoted(text: str) -> str:
    """A string of protobuf's text format, whose escapes JSON's are."""
    return json.dumps(text, ensure_ascii=False)
