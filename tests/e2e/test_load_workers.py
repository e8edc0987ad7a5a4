"""Several load workers under one master: no instant changes, records come back whole, a lost worker is told."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tailrace.harness.errors import TailraceError
from tailrace.harness.processes import free_ports
from tailrace.harness.replay.driver import LoadGenerator, Progress, ReplayResult, Workers
from tests.conftest import wait_until
from tests.e2e.test_replay_driver import Echo, QuietServer, generator, records, schedule

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = QuietServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def replay(load: LoadGenerator, *, lead_s: float = 0.5) -> ReplayResult:
    load.start()
    load.go(time.monotonic_ns() + int(lead_s * 1e9))
    return load.wait()


def workers_of(load: LoadGenerator) -> list[psutil.Process]:
    return psutil.Process(load.pid).children()


@contextlib.contextmanager
def load_worker(master: str) -> Iterator[subprocess.Popen[str]]:
    """``tailrace load-worker``, as on another machine."""
    command = [sys.executable, "-m", "tailrace.cli.main", "load-worker", "--master", master]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_two_workers_send_every_arrival_once_at_its_own_instant(tmp_path: Path, port: int) -> None:
    plan = schedule([-200.0, *np.linspace(0, 1500, 301)])
    with generator(plan, port, tmp_path, workers=Workers(local=2)) as load:
        result = replay(load)
        children = workers_of(load)
    assert result.failure is None
    assert result.recorded == len(plan)
    table = records(tmp_path).sort_by("arrival_id")
    assert table["arrival_id"].to_pylist() == list(range(len(plan)))
    assert table["intended_ns"].to_pylist() == plan.intended_ns.tolist()
    assert table["worker"].to_pylist() == [index % 2 for index in range(len(plan))]
    assert set(table["outcome"].to_pylist()) == {"ok"}
    sent = np.array(table["sent_ns"].to_pylist())
    assert (sent >= plan.intended_ns).all(), "nothing is sent before its instant"
    assert sum(answer.count for answer in result.answers) == len(plan), "answers of both workers come back"
    assert [worker.lost for worker in result.workers] == [None, None]
    assert [(w.clock_offset_ms, w.clock_uncertainty_ms) for w in result.workers] == [(0, 0), (0, 0)], "one clock"
    assert all(worker.cpu_s and worker.start_lag_p99_ms is not None for worker in result.workers)
    assert result.cpu_s == pytest.approx(sum(worker.cpu_s or 0 for worker in result.workers))
    wait_until(lambda: not any(child.is_running() for child in children), "the workers have ended")


def test_grpc_errors_keep_their_texts_apart(tmp_path: Path) -> None:
    """Each worker numbers its own error texts; nobody listens here, so all of them fail."""
    (dead,) = free_ports(1)
    plan = schedule(list(np.linspace(0, 400, 40)))
    with generator(plan, dead, tmp_path, workers=Workers(local=2), protocol="grpc") as load:
        result = replay(load)
    table = records(tmp_path)
    assert result.recorded == len(plan)
    assert set(table["outcome"].to_pylist()) == {"connection"}
    assert all(error.startswith("gRPC UNAVAILABLE") for error in table["error"].to_pylist())


def test_the_live_figures_are_those_of_all(tmp_path: Path, port: int) -> None:
    seen: list[Progress] = []
    plan = schedule(list(np.linspace(0, 3000, 300)))
    with generator(plan, port, tmp_path, workers=Workers(local=2)) as load:
        load.start()
        load.go(time.monotonic_ns() + 500_000_000)
        load.wait(seen.append)
    assert max(progress.done for progress in seen) == len(plan)
    assert max(progress.rate_rps for progress in seen) > 60
    assert any(progress.p99_ms for progress in seen), "Locust's master has joined the statistics"


def test_a_lost_worker_is_told_and_the_rest_is_kept(tmp_path: Path, port: int) -> None:
    plan = schedule(list(np.linspace(0, 6000, 600)))
    with generator(plan, port, tmp_path, workers=Workers(local=2)) as load:
        load.start()
        load.go(time.monotonic_ns() + 500_000_000)
        begun: list[Progress] = []
        victim = workers_of(load)[0]

        def kill_once(progress: Progress) -> None:
            if progress.done > 100 and not begun:
                begun.append(progress)
                victim.kill()

        result = load.wait(kill_once)
    assert begun
    table = records(tmp_path)
    assert table.num_rows == len(plan), "every arrival has its row"
    lost = next(index for index, worker in enumerate(result.workers) if worker.lost)
    assert result.failure is not None and "exit code -9" in result.failure
    by_worker = {index: [] for index in (0, 1)}  # type: dict[int, list[str]]
    for worker, outcome in zip(table["worker"].to_pylist(), table["outcome"].to_pylist(), strict=True):
        by_worker[worker].append(outcome)
    assert "dropped" in by_worker[lost] and "ok" in by_worker[lost], "what it had sent before is kept"
    assert set(by_worker[1 - lost]) == {"ok"}, "the other one goes on to the end"


def test_a_frozen_worker_is_lost_too(tmp_path: Path, port: int) -> None:
    plan = schedule(list(np.linspace(0, 9000, 300)))
    with generator(plan, port, tmp_path, workers=Workers(local=2)) as load:
        load.start()
        load.go(time.monotonic_ns() + 500_000_000)
        victim = workers_of(load)[1]
        victim.suspend()
        result = load.wait()
    assert result.failure is not None and "not heard of" in result.failure
    assert records(tmp_path).num_rows == len(plan)


def test_workers_on_other_machines_come_and_come_again(tmp_path: Path, port: int) -> None:
    (listen,) = free_ports(1)
    master = f"127.0.0.1:{listen}"
    with load_worker(master):
        for number in (1, 2):
            folder = tmp_path / str(number)
            folder.mkdir()
            plan = schedule(list(np.linspace(0, 500, 50)))
            with generator(plan, port, folder, workers=Workers(local=1, remote=1, listen=master)) as load:
                result = replay(load)
            assert result.failure is None
            assert set(records(folder)["worker"].to_pylist()) == {0, 1}
            assert [worker.host is not None for worker in result.workers] == [True, True]


def test_the_only_worker_may_be_remote(tmp_path: Path, port: int) -> None:
    (listen,) = free_ports(1)
    master = f"127.0.0.1:{listen}"
    with (
        load_worker(master),
        generator(schedule([0.0, 10.0]), port, tmp_path, workers=Workers(local=0, remote=1, listen=master)) as load,
    ):
        assert replay(load).recorded == 2


def test_a_worker_that_does_not_come_is_missed(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailrace.harness.replay.driver.START_TIMEOUT_S", 4.0)
    with (
        generator(schedule([0.0]), port, tmp_path, workers=Workers(local=1, remote=1)) as load,
        pytest.raises(TailraceError, match="load process did not start"),
    ):
        load.start()


def test_workers_end_with_a_killed_master(tmp_path: Path, port: int) -> None:
    plan = schedule(list(np.linspace(0, 60_000, 600)))
    with generator(plan, port, tmp_path, workers=Workers(local=2)) as load:
        load.start()
        load.go(time.monotonic_ns() + 500_000_000)
        children = workers_of(load)
        assert len(children) == 2
        psutil.Process(load.pid).kill()
        result = load.wait()
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), "they ended")
    assert result.failure is not None
    assert records(tmp_path).num_rows == len(plan), "what was not sent is recorded as dropped"
