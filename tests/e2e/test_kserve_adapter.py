"""A real KServe model server through its adapter: what is its own way, beside what the contract suite asks of everyone."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest

from tailrace.adapters.kserve.adapter import ADAPTER, KServeDeployment
from tailrace.harness.contract.adapter import Deployment, DeployRequest, Endpoint, ServerEnvironment, Tuning
from tailrace.harness.contract.codecs import OpenInferenceHTTP
from tailrace.harness.contract.exchange import Answer, exchange
from tailrace.harness.contract.workload import PreparedWorkload, Slo, Tensors, TensorSpec, WorkloadSpec
from tailrace.harness.errors import DeployError
from tailrace.harness.processes import ProcessRef, descendants, port_open
from tailrace.harness.servers import environments
from tailrace.harness.servers.guardian import Guardian

pytestmark = pytest.mark.e2e

MODEL = """
import json, os, time
from pathlib import Path
import numpy as np


class Model:
    def __init__(self, artifact, name, device):
        options = json.loads(Path(artifact).read_text())
        time.sleep(options["load_s"])
        if options["broken"]:
            raise RuntimeError("the weights are not there")

    def predict(self, inputs):
        seconds = float(inputs["seconds"].max())
        time.sleep(seconds)
        return {"y": inputs["half"] * 2, "pid": np.full((len(inputs["half"]), 1), os.getpid(), dtype=np.int64)}
"""
SPEC = WorkloadSpec(
    name="doubler",
    title="Doubler",
    description="Twice the input, after as many seconds as it says.",
    devices=("cpu",),
    inputs=(
        TensorSpec(name="half", dtype="float16", shape=(2, 3)),
        TensorSpec(name="seconds", dtype="float32", shape=(1,)),
    ),
    outputs=(TensorSpec(name="y", dtype="float16", shape=(2, 3)), TensorSpec(name="pid", dtype="int64", shape=(1,))),
    slo=Slo(latency_ms=100),
)
PINGED_AFTER_S = 6.0
"""KServe ends a worker that does not answer its pings by then, and would never be ready if loading kept it from that."""


def payload(seconds: float = 0.0) -> Tensors:
    return {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "seconds": np.array([seconds], dtype=np.float32),
    }


def ask(endpoint: Endpoint, seconds: float = 0.0) -> Answer:
    return exchange(endpoint, endpoint.codec.encode("alpha", payload(seconds)), 60)


def answering_pid(endpoint: Endpoint) -> int:
    """Whoever answers, rightly."""
    answer = ask(endpoint)
    assert answer.ok, answer.text
    tensors = endpoint.codec.decode(answer.headers, answer.body)
    np.testing.assert_array_equal(tensors["y"], payload()["half"] * 2)
    return int(tensors["pid"][0])


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


def await_ready(deployment: Deployment) -> None:
    def ready() -> bool:
        deployment.check_alive()
        return deployment.claims_ready()

    wait_until(ready, "kserve says that it is ready")


def counted(deployment: Deployment) -> dict[str, float]:
    return {sample.metric: sample.value for sample in deployment.scrape()}


def addresses(deployment: Deployment) -> set[tuple[str, int]]:
    """Where the server's processes listen."""
    return {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for _, process in descendants(deployment.process)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.fixture(scope="module")
def environment() -> ServerEnvironment:
    return environments.build("venv", [ADAPTER.requirements], name="kserve")


@pytest.fixture(scope="module")
def guardian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guardian]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILRACE_STATE", str(tmp_path_factory.mktemp("state")))
        with Guardian() as host:
            yield host


@pytest.fixture(scope="module")
def start(
    environment: ServerEnvironment, guardian: Guardian, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., KServeDeployment]:
    def started(request_changes: dict[str, object], *, load_s: float = 0.0, broken: bool = False) -> KServeDeployment:
        folder = tmp_path_factory.mktemp("a server")
        (folder / "model.py").write_text(MODEL)
        (folder / "artifact.json").write_text(json.dumps({"load_s": load_s, "broken": broken}))
        (folder / "scratch").mkdir()
        request = DeployRequest(
            workload=PreparedWorkload(SPEC, "cpu", folder / "model.py", folder / "artifact.json", "", None, (), {}),
            models=("alpha",),
            tuning=Tuning(),
            options=ADAPTER.Options(),
            protocol="http",
            environment=environment,
            workdir=folder,
            scratch=folder / "scratch",
            server_env={},
        )
        request = replace(request, **request_changes)  # type: ignore[arg-type]
        for path, text in ADAPTER.render(request).items():
            file = folder / "config" / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        deployment = ADAPTER.deploy(request, guardian)
        assert isinstance(deployment, KServeDeployment)
        return deployment

    return started


@pytest.fixture(scope="module")
def workers(start: Callable[..., KServeDeployment]) -> KServeDeployment:
    """Two workers whose model loads for longer than KServe waits for a worker's sign of life."""
    deployment = start({"tuning": Tuning(replicas=2)}, load_s=PINGED_AFTER_S)
    await_ready(deployment)
    return deployment


