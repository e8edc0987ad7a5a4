"""KServe's arguments from the neutral knobs, its refusals, its metrics, its ports, its workers; no server."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailrace.adapters.kserve.adapter import ADAPTER, KServeDeployment
from tailrace.adapters.kserve.config import Options
from tailrace.harness.contract import control
from tailrace.harness.contract.adapter import AXES, Autoscale, DeployRequest, ServerEnvironment, Tuning
from tailrace.harness.contract.control import ControlConnection
from tailrace.harness.contract.workload import PreparedWorkload, Slo, TensorSpec, WorkloadSpec
from tailrace.harness.errors import DeployError, InputError, ServerError
from tailrace.harness.processes import ProcessRef, free_ports

SPEC = WorkloadSpec(
    name="toy",
    title="Toy",
    description="",
    devices=("emulated", "cpu", "cuda"),
    inputs=(TensorSpec(name="x", dtype="float32", shape=(4,)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(4,)),),
    slo=Slo(latency_ms=100),
)
REQUEST = DeployRequest(
    workload=PreparedWorkload(SPEC, "cpu", Path("/w/model.py"), Path('/a/tïny "one"'), "", None, (), {}),
    models=("alpha", "beta"),
    tuning=Tuning(),
    options=Options(),
    protocol="http",
    environment=ServerEnvironment(Path("/env/bin/python"), "venv"),
    workdir=Path("/run"),
    scratch=Path("/scratch"),
    server_env={"MODEL_VARIABLE": "yes"},
)


def arguments(request: DeployRequest) -> list[str]:
    return ADAPTER.render(request)["kserve.args"].splitlines()


def test_the_shim_is_told_what_to_load() -> None:
    files = ADAPTER.render(REQUEST)
    assert sorted(files) == ["kserve.args", "models.json"]
    assert json.loads(files["models.json"]) == {
        "names": ["alpha", "beta"],
        "arguments": {"model_file": "/w/model.py", "artifact": '/a/tïny "one"', "device": "cpu"},
    }


def test_replicas_are_workers() -> None:
    assert "--workers=3" in arguments(replace(REQUEST, tuning=Tuning(replicas=3)))


def test_defaults_stay_kserves_own() -> None:
    assert arguments(REQUEST) == ["--enable_grpc=false"]


def test_grpc_is_served_where_it_is_measured() -> None:
    assert "--enable_grpc=true" in arguments(replace(REQUEST, protocol="grpc"))


def test_lines_for_every_request_are_written_by_default_or_when_asked_for() -> None:
    quiet = "--enable_latency_logging=false"
    tuned = replace(REQUEST, tuning=Tuning(replicas=2))
    assert quiet not in arguments(REQUEST)
    assert quiet in arguments(tuned)
    assert quiet in arguments(replace(REQUEST, options=Options(request_logs=False)))
    assert quiet not in arguments(replace(tuned, options=Options(request_logs=True)))


def test_knobs_without_a_place_are_refused() -> None:
    tuning = Tuning(
        max_batch=4,
        batch_window_ms=5,
        replicas=2,
        queue_limit=10,
        server_timeout_s=1,
        autoscale=Autoscale(min=1, max=2, target_ongoing=3),
    )
    refusals = ADAPTER.refusals(tuning, Options(), "http")
    assert set(refusals) == set(Tuning.model_fields) - {"replicas"}
    assert refusals["autoscale"] == "kserve has no place for `autoscale`: control plane only"
    assert "no batcher" in refusals["max_batch"] and "no batcher" in refusals["batch_window_ms"]
    assert "takes every request" in refusals["queue_limit"]
    assert "run to its end" in refusals["server_timeout_s"]
    assert ADAPTER.expressible(tuning, Options(), "http")[0] == Tuning(replicas=2)
    assert set(ADAPTER.knobs) | set(ADAPTER.refused) == set(Tuning.model_fields)


def test_what_it_can_do_is_declared() -> None:
    assert ADAPTER.capabilities() == ["health", "replicas", "scrape", "applied", "load_model", "unload_model"]
    assert set(ADAPTER.traits) == set(AXES)
    assert not ADAPTER.exposes
    assert not ADAPTER.approximate


class Host:
    """Takes down what is to be started, and has this very process stand in for it."""

    def __init__(self) -> None:
        self.spawned: list[tuple[list[str], dict[str, str]]] = []

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        ports: Sequence[int] = (),
    ) -> ProcessRef:
        self.spawned.append((list(argv), dict(env)))
        return ProcessRef.of(os.getpid())

    def signal(self, process: ProcessRef, signal_number: int) -> bool:
        raise AssertionError

    def stop_tree(self, process: ProcessRef, grace_s: float) -> None:
        raise AssertionError

    def remove_later(self, path: Path | str) -> None:
        raise AssertionError


def deployed(request: DeployRequest, folder: Path) -> tuple[KServeDeployment, Host]:
    host = Host()
    deployment = ADAPTER.deploy(replace(request, workdir=folder, scratch=folder), host)
    assert isinstance(deployment, KServeDeployment)
    return deployment, host


def test_ports_and_address_go_to_the_server(tmp_path: Path) -> None:
    ports = tuple(free_ports(3))
    deployment, host = deployed(replace(REQUEST, ports=ports), tmp_path)
    argv, env = host.spawned[0]
    assert argv[:2] == ["/env/bin/python", str(ADAPTER.folder / "server.py")]
    assert {
        "--host=127.0.0.1",
        f"--http_port={ports[0]}",
        f"--grpc_port={ports[1]}",
        f"--metrics_port={ports[2]}",
        f"--models={tmp_path}/config/models.json",
        "--enable_grpc=false",
    } <= set(argv)
    assert env["MODEL_VARIABLE"] == "yes"
    assert deployment.endpoint.port == ports[0]
    assert deployed(replace(REQUEST, ports=ports, protocol="grpc"), tmp_path)[0].endpoint.port == ports[1]


def test_every_server_counts_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [deployed(REQUEST, tmp_path)[1].spawned[0][1]["PROMETHEUS_MULTIPROC_DIR"] for _ in range(2)]
    assert folders[0] != folders[1]
    assert all(Path(folder).parent == tmp_path and Path(folder).is_dir() for folder in folders)


def test_ports_are_checked_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kserve takes 3 ports"):
        deployed(replace(REQUEST, ports=(1024, 1025)), tmp_path)
    ports = tuple(free_ports(3))
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", ports[2]))
        squatter.listen()
        with pytest.raises(DeployError, match=f"127.0.0.1:{ports[2]}: Address already in use"):
            deployed(replace(REQUEST, ports=ports), tmp_path)


def test_workers_over_grpc_are_refused() -> None:
    (sentence,) = ADAPTER.refusals(Tuning(replicas=2), Options(), "grpc").values()
    assert "`replicas: 2` over gRPC" in sentence
    assert ADAPTER.refusals(Tuning(replicas=1), Options(), "grpc") == {}
    assert ADAPTER.refusals(Tuning(replicas=2), Options(), "http") == {}


METRICS = """\
# HELP request_predict_seconds predict request latency
# TYPE request_predict_seconds histogram
request_predict_seconds_sum{model_name="alpha"} 1.5
request_predict_seconds_bucket{le="+Inf",model_name="alpha"} 12.0
request_predict_seconds_count{model_name="alpha"} 12.0
request_predict_seconds_bucket{le="+Inf",model_name="gone"} 4.0
request_predict_seconds_count{model_name="gone"} 4.0
# HELP request_postprocess_seconds post-process request latency
# TYPE request_postprocess_seconds histogram
request_postprocess_seconds_bucket{le="+Inf",model_name="alpha"} 10.0
request_postprocess_seconds_count{model_name="alpha"} 10.0
request_postprocess_seconds_bucket{le="+Inf",model_name="gone"} 4.0
request_postprocess_seconds_count{model_name="gone"} 4.0
"""


def test_metrics_get_their_canonical_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, _ = deployed(REQUEST, tmp_path)
    monkeypatch.setattr(ControlConnection, "page", lambda *_args, **_options: METRICS)
    assert {(sample.scope, sample.metric): sample.value for sample in deployment.scrape()} == {
        ("alpha", "requests_ok_total"): 10,
        ("alpha", "requests_failed_total"): 2,
        ("beta", "requests_ok_total"): 0,
        ("beta", "requests_failed_total"): 0,
        ("gone", "requests_ok_total"): 4,
        ("gone", "requests_failed_total"): 0,
    }


class Process:
    """As much of ``psutil.Process`` as the adapter looks at."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name


