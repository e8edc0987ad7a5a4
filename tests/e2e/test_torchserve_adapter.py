"""What only TorchServe does, on a real server: its Java, its readiness, its workers' timeouts, its addresses.

What every adapter promises is asked of it by the contract suite.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from tailrace.adapters.torchserve.adapter import ADAPTER
from tailrace.harness.contract.adapter import Deployment, DeployRequest, ServerEnvironment, Tuning
from tailrace.harness.contract.workload import PreparedWorkload, Slo, Tensors, TensorSpec, WorkloadSpec
from tailrace.harness.errors import DeployError
from tailrace.harness.processes import descendants
from tailrace.harness.servers import environments
from tailrace.harness.servers.guardian import Guardian
from tests.conftest import wait_until

pytestmark = pytest.mark.e2e

MODEL = """
import time
import numpy as np


class Model:
    def __init__(self, artifact, name, device):
        time.sleep(1)

    def predict(self, inputs):
        x = inputs["x"]
        if (x == 666).any():
            raise ValueError("no answer to the beast")
        return {"y": x * 2, "size": np.full((len(x), 1), len(x), dtype=np.int64)}
"""
SPEC = WorkloadSpec(
    name="doubler",
    title="Doubler",
    description="Twice the input, and how many were in its batch.",
    devices=("cpu",),
    inputs=(TensorSpec(name="x", dtype="float32", shape=(4,)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(4,)), TensorSpec(name="size", dtype="int64", shape=(1,))),
    slo=Slo(latency_ms=100),
)
TUNING = Tuning(max_batch=4, batch_window_ms=500, replicas=2, server_timeout_s=2)


def request_for(folder: Path, environment: ServerEnvironment, tuning: Tuning) -> DeployRequest:
    # Longer than a path of a socket may be, so that sockets have to lie elsewhere.
    scratch = folder / ("scratch" * 15)
    scratch.mkdir()
    model_file = folder / "a workload" / "model.py"
    model_file.parent.mkdir()
    model_file.write_text(MODEL)
    return DeployRequest(
        workload=PreparedWorkload(SPEC, "cpu", model_file, folder, "", None, (), {}),
        models=("alpha",),
        tuning=tuning,
        options=ADAPTER.Options(),
        protocol="http",
        environment=environment,
        workdir=folder,
        scratch=scratch,
        server_env={},
    )


def deploy(request: DeployRequest, host: Guardian) -> Deployment:
    for path, text in ADAPTER.render(request).items():
        file = request.workdir / "config" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return ADAPTER.deploy(request, host)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def tensors(self, deployment: Deployment) -> Tensors:
        assert self.status == 200, self.body
        return deployment.endpoint.codec.decode(self.headers, self.body)


def post(deployment: Deployment, body: bytes, content_type: str = "application/octet-stream") -> Answer:
    connection = http.client.HTTPConnection(deployment.endpoint.host, deployment.endpoint.port, timeout=60)
    connection.request("POST", "/predictions/alpha", body, {"Content-Type": content_type})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


def payload(number: float) -> bytes:
    return np.full(4, number, dtype="<f4").tobytes()


@dataclass
class Server:
    """The server that most tests share. ``healthy_but_unready``: how often its start was found in that state."""

    deployment: Deployment
    request: DeployRequest
    host: Guardian
    healthy_but_unready: int = 0
    stopped: bool = False


@pytest.fixture(scope="module")
def environment() -> ServerEnvironment:
    return environments.build("venv", [ADAPTER.requirements], name="torchserve")


@pytest.fixture(scope="module")
def server(environment: ServerEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started where there is no Java but the one in its environment."""
    with pytest.MonkeyPatch.context() as patch, Guardian() as host:
        folder = tmp_path_factory.mktemp("torchserve")
        (folder / "empty").mkdir()
        patch.setenv("PATH", str(folder / "empty"))
        patch.delenv("JAVA_HOME", raising=False)
        request = request_for(folder, environment, TUNING)
        found = Server(deploy(request, host), request, host)
        patch.undo()
        await_ready(found)
        yield found


@pytest.fixture
def guardian() -> Iterator[Guardian]:
    with Guardian() as host:
        yield host


def await_ready(server: Server) -> None:
    def ready() -> bool:
        server.deployment.check_alive()
        healthy = server.deployment.health()
        if server.deployment.claims_ready():
            return True
        server.healthy_but_unready += healthy
        return False

    wait_until(ready, "torchserve is ready")


def test_the_java_of_its_environment_runs_it(server: Server, environment: ServerEnvironment) -> None:
    program = Path(psutil.Process(server.deployment.process.pid).exe())
    assert program.name == "java"
    assert program.is_relative_to(environment.bin.parent)


