"""Triton's configuration from the neutral knobs and back, its shim, its metrics, its error messages; no server."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from tailrace.adapters.triton.adapter import ADAPTER, TritonDeployment
from tailrace.adapters.triton.config import knobs_in, model_config
from tailrace.harness.contract.adapter import (
    CAPABILITIES,
    Autoscale,
    DeployRequest,
    Endpoint,
    NoOptions,
    ServerEnvironment,
    Tuning,
)
from tailrace.harness.contract.codecs import OpenInferenceHTTP
from tailrace.harness.contract.control import ControlConnection
from tailrace.harness.contract.workload import PreparedWorkload, Slo, TensorSpec, WorkloadSpec
from tailrace.harness.errors import DeployError, InputError
from tailrace.harness.processes import ProcessRef, free_ports
from tailrace.harness.servers.images import ImageEnvironment

SPEC = WorkloadSpec(
    name="toy",
    title="Toy",
    description="",
    devices=("emulated", "cpu", "cuda"),
    inputs=(TensorSpec(name="ids", dtype="int64", shape=(128,)), TensorSpec(name="image", dtype="uint8", shape=(2, 3))),
    outputs=(TensorSpec(name="y", dtype="float16", shape=(4,)),),
    slo=Slo(latency_ms=100),
)
REQUEST = DeployRequest(
    workload=PreparedWorkload(SPEC, "cpu", Path("/w/model.py"), Path('/a/tïny "one"'), "", None, (), {}),
    models=("alpha", "beta"),
    tuning=Tuning(),
    options=NoOptions(),
    protocol="http",
    environment=ServerEnvironment(Path("/env/bin/python"), "venv"),
    workdir=Path("/run"),
    scratch=Path("/scratch"),
    server_env={},
)


def on(device: Any, tuning: Tuning) -> DeployRequest:
    return replace(REQUEST, workload=replace(REQUEST.workload, device=device), tuning=tuning)


def test_every_knob_rendered() -> None:
    tuning = Tuning(max_batch=16, batch_window_ms=2.5, replicas=3, queue_limit=100, server_timeout_s=1.5)
    files = ADAPTER.render(on("cpu", tuning))
    assert sorted(files) == [
        "models/alpha/1/model.py",
        "models/alpha/config.pbtxt",
        "models/beta/1/model.py",
        "models/beta/config.pbtxt",
        "tritonserver.args",
    ]
    assert files["models/beta/config.pbtxt"] == (
        'name: "beta"\n'
        'backend: "python"\n'
        "max_batch_size: 16\n"
        'input { name: "ids" data_type: TYPE_INT64 dims: [ 128 ] }\n'
        'input { name: "image" data_type: TYPE_UINT8 dims: [ 2, 3 ] }\n'
        'output { name: "y" data_type: TYPE_FP16 dims: [ 4 ] }\n'
        "instance_group { kind: KIND_CPU count: 3 }\n"
        "dynamic_batching {\n"
        "  max_queue_delay_microseconds: 2500\n"
        "  default_queue_policy { max_queue_size: 100 default_timeout_microseconds: 1500000 timeout_action: REJECT }\n"
        "}\n"
        'parameters { key: "artifact" value { string_value: "/a/tïny \\"one\\"" } }\n'
        'parameters { key: "device" value { string_value: "cpu" } }\n'
        'parameters { key: "model_file" value { string_value: "/w/model.py" } }\n'
    )
    assert files["tritonserver.args"].splitlines() == [
        "--model-repository=models",
        "--model-control-mode=explicit",
        "--load-model=alpha",
        "--load-model=beta",
        "--disable-auto-complete-config",
        "--strict-readiness=false",
        "--exit-timeout-secs=5",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
    ]


def test_defaults_stay_tritons_own() -> None:
    config = ADAPTER.render(on("emulated", Tuning()))["models/alpha/config.pbtxt"]
    assert "max_batch_size: 0\n" in config
    assert "dims: [ 1, 128 ]" in config, "without batching the batch axis of 1 is part of the shape"
    assert "instance_group { kind: KIND_CPU }\n" in config
    assert "dynamic_batching" not in config


def test_on_cuda_the_count_is_that_of_one_gpu_and_gpu_defaults_stay() -> None:
    files = ADAPTER.render(on("cuda", Tuning(replicas=2)))
    assert "instance_group { kind: KIND_GPU gpus: [ 0 ] count: 2 }\n" in files["models/alpha/config.pbtxt"]
    assert "gpu-metrics" not in files["tritonserver.args"]
    assert "pinned" not in files["tritonserver.args"]


@pytest.mark.parametrize(
    ("replicas", "devices", "groups"),
    [
        (None, 2, [([0, 1], None)]),
        (1, 2, [([0], 1)]),
        (4, 2, [([0, 1], 2)]),
        (5, 2, [([0, 1], 2), ([0], 1)]),
        (7, 4, [([0, 1, 2, 3], 1), ([0, 1, 2], 1)]),
    ],
)
def test_instances_are_dealt_out_over_the_gpus(
    replicas: int | None, devices: int, groups: list[tuple[list[int], int | None]]
) -> None:
    request = replace(on("cuda", Tuning(replicas=replicas)), devices=devices)
    config = text_format.Parse(model_config(request, "alpha"), model_config_pb2.ModelConfig())
    assert [(list(group.gpus), group.count or None) for group in config.instance_group] == groups
    assert {group.kind for group in config.instance_group} == {model_config_pb2.ModelInstanceGroup.KIND_GPU}
    if replicas is not None:
        assert sum(group.count * len(group.gpus) for group in config.instance_group) == replicas


@pytest.mark.parametrize(
    ("tuning", "block"),
    [
        (Tuning(max_batch=1), None),
        (Tuning(replicas=4), None),
        (Tuning(max_batch=2), "dynamic_batching {\n}\n"),
        (Tuning(max_batch=1, batch_window_ms=5), "dynamic_batching {\n  max_queue_delay_microseconds: 5000\n}\n"),
        (Tuning(queue_limit=7), "dynamic_batching {\n  default_queue_policy { max_queue_size: 7 }\n}\n"),
        (Tuning(server_timeout_s=1e-9), "default_timeout_microseconds: 1 timeout_action: REJECT }"),
    ],
)
def test_the_batcher_appears_when_a_knob_needs_it(tuning: Tuning, block: str | None) -> None:
    config = model_config(on("cpu", tuning), "alpha")
    if block is None:
        assert "dynamic_batching" not in config
    else:
        assert block in config


# Microseconds are Triton's resolution, so these are the values that it can hold.
TUNINGS = st.builds(
    Tuning,
    max_batch=st.none() | st.integers(1, 2**31 - 1),
    batch_window_ms=st.none() | st.integers(0, 10**9).map(lambda us: us / 1e3),
    replicas=st.none() | st.integers(1, 2**31 - 1),
    queue_limit=st.none() | st.integers(1, 2**32 - 1),
    server_timeout_s=st.none() | st.integers(1, 10**12).map(lambda us: us / 1e6),
)


@given(tuning=TUNINGS, device=st.sampled_from(["cpu", "cuda"]), name=st.text(min_size=1).filter(str.isprintable))
def test_tritons_own_schema_reads_back_what_was_meant(tuning: Tuning, device: str, name: str) -> None:
    config = text_format.Parse(model_config(on(device, tuning), name), model_config_pb2.ModelConfig())
    assert config.name == name
    assert config.parameters["artifact"].string_value == str(REQUEST.workload.artifact)
    answer = MessageToDict(config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for group in answer["instance_group"]:
        group["count"] = group["count"] or 1  # which the server does when it loads the model
    knobs = knobs_in(answer)
    assert {knob: knobs[knob] for knob in tuning.chosen()} == tuning.chosen()
    assert knobs["max_batch"] == (tuning.max_batch or 1)


def test_knobs_without_a_place_are_refused() -> None:
    options = NoOptions()
    assert ADAPTER.refusals(Tuning(max_batch=4, batch_window_ms=5), options, "http") == {}
    (sentence,) = ADAPTER.refusals(Tuning(batch_window_ms=5), options, "http").values()
    assert "`batch_window_ms` without `max_batch`" in sentence
    (sentence,) = ADAPTER.refusals(
        Tuning(autoscale=Autoscale(min=1, max=2, target_ongoing=3)), options, "http"
    ).values()
    assert sentence == "triton has no place for `autoscale`: external scaler only"
    assert set(ADAPTER.knobs) | set(ADAPTER.refused) == set(Tuning.model_fields)
    assert ADAPTER.capabilities() == list(CAPABILITIES)


class Host:
    """A process host that must not be reached."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} called")


