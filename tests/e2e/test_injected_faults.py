"""Faults on real servers: every kind on two nodes behind the balancer, and all mandatory ones on every framework."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.harness.analysis.metrics import measured
from tailrace.harness.cgroups import cpu_root, refusal
from tailrace.harness.records.store import RunFolder, TrialFolder
from tests.conftest import tailrace, wait_until

pytestmark = pytest.mark.e2e

SHORT = ["--set", "warmup.duration_s=1", "--set", "calibration.step_s=0.1", "--set", "client.timeout_s=5"]
OWN_FAULT = ("noisy-host", "generator-saturated", "not-steady", "clock-uncertain", "not-calibrated")
"""The machine that runs the tests may be busy; everything else must be in order."""


def raced(folder: Path, *arguments: str) -> list[TrialFolder]:
    done = tailrace("run", *arguments, "--out", "out", cwd=folder, timeout_s=900)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    run = RunFolder.open(folder / "out")
    for trial in summary(folder)["trials"]:
        assert [reason for reason in trial["reasons"] if reason["code"] not in OWN_FAULT] == []
        assert trial["accounting"]["closed"]
    return run.trials


def summary(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return told


def response_ms(trial: TrialFolder, from_s: float, to_s: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of the successes that were intended between two instants of the trace."""
    requests = trial.requests
    assert requests is not None
    trace = measured(requests)
    chosen = trace.ok & (trace.intended_ns >= from_s * 1e9) & (trace.intended_ns <= to_s * 1e9)
    return trace.response_ms()[chosen]


def names(trial: TrialFolder, **fields: str) -> list[str]:
    return [e["event"] for e in trial.events if all(e.get(key) == value for key, value in fields.items())]


ON_PROCESSES: list[dict[str, Any]] = [
    {"kind": "pause_replica", "at_s": 0.5, "duration_s": 1},
    {"kind": "kill_replica", "at_s": 2},
    {"kind": "pause_node", "at_s": 3, "duration_s": 3, "target": 0},
    {"kind": "kill_node", "at_s": 7, "target": 1},
    {"kind": "rolling_restart", "at_s": 10},
]
ON_CONNECTIONS: list[dict[str, Any]] = [
    {"kind": "latency", "at_s": 0.5, "duration_s": 1, "round_trip_ms": 40},
    {"kind": "packet_loss", "at_s": 1, "duration_s": 1, "share": 0.3, "stall_ms": 100},
    {"kind": "reset", "at_s": 2.5, "duration_s": 1, "target": 1},
    {"kind": "partition", "at_s": 6, "duration_s": 3, "target": 0},
]


