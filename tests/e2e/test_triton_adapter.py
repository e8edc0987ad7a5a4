"""A real Triton through its adapter: answers, batches, knobs, faults, refusals, and what is left in the end."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest

from tailrace.adapters.triton.adapter import ADAPTER, TritonDeployment
from tailrace.harness.contract.adapter import (
    Deployment,
    DeployRequest,
    Endpoint,
    MetricSample,
    ServerEnvironment,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.workload import PreparedWorkload, Slo, Tensors, TensorSpec, WorkloadSpec, mismatch
from tailrace.harness.processes import descendants, free_ports, port_open
from tailrace.harness.run.prepare import prepare
from tailrace.harness.servers import environments
from tailrace.harness.servers.guardian import Guardian

pytestmark = pytest.mark.e2e

MODEL = """
import json, os, time
from pathlib import Path
import numpy as np


class Model:
    def __init__(self, artifact, name, device):
        self.options = json.loads(Path(artifact).read_text())
        if name in self.options["broken"]:
            raise RuntimeError("the weights of " + name + " are not there")
        self.offset = float(sum(name.encode()))

    def predict(self, inputs):
        time.sleep(self.options["seconds"])
        x = inputs["x"]
        if (x == 666).any():
            raise ValueError("no answer to the beast")
        marker = np.full((len(x), 1), int(os.environ["MARKER"]), dtype=np.int64)
        return {"y": x * 2 + self.offset, "marker": marker}
"""
SPEC = WorkloadSpec(
    name="doubler",
    title="Doubler",
    description="Twice the input plus a number that the model's name gives.",
    devices=("cpu",),
    inputs=(TensorSpec(name="x", dtype="float32", shape=(4,)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(4,)), TensorSpec(name="marker", dtype="int64", shape=(1,))),
    slo=Slo(latency_ms=100),
)
MARKER = 4711


def payload(number: int) -> Tensors:
    return {"x": np.arange(4, dtype=np.float32) + number}


def check(model: str, number: int, answer: Tensors) -> None:
    np.testing.assert_array_equal(answer["y"], payload(number)["x"] * 2 + sum(model.encode()))
    np.testing.assert_array_equal(answer["marker"], [MARKER])


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    tensors: Tensors


def ask_http(endpoint: Endpoint, model: str, inputs: Tensors) -> Answer:
    with socket.create_connection((endpoint.host, endpoint.port), timeout=30) as connection:
        connection.sendall(endpoint.codec.encode(model, inputs).data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, body, endpoint.codec.decode(headers, body) if response.status == 200 else {})


def ask_grpc(endpoint: Endpoint, model: str, inputs: Tensors) -> Tensors:
    request = endpoint.codec.encode(model, inputs)
    with grpc.insecure_channel(f"{endpoint.host}:{endpoint.port}") as channel:
        return endpoint.codec.decode({}, channel.unary_unary(request.method)(request.data, timeout=30))


def answered(endpoint: Endpoint, model: str, number: int) -> None:
    answer = ask_http(endpoint, model, payload(number))
    assert answer.status == 200, answer.body
    check(model, number, answer.tensors)


class RecordingGuardian(Guardian):
    """Remembers what it was asked to remove."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns: list[str] = []

    def remove_later(self, path: Path | str) -> None:
        self.patterns.append(str(path))
        super().remove_later(path)

    def leftovers(self) -> list[Path]:
        return [path for pattern in self.patterns for path in Path(pattern).parent.glob(Path(pattern).name)]


@pytest.fixture(scope="module")
def environment() -> ServerEnvironment:
    return environments.build("venv", [ADAPTER.requirements], name="triton")


@pytest.fixture
def guardian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingGuardian]:
    """Ends every server of a test by SIGKILL, and must leave no shared memory all the same."""
    monkeypatch.setenv("TAILRACE_STATE", str(tmp_path / "state"))
    host = RecordingGuardian()
    with host:
        yield host
    assert not host.leftovers()


@pytest.fixture
def request_for(tmp_path: Path, environment: ServerEnvironment) -> Callable[..., DeployRequest]:
    def build(
        tuning: Tuning | None = None,
        *,
        models: tuple[str, ...] = ("alpha",),
        protocol: WireProtocol = "http",
        seconds: float = 0.0,
        broken: tuple[str, ...] = (),
        ports: tuple[int, ...] = (),
    ) -> DeployRequest:
        model_file, artifact = tmp_path / "a workload" / "model.py", tmp_path / "artifact.json"
        model_file.parent.mkdir()
        model_file.write_text(MODEL)
        artifact.write_text(json.dumps({"seconds": seconds, "broken": broken}))
        (tmp_path / "scratch").mkdir()
        return DeployRequest(
            workload=PreparedWorkload(SPEC, "cpu", model_file, artifact, "", None, (), {}),
            models=models,
            tuning=tuning or Tuning(),
            options=ADAPTER.Options(),
            protocol=protocol,
            environment=environment,
            workdir=tmp_path / "server",
            scratch=tmp_path / "scratch",
            server_env={"MARKER": str(MARKER)},
            ports=ports,
        )

    return build