def test_an_interpreter_without_the_wheel_is_named(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    request = replace(REQUEST, environment=ServerEnvironment(python, "current"))
    with pytest.raises(DeployError, match="has no package nvidia-pytriton") as caught:
        ADAPTER.deploy(request, Host())
    assert str(python) in caught.value.message
    assert "requirements.txt" in (caught.value.remedy or "")


def test_an_interpreter_that_does_not_run_is_named(tmp_path: Path) -> None:
    request = replace(REQUEST, environment=ServerEnvironment(tmp_path / "python", "venv"))
    with pytest.raises(DeployError, match="does not run"):
        ADAPTER.deploy(request, Host())


def found(folder: Path, **other: object) -> ServerEnvironment:
    """A program in an interpreter's place that says where everything lies."""
    wheel = folder / "site" / "pytriton" / "tritonserver"
    stub = wheel / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    for file in (stub, wheel / "backends" / "python" / "model.py", folder / "lib" / "libpython3.11.so.1.0"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    said = {
        "installed": False,
        "backends": ["python"],
        "wheel": str(wheel),
        "version": "3.11",
        "stub": str(stub),
        "stub_versions": ["3.9", "3.11"],
        "library": str(folder / "lib" / "libpython3.11.so.1.0"),
        "folders": [str(folder / "lib")],
        **other,
    }
    python = folder / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(said)}'\n")
    python.chmod(0o755)
    return ServerEnvironment(python, "venv")


@pytest.fixture
def fake_environment(tmp_path: Path) -> ServerEnvironment:
    return found(tmp_path)


def test_what_an_interpreter_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"comes without libpython3\.11\.so\.1\.0"):
        ADAPTER.deploy(replace(REQUEST, environment=found(tmp_path, library=None)), Host())
    with pytest.raises(DeployError, match=r"no backend worker for Python 3\.11.*\n.*among 3\.9"):
        ADAPTER.deploy(replace(REQUEST, environment=found(tmp_path, stub=None)), Host())