def test_every_kind_on_two_nodes(tmp_path: Path) -> None:
    slow = [] if refusal() else [{"kind": "slow_node", "at_s": 0.5, "duration_s": 1, "cpus": 0.1}]
    scenarios = [
        {"name": "processes", "faults": [*slow, *ON_PROCESSES]},
        {"name": "connections", "faults": ON_CONNECTIONS},
    ]
    trials = raced(
        tmp_path,
        "smoke",
        *("--adapter", "null", "--set", "nodes=2", "--set", "supervision=restart", "--set", "restart_backoff_s=0.2"),
        *("--set", "trace={name: steady, params: {rate: 60, duration_s: 16}}", "--set", "tuning={replicas: 2}"),
        *("--set", f"scenarios={json.dumps(scenarios)}", *SHORT),
    )
    processes, connections = sorted(trials, key=lambda trial: str(trial.facts.scenario), reverse=True)
    for trial, planned in ((processes, [*slow, *ON_PROCESSES]), (connections, ON_CONNECTIONS)):
        told = trial.facts.dump()["faults"]
        assert [fault["kind"] for fault in told] == [fault["kind"] for fault in planned]
        for fault in told:
            assert fault["injected_s"] >= fault["at_s"], fault
            assert (fault["healed_s"] is not None) is (fault["kind"] not in ("kill_replica", "kill_node")), fault
    dead = [event for event in names(processes, node="node-1") if event.startswith("node-")]
    # Killed and started again by the supervisor; ended and started again by the rolling restart.
    assert dead == 2 * ["node-died", "node-spawned", "node-port-open", "node-ready", "node-first-answer"]
    for trial in trials:
        rotation = [event for event in names(trial, node="node-0") if event.startswith("balancer-")]
        assert rotation[:2] == ["balancer-down", "balancer-up"]
    told = {trial["scenario"]: trial for trial in summary(tmp_path)["trials"]}
    faults = {fault["kind"]: fault for trial in told.values() for fault in trial["faults"]}
    assert np.quantile(response_ms(connections, 0.6, 1.4), 0.75) > 40, "half of the requests go to the node in question"
    assert np.quantile(response_ms(connections, 4, 5.5), 0.75) < np.quantile(response_ms(connections, 0.6, 1.4), 0.75)
    assert set(faults["kill_node"]["came_back"]) >= {"spawned_s", "ready_s", "first_answer_s"}
    assert faults["partition"]["marked_down_s"] > 0
    assert told["connections"]["connection_errors"] + told["connections"]["errors"] > 0, "of the reset"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "load-balancer/haproxy.cfg" in page
    assert "Replicas alive" in page
    assert "Whether every request is accounted for" in page
    if (root := cpu_root()) is not None:
        assert list(root.glob("tailrace-*")) == []


def test_a_random_schedule_is_the_same_again(tmp_path: Path) -> None:
    schedule = (
        "scenarios=[{name: storm, faults: {rate: 1/s, kinds: [kill_replica, pause_replica, latency], duration_s: 0.5}}]"
    )
    injected = []
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        (trial,) = raced(
            tmp_path / name,
            "smoke",
            *("--adapter", "null", "--set", "nodes=2", "--set", "tuning={replicas: 8}", "--set", schedule),
            *("--set", "trace={name: steady, params: {rate: 60, duration_s: 6}}", *SHORT),
        )
        faults = trial.facts.dump()["faults"]
        assert all(fault["injected_s"] is not None for fault in faults)
        injected.append([(fault["kind"], fault["at_s"]) for fault in faults])
    assert injected[0] == injected[1] != []


def test_without_supervision_a_dead_node_stays_dead(tmp_path: Path) -> None:
    (trial,) = raced(
        tmp_path,
        "smoke",
        *("--adapter", "null", "--set", "nodes=2", "--set", "tuning={replicas: 1}"),
        *("--set", "scenarios=[{name: kill, faults: [{kind: kill_node, at_s: 1}]}]"),
        *("--set", "trace={name: steady, params: {rate: 60, duration_s: 5}}", *SHORT),
    )
    assert "node-died" in names(trial)
    assert "node-spawned" not in names(trial)
    (told,) = summary(tmp_path)["trials"]
    assert told["ok"] > 0.8 * told["arrivals"], "the other node goes on"
    assert told["shed"] == 0, "a node that cannot be reached sheds nothing"


