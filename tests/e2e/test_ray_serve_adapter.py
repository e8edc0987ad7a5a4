"""A real Ray Serve through its adapter: answers, batches, knobs, faults, refusals, and what is left when it stopped."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters.ray_serve.adapter import ADAPTER, RayServeDeployment
from harness import environments
from harness.adapter import Deployment, DeployRequest, Endpoint, MetricSample, ServerEnvironment, Tuning
from harness.emulated_device import device_environment, read_counters
from harness.errors import DeployError
from harness.guardian import Guardian
from harness.processes import descendants, free_ports, port_open
from harness.workload import PreparedWorkload, Slo, Tensors, TensorSpec, WorkloadSpec, mismatch
from tests.conftest import wait_until
from workloads import catalogue

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


def ask(endpoint: Endpoint, model: str, inputs: Tensors) -> tuple[int, Tensors | bytes]:
    with socket.create_connection((endpoint.host, endpoint.port), timeout=60) as connection:
        connection.sendall(endpoint.codec.encode(model, inputs).data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
        if response.status != 200:
            return response.status, body
        assert response.getheader("Transfer-Encoding") is None, "one piece, of known length"
        return 200, endpoint.codec.decode({}, body)


def answered(endpoint: Endpoint, model: str, number: int) -> None:
    status, answer = ask(endpoint, model, payload(number))
    assert status == 200, answer
    assert isinstance(answer, dict)
    np.testing.assert_array_equal(answer["y"], payload(number)["x"] * 2 + sum(model.encode()))
    np.testing.assert_array_equal(answer["marker"], [MARKER])


def answers(endpoint: Endpoint, model: str) -> bool:
    """Whether there is a good answer. HAProxy hangs up on one that it has sent to a replica that has just died."""
    try:
        return ask(endpoint, model, payload(0))[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.fixture(scope="module")
def environment() -> ServerEnvironment:
    return environments.build("venv", [ADAPTER.requirements], name="ray_serve")


@pytest.fixture
def guardian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guardian]:
    monkeypatch.setenv("TAILRACE_STATE", str(tmp_path / "state"))
    with Guardian() as host:
        yield host


@pytest.fixture
def request_for(tmp_path: Path, environment: ServerEnvironment) -> Callable[..., DeployRequest]:
    def build(
        tuning: Tuning | None = None,
        *,
        models: tuple[str, ...] = ("alpha",),
        proxy: str = "haproxy",
        seconds: float = 0.0,
        broken: tuple[str, ...] = (),
        ports: tuple[int, ...] = (),
    ) -> DeployRequest:
        folder = tmp_path / f"server {len(list(tmp_path.glob('server *')))}"
        scratch = folder / "scratch"
        scratch.mkdir(parents=True)
        model_file, artifact = folder / "model.py", folder / "artifact.json"
        model_file.write_text(MODEL)
        artifact.write_text(json.dumps({"seconds": seconds, "broken": broken}))
        return DeployRequest(
            workload=PreparedWorkload(SPEC, "cpu", model_file, artifact, "", None, (), {}),
            models=models,
            tuning=tuning or Tuning(),
            options=ADAPTER.Options.model_validate({"proxy": proxy}),
            protocol="http",
            environment=environment,
            workdir=folder,
            scratch=scratch,
            server_env={"MARKER": str(MARKER)},
            ports=ports,
        )

    return build


def deploy(request: DeployRequest, host: Guardian) -> RayServeDeployment:
    for path, text in ADAPTER.render(request).items():
        file = request.workdir / "config" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    deployment = ADAPTER.deploy(request, host)
    assert isinstance(deployment, RayServeDeployment)
    return deployment


def await_ready(*deployments: Deployment) -> None:
    def ready() -> bool:
        for deployment in deployments:
            deployment.check_alive()
        return all(deployment.claims_ready() for deployment in deployments)

    wait_until(ready, "ray serve says that it is ready", ADAPTER.start_timeout_s)


def values(samples: list[MetricSample], model: str) -> dict[str, float]:
    return {sample.metric: sample.value for sample in samples if sample.scope == model}


def test_batches_answers_replaces_the_dead_and_leaves_nothing(
    guardian: Guardian, request_for: Callable[..., DeployRequest]
) -> None:
    tuning = Tuning(max_batch=8, batch_window_ms=20, replicas=2, queue_limit=500, server_timeout_s=20)
    ports = tuple(free_ports(5))
    deployment = deploy(request_for(tuning, seconds=0.02, ports=ports), guardian)
    endpoint = deployment.endpoint
    assert not deployment.claims_ready()
    await_ready(deployment)

    assert deployment.applied() == tuning.chosen()
    assert [replica.model for replica in deployment.replicas()] == ["alpha", "alpha"]

    wait_until(lambda: values(deployment.scrape(), "alpha")["replicas"] == 2, "HAProxy knows both replicas")
    before = values(deployment.scrape(), "alpha")
    with ThreadPoolExecutor(24) as pool:
        for future in [pool.submit(answered, endpoint, "alpha", number) for number in range(192)]:
            future.result()

    seen = before
    sizes = []

    def all_counted() -> bool:  # Ray's metrics come late
        nonlocal seen
        seen = values(deployment.scrape(), "alpha")
        sizes.append(seen.get("batch_size", 0.0))
        return seen.get("items_total", 0.0) - before.get("items_total", 0.0) >= 192

    wait_until(all_counted, "Ray has counted all batches", 30)
    assert seen["items_total"] - before.get("items_total", 0.0) == 192
    assert seen["requests_ok_total"] - before["requests_ok_total"] == 192
    assert seen["requests_failed_total"] == 0
    assert 2 < max(sizes) <= 8
    assert 192 / 8 <= seen["batches_total"] <= 192 / 2

    status, answer = ask(endpoint, "alpha", {"x": np.full(4, 666, dtype=np.float32)})
    assert status == 500
    status, answer = ask(endpoint, "alpha", {"x": np.zeros(3, dtype=np.float32)})
    assert (status, answer) == (400, b"the body has 12 bytes, the declared inputs have 16")

    victim, survivor = deployment.replicas()
    assert guardian.signal(victim.process, signal.SIGKILL)
    wait_until(lambda: victim not in deployment.replicas(), "the replica has gone")
    assert deployment.claims_ready(), "healthy as long as one replica is there"
    wait_until(lambda: answers(endpoint, "alpha"), "the other one answers", 10)
    wait_until(lambda: len(deployment.replicas()) == 2, "ray has replaced the replica")
    assert survivor in deployment.replicas()
    answered(endpoint, "alpha", 2)

    family = [reference for reference, _ in descendants(deployment.process)]
    assert len(family) > 8
    deployment.stop()
    assert not any(reference.alive() for reference in family)
    assert not any(port_open(endpoint.host, port) for port in ports)
    assert not deployment.claims_ready()
    with pytest.raises(OSError):
        deployment.scrape()


def test_two_instances_side_by_side(
    guardian: Guardian, request_for: Callable[..., DeployRequest], tmp_path: Path
) -> None:
    """One with Ray's own defaults and the emulated workload, one with a short queue and a slow model."""
    workload = catalogue.prepare(
        "emulated", models=("alpha",), device="emulated", seed=1, options={"base_ms": 1}, environment_kind="current"
    )
    devices = tmp_path / "devices"
    plain = deploy(
        replace(request_for(proxy="python"), workload=workload, server_env=device_environment(devices, devices=1)),
        guardian,
    )
    tuning = Tuning(queue_limit=2, server_timeout_s=1.5)
    tight = deploy(request_for(tuning, models=("alpha", "beta"), seconds=0.2, broken=("wreck",)), guardian)
    await_ready(plain, tight)

    assert plain.applied() == {"max_batch": 1, "replicas": 1}
    for inputs, reference in zip(workload.payloads, workload.references["alpha"], strict=True):
        status, answer = ask(plain.endpoint, "alpha", inputs)
        assert status == 200 and isinstance(answer, dict), answer
        assert mismatch(answer, reference, workload.spec.tolerance) is None
    (counters,) = read_counters(devices)
    assert counters.items == len(workload.payloads)
    assert counters.pid == plain.replicas()[0].process.pid
    expected = len(workload.payloads)
    wait_until(
        lambda: values(plain.scrape(), "alpha").get("requests_ok_total") == expected, "Ray has counted requests", 30
    )
    plain.unload_model("alpha")
    assert ask(plain.endpoint, "alpha", workload.payloads[0])[0] == 404
    plain.stop()

    assert tight.applied() == {"max_batch": 1, "replicas": 1, **tuning.chosen()}
    with ThreadPoolExecutor(20) as pool:
        seen = list(pool.map(lambda number: ask(tight.endpoint, "alpha", payload(number)), range(20)))
    assert {status for status, _ in seen} == {200, 503}
    refused = [body for status, body in seen if status == 503]
    assert all(body == b"Request dropped due to backpressure" for body in refused)
    assert values(tight.scrape(), "alpha")["requests_failed_total"] == len(refused)

    tight.load_model("gamma")
    for model in ("alpha", "beta", "gamma"):
        answered(tight.endpoint, model, 7)
    assert {replica.model for replica in tight.replicas()} == {"alpha", "beta", "gamma"}

    (only,) = [replica for replica in tight.replicas() if replica.model == "beta"]
    guardian.signal(only.process, signal.SIGKILL)
    wait_until(lambda: answers(tight.endpoint, "beta"), "ray has replaced the only replica")
    assert only not in tight.replicas()


