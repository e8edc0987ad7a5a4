"""A real reference server through its adapter: what is its own way, beside what the contract suite asks of everyone."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from tailrace.adapters.reference.adapter import ADAPTER, Options, ReferenceDeployment
from tailrace.harness.contract.adapter import Autoscale, Tuning
from tailrace.harness.contract.control import ControlConnection
from tailrace.harness.contract.exchange import Answer, exchange
from tailrace.harness.processes import descendants
from tailrace.harness.servers import environments
from tailrace.harness.servers.guardian import Guardian
from tests.contract.bench import Bench, Stream, ask, ask_all, closed, until

pytestmark = pytest.mark.e2e

PACE = {"averaged_over_s": 2.0, "up_after_s": 0.0, "down_after_s": 10.0}
"""The server's own, where the knob leaves it open."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    environment = environments.build("venv", [ADAPTER.requirements], name=ADAPTER.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILRACE_STATE", str(tmp_path_factory.mktemp("state")))
        with Guardian() as guardian:
            yield Bench(ADAPTER, environment, guardian, tmp_path_factory.mktemp("reference"))


@contextmanager
def served(bench: Bench, tuning: Tuning, options: Options = Options()) -> Iterator[ReferenceDeployment]:  # noqa: B008 - frozen
    with bench.running(replace(bench.request(tuning), options=options)) as deployment:
        assert isinstance(deployment, ReferenceDeployment)
        yield deployment


def counted(deployment: ReferenceDeployment, metric: str) -> float:
    """One of the server's own metrics."""
    page = control(deployment).page("/metrics")
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(metric + "{"))


def control(deployment: ReferenceDeployment) -> ControlConnection:
    return ControlConnection("reference", deployment.endpoint.host, deployment.endpoint.port, deployment.log)


def pids(deployment: ReferenceDeployment) -> set[int]:
    return {replica.process.pid for replica in deployment.replicas()}


def raw(deployment: ReferenceDeployment, sleep_ms: int = 0) -> Answer:
    """One request and its answer, headers and all."""
    x = np.array([1, sleep_ms, 0, 0], dtype=np.int32)
    return exchange(deployment.endpoint, deployment.endpoint.codec.encode("alpha", {"x": x}), 60)


def test_what_a_dead_replica_held_is_answered_by_another(bench: Bench) -> None:
    """No request is lost, though some are computed twice; the replica is replaced."""
    with (
        served(bench, Tuning(max_batch=4, batch_window_ms=20, replicas=2)) as deployment,
        ThreadPoolExecutor(40) as pool,
    ):
        first = pids(deployment)
        asked = [pool.submit(ask, deployment, "alpha", number, sleep_ms=300) for number in range(24)]
        until(lambda: counted(deployment, "in_flight") > counted(deployment, "queue_depth"), "batches are in hand")
        for replica in deployment.replicas()[:1]:
            assert bench.guardian.signal(replica.process, signal.SIGKILL)
        replies = [future.result() for future in asked]
        assert all(reply.right for reply in replies), [reply.said for reply in replies if not reply.right]
        assert counted(deployment, "requests_retried_total") >= 1
        assert counted(deployment, "requests_ok_total") >= 24
        assert counted(deployment, "requests_failed_total") == 0
        until(lambda: len(pids(deployment)) == 2 and pids(deployment) != first, "it is replaced")
        assert counted(deployment, "replica_deaths_total") == 1


def test_no_request_is_lost_whatever_the_router_when_a_replica_dies_in_a_stream(bench: Bench) -> None:
    for router in ("shared", "round_robin", "power_of_two"):
        with (
            served(bench, Tuning(max_batch=4, replicas=2), Options(router=router)) as deployment,
            Stream(deployment, 50) as stream,
        ):
            time.sleep(0.5)
            assert bench.guardian.signal(deployment.replicas()[0].process, signal.SIGKILL)
            until(lambda d=deployment: counted(d, "replica_deaths_total") == 1, "the server has noticed")
            until(lambda d=deployment: len(pids(d)) == 2, "it is replaced")
            replies = stream.finish()
        assert len(replies) > 25
        assert all(reply.right for reply in replies), (router, {reply.said for reply in replies})


def test_a_request_that_two_replicas_have_died_with_is_answered_with_an_error(bench: Bench) -> None:
    with served(bench, Tuning(max_batch=1, replicas=1)) as deployment, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(raw, deployment, 30_000)
        for round_number in (1, 2):
            until(lambda: bool(pids(deployment)), "there is a replica")
            until(lambda: counted(deployment, "in_flight") > counted(deployment, "queue_depth"), "it has the request")
            assert bench.guardian.signal(deployment.replicas()[0].process, signal.SIGKILL)
            until(lambda n=round_number: counted(deployment, "replica_deaths_total") == n, "it is dead")
        answer = asked.result()
        assert answer.text == "HTTP 500: two replicas have died with this request"
        until(lambda: ask(deployment).right, "the server goes on")