class Recorder:
    """A process host that starts nothing."""

    def spawn(
        self, _name: str, argv: list[str], *, env: dict[str, str], ports: tuple[int, ...], **_: Any
    ) -> ProcessRef:
        self.argv, self.env, self.ports = argv, env, ports
        return ProcessRef.of(os.getpid())

    def remove_later(self, _path: Path) -> None: ...


def test_the_wheels_server_gets_a_backend_folder_with_the_worker_that_fits(tmp_path: Path) -> None:
    host = Recorder()
    ADAPTER.deploy(replace(REQUEST, environment=found(tmp_path), workdir=tmp_path, scratch=tmp_path), cast(Any, host))
    assert host.argv[0] == f"{tmp_path}/site/pytriton/tritonserver/bin/tritonserver"
    assert f"--backend-directory={tmp_path}/backends" in host.argv
    assert {path.name for path in (tmp_path / "backends" / "python").iterdir()} >= {"triton_python_backend_stub"}
    assert host.env["LD_LIBRARY_PATH"] == f"{tmp_path}/lib:{tmp_path}/site/nvidia_pytriton.libs"
    assert {f"--http-port={host.ports[0]}", f"--grpc-port={host.ports[1]}", f"--metrics-port={host.ports[2]}"} <= set(
        host.argv
    )


def test_an_installed_server_is_used_where_it_is_with_its_own_libraries(tmp_path: Path) -> None:
    host = Recorder()
    environment = found(tmp_path, installed=True, wheel="", stub=None)
    ADAPTER.deploy(replace(REQUEST, environment=environment, workdir=tmp_path, scratch=tmp_path), cast(Any, host))
    assert host.argv[0] == "/opt/tritonserver/bin/tritonserver"
    assert "--backend-directory=/opt/tritonserver/backends" in host.argv
    assert "LD_LIBRARY_PATH" not in host.env
    assert not (tmp_path / "backends").exists()


