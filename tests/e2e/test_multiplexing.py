"""Many models in a memory that does not hold them all, on real servers, each framework in its own way; and faults of loading."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.contract.multiplexing import MIB
from tailrace.harness.records.store import RunFolder, TrialFolder
from tests.conftest import tailrace

pytestmark = pytest.mark.e2e

OWN_FAULT = ("noisy-host", "generator-saturated", "not-steady", "clock-uncertain", "not-calibrated")
"""The machine that runs the tests may be busy; everything else must be in order."""
MODELS, BUDGET_MB = 5, 310.0
EXPERIMENT = [
    *("--set", f"models={{count: {MODELS}, popularity: {{kind: zipf, exponent: 0.5}}, size_mb: 100}}"),
    *("--set", f"multiplexing={{memory_mb: {BUDGET_MB}}}"),
    *("--set", "trace={name: steady, params: {rate: 6, duration_s: 8}}", "--set", "warmup.duration_s=1"),
    *("--set", "calibration.step_s=0.1", "--set", "client.timeout_s=60", "--set", "devices=1"),
]
BATCHING = "tuning={max_batch: 4, batch_window_ms: 2, replicas: 1}"


def served(
    folder: Path, adapter: str, *more: str, tuning: str = BATCHING, faults: str = "[]"
) -> tuple[TrialFolder, Any]:
    """One trial, whose answers were compared with the reference, and what its summary says. However it went, memory sufficed."""
    faulty = f"scenarios=[{{name: shared, faults: {faults}}}]"
    choice = ["--adapter", adapter, "--set", tuning, "--set", faulty]
    done = tailrace("run", "smoke", *choice, *EXPERIMENT, *more, "--out", "out", cwd=folder, timeout_s=600)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    (trial,) = RunFolder.open(folder / "out").trials
    (told,) = json.loads((folder / "out" / "summary.json").read_text())["trials"]
    assert [reason for reason in told["reasons"] if reason["code"] not in OWN_FAULT] == []
    assert trial.facts.verified_before >= MODELS
    outputs = trial.facts.outputs
    assert outputs is not None
    assert outputs.checked + outputs.unchecked == told["accounting"]["outcomes"]["ok"] > 0
    assert outputs.mismatched == 0
    assert told["accounting"]["closed"]
    assert trial.samples is not None
    samples = [sample for sample in trial.samples.to_pylist() if sample["source"] == "memory"]
    used = [sample["value"] for sample in samples if sample["metric"] == "memory_used_bytes"]
    free = [sample["value"] for sample in samples if sample["metric"] == "memory_free_bytes"]
    assert 0 < max(used) <= BUDGET_MB * MIB
    assert min(free) >= 0
    happened = what_happened(trial)
    assert happened["model-refused"] == 0, "whoever loads a model has made room for it before"
    assert happened["model-loaded"] > 0, "there are more models than fit"
    assert happened["model-gone"] > 0
    return trial, told


def what_happened(trial: TrialFolder) -> Counter[str]:
    return Counter(event["event"] for event in trial.events)


def outcomes(told: Any) -> dict[str, int]:
    """How many requests ended in each way in which some did."""
    return {name: count for name, count in told["accounting"]["outcomes"].items() if count}


@pytest.mark.parametrize("adapter", ["reference", "ray_serve", "triton"])
def test_models_come_and_go_and_no_request_fails(adapter: str, tmp_path: Path) -> None:
    trial, told = served(tmp_path, adapter)
    assert set(outcomes(told)) == {"ok"}
    assert trial.facts.memory.controlled is (adapter == "triton")
    assert not trial.facts.not_applied
    account = told["accounting"]
    assert account["executed"] == account["outcomes"]["ok"], "nothing is computed twice or in vain"
    # Ray's figures are up to two seconds old.
    assert account["server_ok"] > account["outcomes"]["ok"] / 2, "what was counted before a model went stays counted"


def test_kserve_serves_many_models_behind_the_controller(tmp_path: Path) -> None:
    _, told = served(tmp_path, "kserve", tuning="tuning={replicas: 1}")
    assert set(outcomes(told)) == {"ok"}


def test_replicas_of_ray_serve_share_the_memory(tmp_path: Path) -> None:
    trial, told = served(tmp_path, "ray_serve", tuning="tuning={max_batch: 4, replicas: 2}")
    assert set(outcomes(told)) == {"ok"}
    loaders = {event["pid"] for event in trial.events if event["event"] == "model-loaded"}
    assert len(loaders) == 2, "each with models of its own"


@pytest.mark.torch
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the CPU build of torch is tested on Python 3.11")
@pytest.mark.parametrize(("adapter", "rate"), [("ray_serve", 4), ("reference", 1)])
def test_real_models_share_a_memory(adapter: str, rate: float, tmp_path: Path) -> None:
    real = f"trace={{name: steady, params: {{rate: {rate}, duration_s: 10}}}}"
    _, told = served(tmp_path, adapter, "--set", "workload=minilm", "--set", real, tuning="tuning={replicas: 1}")
    assert set(outcomes(told)) == {"ok"}
    assert not told["emulated"]
    assert told["device"] == "cpu"
    assert told["multiplexing"]["loads"] > 0
    assert told["multiplexing"]["load_p50_s"] > 0.01, "a network of 22 million weights was read"


@pytest.mark.parametrize("adapter", ["reference", "triton"])
def test_a_load_whose_process_is_killed_is_done_again(adapter: str, tmp_path: Path) -> None:
    trial, told = served(tmp_path, adapter, faults="[{kind: kill_loading, at_s: 1}]")
    (fault,) = trial.facts.dump()["faults"]
    assert fault["injected_s"] >= 1
    assert set(outcomes(told)) == {"ok"}, "who waited for the model got an answer after all"
    happened = what_happened(trial)
    assert happened["model-begun"] == happened["model-loaded"] + 1
    loads = [event for event in trial.events if event.get("model") == fault["target"]]
    killed = next(index for index, event in enumerate(loads) if event.get("pid") == fault["pid"])
    assert [event["event"] for event in loads[killed:] if event["event"] != "model-gone"][:3] == [
        *("model-begun", "model-begun", "model-loaded")
    ]


def test_ray_serve_starts_another_replica_for_one_that_was_killed_while_loading(tmp_path: Path) -> None:
    trial, told = served(tmp_path, "ray_serve", faults="[{kind: kill_loading, at_s: 1}]")
    (fault,) = trial.facts.dump()["faults"]
    assert fault["injected_s"] >= 1
    assert set(outcomes(told)) <= {"ok", "error", "shed"}
    after = [e for e in trial.events if e["event"] == "model-loaded" and e["t_ns"] > fault["injected_s"] * 1e9]
    assert {event["pid"] for event in after} not in (set(), {fault["pid"]})
    assert trial.facts.final_probe.answers


@pytest.mark.parametrize("adapter", ["reference", "ray_serve"])
def test_who_asks_for_a_model_that_fails_to_load_is_told_so_and_others_are_served(adapter: str, tmp_path: Path) -> None:
    target = MODELS - 1
    faults = f"[{{kind: load_failure, at_s: 0.5, duration_s: 6, target: {target}}}]"
    trial, told = served(tmp_path, adapter, faults=faults)
    (fault,) = trial.facts.dump()["faults"]
    assert fault["target"] == trial.facts.models[target]
    assert fault["healed_s"] - fault["injected_s"] >= 6
    failed = [event for event in trial.events if event["event"] == "model-failed"]
    assert {event["model"] for event in failed} == {fault["target"]}
    assert set(outcomes(told)) == {"ok", "shed"}, "503, with the time after which another try is worth it"
    assert trial.requests is not None
    requests = trial.requests.to_pylist()
    assert {row["model"] for row in requests if row["outcome"] == "shed"} == {fault["target"]}
    assert {row["outcome"] for row in requests if row["model"] != fault["target"]} == {"ok"}
