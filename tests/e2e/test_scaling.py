"""The harness's own scaler on real servers: nodes that come and go behind the balancer, replicas that a framework adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.records.store import RunFolder, TrialFolder
from tests.conftest import tailrace

pytestmark = pytest.mark.e2e

WAVE = "trace={name: surge, params: {duration_s: 20, base_rate: 4, surge_rate: 80, peak_at_s: 6, half_width_s: 5, fault_at_s: 6}}"
SHORT = ["--set", WAVE, "--set", "warmup.duration_s=1", "--set", "calibration.step_s=0.1"]


def scaled(folder: Path, *arguments: str, scaler: dict[str, Any]) -> TrialFolder:
    scenarios = json.dumps([{"name": "scaled", "scaler": {"min": 1, "period_s": 0.5, **scaler}}])
    done = tailrace(
        "run", "smoke", *SHORT, *arguments, "--set", f"scenarios={scenarios}", "--out", "out", cwd=folder, timeout_s=600
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr
    (trial,) = RunFolder.open(folder / "out").trials
    assert any("not by the framework" in warning for warning in trial.facts.warnings)
    assert "not by the framework" in (folder / "out" / "report.html").read_text(encoding="utf-8")
    return trial


def changes(trial: TrialFolder) -> list[tuple[int, int]]:
    return [(event["before"], event["wanted"]) for event in trial.events if event["event"] == "scaled"]


def test_nodes_come_with_the_load_and_go_with_it(tmp_path: Path) -> None:
    trial = scaled(
        tmp_path,
        *("--adapter", "null", "--set", "nodes=3", "--set", "devices=3", "--set", "tuning=defaults"),
        *("--set", "options.null={latency_ms: 100}"),
        scaler={"of": "nodes", "max": 3, "up_above": 3, "down_below": 1.5, "warm_pool": 1},
    )
    (summary,) = json.loads((tmp_path / "out" / "summary.json").read_text())["trials"]
    assert summary["ok"] == summary["arrivals"], "what is retired finishes what it has"
    decided = changes(trial)
    assert max(wanted for _, wanted in decided) == 3
    assert decided[-1][1] < 3, "the wave is over"
    names = [event["event"] for event in trial.events]
    assert names.count("node-spawned") == names.count("node-first-answer") >= 1, "the third node was not even started"
    assert "node-stopped" in names, "one is more than a pool of one holds"
    assert "node-died" not in names
    first = names.index("scale")
    assert "balancer-up" in names[first : names.index("node-first-answer")], "the warm node was called upon at once"


def test_nodes_of_a_framework_without_a_scaler_come_and_go(tmp_path: Path) -> None:
    """KServe's model server, one request at a time: the wave is more than one node can serve."""
    trial = scaled(
        tmp_path,
        *("--adapter", "kserve", "--set", "nodes=2", "--set", "devices=2", "--set", "tuning={replicas: 1}"),
        scaler={"of": "nodes", "max": 2, "up_above": 1, "down_below": 0.1, "warm_pool": 1},
    )
    assert (1, 2) in changes(trial)
    names = [event["event"] for event in trial.events]
    assert "balancer-up" in names[names.index("scale") :]
    assert "node-died" not in names


def test_a_node_may_have_to_load_its_model_alone(tmp_path: Path) -> None:
    trial = scaled(
        tmp_path,
        *("--adapter", "triton", "--set", "nodes=2", "--set", "devices=2", "--set", "tuning=defaults"),
        scaler={"of": "nodes", "max": 2, "up_above": 1, "down_below": 0.1, "cold_start": "model"},
    )
    assert (1, 2) in changes(trial)
    names = [event["event"] for event in trial.events]
    assert "node-spawned" not in names, "both servers are there from the beginning"
    assert "balancer-up" in names[names.index("scale") :]


def test_replicas_are_added_by_the_framework_itself(tmp_path: Path) -> None:
    trial = scaled(
        tmp_path,
        # One request at a time takes 15 ms: the wave is more than one worker can serve, on a quick machine too.
        *("--adapter", "torchserve", "--set", "devices=2", "--set", "tuning={max_batch: 1, replicas: 1}"),
        scaler={"of": "replicas", "max": 2, "up_above": 1, "down_below": 0.1},
    )
    assert (1, 2) in changes(trial)
    assert "replica-born" in [event["event"] for event in trial.events]