def test_in_a_container_it_listens_where_its_published_ports_reach_it() -> None:
    inside = replace(REQUEST, environment=ServerEnvironment(Path("/opt/server/bin/python"), "docker", image="sha256:1"))
    assert "--http-address=0.0.0.0" in ADAPTER.render(inside)["tritonserver.args"]
    assert f"--http-address={REQUEST.host}" in ADAPTER.render(REQUEST)["tritonserver.args"]


def test_ports_are_checked_before_anything_starts(fake_environment: ServerEnvironment) -> None:
    request = replace(REQUEST, environment=fake_environment)
    with pytest.raises(InputError, match=r"3 ports \(HTTP, gRPC, metrics\)"):
        ADAPTER.deploy(replace(request, ports=(1024, 1025)), Host())
    ports = tuple(free_ports(3))
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", ports[1]))
        squatter.listen()
        with pytest.raises(DeployError, match=f"127.0.0.1:{ports[1]}: Address already in use"):
            ADAPTER.deploy(replace(request, ports=ports), Host())


METRICS = """\
# HELP nv_inference_count Number of inferences performed
# TYPE nv_inference_count counter
nv_inference_count{{model="alpha",version="1"}} {items}
# HELP nv_inference_exec_count Number of model executions performed
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{{model="alpha",version="1"}} {batches}
# HELP nv_inference_request_success Number of successful inference requests
# TYPE nv_inference_request_success counter
nv_inference_request_success{{model="alpha",version="1"}} {items}
# HELP nv_inference_request_failure Number of failed inference requests
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{{model="alpha",reason="OTHER",version="1"}} 2
nv_inference_request_failure{{model="alpha",reason="REJECTED",version="1"}} 3
# HELP nv_inference_pending_request_count Pending requests
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{{model="alpha",version="1"}} 6
# HELP nv_cpu_utilization CPU utilization rate
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.5
"""


@pytest.fixture
def deployment() -> TritonDeployment:
    endpoint = Endpoint("http", "127.0.0.1", 1, OpenInferenceHTTP("127.0.0.1", 1, SPEC.inputs, SPEC.outputs))
    own = ProcessRef.of(os.getpid())
    return TritonDeployment(
        Host(), own, endpoint, Path("log"), request=REQUEST, http_port=1, metrics_port=2, shared_memory_prefix="x"
    )


def test_metrics_get_their_canonical_names(deployment: TritonDeployment, monkeypatch: pytest.MonkeyPatch) -> None:
    def scrape(items: int, batches: int) -> dict[str, float]:
        text = METRICS.format(items=items, batches=batches).encode()
        monkeypatch.setattr(ControlConnection, "ask", lambda *_args, **_kwargs: (200, text))
        samples = deployment.scrape()
        assert {sample.scope for sample in samples} == {"alpha"}
        return {sample.metric: sample.value for sample in samples}

    assert scrape(10, 5) == {
        "queue_depth": 6,
        "requests_ok_total": 10,
        "requests_failed_total": 5,
        "batches_total": 5,
        "items_total": 10,
        "batch_size": 2,
    }
    assert scrape(40, 10)["batch_size"] == 6
    assert "batch_size" not in scrape(40, 10), "nothing ran in between"
    assert "batch_size" not in scrape(3, 3), "the counters began anew"
    assert scrape(11, 5)["batch_size"] == 4

    monkeypatch.setattr(ControlConnection, "ask", lambda *_args, **_kwargs: (503, b""))
    with pytest.raises(OSError, match="503"):
        deployment.scrape()


def test_models_that_disagree_are_not_smoothed_over(
    deployment: TritonDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_self: ControlConnection, _method: str, path: str, **_: object) -> tuple[int, bytes]:
        size = 8 if "alpha" in path else 4
        return 200, b'{"max_batch_size": %d, "instance_group": [{"count": 2, "gpus": []}]}' % size

    monkeypatch.setattr(ControlConnection, "ask", ask)
    assert deployment.applied() == {"max_batch": [8, 4], "replicas": 2}


def test_an_unreachable_server_is_not_ready(deployment: TritonDeployment) -> None:
    assert deployment.claims_ready() is False


@dataclass
class Response:
    output_tensors: list[Any]
    error: Any = None


