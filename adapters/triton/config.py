"""Neutral knobs to Triton's model configuration and flags, and back again from what a running server reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailrace.harness.contract.adapter import DeployRequest, Tuning
from tailrace.harness.contract.workload import ArtifactKind, StageSpec, TensorSpec

_DATA_TYPES = {
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
}
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class NativeBackend:
    """A backend that runs an exported model within the server's process."""

    name: str
    file: str
    """What it looks for in the folder of a version."""
    threads: tuple[str, ...]
    """The parameters that tell it how many threads an instance computes with on a CPU. Not PyTorch's INTER_OP_THREAD_COUNT:
    before release 26.05 the whole server aborts at the second model that says it."""


NATIVE: Mapping[ArtifactKind, NativeBackend] = {
    "onnx": NativeBackend("onnxruntime", "model.onnx", ("intra_op_thread_count", "inter_op_thread_count")),
    "torchscript": NativeBackend("pytorch", "model.pt", ("INTRA_OP_THREAD_COUNT",)),
}
"""What runs each kind of export."""


def stage_model(model: str, stage: StageSpec) -> str:
    """Triton's name for a stage of a pipeline that it composes."""
    return f"{model}-{stage.name}"


def is_ensemble(request: DeployRequest) -> bool:
    """Whether Triton composes by an ensemble, which knows no conditions; a rule takes a script (BLS, ``script.py``)."""
    return not any(stage.when for stage in request.stages)


def parts(request: DeployRequest, model: str) -> list[str]:
    """All that Triton must have loaded to answer for a model: the stages of a pipeline that it composes, and what does so."""
    return [*(stage_model(model, stage) for stage in request.stages), model]


def batching_parts(request: DeployRequest, model: str) -> list[str]:
    """Those of them to which the tuning applies: of a composed pipeline the stages on the device."""
    return [stage_model(model, stage) for stage in request.stages if stage.on_device] or [model]


def model_files(request: DeployRequest, model: str) -> dict[str, str]:
    """A model's folders in the repository: path below the configuration folder → text."""
    shim = (_FOLDER / "shim.py").read_text(encoding="utf-8")
    files = {}
    for stage in request.stages:
        name = stage_model(model, stage)
        files[f"models/{name}/config.pbtxt"] = stage_config(request, model, stage)
        files[f"models/{name}/1/model.py"] = shim
    if request.artifact != "python":
        files[f"models/{model}/config.pbtxt"] = exported_config(request, model)
    elif not request.stages:
        files[f"models/{model}/config.pbtxt"] = model_config(request, model)
        files[f"models/{model}/1/model.py"] = shim
    elif is_ensemble(request):
        files[f"models/{model}/config.pbtxt"] = ensemble_config(request, model)
        files[f"models/{model}/1/README"] = "An ensemble has no file, but Triton wants the folder of a version.\n"
    else:
        files[f"models/{model}/config.pbtxt"] = script_config(request, model)
        files[f"models/{model}/1/model.py"] = (_FOLDER / "script.py").read_text(encoding="utf-8")
    return files


