"""What every adapter promises of a start: limits that hold, and one clear message when it cannot be."""

from __future__ import annotations

import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tailrace.harness.contract.adapter import Adapter, Autoscale, Tuning
from tailrace.harness.contract.exchange import check_answer, exchange
from tailrace.harness.contract.workload import Device
from tailrace.harness.errors import TailraceError
from tailrace.harness.processes import descendants, free_ports
from tailrace.harness.run.prepare import prepare
from tailrace.harness.servers import environments
from tailrace.harness.servers.emulated_device import device_environment
from tests.contract.bench import Bench, Stream, ask, ask_all, closed, until
from tests.contract.conftest import Observe

pytestmark = pytest.mark.e2e

QUEUE_LIMIT = 3
TIMEOUT_S = 2


def test_every_knob_has_a_place_or_a_reason(adapter: Adapter) -> None:
    assert set(adapter.knobs) | set(adapter.refused) == set(Tuning.model_fields)
    assert not set(adapter.knobs) & set(adapter.refused)
    assert all(adapter.knobs.values())
    assert all(adapter.refused.values())


@pytest.mark.places("queue_limit", "server_timeout_s")
def test_a_full_queue_sheds_and_a_long_wait_ends(adapter: Adapter, bench: Bench) -> None:
    """Both limits at once, told apart by what they do: shedding is at once, a timeout is not."""
    request = bench.request(Tuning(queue_limit=QUEUE_LIMIT, server_timeout_s=TIMEOUT_S, replicas=1))
    with bench.running(request) as deployment:
        if "queue_limit" in adapter.knobs:
            replies = ask_all(deployment, 24, sleep_ms=300, at_once=24)
            assert any(reply.right for reply in replies)
            assert any(reply.shed for reply in replies), {reply.said for reply in replies}
            until(lambda: ask(deployment).right, "it answers again")
        if "server_timeout_s" in adapter.knobs:
            # Three in a row for one replica: the last would be answered after seven seconds and a half.
            replies = ask_all(deployment, 3, sleep_ms=2500, at_once=3)
            late = [reply for reply in replies if not reply.right]
            assert late, "a wait longer than the limit is ended"
            until(lambda: ask(deployment).right, "it answers again")


@pytest.mark.places("autoscale")
def test_the_autoscaler_follows_the_load(adapter: Adapter, bench: Bench, observe: Observe) -> None:
    request = bench.request(Tuning(autoscale=Autoscale(min=1, max=2, target_ongoing=1)))
    with bench.running(request) as deployment:
        assert len(deployment.replicas()) == 1
        begun_s = time.monotonic()
        with Stream(deployment, 8) as stream:

            def loaded() -> bool:
                ask_all(deployment, 8, sleep_ms=200)
                return len(deployment.replicas()) == 2

            until(loaded, "a second replica was started", 180)
            up_s = time.monotonic() - begun_s
            stream.finish()
    observe("scaling", f"its autoscaler went from 1 to 2 replicas after {up_s:.0f} s of load", autoscale_up_s=up_s)


def test_a_busy_port_is_named(adapter: Adapter, bench: Bench) -> None:
    ports = tuple(free_ports(len(adapter.port_names)))
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", ports[-1]))
        squatter.listen()
        with pytest.raises(TailraceError, match=f"127.0.0.1:{ports[-1]}: Address already in use"):
            bench.deploy(bench.request(ports=ports))


def test_a_model_that_cannot_be_loaded_ends_the_start(adapter: Adapter, bench: Bench) -> None:
    """And the model's own words are told. A server may crash while it cleans up, before it has written them (Triton's Python
    backend now and then removes a folder twice at once); not every time."""
    told = ""
    for _ in range(3):
        deployment = bench.deploy(bench.request(Tuning(replicas=1), broken=["alpha"]))
        try:
            with pytest.raises(TailraceError) as refused:
                bench.wait_ready(deployment)
        finally:
            deployment.stop()
        told = str(refused.value)
        if "the weights of alpha are not there" in told:
            return
    pytest.fail(told)


def test_a_missing_dependency_is_named(adapter: Adapter, bench: Bench, tmp_path: Path) -> None:
    if not adapter.requirements.read_text().strip():
        pytest.skip(f"{adapter.name} needs nothing")
    empty = tmp_path / "requirements.txt"
    empty.write_text("")
    bare = environments.build("venv", [empty], name="bare", compile_bytecode=False)
    with pytest.raises(TailraceError) as refused:
        deployment = bench.deploy(replace(bench.request(), environment=bare))
        try:
            bench.wait_ready(deployment)
        finally:
            deployment.stop()
    said = str(refused.value)
    assert any(word in said for word in ("No module named", "has no package", "lacks")), said


def test_a_server_that_dies_while_it_loads_is_told_at_once(adapter: Adapter, bench: Bench) -> None:
    deployment = bench.deploy(bench.request(Tuning(replicas=1), load_s=30))
    try:
        until(deployment.process.alive, "it has been started")
        time.sleep(1)
        deployment.check_alive()
        assert bench.guardian.signal(deployment.process, signal.SIGKILL)
        until(lambda: not deployment.process.alive(), "it is dead")
        with pytest.raises(TailraceError, match="main process has ended") as refused:
            deployment.check_alive()
        assert str(deployment.log) in str(refused.value)
        assert not deployment.claims_ready()
    finally:
        deployment.stop()
    assert closed(deployment)
    assert not list(descendants(deployment.process))


needs_torch = (
    pytest.mark.torch,
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the CPU build of torch is tested on Python 3.11"),
)


@pytest.mark.parametrize(
    ("workload", "device"),
    [
        ("emulated", "emulated"),
        pytest.param("minilm", "cpu", marks=needs_torch),
        pytest.param("resnet50", "cpu", marks=needs_torch),
    ],
)
def test_every_workload_gives_the_reference(
    adapter: Adapter, bench: Bench, workload: str, device: Device, tmp_path: Path
) -> None:
    prepared = prepare(workload, models=(workload,), device=device, seed=7, options={}, environment_kind="venv")
    requirements = [adapter.requirements, *([prepared.requirements] if prepared.requirements else [])]
    environment = environments.build("venv", requirements, name=adapter.name)
    request = bench.request(Tuning(max_batch=4, replicas=1), models=(workload,))
    deployment = bench.deploy(
        replace(
            request,
            workload=prepared,
            environment=environment,
            server_env={**request.server_env, **device_environment(tmp_path, devices=1)},
        )
    )
    try:
        deadline = time.monotonic() + adapter.start_timeout_s
        while not deployment.claims_ready():
            deployment.check_alive()
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.1)
        endpoint = deployment.endpoint

        def difference(payload_id: int) -> str | None:
            answer = exchange(endpoint, endpoint.codec.encode(workload, prepared.payloads[payload_id]), 60)
            if not answer.ok:
                return answer.text
            return check_answer(endpoint, prepared, workload, payload_id, answer.headers, answer.body)

        with ThreadPoolExecutor(4) as pool:  # in batches, where there are any
            assert list(pool.map(difference, range(8))) == [None] * 8
    finally:
        deployment.stop()
