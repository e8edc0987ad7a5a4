"""A run whose harness is killed leaves nothing running, and goes on: what is done stays, what had begun is set aside."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.errors import InputError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.loading import builtin_experiments, load_experiment
from tailrace.harness.records.store import RunFolder
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.runner import resume_run
from tests.conftest import tailrace, wait_until

pytestmark = pytest.mark.e2e

EXPERIMENT = [
    *("smoke", "--adapter", "null", "--set", "tuning=defaults", "--trials", "2", "--set", "warmup.duration_s=0.5"),
    *("--set", "trace={name: steady, params: {rate: 100, duration_s: 2}}", "--set", "calibration.step_s=0.1"),
]
FIRST, SECOND = "null--no-fault--1", "null--no-fault--2"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run puts what it does not keep, so that nobody else's is taken for it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tailrace.cli.main", "run", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_when(reached: Callable[[], bool], what: str, harness: subprocess.Popen[str]) -> None:
    """SIGKILL of the harness alone, at that instant."""
    try:
        wait_until(lambda: reached() or harness.poll() is not None, what)
    finally:
        harness.kill()
        _, told = harness.communicate(timeout=60)
    assert harness.returncode == -signal.SIGKILL, told


def in_stage(run: Path, trial: str, stage: str) -> Callable[[], bool]:
    events = run / "trials" / trial / "events.jsonl"
    return lambda: events.exists() and f'"stage": "{stage}"' in events.read_text()


def is_done(run: Path, trial: str) -> Callable[[], bool]:
    return lambda: RunFolder(run).trial(trial).done


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash; the lock holds the process that was last to work there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def manifest_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return content


def assert_complete(run: Path) -> None:
    assert manifest_of(run)["state"] == "done"
    assert manifest_of(run)["ended_at"] is not None
    trials = RunFolder.open(run).trials
    assert [trial.id for trial in trials] == [FIRST, SECOND]
    assert all(trial.done for trial in trials)
    assert len({trial.facts.seed for trial in trials}) == 2
    assert [trial.facts.seed for trial in trials] == [planned["seed"] for planned in manifest_of(run)["trials"]]
    summary = json.loads((run / "summary.json").read_text())
    assert [trial["state"] for trial in summary["trials"]] == ["done", "done"]
    assert all(trial["ok"] == trial["arrivals"] for trial in summary["trials"])
    assert "not-calibrated" not in {reason["code"] for trial in summary["trials"] for reason in trial["reasons"]}
    assert (run / "report.html").exists()


INSTANTS: dict[str, tuple[Callable[[Path], Callable[[], bool]], list[str], list[str]]] = {
    # the instant, the trials that are kept, what is set aside
    "calibrating": (
        lambda run: (run / "calibration" / "http" / "requests.arrow").exists,
        [],
        ["calibration-http-1"],
    ),
    "deploying": (lambda run: in_stage(run, SECOND, "deploy"), [FIRST], [f"{SECOND}-1"]),
    "measuring": (lambda run: in_stage(run, SECOND, "measure"), [FIRST], [f"{SECOND}-1"]),
    "stopping": (lambda run: in_stage(run, FIRST, "stop"), [], [f"{FIRST}-1"]),
    "between two trials": (lambda run: is_done(run, FIRST), [FIRST], []),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_killed_run_leaves_nothing_and_goes_on(tmp_path: Path, temporary: Path, leftovers: Any, instant: str) -> None:
    run = tmp_path / "out"
    reached, kept, aside = INSTANTS[instant]
    kill_when(reached(run), instant, start(tmp_path, *EXPERIMENT, "--out", "out"))
    wait_until(lambda: not leftovers(), "no process is left", 60)
    assert list(temporary.iterdir()) == []

    before = {trial: contents(run / "trials" / trial) for trial in kept}
    assert tailrace("report", "out", cwd=tmp_path).returncode == 0
    done = tailrace("run", "--resume", "out", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout.splitlines()[-1] == str(run / "report.html")
    assert_complete(run)
    assert {trial: contents(run / "trials" / trial) for trial in kept} == before, "what is kept is not touched"

    # A kill takes a moment: the trial whose end was near may have been saved, and the next may have begun.
    set_aside = sorted(path.name for path in (run / "set-aside").glob("*"))
    (resumption,) = manifest_of(run)["resumed"]
    assert sorted(resumption["set_aside"]) == [f"set-aside/{name}" for name in set_aside]
    assert resumption["command"] == ["tailrace", "run", "--resume", "out"]
    for name in set_aside:
        assert f"is now set-aside/{name}" in done.stderr
    if instant in ("calibrating", "deploying", "measuring"):
        assert set_aside == aside
    if instant == "measuring":
        cut_off = RunFolder.open(run).folder / "set-aside" / f"{SECOND}-1"
        assert json.loads((cut_off / "trial.json").read_text())["state"] == "running"
        assert (cut_off / "requests.arrow").exists(), "what was measured until then is kept"
    assert leftovers() == []
    assert list(temporary.iterdir()) == []


def test_a_resumed_run_that_is_killed_goes_on_again(tmp_path: Path, leftovers: Any) -> None:
    run = tmp_path / "out"
    kill_when(in_stage(run, FIRST, "measure"), "the first", start(tmp_path, *EXPERIMENT, "--out", "out"))
    calibration = contents(run / "calibration")

    def again() -> bool:
        return (run / "set-aside" / f"{FIRST}-1").exists() and in_stage(run, FIRST, "measure")()

    kill_when(again, "the first once more", start(tmp_path, "--resume", "out"))
    first_cut = contents(run / "set-aside" / f"{FIRST}-1")
    done = tailrace("run", "--resume", "out", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert_complete(run)
    assert contents(run / "calibration") == calibration, "a calibration that is complete is not made again"
    assert contents(run / "set-aside" / f"{FIRST}-1") == first_cut
    told = [resumption["set_aside"] for resumption in manifest_of(run)["resumed"]]
    assert told == [[f"set-aside/{FIRST}-1"], [f"set-aside/{FIRST}-2"]]
    wait_until(lambda: not leftovers(), "no process is left", 60)


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    harness = start(tmp_path, *EXPERIMENT, "--out", "out")
    try:
        wait_until(in_stage(tmp_path / "out", FIRST, "measure"), "the first trial is measured")
        harness.send_signal(signal.SIGINT)
        _, told = harness.communicate(timeout=120)
    finally:
        harness.kill()
    assert harness.returncode == 130, told
    assert "go on with: tailrace run --resume out" in told
    done = tailrace("run", "--resume", "out", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert_complete(tmp_path / "out")


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other seed": (lambda m: m["experiment"].update(seed=8), "not the one that the run began with"),
    "unknown key": (lambda m: m["experiment"].update(trails=2), "did you mean 'trials'"),
    "other machine": (lambda m: m["hardware"].update(cpu_count=1000), "hardware cpu_count: 1000 when it began, "),
    "other memory": (lambda m: m["hardware"].update(memory_bytes=1000), "hardware memory_bytes: 1000 when it began, "),
    "other GPUs": (lambda m: m["hardware"].update(gpus=["H9"]), "hardware gpus: ['H9'] when it began, "),
    "other Python": (lambda m: m["software"].update(python="2.7"), "software python: 2.7 when it began, "),
    "other tailrace": (lambda m: m.update(tailrace_version="0.0"), "tailrace version: 0.0 when it began, "),
    "other commit": (lambda m: m.update(git={"commit": "abc", "dirty": False}), "git commit: abc when it began, none"),
    "other trace": (
        lambda m: m["trace"]["provenance"].update(file="x"),
        "trace provenance file: x when it began, none",
    ),
    "other artifact": (lambda m: m["workload"].update(artifact_sha256="abc"), "artifact SHA-256: abc when it began, "),
    "other model": (lambda m: m["workload"].update(model_sha256="abc"), "SHA-256 of model.py: abc when it began, "),
    "model unknown": (lambda m: m["workload"].pop("model_sha256"), "SHA-256 of model.py: none when it began, "),
}


def test_what_must_not_be_gone_on_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "out"
    monkeypatch.chdir(tmp_path)  # the commit that a manifest holds is that of the working directory
    harness = start(tmp_path, *EXPERIMENT, "--out", "out")
    try:
        wait_until(in_stage(run, FIRST, "deploy"), "the first trial has begun")
        refused(tmp_path, f"is still going on: process {harness.pid} works on it", "--resume", "out")
    finally:
        kill_when(is_done(run, FIRST), "the first trial is done", harness)

    for name, (change, told) in CHANGED.items():
        copy = tmp_path / name
        shutil.copytree(run, copy)
        manifest = manifest_of(copy)
        change(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        trials = contents(copy / "trials" / FIRST)
        with pytest.raises(InputError) as caught:
            resume_run(copy, Observer())
        assert told in str(caught.value), name
        assert "Remedy: " in str(caught.value)
        assert contents(copy / "trials" / FIRST) == trials

    for options in (["smoke"], ["--set", "trials=3"], ["--adapter", "null", "--out", "other"]):
        refused(tmp_path, "--resume goes on with the experiment of that run", "--resume", "out", *options)
    refused(tmp_path, "holds no manifest.json", "--resume", "nowhere")

    assert tailrace("run", "--resume", "out", cwd=tmp_path).returncode in (0, 3)
    everything = contents(run)
    refused(tmp_path, "is complete: all of its 2 trials are done", "--resume", "out")
    assert contents(run) == everything


def refused(cwd: Path, told: str, *arguments: str) -> None:
    done = tailrace("run", *arguments, cwd=cwd)
    assert done.returncode == 2, (arguments, done.stdout, done.stderr)
    assert told in done.stderr, (arguments, done.stderr)
    assert "Remedy: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", builtin_experiments())
def test_a_manifest_holds_its_experiment_whole(name: str) -> None:
    experiment = load_experiment(name)
    again = Experiment.model_validate(json.loads(json.dumps(experiment.model_dump(mode="json"))))
    assert again == experiment
    assert again.sha256 == experiment.sha256