def test_killed_amid_faults_the_harness_leaves_nothing_and_the_run_goes_on(
    tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    faults = [
        {"kind": "pause_node", "at_s": 1, "duration_s": 60, "target": 0},
        {"kind": "pause_replica", "at_s": 1, "duration_s": 60, "target": 0},
        {"kind": "partition", "at_s": 1, "duration_s": 60, "target": 1},
        *([] if refusal() else [{"kind": "slow_node", "at_s": 1, "duration_s": 60, "target": 1}]),
    ]
    command = [sys.executable, "-m", "tailrace.cli.main", "run", "smoke", "--adapter", "null", "--out", "out", *SHORT]
    command += ["--set", "nodes=2", "--set", "tuning={replicas: 2}", "--set", "supervision=restart"]
    command += ["--set", "trace={name: steady, params: {rate: 40, duration_s: 8}}"]
    command += ["--set", f"scenarios=[{{name: amid, faults: {json.dumps(faults)}}}]"]
    events = tmp_path / "out" / "trials" / "null--amid--1" / "events.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as harness:
        wait_until(
            lambda: events.exists() and events.read_text().count('"fault"') == len(faults), "all faults are there"
        )
        harness.kill()
    wait_until(lambda: not leftovers(), "nothing is left, stopped or not")
    if (root := cpu_root()) is not None:
        wait_until(lambda: not list(root.glob("tailrace-*")), "no control group is left")
    assert tailrace("report", "out", cwd=tmp_path).returncode == 0
    done = tailrace("run", "--resume", "out", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    (trial,) = RunFolder.open(tmp_path / "out").trials
    assert trial.facts.state == "done"
    assert [fault["healed_s"] is not None for fault in trial.facts.dump()["faults"]] == [True] * len(faults), (
        "by the end"
    )


@pytest.mark.parametrize("adapter", ["triton", "ray_serve", "torchserve", "kserve"])
def test_the_mandatory_faults_on_every_framework(tmp_path: Path, adapter: str) -> None:
    faults = [
        {"kind": "latency", "at_s": 1, "duration_s": 2, "target": 0},
        {"kind": "reset", "at_s": 4, "target": 0},
        {"kind": "pause_node", "at_s": 5, "duration_s": 2},
        {"kind": "kill_node", "at_s": 9},
        {"kind": "pause_replica", "at_s": 10, "duration_s": 1, "target": 0},
        {"kind": "kill_replica", "at_s": 13, "target": 0},
    ]
    (trial,) = raced(
        tmp_path,
        "smoke",
        *("--adapter", adapter, "--set", "nodes=2", "--set", "supervision=restart", "--set", "tuning.replicas=1"),
        *("--set", f"scenarios=[{{name: all, faults: {json.dumps(faults)}}}]"),
        *("--set", "trace={name: steady, params: {rate: 30, duration_s: 16}}", *SHORT),
    )
    told = trial.facts.dump()["faults"]
    assert [fault["kind"] for fault in told] == [fault["kind"] for fault in faults]
    assert all(fault["injected_s"] is not None for fault in told)
    assert all(fault["healed_s"] is not None for fault in told if fault.get("duration_s"))
    assert "node-spawned" in names(trial)
    (figures,) = summary(tmp_path)["trials"]
    assert figures["nodes"] == 2
    assert figures["ok"] > figures["arrivals"] / 4
    assert figures["accounting"]["executed"] >= figures["ok"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--set", "scenarios=[{name: a, faults: [{kind: model_reload}]}]"],
            "does not have the capability `load_model`",
        ),
        (["--set", "scenarios=[{name: a, faults: [{kind: rolling_restart}]}]"], "it needs `nodes: 2` or more"),
        (["--set", "scenarios=[{name: a, faults: [{kind: kil_node}]}]"], "did you mean 'kill_node'"),
        (["--set", "nodes=3"], "2 devices cannot be dealt out evenly to 3 nodes"),
        (["--set", "nodes=2", "--set", "client.protocol=grpc"], "has no health check that a load balancer could ask"),
        (
            ["--set", "nodes=2", "--set", "scenarios=[{name: a, faults: [{kind: kill_node, target: 2}]}]"],
            "target 2 does not exist, there are 2 nodes",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_starts(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = tailrace("run", "smoke", "--adapter", "null", *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_the_matrix_of_faults_says_what_cannot_be_done_and_why(tmp_path: Path) -> None:
    done = tailrace("adapters", "--faults", cwd=tmp_path)
    assert done.returncode == 0
    assert "kill_node" in done.stdout
    told = json.loads(tailrace("adapters", "--faults", "--format", "json", cwd=tmp_path).stdout)
    assert told["triton"]["kill_node"] is None
    assert "capability" in told["null"]["model_reload"]