@dataclass
class Tensor:
    name: str
    array: Any

    def as_numpy(self) -> Any:
        return self.array


@dataclass
class Shim:
    """The shim with a workload's model, beside a stand-in for the module that Triton's worker provides."""

    python_model: Any
    logged: list[str] = field(default_factory=list)

    def execute(self, *arrays: Any) -> list[Response]:
        responses: list[Response] = self.python_model.execute([{"x": Tensor("x", array)} for array in arrays])
        return responses


@pytest.fixture
def start_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shim]:
    def start(predict: str, device: str = "cpu", gpu: str = "0") -> Shim:
        logged: list[str] = []
        backend: Any = types.ModuleType("triton_python_backend_utils")
        backend.InferenceResponse = Response
        backend.Tensor = Tensor
        backend.TritonError = str
        backend.Logger = types.SimpleNamespace(log_error=logged.append)
        backend.get_input_tensor_by_name = lambda request, name: request[name]
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
        path = Path(sys.modules["tailrace.adapters.triton.config"].__file__ or "").with_name("shim.py")
        spec = importlib.util.spec_from_file_location("shim", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model_file = tmp_path / "model.py"
        model_file.write_text(
            "class Model:\n"
            "    calls = []\n"
            "    def __init__(self, *arguments): self.arguments = arguments\n"
            f"    def predict(self, inputs):\n        x = inputs['x']; self.calls.append(len(x))\n        {predict}\n"
        )
        texts = {"model_file": str(model_file), "artifact": "/a", "device": device}
        config = {
            "input": [{"name": "x"}],
            "output": [{"name": "y"}],
            "parameters": {name: {"string_value": text} for name, text in texts.items()},
        }
        python_model = module.TritonPythonModel()
        python_model.initialize(
            {"model_config": json.dumps(config), "model_name": "alpha", "model_instance_device_id": gpu}
        )
        return Shim(python_model, logged)

    return start


def test_an_instance_computes_on_the_gpu_that_it_was_dealt(start_shim: Callable[..., Shim]) -> None:
    assert start_shim("return {'y': x}", "cuda", "3").python_model._model.arguments[2] == "cuda:3"
    assert start_shim("return {'y': x}", "emulated").python_model._model.arguments[2] == "emulated"


def test_the_shim_stacks_a_batch_into_one_call(start_shim: Callable[..., Shim]) -> None:
    shim = start_shim("return {'y': x * 2, 'unasked': x}")
    model = shim.python_model._model
    assert model.arguments == ("/a", "alpha", "cpu")
    batch = [np.full((rows, 3), rows, dtype=np.float32) for rows in (1, 2, 1)]
    responses = shim.execute(*batch)
    assert model.calls == [4]
    for array, response in zip(batch, responses, strict=True):
        (tensor,) = response.output_tensors
        assert tensor.name == "y"
        np.testing.assert_array_equal(tensor.array, array * 2)
        assert tensor.array.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        ("raise KeyError('weights')", "KeyError: 'weights'"),
        ("return {'y': x[:1]}", "ValueError: output 'y' has 1 rows for a batch of 2"),
        ("return {}", "KeyError: 'y'"),
    ],
)
def test_what_a_failing_model_raises_goes_through(start_shim: Callable[..., Shim], predict: str, message: str) -> None:
    """Triton fails the whole batch by it, and counts the requests as failed."""
    kind, _, words = message.partition(": ")
    with pytest.raises(Exception, match=re.escape(words)) as raised:
        start_shim(predict).execute(np.zeros((1, 3)), np.zeros((1, 3)))
    assert type(raised.value).__name__ == kind


def exporting(artifact: Any, tuning: Tuning, device: Any = "cpu") -> DeployRequest:
    request = on(device, tuning)
    exported = Path("/a/exported/model")
    return replace(request, artifact=artifact, workload=replace(request.workload, exported=exported))


