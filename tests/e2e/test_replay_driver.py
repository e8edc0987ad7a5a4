"""The load generator as the harness uses it: a real load process, its records, and the ways it can end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tailrace.harness.contract.codecs import PreparedRequest, http_request
from tailrace.harness.errors import StorageError, TailraceError
from tailrace.harness.plan.schedule import Schedule
from tailrace.harness.processes import ProcessRef
from tailrace.harness.records.schema import REQUEST_SCHEMA
from tailrace.harness.records.tables import finish_table, read_table
from tailrace.harness.replay import driver
from tailrace.harness.replay.driver import LoadGenerator, Progress, ReplayResult

pytestmark = pytest.mark.e2e


class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.path.encode() + b" " + body
        # In one piece: two would wait for each other (Nagle's algorithm, delayed acknowledgements).
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(answer)}\r\n\r\n"
        self.wfile.write(head.encode() + answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients are killed here


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = QuietServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def schedule(at_ms: list[float], models: tuple[str, ...] = ("m",)) -> Schedule:
    count = len(at_ms)
    return Schedule(
        intended_ns=(np.array(at_ms) * 1e6).astype(np.int64),
        model=(np.arange(count) % len(models)).astype(np.uint16),
        payload_id=(np.arange(count) % 3).astype(np.int32),
        phase=(np.array(at_ms) >= 0).astype(np.uint8),
        models=models,
    )


def generator(plan: Schedule, port: int, folder: Path, **options: Any) -> LoadGenerator:
    requests = {
        (model, payload): PreparedRequest(http_request("127.0.0.1", port, f"/{name}", b"payload %d" % payload, {}))
        for model, name in enumerate(plan.models)
        for payload in range(3)
    }
    arguments: dict[str, Any] = {
        "schedule": plan,
        "requests": requests,
        "protocol": "http",
        "host": "127.0.0.1",
        "port": port,
        "timeout_s": 10.0,
        "max_connections": 64,
        "records": folder / "requests",
        "log": folder / "load.log",
    }
    return LoadGenerator(**{**arguments, **options})


def until(condition: Callable[[], bool], patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def records(folder: Path) -> pa.Table:
    table = read_table(folder / "requests", REQUEST_SCHEMA)
    assert table is not None
    return table


def rows_on_disk(folder: Path) -> int:
    table = read_table(folder / "requests", REQUEST_SCHEMA)
    return 0 if table is None else table.num_rows


def test_a_trial_from_plan_to_parquet(port: int, tmp_path: Path) -> None:
    plan = schedule([-200.0, -100.0, *(5.0 * k for k in range(200))], models=("a", "b"))
    progress: list[Progress] = []
    with generator(plan, port, tmp_path) as load:
        load.start()
        pid = load.pid
        load.go(time.monotonic_ns() + 300_000_000)
        result = load.wait(progress.append)
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()
    assert result.failure is None
    assert not result.aborted
    assert result.recorded == 202
    assert result.cpu_s > 0
    assert result.start_lag_p50_ms is not None
    assert result.start_lag_p99_ms is not None
    assert 0 <= result.start_lag_p50_ms <= result.start_lag_p99_ms
    assert 1 <= result.peak_connections <= result.connections_opened <= 64

    finish_table(tmp_path / "requests", sort_by="arrival_id")
    rows = records(tmp_path)
    assert rows.schema.equals(REQUEST_SCHEMA)
    assert rows["arrival_id"].to_pylist() == list(range(202))
    assert rows["intended_ns"].to_pylist() == plan.intended_ns.tolist()
    assert set(rows["outcome"].to_pylist()) == {"ok"}
    assert rows["phase"].to_pylist() == ["warmup"] * 2 + ["measure"] * 200
    assert rows["model"].to_pylist() == ["a", "b"] * 101
    assert rows["payload_id"].to_pylist() == [k % 3 for k in range(202)]
    assert set(rows["status"].to_pylist()) == {200}
    assert rows["error"].null_count == 202
    sent, done = rows["sent_ns"].to_numpy(), rows["done_ns"].to_numpy()
    assert result.start_lag_p99_ms <= (sent - plan.intended_ns).max() / 1e6
    assert (sent >= plan.intended_ns).all()
    assert (done >= sent).all()

    # Every answer was looked at, and each is the one to its own request.
    assert result.unchecked == 0
    assert {(answer.model, answer.payload_id): answer.body for answer in result.answers} == {
        (model, payload): f"/{model} payload {payload}".encode() for model in "ab" for payload in range(3)
    }
    assert sum(answer.count for answer in result.answers) == 202
    assert result.answers[0].headers == {"content-type": "text/plain"}

    assert progress[-1].done == progress[-1].ok == progress[-1].intended == progress[-1].sent == 202
    assert progress[-1].failed == 0
    assert progress[0].t_s < progress[-1].t_s
    assert [step.done for step in progress] == sorted(step.done for step in progress)


def test_an_empty_schedule(port: int, tmp_path: Path) -> None:
    with generator(schedule([]), port, tmp_path) as load:
        load.start()
        load.go(time.monotonic_ns())
        result = load.wait()
    assert (result.recorded, result.answers, result.failure) == (0, (), None)
    assert rows_on_disk(tmp_path) == 0


def test_a_load_process_killed_amid_a_trial(port: int, tmp_path: Path) -> None:
    plan = schedule([20.0 * k for k in range(1000)])
    with generator(plan, port, tmp_path) as load:
        load.start()
        load.go(time.monotonic_ns())
        until(lambda: rows_on_disk(tmp_path) > 10)
        assert load.pid is not None
        os.kill(load.pid, signal.SIGKILL)
        result = load.wait()
    assert result.failure == "the load process ended (exit code -9)"
    assert (result.start_lag_p50_ms, result.start_lag_p99_ms) == (None, None)
    assert result.recorded == 1000
    rows = records(tmp_path).sort_by("arrival_id")
    assert rows["arrival_id"].to_pylist() == list(range(1000))
    outcomes = rows["outcome"].to_pylist()
    good = outcomes.count("ok")
    assert good > 10
    assert outcomes == ["ok"] * good + ["dropped"] * (1000 - good)
    assert set(rows["error"].to_pylist()[good:]) == {"load generator ended"}
    assert rows["sent_ns"].null_count == 1000 - good
    assert (rows["done_ns"].to_numpy() >= rows["intended_ns"].to_numpy()).all()


def test_an_aborted_trial_keeps_what_was_sent(port: int, tmp_path: Path) -> None:
    plan = schedule([20.0 * k for k in range(1000)])
    with generator(plan, port, tmp_path) as load:
        load.start()
        load.go(time.monotonic_ns())
        until(lambda: rows_on_disk(tmp_path) > 10)
        load.abort()
        result = load.wait()
    assert result.aborted
    assert result.failure is None
    rows = records(tmp_path).sort_by("arrival_id")
    assert 10 < result.recorded == rows.num_rows < 1000
    assert rows["arrival_id"].to_pylist() == list(range(rows.num_rows))
    assert sum(answer.count for answer in result.answers) >= rows.num_rows - 1


def test_an_abort_does_not_wait_for_the_rest_of_the_trace(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "END_GRACE_S", 1.0)
    results: list[ReplayResult] = []
    with generator(schedule([0.0, 3_600_000.0]), port, tmp_path, timeout_s=0.5) as load:
        load.start()
        load.go(time.monotonic_ns())
        waiting = threading.Thread(target=lambda: results.append(load.wait()), daemon=True)
        waiting.start()
        until(lambda: rows_on_disk(tmp_path) == 1)
        assert load.pid is not None
        os.kill(load.pid, signal.SIGSTOP)  # it will not hear of the abort
        load.abort()
        waiting.join(30)
        assert not waiting.is_alive()
    assert results[0].aborted
    assert "recorded nothing" in (results[0].failure or "")
    assert results[0].recorded == rows_on_disk(tmp_path) == 1


def test_a_trial_that_never_began_ends_with_nothing(port: int, tmp_path: Path) -> None:
    with generator(schedule([0.0]), port, tmp_path) as load:
        load.start()
        load.abort()
        assert load.wait().recorded == 0
    with generator(schedule([0.0]), port, tmp_path) as load:
        load.start()
        pid = load.pid
    assert not Path(f"/proc/{pid}").exists()


def test_the_load_process_ends_when_the_harness_is_killed(port: int, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_replay_driver import generator, schedule
        load = generator(schedule([20.0 * k for k in range(5000)]), int(sys.argv[2]), Path(sys.argv[3]))
        load.start()
        load.go(time.monotonic_ns())
        print(load.pid, flush=True)
        load.wait()
        """
    )
    harness = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(port), str(tmp_path)], stdout=subprocess.PIPE
    )
    with contextlib.closing(harness.stdout) as stdout:
        assert stdout is not None
        load_process = ProcessRef.of(int(stdout.readline()))
        until(lambda: rows_on_disk(tmp_path) > 10)
        harness.kill()
        harness.wait()
    until(lambda: not load_process.alive())
    assert rows_on_disk(tmp_path) > 10  # what was measured is readable