def deploy(request: DeployRequest, host: RecordingGuardian) -> TritonDeployment:
    for path, text in ADAPTER.render(request).items():
        file = request.workdir / "config" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    deployment = ADAPTER.deploy(request, host)
    assert isinstance(deployment, TritonDeployment)
    return deployment


def await_ready(deployment: Deployment) -> None:
    def ready() -> bool:
        deployment.check_alive()
        return deployment.claims_ready()

    wait_until(ready, "triton says that it is ready")


def values(samples: list[MetricSample], model: str) -> dict[str, float]:
    return {sample.metric: sample.value for sample in samples if sample.scope == model}


def test_batches_answers_and_leaves_nothing(
    guardian: RecordingGuardian, request_for: Callable[..., DeployRequest]
) -> None:
    tuning = Tuning(max_batch=8, batch_window_ms=20, replicas=2, queue_limit=500, server_timeout_s=20)
    deployment = deploy(request_for(tuning, models=("alpha", "beta"), seconds=0.02), guardian)
    await_ready(deployment)

    assert deployment.applied() == tuning.chosen()
    assert Counter(worker.model for worker in deployment.replicas()) == {"alpha": 2, "beta": 2}
    assert {worker.name for worker in deployment.replicas()} == {"alpha_0_0", "alpha_0_1", "beta_0_0", "beta_0_1"}

    deployment.scrape()
    with ThreadPoolExecutor(24) as pool:
        for future in [pool.submit(answered, deployment.endpoint, m, i) for i in range(96) for m in ("alpha", "beta")]:
            future.result()
    samples = deployment.scrape()
    for model in ("alpha", "beta"):
        seen = values(samples, model)
        assert seen["requests_ok_total"] == seen["items_total"] == 96
        assert seen["requests_failed_total"] == seen["queue_depth"] == 0
        assert 1 < seen["batch_size"] == 96 / seen["batches_total"] <= 8
    assert "batch_size" not in values(deployment.scrape(), "alpha"), "no batch since the last scrape: no mean"

    answer = ask_http(deployment.endpoint, "alpha", {"x": np.full(4, 666, dtype=np.float32)})
    assert answer.status == 500
    assert b"ValueError: no answer to the beast" in answer.body
    answered(deployment.endpoint, "alpha", 1)

    family = [reference for reference, _ in descendants(deployment.process)]
    assert len(family) == 5
    assert len(guardian.leftovers()) == 4, "one shared-memory region per worker"
    guardian.signal(deployment.replicas()[0].process, signal.SIGKILL)
    deployment.stop()
    assert not any(reference.alive() for reference in family)
    assert not port_open(deployment.endpoint.host, deployment.endpoint.port)
    assert not guardian.leftovers()
    assert not deployment.claims_ready()
    with pytest.raises(OSError):
        deployment.scrape()


def test_defaults_over_grpc(guardian: RecordingGuardian, request_for: Callable[..., DeployRequest]) -> None:
    deployment = deploy(request_for(protocol="grpc"), guardian)
    await_ready(deployment)
    assert deployment.applied() == {"max_batch": 1, "replicas": 1}
    for number in range(20):
        check("alpha", number, ask_grpc(deployment.endpoint, "alpha", payload(number)))
    assert values(deployment.scrape(), "alpha")["batch_size"] == 1
    with pytest.raises(grpc.RpcError, match="no answer to the beast"):
        ask_grpc(deployment.endpoint, "alpha", {"x": np.full(4, 666, dtype=np.float32)})


def test_a_killed_worker_stays_dead(guardian: RecordingGuardian, request_for: Callable[..., DeployRequest]) -> None:
    deployment = deploy(request_for(Tuning(replicas=2)), guardian)
    await_ready(deployment)
    victim = deployment.replicas()[0]
    assert guardian.signal(victim.process, signal.SIGKILL)
    wait_until(lambda: victim not in deployment.replicas(), "the worker has gone")

    answers = [ask_http(deployment.endpoint, "alpha", payload(number)) for number in range(4)]
    assert {answer.status for answer in answers} == {200, 500}
    failures = [answer.body.decode() for answer in answers if answer.status == 500]
    assert all(f"'{victim.name}' is not healthy" in body for body in failures)
    assert len(deployment.replicas()) == 1, "triton starts no worker in place of a dead one"
    assert deployment.claims_ready(), "and says that all is well"