def test_slow_models_load_in_every_worker(workers: KServeDeployment) -> None:
    assert workers.applied() == {"replicas": 2}
    pids = {worker.process.pid for worker in workers.replicas()}
    assert workers.process.pid not in pids
    seen: set[int] = set()

    def all_seen() -> bool:
        seen.add(answering_pid(workers.endpoint))
        return seen == pids

    wait_until(all_seen, "both workers have answered")


def test_a_dead_worker_is_replaced_and_what_it_counted_stays(workers: KServeDeployment, guardian: Guardian) -> None:
    victim, other = (worker.process for worker in workers.replicas())
    wait_until(lambda: answering_pid(workers.endpoint) == victim.pid, "the worker has something to count")
    before = counted(workers)
    assert guardian.signal(victim, signal.SIGKILL)
    wait_until(lambda: not victim.alive(), "the worker is dead")
    assert answering_pid(workers.endpoint) == other.pid
    assert workers.claims_ready()
    wait_until(lambda: workers.applied() == {"replicas": 2}, "another worker has loaded")
    assert workers.replicas()[0].process == other
    assert counted(workers)["requests_ok_total"] == before["requests_ok_total"] + 1
    assert "POST /v2/models" not in workers.log.read_text(), "workers started later keep quiet, too"


def test_workers_outlive_the_main_process_but_not_the_guardian(workers: KServeDeployment, guardian: Guardian) -> None:
    family = [reference for reference, _ in descendants(workers.process)]
    assert guardian.signal(workers.process, signal.SIGKILL)
    wait_until(lambda: not workers.process.alive(), "the main process is dead")
    assert answering_pid(workers.endpoint) in {reference.pid for reference in family}
    assert workers.replicas() == []
    with pytest.raises(DeployError, match="main process has ended"):
        workers.check_alive()
    workers.stop(grace_s=0.5)
    assert not any(reference.alive() for reference in family)
    assert not port_open(workers.endpoint.host, workers.endpoint.port)


@pytest.fixture(scope="module")
def grpc_server(start: Callable[..., KServeDeployment]) -> KServeDeployment:
    deployment = start({"protocol": "grpc"})
    await_ready(deployment)
    return deployment


@pytest.fixture
def rest(grpc_server: KServeDeployment) -> Endpoint:
    """The REST side of the gRPC server."""
    host, port = grpc_server.endpoint.host, grpc_server._control.port
    return Endpoint("http", host, port, OpenInferenceHTTP(host, port, SPEC.inputs, SPEC.outputs))


def test_grpc_and_rest_answer_alike_from_the_one_process(grpc_server: KServeDeployment, rest: Endpoint) -> None:
    for _ in range(3):
        assert answering_pid(grpc_server.endpoint) == answering_pid(rest) == grpc_server.process.pid
    assert [worker.process for worker in grpc_server.replicas()] == [grpc_server.process]


def test_everything_listens_on_loopback(grpc_server: KServeDeployment, rest: Endpoint) -> None:
    ports = {grpc_server.endpoint.port, rest.port, grpc_server._metrics.port}
    assert addresses(grpc_server) == {("127.0.0.1", port) for port in ports}


def test_outputs_are_json_where_the_request_does_not_ask_for_bytes(rest: Endpoint) -> None:
    x = [0.0] * 6
    body = {
        "inputs": [
            {"name": "half", "shape": [1, 2, 3], "datatype": "FP32", "data": x},
            {"name": "seconds", "shape": [1, 1], "datatype": "FP32", "data": [0]},
        ]
    }
    connection = http.client.HTTPConnection(rest.host, rest.port, timeout=60)
    connection.request("POST", "/v2/models/alpha/infer", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    outputs = {output["name"]: output["data"] for output in json.loads(answer.read())["outputs"]}
    connection.close()
    assert outputs["y"] == x


def test_a_busy_model_stops_health_but_not_metrics(grpc_server: KServeDeployment, rest: Endpoint) -> None:
    before = counted(grpc_server)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(ask, rest, 5.0)
        wait_until(lambda: not grpc_server.health(), "health does not answer in time")
        assert counted(grpc_server) == before
        assert not busy.done()
        assert busy.result().ok
    assert grpc_server.health()
    assert counted(grpc_server)["requests_ok_total"] == before["requests_ok_total"] + 1


def test_workers_that_cannot_load_end_the_server(start: Callable[..., KServeDeployment]) -> None:
    deployment = start({"tuning": Tuning(replicas=2)}, broken=True)
    family: set[ProcessRef] = set()

    def ended() -> bool:
        family.update(reference for reference, _ in descendants(deployment.process))
        return not deployment.process.alive()

    wait_until(ended, "the server has ended")
    with pytest.raises(DeployError, match="RuntimeError: the weights are not there"):
        await_ready(deployment)
    wait_until(lambda: not any(reference.alive() for reference in family), "its workers have ended", 20)


def test_lines_for_every_request_are_there_when_asked_for(start: Callable[..., KServeDeployment]) -> None:
    deployment = start({})
    await_ready(deployment)
    answering_pid(deployment.endpoint)
    wait_until(lambda: "POST /v2/models/alpha/infer" in deployment.log.read_text(), "the request is in the log")