def test_a_model_that_cannot_start_is_named(guardian: Guardian, request_for: Callable[..., DeployRequest]) -> None:
    deployment = deploy(request_for(models=("wreck",), broken=("wreck",)), guardian)
    with pytest.raises(DeployError, match="RuntimeError: the weights of wreck are not there"):
        await_ready(deployment)
    assert not deployment.claims_ready()


def test_the_rendered_configuration_is_one_of_ray_serve(
    request_for: Callable[..., DeployRequest], environment: ServerEnvironment
) -> None:
    """Serve's own schema takes it, and the server's shares of GPUs fit."""
    tuning = Tuning(max_batch=8, batch_window_ms=5, replicas=2, queue_limit=9, server_timeout_s=3)
    program = """
import json, sys
sys.path.insert(0, sys.argv[1])
from ray.serve.schema import ServeDeploySchema
from server import gpu_share
ServeDeploySchema.model_validate(json.loads(sys.stdin.read()))
for devices in range(1, 5):
    for replicas in range(1, 30):
        share = gpu_share(replicas, devices)
        assert 0 < share <= 1 and int(1 / share) * devices >= replicas, (replicas, devices, share)
assert gpu_share(2, 2) == gpu_share(1, 4) == 1 and gpu_share(3, 2) == 0.5
"""
    done = subprocess.run(
        [environment.python, "-c", program, str(ADAPTER.folder)],
        input=ADAPTER.render(request_for(tuning))["serve.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
