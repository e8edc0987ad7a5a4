"""Cold starts of real servers: what the command leaves behind, a penalty that is known, failures, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.run.coldstart import PHASES, ColdStarts, check
from tests.conftest import tailrace, wait_until

pytestmark = pytest.mark.e2e

FAILING = """
import functools
from tailrace.cli import main as cli
from tailrace.harness.run import coldstart
coldstart.check = functools.partial(coldstart.check, options={"null": {"fail_at_start": True}})
cli.main()
"""


def record_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "coldstart.json").read_text(encoding="utf-8"))
    return content


def page_in(folder: Path) -> str:
    return (folder / "coldstart.html").read_text(encoding="utf-8")


def measured(folder: Path, *, trials: int = 1, **options: Any) -> dict[str, Any]:
    starts = ColdStarts(check(["null"], "emulated", trials=trials, options={"null": options}), folder, print)
    starts.run()
    assert record_in(folder) == starts.record
    return starts.record


def test_a_penalty_that_is_known_is_found(tmp_path: Path, leftovers: Callable[[], list[str]]) -> None:
    record = measured(tmp_path / "out", trials=2, latency_ms=50, cold_requests=3, cold_ms=1000)
    assert record["state"] == "done"
    assert [trial["number"] for trial in record["trials"]] == [1, 2]
    for trial in record["trials"]:
        assert trial["state"] == "done"
        assert trial["first_request_ms"] >= 1050
        assert min(trial["request_ms"]) >= 50
        assert trial["first_request_penalty_ms"] > 0
        # Beyond the three slow ones the machine may hold one up, never hurry one.
        assert trial["warm_after_requests"] >= 3
        assert list(trial["phases"]) == list(PHASES["process"])
        assert sum(trial["phases"].values()) == pytest.approx(trial["since_start"]["first_answer_s"])
        assert trial["phases"]["first_answer_s"] >= 1.05
    (rehearsal,) = record["rehearsals"]
    assert rehearsal["number"] == 0
    assert record["summary"]["null"]["done"] == 2
    assert not leftovers()


def test_a_wrong_answer_fails_its_trial(tmp_path: Path) -> None:
    record = measured(tmp_path / "out", wrong_share=1.0)
    (trial,) = record["trials"]
    assert trial["state"] == "failed"
    assert "does not compute what the reference computes" in trial["error"]["message"]
    assert record["summary"]["null"] == {"trials": 1, "done": 0}


def test_starts_that_fail_are_told_and_all_are_tried(tmp_path: Path, leftovers: Callable[[], list[str]]) -> None:
    command = [sys.executable, "-c", FAILING, "coldstart", "null", "--trials", "2", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: 2 of 2 starts failed" in done.stderr
    assert "Traceback" not in done.stderr
    record = record_in(tmp_path / "out")
    assert [trial["state"] for trial in record["trials"]] == ["failed", "failed"]
    for trial in record["trials"]:
        assert trial["error"]["message"] == "the server's main process has ended"
        assert trial["error"]["detail"], "the log's tail"
        assert trial["error"]["detail"].splitlines()[-1] in done.stderr
        assert trial["error"]["detail"] in (tmp_path / "out" / trial["server"] / "logs" / "server.log").read_text()
    assert "FAILED" in page_in(tmp_path / "out")
    assert "0 of 2" in done.stdout
    assert not leftovers()


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, leftovers: Callable[[], list[str]]) -> None:
    command = [sys.executable, "-m", "tailrace.cli.main", "coldstart", "null", "--trials", "500", "--out", "out"]
    harness = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        second = tmp_path / "out" / "servers" / "null--2"
        wait_until(lambda: second.exists() or harness.poll() is not None, "the second trial has begun", 300)
        harness.send_signal(signal.SIGINT)
        _, told = harness.communicate(timeout=120)
    finally:
        harness.kill()
    assert harness.returncode == 130, told
    assert "Traceback" not in told
    record = record_in(tmp_path / "out")
    assert record["state"] == "interrupted"
    assert record["trials"][0]["state"] == "done"
    assert record["summary"]["null"]["done"] >= 1
    assert "CUT SHORT" in page_in(tmp_path / "out")
    wait_until(lambda: not leftovers(), "no process is left", 60)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tritn"], "did you mean 'triton'?"),
        (["null", "--workload", "emulatd"], "did you mean `emulated`?"),
        (["null", "--trials", "0"], "--trials"),
        (["null", "--mode", "model"], "leave null out"),
        (["null", "--out", "."], "never overwritten"),
    ],
)
def test_bad_input_is_one_message_and_starts_nothing(tmp_path: Path, given: list[str], said: str) -> None:
    (tmp_path / "mine").touch()
    done = tailrace("coldstart", *given, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_triton_starts_cold_and_leaves_nothing_but_its_record(
    tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    arguments = ("--workload", "emulated", "--trials", "2", "--format", "json", "--out", "out")
    done = tailrace("coldstart", "triton", *arguments, cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stderr
    told, record = json.loads(done.stdout), record_in(tmp_path / "out")
    assert told == record
    assert record["emulated"]
    assert [trial["state"] for trial in record["trials"]] == ["done", "done"]
    for trial in record["trials"]:
        assert all(took_s >= 0 for took_s in trial["phases"].values())
        assert min(trial["request_ms"]) >= 15, "the emulated device takes 12 ms, and 3 ms for the item"
        assert list((tmp_path / "out" / trial["server"] / "logs").iterdir())
        assert list((tmp_path / "out" / trial["server"] / "config").iterdir())
    assert 'role="img"' in page_in(tmp_path / "out")
    assert not leftovers()


def test_a_model_alone_is_unloaded_and_loaded_again(tmp_path: Path) -> None:
    done = tailrace(
        "coldstart", "triton", "--mode", "model", "--trials", "1", "--out", "out", cwd=tmp_path, timeout_s=900
    )
    assert done.returncode == 0, done.stderr
    record = record_in(tmp_path / "out")
    (trial,) = record["trials"]
    assert list(trial["phases"]) == ["load_s", "first_answer_s"]
    assert all(took_s > 0 for took_s in trial["phases"].values())
    assert record["rehearsals"] == []
    assert "says that it is loaded" in done.stdout
    assert (tmp_path / "out" / "coldstart.html").resolve() == Path(done.stdout.splitlines()[-1])