def test_a_full_queue_sheds_and_says_when_to_come_back(bench: Bench) -> None:
    with served(bench, Tuning(max_batch=1, queue_limit=2, replicas=1)) as deployment, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: raw(deployment, 700), range(12)))
        shed = [answer for answer in answers if not answer.ok]
        assert 0 < len(shed) < 12
        assert all(answer.text.startswith("HTTP 503: overloaded") for answer in shed), shed
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in shed)
        assert counted(deployment, "requests_shed_total") == len(shed)
        assert counted(deployment, "requests_failed_total") == 0


@pytest.mark.parametrize("admission", ["queue", "slo"])
def test_admission_control_turns_away_what_would_be_late(bench: Bench, admission: str) -> None:
    """Thirty at once for one replica that takes half a second for each: most of them cannot be answered within two."""
    options = Options.model_validate({"admission": admission, "slo_ms": 2000})
    with served(bench, Tuning(max_batch=1, batch_window_ms=0, replicas=1), options) as deployment:
        assert all(ask(deployment, sleep_ms=500).right for _ in range(3)), "it learns how long a batch takes"
        replies = ask_all(deployment, 30, sleep_ms=500, at_once=30)
        shed = [reply for reply in replies if reply.shed]
        assert all(reply.right for reply in replies if not reply.shed)
        if admission == "queue":
            assert not shed, "there is room for all in the queue, however late they are answered"
        else:
            assert 20 <= len(shed) < 30


def test_it_scales_with_a_surge_and_back(bench: Bench) -> None:
    scale = Autoscale(min=1, max=3, target_ongoing=3, averaged_over_s=0.3, up_after_s=0, down_after_s=1)
    with served(bench, Tuning(max_batch=2, autoscale=scale)) as deployment:
        assert len(pids(deployment)) == 1
        assert deployment.applied()["autoscale"] == {**PACE, **scale.model_dump()}
        with Stream(deployment, 20) as stream:

            def grown() -> bool:
                ask_all(deployment, 24, sleep_ms=300, at_once=24)
                return len(pids(deployment)) == 3

            until(grown, "there are three")
            replies = stream.finish()
        assert all(reply.right for reply in replies), "nobody is lost meanwhile"
        until(lambda: len(pids(deployment)) == 1, "there is one again")
        assert ask(deployment).right


def test_a_warm_pool_is_there_before_it_is_called_for(bench: Bench) -> None:
    scale = Autoscale(min=1, max=4, target_ongoing=100)
    with served(bench, Tuning(autoscale=scale), Options(warm_pool=2)) as deployment:
        assert len(pids(deployment)) == 3
        assert deployment.applied()["autoscale"] == {**scale.model_dump(), **PACE}, "the knob is what was asked for"


def test_from_none_to_one_and_back(bench: Bench) -> None:
    scale = Autoscale(min=0, max=1, target_ongoing=2, averaged_over_s=0.2, down_after_s=1)
    with served(bench, Tuning(autoscale=scale)) as deployment:
        until(lambda: not pids(deployment), "there is none")
        assert deployment.health(), "it would be answered"
        assert ask(deployment).right, "after a cold start"
        until(lambda: not pids(deployment), "there is none again")


def test_told_to_end_it_finishes_what_it_holds_and_takes_nothing_more(bench: Bench) -> None:
    with served(bench, Tuning(max_batch=2, replicas=1)) as deployment, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, deployment, "alpha", number, sleep_ms=700) for number in range(6)]
        until(lambda: counted(deployment, "in_flight") == 6, "all of them are there")
        assert bench.guardian.signal(deployment.process, signal.SIGTERM)
        until(lambda: not deployment.health(), "it says that it is not ready")
        late = raw(deployment)
        assert late.text == "HTTP 503: shutting down"
        assert late.headers["retry-after"] == "1"
        assert all(future.result().right for future in asked)
        until(lambda: not deployment.process.alive(), "it has ended by itself")
        assert closed(deployment)
        assert "Traceback" not in deployment.log.read_text(encoding="utf-8")


def test_told_to_end_while_it_loads_it_does_not_wait_for_that(bench: Bench) -> None:
    deployment = bench.deploy(bench.request(Tuning(replicas=2), load_s=600))
    try:
        assert isinstance(deployment, ReferenceDeployment)
        until(lambda: bool(control(deployment).says_ok("/v2/config")), "it listens")
        assert not deployment.claims_ready()
        until(lambda: len(list(descendants(deployment.process))) == 3, "its replicas have been started")
        assert bench.guardian.signal(deployment.process, signal.SIGTERM)
        until(lambda: not deployment.process.alive(), "it has ended by itself")
        assert "Traceback" not in deployment.log.read_text(encoding="utf-8")
    finally:
        deployment.stop()