def test_a_full_queue_refuses_and_a_long_wait_ends(
    guardian: RecordingGuardian, request_for: Callable[..., DeployRequest]
) -> None:
    tuning = Tuning(queue_limit=2, server_timeout_s=0.7)
    deployment = deploy(request_for(tuning, seconds=0.5), guardian)
    await_ready(deployment)
    assert deployment.applied() == {"max_batch": 1, "replicas": 1, "batch_window_ms": 0.0, **tuning.chosen()}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask_http(deployment.endpoint, "alpha", payload(i)), range(8)))
    # Half a second each, one at a time: the first is served, two wait, of whom the second waits too long.
    reasons = Counter(json.loads(answer.body)["error"].split("] ")[-1] for answer in answers if answer.status == 503)
    assert set(reasons) == {"Exceeds maximum queue size", "Request timeout expired"}
    assert {answer.status for answer in answers} == {200, 503}


def test_the_same_ports_can_be_used_at_once_again(
    guardian: RecordingGuardian, request_for: Callable[..., DeployRequest]
) -> None:
    ports = tuple(free_ports(3))
    request = request_for(ports=ports)
    for _ in range(2):
        deployment = deploy(request, guardian)
        await_ready(deployment)
        assert deployment.endpoint.port == ports[0]
        deployment.stop()


def test_the_bundled_server_has_no_backend_for_exports(environment: ServerEnvironment) -> None:
    for artifact, backend in (("onnx", "onnxruntime"), ("torchscript", "pytorch")):
        assert f"no backend `{backend}`" in (ADAPTER.artifact_refusal(cast("Any", artifact), environment) or "")
    assert (ADAPTER.artifact_refusal("onnx", environment) or "").endswith("it has: python")


@pytest.mark.torch
@pytest.mark.parametrize("artifact", ["onnx", "torchscript"])
@pytest.mark.parametrize("tuning", [Tuning(), Tuning(max_batch=4, batch_window_ms=20, replicas=2)])
@pytest.mark.skipif(
    not all(Path(f"/opt/tritonserver/backends/{name}").is_dir() for name in ("onnxruntime", "pytorch")),
    reason="there is no Triton with the backends onnxruntime and pytorch in /opt/tritonserver",
)
def test_an_export_is_served_by_tritons_own_backend(
    guardian: RecordingGuardian, environment: ServerEnvironment, tmp_path: Path, artifact: Any, tuning: Tuning
) -> None:
    prepared = prepare(
        "minilm", models=("minilm",), device="cpu", seed=7, options={}, environment_kind="venv", artifact=artifact
    )
    (tmp_path / "scratch").mkdir()
    request = DeployRequest(
        workload=prepared,
        models=("minilm",),
        tuning=tuning,
        options=ADAPTER.Options(),
        protocol="http",
        environment=environment,
        workdir=tmp_path / "server",
        scratch=tmp_path / "scratch",
        server_env={},
        artifact=artifact,
    )
    assert ADAPTER.artifact_refusal(artifact, environment) is None
    deployment = deploy(request, guardian)
    await_ready(deployment)
    own_default = {"onnx": 2, "torchscript": 1}[artifact]
    assert deployment.applied() == {"max_batch": 1, "replicas": own_default, **tuning.chosen()}
    assert deployment.replicas() == []

    def ask(index: int) -> str | None:
        answer = ask_http(deployment.endpoint, "minilm", prepared.payloads[index])
        assert answer.status == 200, answer.body
        return mismatch(answer.tensors, prepared.references["minilm"][index], prepared.tolerance)

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(ask, range(len(prepared.payloads)))) == {None}
    count = len(prepared.payloads)
    # These backends answer first and count then.
    wait_until(lambda: values(deployment.scrape(), "minilm")["items_total"] == count, "all answers are counted")
    seen = values(deployment.scrape(), "minilm")
    assert (seen["batches_total"] < seen["items_total"]) == (tuning.max_batch is not None)
    deployment.unload_model("minilm")
    assert ask_http(deployment.endpoint, "minilm", prepared.payloads[0]).status != 200
    deployment.load_model("minilm")
    assert ask(0) is None
    deployment.scale(1)
    assert deployment.applied()["replicas"] == 1
    assert ask(1) is None
    deployment.stop()
