"""Ctrl-C in the commands that make several runs: the first one stops servers and keeps what was measured, a second one changes
nothing. What `tailrace run` and `tailrace coldstart` do is tested with them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tailrace.harness.records.store import RunFolder
from tests.conftest import wait_until

pytestmark = pytest.mark.e2e

COMMANDS = {
    "pareto": ["--adapter", "null"],
    "tune": ["--adapter", "null", "--trace", "surge"],
    "saturate": ["smoke", "--adapter", "null", "--set", "trace.params.duration_s=60"],
    "validate-sim": ["--adapter", "reference"],
}


def begun(out: Path, stage: str) -> list[Path]:
    """The events of all trials that have reached a stage."""
    return [path for path in out.rglob("events.jsonl") if f'"{stage}"' in path.read_text()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_ctrl_c_does_not_cut_the_cleaning_up(
    tmp_path: Path, command: str, leftovers: Callable[[], list[str]]
) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "tailrace.cli.main", command, *COMMANDS[command], "--out", "out"]
    harness = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: begun(out, "warm up") != [] or harness.poll() is not None, "a server serves", 300)
        time.sleep(6)  # into the measured span
        servers = psutil.Process(harness.pid).children(recursive=True)
        for _ in range(2):
            harness.send_signal(signal.SIGINT)
            time.sleep(0.1)
        _, told = harness.communicate(timeout=120)
    finally:
        harness.kill()
    assert servers
    assert harness.returncode == 130, told
    assert "already stopping" in told, "the second one came while servers were being stopped"
    assert "interrupted; what was measured is in out" in told
    assert "go on with" in told
    assert "Traceback" not in told
    wait_until(lambda: not any(server.is_running() for server in servers), "every process has ended", 60)
    wait_until(lambda: not leftovers(), "no process is left", 60)
    (events,) = begun(out, "warm up")
    run = RunFolder.open(events.parents[2])
    (trial,) = run.trials
    assert run.manifest["state"] == "interrupted"
    assert trial.facts.state == "interrupted"
    assert trial.requests is not None and trial.requests.num_rows > 0, "what was measured is kept"