def test_a_full_disk_ends_the_trial_and_keeps_what_was_written(port: int, tmp_path: Path) -> None:
    plan = schedule([float(k) for k in range(20_000)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with generator(plan, port, tmp_path) as load:
        load.start()
        pid = load.pid
        load.go(time.monotonic_ns())
        until(lambda: rows_on_disk(tmp_path) > 10)
        size = (tmp_path / "requests.arrow").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, hard))
        try:
            with pytest.raises(StorageError, match=r"requests\.arrow"):
                load.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not Path(f"/proc/{pid}").exists()
    assert rows_on_disk(tmp_path) > 10


def test_records_that_cannot_be_created(port: int, tmp_path: Path) -> None:
    with (
        generator(schedule([0.0]), port, tmp_path, records=tmp_path / "none" / "requests") as load,
        pytest.raises(StorageError, match="none"),
    ):
        load.start()


def test_a_load_process_that_does_not_start(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with (
        generator(schedule([0.0]), port, tmp_path) as load,
        pytest.raises(TailraceError, match="did not start") as caught,
    ):
        load.start()
    assert caught.value.detail  # what the process said


def test_a_log_that_cannot_be_created(port: int, tmp_path: Path) -> None:
    with (
        generator(schedule([0.0]), port, tmp_path, log=tmp_path / "none" / "load.log") as load,
        pytest.raises(StorageError, match=r"load\.log"),
    ):
        load.start()


@pytest.fixture
def deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Load processes never read their plan; the file appears when one ends without having been killed."""
    lived = tmp_path / "lived"
    script = tmp_path / "deaf"
    # A shell that waits in a builtin, and so leaves no child behind that would keep the pipes open.
    script.write_text(f"#!/bin/bash\nread -t 20 <> <(:)\necho > '{lived}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return lived


def more_than_a_pipe_holds(port: int, folder: Path) -> LoadGenerator:
    requests = {(0, payload): PreparedRequest(bytes(1_000_000)) for payload in range(3)}
    return generator(schedule([0.0]), port, folder, requests=requests)


def test_a_load_process_that_does_not_read_its_plan(
    port: int, tmp_path: Path, deaf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "START_TIMEOUT_S", 1.0)
    with (
        more_than_a_pipe_holds(port, tmp_path) as load,
        pytest.raises(TailraceError, match="did not start: it was not ready after 1 s"),
    ):
        load.start()
    assert not Path(f"/proc/{load.pid}").exists()
    assert not deaf.exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, as on a terminal; where tests run side by side it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_the_plan_is_handed_over(port: int, tmp_path: Path, deaf: Path) -> None:
    main_thread = threading.get_ident()

    def interrupt() -> None:
        until(lambda: load.pid is not None)
        time.sleep(0.5)  # by now the pipe is full
        signal.pthread_kill(main_thread, signal.SIGINT)

    with more_than_a_pipe_holds(port, tmp_path) as load, pytest.raises(KeyboardInterrupt):
        threading.Thread(target=interrupt, daemon=True).start()
        load.start()
    assert not Path(f"/proc/{load.pid}").exists()
    assert not deaf.exists()


def test_closing_from_elsewhere_while_the_plan_is_handed_over(port: int, tmp_path: Path, deaf: Path) -> None:
    with more_than_a_pipe_holds(port, tmp_path) as load:

        def close() -> None:
            until(lambda: load.pid is not None)
            time.sleep(0.5)  # by now the pipe is full
            load.close()

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        with pytest.raises(TailraceError, match="did not start: it was closed"):
            load.start()
        closing.join(30)
        assert not closing.is_alive()
    assert not deaf.exists()


def test_a_request_that_was_not_prepared_is_a_mistake_of_the_caller(port: int, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        generator(schedule([0.0]), port, tmp_path, requests={})