def test_ping_is_healthy_before_any_worker_has_its_model(server: Server) -> None:
    assert server.healthy_but_unready > 0


def test_everything_listens_on_the_address_asked_for(server: Server) -> None:
    listening = {
        connection.laddr
        for _, process in descendants(server.deployment.process)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) == len(ADAPTER.port_names)
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {server.request.host}
    assert ADAPTER.exposes == ""


def test_answers_are_whole_and_raw(server: Server) -> None:
    answer = post(server.deployment, payload(3))
    np.testing.assert_array_equal(answer.tensors(server.deployment)["y"], np.full(4, 6))
    assert answer.headers["content-length"] == str(len(answer.body))
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["content-type"] == "application/octet-stream"


def test_a_wrong_body_fails_alone_in_its_batch(server: Server) -> None:
    bodies = [payload(1), b"short", payload(2), payload(3)]

    def one_batch() -> bool:
        with ThreadPoolExecutor(4) as pool:
            first, wrong, *others = pool.map(lambda body: post(server.deployment, body), bodies)
        assert wrong.status == 400
        assert wrong.body == b"the body must be the 16 bytes of the declared inputs, and no text"
        # Four requests are a batch by themselves, unless two workers have shared them.
        return {int(answer.tensors(server.deployment)["size"][0]) for answer in (first, *others)} == {3}

    wait_until(one_batch, "the four are in one batch")
    assert post(server.deployment, b'{"x": 1}', "application/json").status == 400


def test_what_the_model_raises_is_told_and_is_no_503(server: Server) -> None:
    answer = post(server.deployment, payload(666))
    assert (answer.status, answer.body) == (500, b"ValueError: no answer to the beast")
    assert "Traceback" in server.deployment.log.read_text()


def test_a_paused_worker_is_replaced_after_its_timeout(server: Server) -> None:
    deployment = server.deployment
    victim = deployment.replicas()[0]
    assert server.host.signal(victim.process, signal.SIGSTOP)
    assert deployment.claims_ready(), "it says so as long as the timeout has not passed"
    failures = []

    def replaced() -> bool:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: post(deployment, payload(number)), range(8)))
        failures.extend(answer for answer in answers if answer.status != 200)
        replicas = deployment.replicas()
        return len(replicas) == 2 and victim not in replicas

    wait_until(replaced, "the paused worker is replaced")
    assert {answer.status for answer in failures} == {500}
    assert all(json.loads(answer.body)["message"] == "Worker died." for answer in failures)
    wait_until(deployment.claims_ready, "the new worker has loaded the model")
    assert {replica.name for replica in deployment.replicas()} == {"alpha-9000", "alpha-9001"}


def test_a_killed_frontend_takes_its_workers_along_and_stop_leaves_nothing(server: Server) -> None:
    deployment, request = server.deployment, server.request
    workers = deployment.replicas()
    (sockets,) = {
        Path(word).parent
        for word in psutil.Process(workers[0].process.pid).cmdline()
        if Path(word).name.startswith(".ts.sock.")
    }
    assert sockets.is_dir()
    assert not sockets.is_relative_to(request.scratch)
    assert server.host.signal(deployment.process, signal.SIGKILL)
    wait_until(lambda: not any(worker.process.alive() for worker in workers), "the workers have ended")
    assert deployment.replicas() == []
    assert not deployment.claims_ready()
    deployment.stop()
    assert not sockets.exists()
    assert list(request.scratch.iterdir()) == []
    rendered = set(ADAPTER.render(request))
    kept = {str(path.relative_to(request.workdir / "config")) for path in files_below(request.workdir / "config")}
    assert kept == rendered, "the configuration is kept as it was rendered"
    assert [path.name for path in files_below(request.workdir / "logs")] == ["torchserve.log"]


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_worker_that_lacks_a_package_ends_the_start(tmp_path: Path, guardian: Guardian) -> None:
    """TorchServe does not declare PyYAML; without it, it is «Healthy» and starts workers again and again."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torchserve==0.12.0\njdk4py\nnumpy\n")
    lacking = environments.build("venv", [requirements], name="torchserve-lacking", compile_bytecode=False)
    deployment = deploy(request_for(tmp_path, lacking, Tuning(replicas=1)), guardian)
    with pytest.raises(DeployError, match="did not come up: ModuleNotFoundError: No module named 'yaml'"):
        while True:
            deployment.check_alive()
            assert not deployment.claims_ready()
            time.sleep(0.05)
    assert deployment.health()
    deployment.stop()
    with socket.socket() as probe:
        assert probe.connect_ex((deployment.endpoint.host, deployment.endpoint.port)) != 0
