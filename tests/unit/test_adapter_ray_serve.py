"""Ray Serve's adapter without Ray: the rendered configuration and what is read back, metrics, ports and folders."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.adapters.ray_serve import config
from tailrace.adapters.ray_serve.adapter import ADAPTER
from tailrace.adapters.ray_serve.metrics import Metrics, batches_and_items
from tailrace.harness.contract.adapter import Autoscale, DeployRequest, MetricSample, ServerEnvironment, Tuning
from tailrace.harness.contract.multiplexing import MemoryPlan, Multiplexing, plan_memory
from tailrace.harness.contract.workload import Device, PreparedWorkload, Slo, TensorSpec, WorkloadSpec
from tailrace.harness.errors import DeployError, InputError, ServerError
from tailrace.harness.processes import ProcessRef, free_ports
from tests.conftest import wait_until

SPEC = WorkloadSpec(
    name="doubler",
    title="Doubler",
    description="Twice the input.",
    devices=("cpu",),
    inputs=(TensorSpec(name="x", dtype="float32", shape=(4,)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(4,)),),
    slo=Slo(latency_ms=100),
)


def request_for(tuning: Tuning, scratch: Path, device: Device = "cpu", proxy: str | None = "haproxy") -> DeployRequest:
    return DeployRequest(
        workload=PreparedWorkload(SPEC, device, scratch / "model.py", scratch / "artifact", "", None, (), {}),
        models=("alpha", "beta"),
        tuning=tuning,
        options=ADAPTER.Options.model_validate({"proxy": proxy}),
        protocol="http",
        environment=ServerEnvironment(Path("/environment/bin/python"), "venv"),
        workdir=scratch / "server",
        scratch=scratch,
        server_env={"MARKER": "1"},
    )


class RecordingHost:
    """Takes down what it is asked to start and remove."""

    def __init__(self) -> None:
        self.env: Mapping[str, str] = {}
        self.argv: Sequence[str] = ()
        self.spawned: list[tuple[str, Sequence[str], Mapping[str, str]]] = []
        self.killed: list[ProcessRef] = []
        self.to_remove: list[str] = []

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
        self.argv, self.env = argv, env
        self.spawned.append((name, argv, env))
        return ProcessRef(1, len(self.spawned))

    def signal(self, process: ProcessRef, signal_number: int) -> bool:
        raise AssertionError("nothing to signal")

    def stop_tree(self, process: ProcessRef, grace_s: float) -> None:
        """Nothing runs."""

    def kill_tree(self, process: ProcessRef) -> bool:
        self.killed.append(process)
        return True

    def remove_later(self, path: Path | str) -> None:
        self.to_remove.append(str(path))


def test_defaults_leave_serves_own_defaults_alone(tmp_path: Path) -> None:
    files = ADAPTER.render(request_for(Tuning(), tmp_path))
    serve = json.loads(files["serve.json"])
    assert [one["deployments"] for one in serve["applications"]] == [[{"name": "Model"}]] * 2
    assert [one["route_prefix"] for one in serve["applications"]] == ["/models/alpha", "/models/beta"]
    assert serve["http_options"] == {"host": "127.0.0.1"}
    assert json.loads(files["ray.json"])["init"]["num_gpus"] == 0


def test_every_knob_lands_in_its_place(tmp_path: Path) -> None:
    tuning = Tuning(max_batch=8, batch_window_ms=2.5, replicas=3, queue_limit=64, server_timeout_s=1.5)
    files = ADAPTER.render(request_for(tuning, tmp_path))
    serve = json.loads(files["serve.json"])
    assert serve["applications"][0]["deployments"] == [
        {
            "name": "Model",
            "num_replicas": 3,
            "max_queued_requests": 64,
            "max_ongoing_requests": 16,
            "user_config": {"max_batch_size": 8, "batch_wait_timeout_s": 0.0025},
        }
    ]
    assert serve["http_options"]["request_timeout_s"] == 1.5
    ray = json.loads(files["ray.json"])
    assert ray["init"]["num_cpus"] > 6, "a replica takes one logical CPU"
    assert ray["environment"]["RAY_SERVE_BATCH_SIZE_BUCKETS"] == "1,2,3,4,5,6,7,8"
    assert ray["environment"]["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def memory_of(budget_mb: float, *sizes_mb: float, **chosen: Any) -> MemoryPlan:
    names = [f"m-{index}" for index in range(len(sizes_mb))]
    return plan_memory(Multiplexing(memory_mb=budget_mb, **chosen), names, sizes_mb, "here")


def test_models_that_share_a_memory_are_one_application(tmp_path: Path) -> None:
    tuning = Tuning(max_batch=8, replicas=2)
    request = replace(request_for(tuning, tmp_path, proxy=None), models=("m-0", "m-1", "m-2"))
    files = ADAPTER.render(replace(request, memory=memory_of(1000, 100, 210, 90)))
    (one,) = json.loads(files["serve.json"])["applications"]
    assert (one["name"], one["route_prefix"]) == ("models", "/models")
    assert one["args"]["models_per_replica"] == 2, "each of two replicas has 500 MiB, and room for two of the largest"
    assert one["deployments"][0]["max_ongoing_requests"] == 2 * 8 * 3, "those of one model must not keep out the others"
    environment = json.loads(files["ray.json"])["environment"]
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment, "HAProxy does not know which replica has which model"


@pytest.mark.parametrize(
    ("tuning", "memory", "said"),
    [
        (Tuning(), memory_of(500, 100, 200), None),
        (Tuning(replicas=2), memory_of(400, 100, 200), None),
        (Tuning(replicas=3), memory_of(500, 100, 200), "3 × 200 MiB are more than 500"),
        (Tuning(), memory_of(500, 100, policy="gdsf"), "only the policy lru"),
        (Tuning(), memory_of(500, 100, pinned=1), "pins no model"),
        (Tuning(autoscale=Autoscale(min=1, max=2, target_ongoing=2)), memory_of(500, 100), "no `autoscale`"),
    ],
)
def test_memory_is_shared_by_what_serve_knows_of(tuning: Tuning, memory: MemoryPlan, said: str | None) -> None:
    reason = ADAPTER.multiplexing_refusal(memory, tuning, "http")
    assert reason is None if said is None else said in str(reason)


@given(st.floats(1, 1e4), st.lists(st.floats(1, 100), min_size=1, max_size=5), st.integers(1, 8))
def test_replicas_full_of_the_largest_model_fit_together(budget: float, sizes: list[float], replicas: int) -> None:
    memory = memory_of(max(budget, *sizes), *sizes)
    each, largest = config.models_per_replica(memory, replicas), max(memory.sizes.values())
    assert replicas * each * largest <= memory.budget_bytes < replicas * (each + 1) * largest


def test_a_model_that_shares_memory_is_named_in_a_header_and_comes_by_serves_policy_alone(tmp_path: Path) -> None:
    memory = memory_of(500, 100)
    request = replace(request_for(Tuning(), tmp_path), models=("m-0",), memory=memory)
    deployment = ADAPTER.deploy(request, RecordingHost())
    data = deployment.endpoint.codec.encode("m-0", {"x": np.zeros(4, dtype=np.float32)}).data
    assert data.startswith(b"POST /models/m-0 HTTP/1.1\r\n")
    assert b"\r\nserve_multiplexed_model_id: m-0\r\n" in data
    for change in (deployment.load_model, deployment.unload_model):
        with pytest.raises(ServerError, match="says when 'm-0' comes"):
            change("m-0")
    deployment.stop()


def test_autoscaling_takes_the_place_of_a_number_of_replicas(tmp_path: Path) -> None:
    tuning = Tuning(autoscale=Autoscale(min=1, max=4, target_ongoing=6))
    files = ADAPTER.render(request_for(tuning, tmp_path, device="cuda", proxy="python"))
    deployment = json.loads(files["serve.json"])["applications"][0]["deployments"][0]
    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 6}
    share = {"num_gpus": 0.125}  # for the most replicas that there may be of two models
    assert deployment == {"name": "Model", "autoscaling_config": scaling, "ray_actor_options": share}
    ray = json.loads(files["ray.json"])
    assert ray["init"]["num_gpus"] == 1
    assert ray["init"]["num_cpus"] > 8
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in ray["environment"]


def test_how_quickly_it_scales_is_told_and_read_back(tmp_path: Path) -> None:
    wanted = Autoscale(min=1, max=4, target_ongoing=6, up_after_s=1, down_after_s=0, averaged_over_s=2)
    files = ADAPTER.render(request_for(Tuning(autoscale=wanted), tmp_path))
    scaling = json.loads(files["serve.json"])["applications"][0]["deployments"][0]["autoscaling_config"]
    assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"], scaling["look_back_period_s"]) == (1, 0, 2)
    assert scaling["metrics_interval_s"] < 2, "an average needs more than one report"
    report = {
        "http_options": {},
        "applications": {"alpha": reported(deployment_config={"autoscaling_config": scaling})},
    }
    assert config.knobs_in(report)["autoscale"] == wanted.model_dump()


def test_one_node_is_head_and_worker(tmp_path: Path) -> None:
    host = RecordingHost()
    request = request_for(Tuning(replicas=2), tmp_path)
    files = ADAPTER.render(request)
    assert set(json.loads(files["ray.json"])) == {"init", "environment"}
    serve = json.loads(files["serve.json"])
    assert "proxy_location" not in serve
    assert serve["applications"][0]["deployments"] == [{"name": "Model", "num_replicas": 2}]
    deployment = ADAPTER.deploy(request, host)
    assert [name for name, _, _ in host.spawned] == ["ray_serve"]
    deployment.stop()


@pytest.mark.parametrize(
    ("tuning", "expected", "per_node"),
    [
        (Tuning(), {"num_replicas": 2}, 1),
        (Tuning(replicas=3), {"num_replicas": 6}, 3),
        (
            Tuning(autoscale=Autoscale(min=1, max=4, target_ongoing=6)),
            {"autoscaling_config": {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 6}},
            4,
        ),
    ],
)
def test_the_tuning_is_what_each_of_several_nodes_holds(
    tmp_path: Path, tuning: Tuning, expected: dict[str, object], per_node: int
) -> None:
    files = ADAPTER.render(replace(request_for(tuning, tmp_path), nodes=2))
    serve = json.loads(files["serve.json"])
    assert serve["proxy_location"] == "HeadOnly"
    for one in serve["applications"]:
        assert one["deployments"] == [{"name": "Model", "max_replicas_per_node": per_node, **expected}]
    ray = json.loads(files["ray.json"])
    assert ray["nodes"] == 2
    assert ray["init"]["num_cpus"] == 0, "the head holds no replica"
    assert ray["node"]["num-cpus"] >= 2 * per_node, "as many for each of the two models"
    assert ray["node"]["num-gpus"] == 0
    assert ray["node"]["node-ip-address"] == ray["init"]["_node_ip_address"], "where HAProxy looks on loopback"

    on_gpus = json.loads(ADAPTER.render(replace(request_for(tuning, tmp_path, device="cuda"), nodes=2))["ray.json"])
    assert on_gpus["init"]["num_gpus"] == 0
    assert on_gpus["node"]["num-gpus"] == 1


@given(replicas=st.integers(1, 64), devices=st.integers(1, 8))
def test_shares_of_a_gpu_fit_and_spread(replicas: int, devices: int) -> None:
    share = config.gpu_share(replicas, devices)
    per_device = int(1 / share + 1e-9)
    assert 0 < share <= 1 and per_device * devices >= replicas, "all find a place"
    assert (per_device - 1) * devices < replicas, "and no GPU has room for more than its even part"


def test_replicas_have_their_share_of_the_nodes_gpus(tmp_path: Path) -> None:
    request = replace(request_for(Tuning(replicas=3), tmp_path, device="cuda"), models=("alpha",), devices=2)
    files = ADAPTER.render(request)
    assert json.loads(files["ray.json"])["init"]["num_gpus"] == 2
    (deployment,) = json.loads(files["serve.json"])["applications"][0]["deployments"]
    assert deployment["ray_actor_options"] == {"num_gpus": 0.5}
    (on_cpu,) = json.loads(ADAPTER.render(request_for(Tuning(replicas=3), tmp_path))["serve.json"])["applications"][0][
        "deployments"
    ]
    assert "ray_actor_options" not in on_cpu


def test_nodes_are_processes_with_environments_and_folders_of_their_own(tmp_path: Path) -> None:
    host = RecordingHost()
    request = replace(request_for(Tuning(), tmp_path), nodes=2, node_envs=({"MARKER": "10"}, {"MARKER": "11"}))
    deployment = ADAPTER.deploy(request, host)
    assert [(name, env["MARKER"]) for name, _, env in host.spawned] == [
        ("ray_serve", "1"),
        ("node-0", "10"),
        ("node-1", "11"),
    ]
    (_, head, head_env), (_, first, first_env), (_, second, _) = host.spawned
    assert first_env["RAY_AUTH_TOKEN_PATH"] == head_env["RAY_AUTH_TOKEN_PATH"]
    (address,) = {argument for argument in head if argument.startswith("--head=")}
    assert address in first
    assert address in second
    for option in ("--temp-dir", "--metrics-port"):
        assert len({argument for argv in (head, first, second) for argument in argv if option in argument}) == 3

    deployment.restart_node(1)
    assert host.spawned[3] == host.spawned[2]
    assert host.killed == [ProcessRef(1, 3)], "of what has ended nothing stays"
    deployment.stop()
    assert host.killed[1:] == [ProcessRef(1, 2), ProcessRef(1, 4)]


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        (Tuning(batch_window_ms=5), "`batch_window_ms` without `max_batch`"),
        (Tuning(replicas=2, autoscale=Autoscale(min=1, max=2, target_ongoing=2)), "`replicas` beside `autoscale`"),
    ],
)
def test_combinations_without_a_place_are_refused(tuning: Tuning, words: str) -> None:
    (sentence,) = ADAPTER.refusals(tuning, ADAPTER.Options(), "http").values()
    assert words in sentence


def test_every_knob_has_a_place() -> None:
    assert set(ADAPTER.knobs) == set(Tuning.model_fields)
    full = Tuning(max_batch=1, batch_window_ms=0, replicas=1, queue_limit=1, server_timeout_s=1)
    assert ADAPTER.refusals(full, ADAPTER.Options(), "http") == {}


def reported(**changes: object) -> dict[str, object]:
    return {
        "deployment_config": {"max_queued_requests": 64},
        "running": 2,
        "batching": {"max_batch_size": 8, "batch_wait_timeout_s": 0.0025},
        **changes,
    }


def test_knobs_are_read_from_the_report() -> None:
    http_options = {"request_timeout_s": 1.5}
    report = {"http_options": http_options, "applications": {"alpha": reported(), "beta": reported()}}
    tuning = Tuning(max_batch=8, batch_window_ms=2.5, replicas=2, queue_limit=64, server_timeout_s=1.5)
    assert config.knobs_in(report) == tuning.chosen()

    report["applications"] = {"alpha": reported(), "beta": reported(running=1)}
    assert config.knobs_in(report)["replicas"] == [2, 1]

    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 6.0}
    unlimited = {"max_queued_requests": -1, "autoscaling_config": scaling}
    bare = reported(batching={}, deployment_config=unlimited)
    scaled = Tuning(autoscale=Autoscale(min=1, max=4, target_ongoing=6)).model_dump(mode="json", exclude_none=True)
    assert config.knobs_in({"http_options": {}, "applications": {"alpha": bare}}) == {"max_batch": 1, **scaled}


def test_knobs_of_several_nodes_are_read_per_node() -> None:
    scaling = {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 6.0}
    scaled = reported(deployment_config={"autoscaling_config": scaling})
    knobs = config.knobs_in({"http_options": {}, "applications": {"alpha": scaled}}, nodes=2)
    assert knobs["autoscale"] == {"min": 1, "max": 4, "target_ongoing": 6.0}
    for running, expected in ((4, 2), (3, 1)):
        report = {"http_options": {}, "applications": {"alpha": reported(running=running)}}
        assert config.knobs_in(report, nodes=2)["replicas"] == expected


@given(st.integers(1, 5000))
def test_bounds_of_batch_sizes(max_batch: int) -> None:
    bounds = config.batch_size_bounds(max_batch)
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == max_batch
    assert len(bounds) <= 128
    assert bounds[:64] == list(range(1, min(max_batch, 64) + 1))


@given(st.dictionaries(st.integers(1, 64), st.integers(0, 1000)))
def test_batches_of_exact_sizes_are_counted_exactly(batches_by_size: dict[int, int]) -> None:
    bounds = config.batch_size_bounds(64)
    cumulative = list(accumulate(batches_by_size.get(size, 0) for size in bounds))
    buckets = [*zip(map(float, bounds), map(float, cumulative), strict=True), (float("inf"), float(cumulative[-1]))]
    items = sum(size * count for size, count in batches_by_size.items())
    assert batches_and_items(reversed(buckets)) == (sum(batches_by_size.values()), items)


def test_a_wide_bucket_counts_as_its_middle() -> None:
    assert batches_and_items([(4.0, 0.0), (8.0, 10.0), (float("inf"), 11.0)]) == (11, 10 * 6.5 + 9)


def ray_page(batches: Mapping[str, Sequence[int]], processing: Mapping[str, int]) -> str:
    """As Ray writes it: cumulative counts of batches of 1 and of 2, and gauges, per replica."""
    lines = ["# TYPE ray_serve_actual_batch_size histogram", 'ray_tasks{State="RUNNING"} 3.0']
    for replica, (ones, twos) in batches.items():
        for bound, count in (("1.0", ones), ("2.0", ones + twos), ("+Inf", ones + twos)):
            labels = f'application="alpha",replica="{replica}",le="{bound}"'
            lines.append(f"ray_serve_actual_batch_size_bucket{{{labels}}} {count}.0")
    for replica, requests in processing.items():
        lines.append(f'ray_serve_replica_processing_queries{{application="alpha",replica="{replica}"}} {requests}.0')
    return "\n".join(lines) + "\n"


def haproxy_page(sessions: int, ok: int, failed: int) -> str:
    up = 'haproxy_server_status{{proxy="http-alpha",server="{}",state="{}"}} 1'
    return "\n".join(
        [
            f'haproxy_backend_current_sessions{{proxy="http-alpha"}} {sessions}',
            'haproxy_backend_current_sessions{proxy="default_backend"} 99',
            f'haproxy_backend_http_responses_total{{proxy="http-alpha",code="2xx"}} {ok}',
            f'haproxy_backend_http_responses_total{{proxy="http-alpha",code="5xx"}} {failed}',
            'haproxy_backend_http_responses_total{proxy="default_backend",code="4xx"} 7',
            up.format("SERVE_REPLICA_alpha-Model-aaa", "UP"),
            up.format("SERVE_REPLICA_alpha-Model-bbb", "DOWN"),
            up.format("SERVE_PROXY_ACTOR-fallback-0", "UP"),
            "",
        ]
    )


def values(samples: Sequence[MetricSample]) -> dict[str, float]:
    assert {sample.scope for sample in samples} == {"alpha"}
    return {sample.metric: sample.value for sample in samples}


def test_metrics_behind_haproxy_survive_the_death_of_a_replica() -> None:
    metrics = Metrics()
    first = ray_page({"aaa": (2, 4), "bbb": (0, 1)}, {"aaa": 5, "bbb": 3})
    assert values(metrics.read(["alpha"], first, haproxy_page(sessions=11, ok=12, failed=1))) == {
        "batches_total": 7,
        "items_total": 12,
        "batch_size": pytest.approx(12 / 7),
        "requests_ok_total": 12,
        "requests_failed_total": 1,
        "in_flight": 11,
        "queue_depth": 3,
        "replicas": 1,
    }
    # bbb died, ccc came, and HAProxy was replaced by a new process that counts from zero.
    second = ray_page({"aaa": (2, 6), "ccc": (1, 0)}, {"aaa": 2, "ccc": 1})
    seen = values(metrics.read(["alpha"], second, haproxy_page(sessions=2, ok=5, failed=0)))
    assert (seen["batches_total"], seen["items_total"]) == (10, 17)
    assert seen["batch_size"] == pytest.approx(5 / 3)
    assert (seen["requests_ok_total"], seen["requests_failed_total"]) == (17, 1)
    assert seen["queue_depth"] == 0, "Ray's gauge lags behind HAProxy's: never below zero"
    third = values(metrics.read(["alpha"], second, haproxy_page(sessions=0, ok=5, failed=0)))
    assert "batch_size" not in third, "no batch since: no mean"


def test_batches_of_models_in_one_replica_are_told_apart() -> None:
    lines = [
        f'ray_serve_actual_batch_size_bucket{{application="alpha",replica="r",function_name="{name}",le="{bound}"}} {count}'
        for name, ones, twos in (("m-0", 1, 2), ("m-1", 0, 5))
        for bound, count in (("1.0", ones), ("2.0", ones + twos), ("+Inf", ones + twos))
    ]
    seen = values(Metrics().read(["alpha"], "\n".join(lines) + "\n", None))
    assert (seen["batches_total"], seen["items_total"]) == (8, 15)


def test_metrics_behind_the_python_proxy() -> None:
    request = 'ray_serve_num_http_requests_total{{application="alpha",method="POST",route="/models/alpha",{}}} {}'
    page = "\n".join(
        [
            request.format('status_code="200",WorkerId="w"', 40),
            request.format('status_code="503",WorkerId="w"', 2),
            request.format('status_code="408",WorkerId="w"', 3),
            'ray_serve_deployment_queued_queries{application="alpha",handle="h"} 6.0',
            'ray_serve_num_ongoing_requests_at_replicas{application="alpha",handle="h"} 5.0',
            'ray_serve_deployment_queued_queries{application="beta",handle="h"} 70.0',
            "",
        ]
    )
    assert values(Metrics().read(["alpha"], page, None)) == {
        "requests_ok_total": 40,
        "requests_failed_total": 5,
        "queue_depth": 6,
        "in_flight": 11,
    }
    assert values(Metrics().read(["alpha"], "", None)) == {"queue_depth": 0, "in_flight": 0}


def test_a_busy_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    ports = tuple(free_ports(5))
    request = replace(request_for(Tuning(), tmp_path), ports=ports)
    host = RecordingHost()
    with socket.socket() as squatter:
        squatter.bind((request.host, ports[3]))
        squatter.listen()
        with pytest.raises(DeployError, match=f"cannot listen on 127.0.0.1:{ports[3]}: Address already in use"):
            ADAPTER.deploy(request, host)
    assert host.argv == ()


def test_the_ports_that_are_asked_for_are_used(tmp_path: Path) -> None:
    """On ports that nobody has had yet; others on this machine look for free ones too, and may be quicker."""
    host = RecordingHost()

    def deployed_on(ports: tuple[int, ...]) -> bool:
        try:
            deployment = ADAPTER.deploy(replace(request_for(Tuning(), tmp_path), ports=ports), host)
        except DeployError as error:
            assert "Address already in use" in error.message
            return False
        assert deployment.endpoint.port == ports[0]
        assert f"--port={ports[0]}" in host.argv
        deployment.stop()
        return True

    wait_until(lambda: deployed_on(tuple(free_ports(5))), "five free ports are still free")


@pytest.mark.parametrize("ports", [(1024,), (1024, 1025, 1026, 1027, 1027)])
def test_ports_must_be_five_different_ones(tmp_path: Path, ports: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"ray_serve takes 5 ports \(http, metrics, "):
        ADAPTER.deploy(replace(request_for(Tuning(), tmp_path), ports=ports), RecordingHost())


def test_sockets_get_a_folder_with_a_short_name(tmp_path: Path) -> None:
    host = RecordingHost()
    scratch = tmp_path / ("a long name " * 8)
    scratch.mkdir()
    deployment = ADAPTER.deploy(request_for(Tuning(), scratch), host)
    token = Path(host.env["RAY_AUTH_TOKEN_PATH"])
    folder = token.parent
    assert host.to_remove == [str(folder)]
    assert len(str(folder)) < 40
    assert folder.stat().st_mode & 0o077 == 0, "token and sockets are nobody else's business"
    assert len(token.read_text()) >= 32
    assert host.env["MARKER"] == "1"
    places = [value for name, value in host.env.items() if "HAPROXY" in name and "/" in value]
    assert len(places) == 5
    assert all(Path(place).is_relative_to(folder) for place in places)
    assert not deployment.claims_ready()
    deployment.stop()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("tuning", "proxy", "expected"),
    [
        (Tuning(replicas=2), None, True),
        (Tuning(), None, False),
        (Tuning(), "haproxy", True),
        (Tuning(replicas=2), "python", False),
    ],
)
def test_defaults_leave_ray_its_own_proxy_unless_told_otherwise(
    tmp_path: Path, tuning: Tuning, proxy: str | None, expected: bool
) -> None:
    assert config.behind_haproxy(request_for(tuning, tmp_path, proxy=proxy)) is expected
