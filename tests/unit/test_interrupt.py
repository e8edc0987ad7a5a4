"""The policy for Ctrl-C and SIGTERM holds in every command, and whatever starts servers says what it keeps."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from tailrace.cli.main import app

BEFORE_SERVERS = {
    "run": (["smoke", "--out", "out"], "harness.run.runner.check"),
    "pareto": (["--out", "out"], "harness.run.runner.check"),
    "tune": (["--adapter", "null", "--out", "out"], "harness.run.runner.check"),
    "saturate": (["smoke", "--out", "out"], "harness.run.runner.check"),
    "validate-sim": (["--out", "out"], "harness.run.runner.check"),
    "coldstart": (["null", "--out", "out"], "harness.run.coldstart.prepare"),
    "ceiling": (["emulated"], "harness.run.ceiling.prepare"),
    "loadgen": ([], "harness.run.ruler.NullServer"),
}
"""Each command that starts servers, and where it can be interrupted before it does."""
NO_SERVERS = {
    *(
        "report",
        "index",
        "summary",
        "compare",
        "gate",
        "recommend",
        "simulate",
        "fit",
        "calibrate",
        "adapters",
        "doctor",
        "clean",
    ),
    *("traces", "plan", "baseline"),
    "load-worker",  # sends load, and has nothing to keep
}


def test_every_command_is_known_to_start_servers_or_not() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == BEFORE_SERVERS.keys() | NO_SERVERS


@pytest.mark.parametrize("command", BEFORE_SERVERS)
def test_whatever_starts_servers_says_what_it_keeps(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments, where = BEFORE_SERVERS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"tailrace.{where}", interrupted)
    done = CliRunner().invoke(app, [command, *arguments])
    assert done.exit_code == 130, done.output
    assert "interrupted; " in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_only_the_first_signal_interrupts(sent: signal.Signals) -> None:
    """A process that is ended again and again while it cleans up still cleans up, and says so."""
    code = f"""
import os
from tailrace.cli.interrupt import heed_interrupts
heed_interrupts()
try:
    os.kill(os.getpid(), {sent.value})
except KeyboardInterrupt:
    for number in {int(signal.SIGINT)}, {int(signal.SIGTERM)}:
        os.kill(os.getpid(), number)
    print("cleaned up")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "cleaned up\n"), done.stderr
    assert done.stderr.count("already stopping") == 2


def test_nothing_else_decides_about_these_signals() -> None:
    """But processes of their own, which the harness starts."""
    root = Path(__file__).parents[2]
    rooms = ("cli", "harness", "reports", "simulator", "tuner", "gate", "traces")
    found = {
        str(path.relative_to(root))
        for room in rooms
        for path in (root / room).rglob("*.py")
        if "signal.signal(" in path.read_text(encoding="utf-8")
    }
    assert found == {"cli/interrupt.py", "harness/servers/guardian_process.py"}
