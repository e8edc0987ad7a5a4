"""The guardian ends what a run started, however the run ends; real processes, no server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tailrace.harness.cgroups import cpu_root, refusal
from tailrace.harness.errors import DeployError
from tailrace.harness.processes import ProcessRef
from tailrace.harness.servers.guardian import Guardian, sweep

# A server that daemonises: it starts a grandchild in a session of its own and a child that ignores SIGTERM.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
        time.sleep(600)
    os._exit(0)
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILRACE_STATE", str(tmp_path / "state"))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def spawn_stubborn(host: Guardian, tmp_path: Path) -> tuple[ProcessRef, list[int]]:
    notes = tmp_path / "pids"
    process = host.spawn(
        "stubborn",
        [sys.executable, "-c", STUBBORN, str(notes)],
        env=dict(os.environ),
        cwd=tmp_path,
        log=tmp_path / "log",
    )
    wait_until(lambda: len(pids(notes)) == 2, "both processes run")
    return process, pids(notes)


def test_stop_tree_ends_daemonised_descendants_that_ignore_sigterm(tmp_path: Path) -> None:
    with Guardian() as host:
        process, family = spawn_stubborn(host, tmp_path)
        assert not any(gone(pid) for pid in family)
        host.stop_tree(process, grace_s=0.1)
        assert all(gone(pid) for pid in family)
        assert not process.alive()


def test_stopping_one_tree_leaves_the_other_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Guardian() as host:
        first, first_family = spawn_stubborn(host, tmp_path / "a")
        _, second_family = spawn_stubborn(host, tmp_path / "b")
        host.stop_tree(first, grace_s=0)
        assert all(gone(pid) for pid in first_family)
        assert not any(gone(pid) for pid in second_family)
    assert all(gone(pid) for pid in second_family)


def test_orphans_of_a_dead_server_are_asked_before_they_are_killed(tmp_path: Path) -> None:
    """Without the main process nobody hands SIGTERM on; a worker that ends on it need not be waited for."""
    notes, farewell = tmp_path / "pids", tmp_path / "farewell"
    code = (
        "import os, signal, sys, time, pathlib\n"
        "def end(*_): pathlib.Path(sys.argv[2]).write_text('in order'); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "if os.fork(): time.sleep(600)\n"
        "open(sys.argv[1], 'a').write(f'{os.getpid()}\\n')\n"
        "while True: time.sleep(1)\n"
    )
    with Guardian() as host:
        arguments = [sys.executable, "-c", code, str(notes), str(farewell)]
        server = host.spawn("parent", arguments, env={}, cwd=tmp_path, log=tmp_path / "log")
        wait_until(lambda: bool(pids(notes)), "the worker runs")
        host.signal(server, signal.SIGKILL)
        wait_until(lambda: not server.alive(), "its parent has gone")
        begun = time.monotonic()
        host.stop_tree(server, grace_s=60)
        assert time.monotonic() - begun < 50, "the grace was not waited out"
        assert gone(pids(notes)[0])
        assert farewell.read_text() == "in order"
        host.stop_tree(server, grace_s=60)  # once more is nothing more


def test_a_signal_reaches_ours_and_never_a_process_that_the_run_did_not_start(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with Guardian() as host:
            _, family = spawn_stubborn(host, tmp_path)
            assert not host.signal(ProcessRef.of(bystander.pid), signal.SIGKILL)
            assert bystander.poll() is None
            victim = ProcessRef.of(family[0])
            assert not host.signal(ProcessRef(victim.pid, victim.started_ticks + 1), signal.SIGKILL), "a recycled pid"
            assert victim.alive()
            assert host.signal(victim, signal.SIGKILL)
            wait_until(lambda: not victim.alive(), "the victim is dead")
    finally:
        bystander.kill()
        bystander.wait()


def test_a_program_that_does_not_exist_is_a_deploy_error_with_its_name(tmp_path: Path) -> None:
    with Guardian() as host, pytest.raises(DeployError, match="no-such-program"):
        host.spawn("ghost", ["/no-such-program"], env={}, cwd=tmp_path, log=tmp_path / "log")


HARNESS = """
import os, sys, time
from pathlib import Path
from tailrace.harness.servers.guardian import Guardian
host = Guardian()
host.remove_later(sys.argv[2] + "/leftover*")
host.spawn("s", [sys.executable, "-c", sys.argv[1], sys.argv[2] + "/pids"], env=dict(os.environ),
           cwd=Path(sys.argv[2]), log=Path(sys.argv[2]) / "log")
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["harness", "guardian", "both"])
def test_sigkill_of_harness_or_guardian_leaves_no_server(tmp_path: Path, victim: str) -> None:
    (tmp_path / "leftover-1").write_text("x")
    harness = subprocess.Popen([sys.executable, "-c", HARNESS, STUBBORN, str(tmp_path)])
    try:
        wait_until(lambda: len(pids(tmp_path / "pids")) == 2, "the server runs")
        guardian = psutil.Process(harness.pid).children()[0]
        if victim in ("guardian", "both"):
            guardian.kill()
        if victim in ("harness", "both"):
            harness.kill()
        wait_until(lambda: all(gone(pid) for pid in pids(tmp_path / "pids")), "every server process is gone")
        wait_until(lambda: gone(guardian.pid), "the guardian is gone")
    finally:
        harness.kill()
        harness.wait()
    told = sweep()
    assert not (tmp_path / "leftover-1").exists()
    assert any("leftover-1" in sentence for sentence in told), told
    if victim == "harness":
        assert any("ended" in sentence for sentence in told), told
    assert sweep() == [], "what was cleaned is told once"