def test_a_replica_that_gives_no_sign_of_life_is_replaced_and_its_request_answered(bench: Bench) -> None:
    options = Options(health_timeout_s=1)
    with served(bench, Tuning(max_batch=1, replicas=1), options) as deployment, ThreadPoolExecutor(1) as pool:
        (victim,) = deployment.replicas()
        assert bench.guardian.signal(victim.process, signal.SIGSTOP)
        asked = pool.submit(ask, deployment)
        until(lambda: not victim.process.alive(), "it is given up")
        assert asked.result().right
        assert victim.process.pid not in pids(deployment)


def test_a_long_batch_is_no_illness(bench: Bench) -> None:
    with served(bench, Tuning(replicas=1), Options(health_timeout_s=1)) as deployment:
        before = pids(deployment)
        assert ask(deployment, sleep_ms=3500).right
        assert pids(deployment) == before


def test_a_server_that_was_stopped_itself_blames_no_replica(bench: Bench) -> None:
    with served(bench, Tuning(replicas=2), Options(health_timeout_s=1)) as deployment:
        before = pids(deployment)
        assert bench.guardian.signal_tree(deployment.process, signal.SIGSTOP) >= 3
        time.sleep(3)
        bench.guardian.signal_tree(deployment.process, signal.SIGCONT)
        assert ask(deployment).right
        time.sleep(2)
        assert pids(deployment) == before


def test_without_its_front_no_replica_lives_on(bench: Bench) -> None:
    with served(bench, Tuning(replicas=2)) as deployment:
        family = [reference for reference, _ in descendants(deployment.process)]
        assert len(family) == 3
        os.kill(deployment.process.pid, signal.SIGKILL)
        until(lambda: not any(reference.alive() for reference in family), "all have ended by themselves")


def test_who_has_gone_is_not_computed_for(bench: Bench) -> None:
    with served(bench, Tuning(max_batch=1, replicas=1)) as deployment, ThreadPoolExecutor(1) as pool:
        done = counted(deployment, "items_total")
        busy = pool.submit(ask, deployment, sleep_ms=1000)
        until(lambda: counted(deployment, "in_flight") == 1, "it is busy")
        request = deployment.endpoint.codec.encode("alpha", {"x": np.array([1, 0, 0, 0], dtype=np.int32)}).data
        with socket.create_connection((deployment.endpoint.host, deployment.endpoint.port)) as impatient:
            impatient.sendall(request)
            until(lambda: counted(deployment, "queue_depth") == 1, "it waits")
        until(lambda: counted(deployment, "queue_depth") == 0, "it is forgotten")
        assert busy.result().right
        assert counted(deployment, "items_total") == done + 1


def test_pages_methods_and_sizes_that_are_not_there_are_told(bench: Bench) -> None:
    with served(bench, Tuning()) as deployment:
        kept = http.client.HTTPConnection(deployment.endpoint.host, deployment.endpoint.port, timeout=30)

        def status(method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
            kept.request(method, path, body)
            answer = kept.getresponse()
            return answer.status, answer.read().decode()

        infer = "/v2/models/alpha/infer"
        assert status("GET", "/") == (404, "there is no such page")
        assert status("POST", "/v2/models/nobody/infer", b"") == (404, "there is no such model")
        assert status("GET", infer) == (405, "only POST")
        assert status("DELETE", "/metrics") == (405, "only GET")
        assert status("POST", infer, b"short") == (400, "the inputs of one item are 16 bytes, these are 5")
        assert status("GET", "/v2/models/alpha/ready")[0] == 200, "all over one connection"
        kept.putrequest("POST", infer)
        kept.putheader("Content-Length", str(1 << 20))
        kept.endheaders()
        assert kept.getresponse().status == 413, (
            "told before the body comes, for who has begun to send it may be cut off"
        )
        kept.close()
        for noise in (
            b"\0" * 100_000,
            b"GET / HTTP/1.1\r\n\r\n",
            b"\r\n\r\n" * 10,
            b"POST " + infer.encode() + b" HTTP/1.1",
        ):
            with socket.create_connection((deployment.endpoint.host, deployment.endpoint.port), timeout=30) as hostile:
                try:
                    hostile.sendall(noise)
                    hostile.shutdown(socket.SHUT_WR)
                    assert hostile.recv(1 << 16)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
                except ConnectionError:
                    continue  # hung up on while it was still sending
        assert ask(deployment).right
        assert "Traceback" not in deployment.log.read_text(encoding="utf-8")
