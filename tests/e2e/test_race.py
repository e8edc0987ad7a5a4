"""The race itself: all frameworks, real servers, one experiment, from the command line to the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.records.store import RunFolder
from tests.conftest import tailrace

pytestmark = pytest.mark.e2e

TRACES = Path(__file__).parents[3] / "shared" / "traces"
SHORT = ["--set", "trace={name: steady, params: {rate: 80, duration_s: 10}}", "--set", "warmup.duration_s=2"]


def race(folder: Path, *arguments: str) -> dict[str, Any]:
    done = tailrace("run", *arguments, "--out", "out", cwd=folder, timeout_s=900)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert Path(done.stdout.splitlines()[-1]) == folder / "out" / "report.html"
    assert (folder / "out" / "report.html").stat().st_size > 10_000
    summary: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    for trial in summary["trials"]:
        # The machine that runs the tests may be busy; everything else must be in order.
        others = [r for r in trial["reasons"] if r["code"] not in ("noisy-host", "generator-saturated", "not-steady")]
        assert others == []
        assert trial["outputs"]["mismatched"] == 0
        assert trial["outputs"]["checked"] > 0
        outcomes = ("ok", "errors", "shed", "timeouts", "connection_errors", "dropped")
        assert sum(trial[key] for key in outcomes) == trial["arrivals"]
        phases = trial["cold_start_phases_s"]
        assert 0 < phases["port_open_s"] <= phases["ready_s"] <= phases["first_answer_s"] == trial["cold_start_s"]
        assert trial["server_cpu_cores"] > 0
        assert trial["server_memory_bytes"] > 1e6
    return summary


ALL = {"triton", "ray_serve", "torchserve", "kserve", "reference"}


def test_all_frameworks_under_a_kill_and_on_their_defaults(tmp_path: Path) -> None:
    scenarios = (
        "scenarios=[{name: kill-replica, faults: [{kind: kill_replica, at_s: 4}]}, {name: defaults, tuning: defaults}]"
    )
    summary = race(tmp_path, "compare", "--trials", "1", *SHORT, "--set", scenarios)
    assert {(trial["adapter"], trial["scenario"]) for trial in summary["trials"]} == {
        (adapter, scenario) for adapter in ALL for scenario in ("kill-replica", "defaults")
    }
    for trial in summary["trials"]:
        assert trial["emulated"]
        assert 0 < trial["utilization"] < 1
        if trial["scenario"] == "defaults":
            assert (trial["tuning"], trial["left_out"], trial["faults"]) == ({}, {}, [])
            continue
        if trial["adapter"] == "kserve":
            assert trial["tuning"] == {"replicas": 3}
            assert set(trial["left_out"]) == {"max_batch", "batch_window_ms"}
        else:
            assert trial["tuning"] == {"max_batch": 16, "batch_window_ms": 10, "replicas": 3}
            assert trial["batch_size_mean"] >= 1
        assert trial["ok"] > trial["arrivals"] / 2, "two replicas of three are left"
        (fault,) = trial["faults"]
        assert 4 <= fault["injected_s"] < 6
    for trial_folder in RunFolder.open(tmp_path / "out").trials:
        facts = trial_folder.facts
        assert facts.not_applied == []
        assert list((trial_folder.server / "config").rglob("*")), "the rendered configuration is kept"
        events = [event["event"] for event in trial_folder.events]
        assert events.index("spawned") < events.index("first-answer")
        if facts.scenario != "kill-replica":
            continue
        assert events.index("first-answer") < events.index("fault") < events.index("replica-died")
        # The others replace it, in a time of their own that may be longer than what is left of this short trace.
        if facts.adapter == "triton":
            assert "replica-born" not in events, "Triton never replaces a dead worker"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "KServe ran without «max_batch» and «batch_window_ms»" in page


@pytest.mark.parametrize("adapter", ["triton", "kserve"])
def test_over_grpc(tmp_path: Path, adapter: str) -> None:
    rate = ["--set", "trace.params.rate=30"]
    summary = race(tmp_path, "smoke", "--adapter", adapter, *SHORT, *rate, "--set", "client.protocol=grpc")
    (trial,) = summary["trials"]
    assert trial["protocol"] == "grpc"
    assert trial["ok"] == trial["arrivals"]


def test_a_recorded_trace_is_added_and_replayed(tmp_path: Path) -> None:
    source = TRACES / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv"
    if not source.is_file():
        pytest.skip(f"{source.name} is not here")
    added = tailrace("traces", "add", str(source), "--format", "azure_llm_2023", "--name", "azure-conv", cwd=tmp_path)
    assert added.returncode == 0, added.stderr
    assert "19366" in added.stdout
    window = ["--set", "trace.window_s=[600, 615]", "--set", "trace.mean_rate=40"]
    summary = race(tmp_path, "smoke", "--trace", "azure-conv", *window)
    (trial,) = summary["trials"]
    assert trial["trace"] == "azure-conv"
    assert trial["arrivals"] == 600
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    done = json.dumps(manifest["trace"]["provenance"]["transformations"])
    assert "window" in done
    assert "rescale" in done


@pytest.mark.torch
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the CPU build of torch is tested on Python 3.11")
def test_a_real_model_on_all_frameworks(tmp_path: Path) -> None:
    light = ["--set", "trace={name: steady, params: {duration_s: 10}}", "--set", "rate_by_workload.minilm=8"]
    one = ["--set", "scenarios=[{name: no-fault}]", "--set", "tuning.replicas=1", "--trials", "1"]
    summary = race(tmp_path, "compare", "--workload", "minilm", *light, *one)
    assert {trial["adapter"] for trial in summary["trials"]} == ALL
    for trial in summary["trials"]:
        assert not trial["emulated"]
        assert trial["device"] == "cpu"
        assert trial["devices"] == 1
        assert trial["ok"] > 0


def test_every_framework_serves_several_models_and_never_mixes_them_up(tmp_path: Path) -> None:
    models = "models={count: 3, popularity: {kind: zipf, exponent: 0.5}}"
    replicas, calm, traffic = "tuning.replicas=1", "scenarios=[{name: no-fault}]", "trace.params.rate=15"
    summary = race(
        tmp_path,
        "compare",
        "--trials",
        "1",
        *SHORT,
        *(w for s in (models, replicas, calm, traffic) for w in ("--set", s)),
    )
    assert {trial["adapter"] for trial in summary["trials"]} == ALL
    for trial in summary["trials"]:
        assert [model["model"] for model in trial["models"]] == ["emulated-00", "emulated-01", "emulated-02"]
        shares = [model["arrivals"] / trial["arrivals"] for model in trial["models"]]
        assert 0.1 < shares[2] < shares[0] < 0.7, shares
        assert all(model["good"] > 0 for model in trial["models"])
    for folder in RunFolder.open(tmp_path / "out").trials:
        assert folder.facts.verified_before == 3 * 16, "each model's answers are compared with its own reference"
    assert "emulated-02" in (tmp_path / "out" / "report.html").read_text()