def test_servers_start_with_the_usual_signals(tmp_path: Path) -> None:
    """What the guardian does to survive Ctrl-C must not make every server deaf to SIGTERM."""
    with Guardian() as host:
        process = host.spawn("sleep", ["/bin/sleep", "600"], env={}, cwd=tmp_path, log=tmp_path / "log")
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            assert not ignored & (1 << (number - 1)), number
        begun = time.monotonic()
        host.stop_tree(process, grace_s=60)
        assert time.monotonic() - begun < 60, "SIGTERM was enough"


FAMILY = (
    "import os, sys, time; os.fork(); os.fork(); open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); time.sleep(600)"
)


def spawn_family(host: Guardian, folder: Path) -> tuple[ProcessRef, list[int]]:
    file = folder / "family"
    process = host.spawn("family", [sys.executable, "-c", FAMILY, str(file)], env={}, cwd=folder, log=folder / "log")
    wait_until(lambda: len(pids(file)) == 4, "all four are there")
    return process, pids(file)


def states(family: list[int]) -> set[str]:
    return {psutil.Process(pid).status() for pid in family}


def test_a_tree_is_stopped_let_go_and_killed_as_one(tmp_path: Path) -> None:
    with Guardian() as host:
        process, family = spawn_family(host, tmp_path)
        other, _ = spawn_stubborn(host, tmp_path)
        assert host.signal_tree(process, signal.SIGSTOP) == 4
        wait_until(lambda: states(family) == {psutil.STATUS_STOPPED}, "all have stopped")
        assert host.signal_tree(process, signal.SIGCONT) == 4
        wait_until(lambda: psutil.STATUS_STOPPED not in states(family), "all go on")
        assert host.kill_tree(process)
        assert all(gone(pid) for pid in family)
        assert not host.kill_tree(process), "there is nothing any more"
        assert host.signal_tree(process, signal.SIGSTOP) == 0
        assert other.alive(), "no other tree is touched"


@pytest.mark.skipif(refusal() is not None, reason="no control group can be made here")
def test_a_tree_is_limited_in_its_cpus_and_its_group_goes_with_the_guardian(tmp_path: Path) -> None:
    root = cpu_root()
    assert root is not None
    with Guardian() as host:
        process, family = spawn_family(host, tmp_path)
        before = set(root.glob("tailrace-*"))
        host.limit_cpus(process, 0.5)
        (group,) = set(root.glob("tailrace-*")) - before
        assert set(map(int, (group / "cgroup.procs").read_text().split())) == set(family)
        quota = next(path for path in (group / "cpu.cfs_quota_us", group / "cpu.max") if path.exists())
        assert quota.read_text().split()[0] == "50000"
        host.limit_cpus(process, None)
        assert quota.read_text().split()[0] in ("-1", "max")
    assert not group.exists()


def test_a_module_in_the_users_folder_does_not_shadow_the_guardians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "psutil.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with Guardian() as host:
        host.stop_tree(
            host.spawn("sleep", ["/bin/sleep", "600"], env={}, cwd=tmp_path, log=tmp_path / "log"), grace_s=10
        )


def test_a_harness_that_hangs_up_in_mid_question_loses_no_clean_up(tmp_path: Path) -> None:
    host = Guardian()
    _, family = spawn_stubborn(host, tmp_path)
    for number in range(50):
        host._socket.sendall(f'{{"do": "remove_later", "path": "x", "id": {number}}}\n'.encode())
    host._socket.close()
    host._process.wait(timeout=60)
    assert all(gone(pid) for pid in family)
    assert any("ended" in sentence for sentence in sweep())


def test_ledgers_of_another_pid_namespace_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "guardians"
    folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("x")
    ledger = {
        "namespace": "pid:[1]",
        "guardian": [999_999_999, 1],
        "processes": [],
        "paths": [str(tmp_path / "precious")],
        "cleaned": None,
    }
    (folder / "1.json").write_text(json.dumps(ledger))
    assert sweep() == []
    assert (tmp_path / "precious").exists()