@pytest.mark.parametrize(
    ("artifact", "backend", "threads"),
    [
        ("onnx", "onnxruntime", ("intra_op_thread_count", "inter_op_thread_count")),
        ("torchscript", "pytorch", ("INTRA_OP_THREAD_COUNT",)),
    ],
)
def test_an_export_is_run_by_a_backend_of_tritons_own(artifact: str, backend: str, threads: tuple[str, ...]) -> None:
    tuning = Tuning(max_batch=16, batch_window_ms=2.5, replicas=3)
    files = ADAPTER.render(exporting(artifact, tuning))
    assert sorted(files) == ["models/alpha/config.pbtxt", "models/beta/config.pbtxt", "tritonserver.args"], "no Python"
    assert files["models/beta/config.pbtxt"] == (
        'name: "beta"\n'
        f'backend: "{backend}"\n'
        "max_batch_size: 16\n"
        'input { name: "ids" data_type: TYPE_INT64 dims: [ 128 ] }\n'
        'input { name: "image" data_type: TYPE_UINT8 dims: [ 2, 3 ] }\n'
        'output { name: "y" data_type: TYPE_FP16 dims: [ 4 ] }\n'
        "instance_group { kind: KIND_CPU count: 3 }\n"
        "dynamic_batching {\n"
        "  max_queue_delay_microseconds: 2500\n"
        "}\n" + "".join(f'parameters {{ key: "{key}" value {{ string_value: "1" }} }}\n' for key in threads)
    )
    text_format.Parse(files["models/beta/config.pbtxt"], model_config_pb2.ModelConfig())


def test_without_batching_the_batch_axis_of_an_export_has_no_size() -> None:
    """ONNX Runtime's backend wants the axes of outputs told exactly as the model has them."""
    config = ADAPTER.render(exporting("onnx", Tuning()))["models/alpha/config.pbtxt"]
    parsed = text_format.Parse(config, model_config_pb2.ModelConfig())
    assert [list(tensor.dims) for tensor in (*parsed.input, *parsed.output)] == [[-1, 128], [-1, 2, 3], [-1, 4]]
    assert parsed.max_batch_size == 0


def test_an_export_goes_to_the_gpus_as_everything_does() -> None:
    config = ADAPTER.render(exporting("torchscript", Tuning(replicas=2), "cuda"))["models/alpha/config.pbtxt"]
    assert "instance_group { kind: KIND_GPU gpus: [ 0 ] count: 2 }\n" in config


def test_which_exports_can_be_run_is_told_by_the_backends_that_are_there(tmp_path: Path) -> None:
    bundled = found(tmp_path)
    for artifact, backend in (("onnx", "onnxruntime"), ("torchscript", "pytorch")):
        refusal = ADAPTER.artifact_refusal(cast("Any", artifact), bundled) or ""
        assert f"has no backend `{backend}`, which `artifact: {artifact}` needs; it has: python" in refusal
    assert ADAPTER.artifact_refusal("python", bundled) is None
    vendors = found(tmp_path, installed=True, wheel="", stub=None, backends=["onnxruntime", "python"])
    assert ADAPTER.artifact_refusal("onnx", vendors) is None
    assert "it has: onnxruntime, python" in (ADAPTER.artifact_refusal("torchscript", vendors) or "")
    assert ADAPTER.artifact_refusal("onnx") is None, "unknown before there is an environment"


def test_an_image_is_asked_for_its_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.run([found(tmp_path).python], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr("tailrace.harness.servers.images._answer", lambda image, _program: {"sha256:1": said}[image])
    image = ImageEnvironment(Path("/opt/server/bin/python"), "docker", image="sha256:1")
    assert (ADAPTER.artifact_refusal("onnx", image) or "").startswith("the Triton of the image sha256:1 has no backend")


def test_an_export_is_in_the_repository_as_a_link_that_goes_with_the_run(tmp_path: Path) -> None:
    removed: list[Path] = []
    host = Recorder()
    host.remove_later = removed.append  # type: ignore[method-assign]
    environment = found(tmp_path, installed=True, wheel="", stub=None, backends=["onnxruntime"])
    request = replace(exporting("onnx", Tuning()), environment=environment, workdir=tmp_path, scratch=tmp_path)
    for _ in range(2):  # a node that is started again finds its link there
        ADAPTER.deploy(request, cast(Any, host))
    links = [tmp_path / "config" / "models" / model / "1" / "model.onnx" for model in request.models]
    assert [link.readlink() for link in links] == [request.workload.exported] * 2
    assert set(links) <= set(removed)
