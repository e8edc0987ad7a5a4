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
import psutil
import pytest

from tailrace.adapters.ray_serve.adapter import ADAPTER, RayServeDeployment
from tailrace.harness.contract.adapter import (
    Deployment,
    DeployRequest,
    Endpoint,
    MetricSample,
    Node,
    Replica,
    ServerEnvironment,
    Tuning,
)
from tailrace.harness.contract.workload import PreparedWorkload, Slo, Tensors, TensorSpec, WorkloadSpec
from tailrace.harness.processes import descendants, free_ports, port_open
from tailrace.harness.servers import environments
from tailrace.harness.servers.guardian import Guardian
from tests.conftest import wait_until

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


def test_what_only_ray_serve_does(guardian: Guardian, request_for: Callable[..., DeployRequest]) -> None:
    """Its own words for refusals, the only replica of a model replaced, every port of its own closed in the end."""
    tuning = Tuning(queue_limit=2, server_timeout_s=20)
    ports = tuple(free_ports(5))
    deployment = deploy(request_for(tuning, models=("alpha", "beta"), seconds=0.2, ports=ports), guardian)
    endpoint = deployment.endpoint
    assert not deployment.claims_ready()
    await_ready(deployment)

    assert deployment.applied() == {"max_batch": 1, "replicas": 1, **tuning.chosen()}
    wait_until(lambda: values(deployment.scrape(), "alpha")["replicas"] == 1, "HAProxy knows the replica")
    status, answer = ask(endpoint, "alpha", {"x": np.full(4, 666, dtype=np.float32)})
    assert status == 500
    status, answer = ask(endpoint, "alpha", {"x": np.zeros(3, dtype=np.float32)})
    assert (status, answer) == (400, b"the body has 12 bytes, the declared inputs have 16")

    with ThreadPoolExecutor(20) as pool:
        seen = list(pool.map(lambda number: ask(endpoint, "alpha", payload(number)), range(20)))
    assert {status for status, _ in seen} == {200, 503}
    assert {body for status, body in seen if status == 503} == {b"Request dropped due to backpressure"}

    (only,) = [replica for replica in deployment.replicas() if replica.model == "beta"]
    guardian.signal(only.process, signal.SIGKILL)
    wait_until(lambda: answers(endpoint, "beta"), "ray has replaced the only replica")
    assert only not in deployment.replicas()

    family = [reference for reference, _ in descendants(deployment.process)]
    assert len(family) > 8
    deployment.stop()
    assert not any(reference.alive() for reference in family)
    assert not any(port_open(endpoint.host, port) for port in ports)
    with pytest.raises(OSError):
        deployment.scrape()


def test_a_cluster_of_two_nodes_outlives_one(guardian: Guardian, request_for: Callable[..., DeployRequest]) -> None:
    """Every node has replicas of its own, in its own environment; a lost node's come back with it, and not before."""
    request = replace(request_for(Tuning(replicas=1)), nodes=2, node_envs=({"MARKER": "10"}, {"MARKER": "11"}))
    deployment = deploy(request, guardian)
    endpoint = deployment.endpoint
    assert not deployment.claims_ready()
    await_ready(deployment)
    assert deployment.applied() == {"max_batch": 1, "replicas": 1}
    first, second = deployment.nodes()
    assert (first.name, second.name) == ("node-0", "node-1")

    def replicas_of(node: Node) -> list[Replica]:
        processes = [reference for reference, _ in descendants(node.process)]
        return [replica for replica in deployment.replicas() if replica.process in processes]

    def markers() -> set[int]:
        """Which nodes answer so many requests at once that none is left out."""
        with ThreadPoolExecutor(8) as pool:
            seen = pool.map(lambda number: ask(endpoint, "alpha", payload(number)), range(24))
        return {int(answer["marker"][0]) for status, answer in seen if status == 200 and isinstance(answer, dict)}

    assert [len(replicas_of(node)) for node in (first, second)] == [1, 1], "and none is the head's"
    assert len(deployment.replicas()) == 2
    wait_until(lambda: markers() == {10, 11}, "both nodes answer")

    guardian.kill_tree(second.process)
    assert deployment.nodes() == [first]
    assert not deployment.claims_ready()
    wait_until(lambda: answers(endpoint, "alpha"), "the other node answers")
    assert [replica.process for replica in deployment.replicas()] == [one.process for one in replicas_of(first)]

    deployment.restart_node(1)
    await_ready(deployment)
    again = deployment.nodes()[1]
    assert (again.name, again.process.alive()) == ("node-1", True)
    assert again.process != second.process
    assert len(replicas_of(again)) == 1
    wait_until(lambda: markers() == {10, 11}, "both nodes answer again")

    roots = [deployment.process, first.process, again.process]
    family = [reference for root in roots for reference, _ in descendants(root)]
    sockets_and_sessions = Path(psutil.Process(deployment.process.pid).environ()["RAY_AUTH_TOKEN_PATH"]).parent
    assert (sockets_and_sessions / "1").is_dir()
    deployment.stop()
    assert not any(reference.alive() for reference in family)
    assert deployment.nodes() == []
    assert not sockets_and_sessions.exists()


def test_the_rendered_configuration_is_one_of_ray_serve(
    request_for: Callable[..., DeployRequest], environment: ServerEnvironment
) -> None:
    """Serve's own schema takes it, shares of a GPU included."""
    tuning = Tuning(max_batch=8, batch_window_ms=5, replicas=2, queue_limit=9, server_timeout_s=3)
    program = """
import json, sys
from ray.serve.schema import ServeDeploySchema
ServeDeploySchema.model_validate(json.loads(sys.stdin.read()))
"""
    on_cpu = request_for(tuning)
    done = subprocess.run(
        [environment.python, "-c", program],
        input=ADAPTER.render(replace(on_cpu, workload=replace(on_cpu.workload, device="cuda")))["serve.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