def flags(request: DeployRequest) -> list[str]:
    """The server's flags, without those that differ from start to start (ports, backend folder, shared memory)."""
    chosen = [
        "--model-repository=models",
        "--model-control-mode=explicit",
        *(f"--load-model={part}" for model in request.models for part in parts(request, model)),
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
    spec = request.workload.spec
    return _text(
        [
            *_head(request, model, "python", spec.inputs, spec.outputs),
            *_instance_group(request),
            *_dynamic_batching(request.tuning),
            *_parameters(_loaded(request)),
        ]
    )


def exported_config(request: DeployRequest, model: str) -> str:
    """``config.pbtxt`` of an exported model, run by a backend of Triton's own.

    ONNX has names and types of its tensors in it, which are the workload's. TorchScript has none for outputs, and takes and
    gives them in the order of this file, as long as no name ends in ``__`` and a number. The batch axis of an export has
    no fixed size, and ONNX Runtime's backend will have it told so.
    """
    spec, backend = request.workload.spec, NATIVE[request.artifact]
    return _text(
        [
            *_head(request, model, backend.name, spec.inputs, spec.outputs),
            *_instance_group(request),
            *_dynamic_batching(request.tuning),
            # As in the workloads' own model.py: replicas share the cores.
            *_parameters(dict.fromkeys(backend.threads, "1")),
        ]
    )


def stage_config(request: DeployRequest, model: str, stage: StageSpec) -> str:
    """``config.pbtxt`` of one stage: on the device it batches as the tuning says, elsewhere one request at a time."""
    inputs = tuple(request.workload.spec.tensors[name] for name in stage.inputs)
    return _text(
        [
            *_head(request, stage_model(model, stage), "python", inputs, stage.outputs),
            *_instance_group(request, on_device=stage.on_device),
            *(_dynamic_batching(request.tuning) if stage.on_device else []),
            *_parameters({**_loaded(request), "name": model, "stage": stage.name}),
        ]
    )


def ensemble_config(request: DeployRequest, model: str) -> str:
    """``config.pbtxt`` of the whole as an ensemble: tensors keep the names that they have in the pipeline."""
    spec = request.workload.spec
    steps = []
    for stage in request.stages:
        maps = [f"input_map {{ key: {_quoted(name)} value: {_quoted(name)} }}" for name in stage.inputs]
        maps += [f"output_map {{ key: {_quoted(t.name)} value: {_quoted(t.name)} }}" for t in stage.outputs]
        steps.append(
            f"  step {{ model_name: {_quoted(stage_model(model, stage))} model_version: -1 {' '.join(maps)} }}"
        )
    return _text([*_head(request, model, None, spec.inputs, spec.outputs), "ensemble_scheduling {", *steps, "}"])


def script_config(request: DeployRequest, model: str) -> str:
    """``config.pbtxt`` of the whole as a script.

    An instance is busy until all requests that it took together are answered by all stages. So that no stage is idle for want of
    somebody to call it, there are as many instances as replicas of all stages.
    """
    spec, tuning = request.workload.spec, request.tuning
    stages = [
        {
            "model": stage_model(model, stage),
            "inputs": stage.inputs,
            "outputs": [tensor.name for tensor in stage.outputs],
            "when": stage.when,
        }
        for stage in request.stages
    ]
    count = "" if tuning.replicas is None else f" count: {script_instances(request, tuning.replicas)}"
    return _text(
        [
            *_head(request, model, "python", spec.inputs, spec.outputs),
            f"instance_group {{ kind: KIND_CPU{count} }}",
            *(["dynamic_batching { }"] if (tuning.max_batch or 1) > 1 else []),
            *_parameters({"stages": json.dumps(stages)}),
        ]
    )


def script_instances(request: DeployRequest, replicas: int) -> int:
    """How many instances of the script there are for so many replicas of every stage."""
    return replicas * len(request.stages)


def _head(
    request: DeployRequest,
    name: str,
    backend: str | None,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> list[str]:
    if request.tuning.max_batch is not None:
        leading: tuple[int, ...] = ()
    else:
        leading = (1,) if request.artifact == "python" else (-1,)
    return [
        f"name: {_quoted(name)}",
        f"backend: {_quoted(backend)}" if backend else 'platform: "ensemble"',
        f"max_batch_size: {request.tuning.max_batch or 0}",
        *_tensors("input", inputs, leading),
        *_tensors("output", outputs, leading),
    ]


def _loaded(request: DeployRequest) -> dict[str, str]:
    """What ``shim.py`` loads."""
    workload = request.workload
    return {"artifact": str(workload.artifact), "device": workload.device, "model_file": str(workload.model_file)}


def _parameters(values: dict[str, str]) -> list[str]:
    return [
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        for key, value in values.items()
    ]


def _text(lines: list[str]) -> str:
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


def _tensors(field: str, specs: tuple[TensorSpec, ...], leading: tuple[int, ...]) -> list[str]:
    lines = []
    for spec in specs:
        dims = ", ".join(map(str, (*leading, *spec.shape)))
        lines.append(f"{field} {{ name: {_quoted(spec.name)} data_type: {_DATA_TYPES[spec.dtype]} dims: [ {dims} ] }}")
    return lines


def _instance_group(request: DeployRequest, *, on_device: bool = True) -> list[str]:
    replicas = request.tuning.replicas
    if not on_device or request.workload.device != "cuda":
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