def test_workers_are_the_processes_that_have_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, _ = deployed(replace(REQUEST, tuning=Tuning(replicas=2)), tmp_path)
    old, young, tracker, main = (ProcessRef(pid, ticks) for pid, ticks in ((9, 100), (7, 200), (8, 90), (6, 80)))
    family: list[tuple[ProcessRef, Any]] = [
        (main, Process("python")),
        (tracker, Process("python")),
        (young, Process("python")),
        (old, Process("kserve-serving")),
    ]
    monkeypatch.setattr(control, "descendants", lambda _root: iter(family))
    monkeypatch.setattr(ControlConnection, "says_ok", lambda *_args: True)
    assert deployment.applied() == {"replicas": 1}
    assert not deployment.claims_ready(), "the other worker still loads"
    family[2] = (young, Process("kserve-serving"))
    assert deployment.applied() == {"replicas": 2}
    assert deployment.claims_ready()
    assert [(replica.name, replica.model, replica.process) for replica in deployment.replicas()] == [
        ("alpha-9", "alpha", old),
        ("beta-9", "beta", old),
        ("alpha-7", "alpha", young),
        ("beta-7", "beta", young),
    ]
    family.pop()
    assert deployment.claims_ready(), "a worker that dies later is no reason to say that the server is not ready"


def test_models_of_several_workers_stay_as_they_are(tmp_path: Path) -> None:
    deployment, _ = deployed(replace(REQUEST, tuning=Tuning(replicas=2)), tmp_path)
    with pytest.raises(ServerError, match="cannot load a model in 2 workers"):
        deployment.load_model("gamma")
    with pytest.raises(ServerError, match="cannot unload a model in 2 workers"):
        deployment.unload_model("alpha")
    assert {replica.model for replica in deployment.replicas()} <= {"alpha", "beta"}
    assert deployment._models == ["alpha", "beta"]


def test_an_unreachable_server_is_not_ready(tmp_path: Path) -> None:
    deployment, _ = deployed(REQUEST, tmp_path)
    assert deployment.claims_ready() is False
    assert deployment.health() is False
    with pytest.raises(OSError):
        deployment.scrape()
