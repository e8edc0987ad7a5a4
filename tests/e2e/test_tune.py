"""The search and the frontier on a real server: short traces, few settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.errors import InputError
from tailrace.harness.records.store import RunFolder
from tailrace.harness.run.observer import Observer
from tailrace.reports.report import build
from tailrace.tuner.objective import Objective
from tailrace.tuner.pareto import measure
from tailrace.tuner.search import Search
from tests.conftest import measured_again, tailrace

pytestmark = pytest.mark.e2e

OBJECTIVE = Objective(500)
"""Wide enough for a machine that is busy with other tests."""


def base(rate: float, duration_s: float) -> dict[str, Any]:
    trace = {"name": "steady", "params": {"rate": rate, "duration_s": duration_s}}
    return {"trace": trace, "devices": 2, "warmup": {"duration_s": 1}, "slo": {"latency_ms": OBJECTIVE.p99_ms}}


@measured_again
def test_the_best_settings_are_measured_against_the_defaults_and_can_be_copied(tmp_path: Path) -> None:
    """Triton's defaults serve one request at a time, 67 a second: at 150 a second they cannot keep the objective."""
    space: dict[str, tuple[Any, ...]] = {"max_batch": (8, 16), "batch_window_ms": (2,), "replicas": (2,)}
    tmp_path.mkdir()
    search = Search({**base(150, 4), "adapters": ["triton"]}, space, OBJECTIVE, tmp_path, Observer(), seed=1)
    found = search.run(2, simulate_first=False, trials=1)
    assert found.failed == []
    assert [step.settings is None for step in found.steps] == [True, False, False]
    assert found.best is not None
    assert found.best.settings is not None
    (config,) = (tmp_path / "best-configuration").rglob("config.pbtxt")
    assert f"max_batch_size: {found.best.settings['max_batch']}" in config.read_text()
    assert found.confirmation is not None
    goodput = found.ratios["goodput_rps_per_device"]
    assert goodput is None or goodput.value < 1, "None: the defaults had no good answer at all"
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("requests.parquet"))
    again = search.run(2, simulate_first=False, trials=1)
    assert [step.name for step in again.steps] == [step.name for step in found.steps]
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("requests.parquet")) == before, "nothing ran again"
    other = Search({**base(140, 4), "adapters": ["triton"]}, space, OBJECTIVE, tmp_path, Observer(), seed=1)
    with pytest.raises(InputError, match="another experiment"):
        other.run(2, simulate_first=False, trials=1)


def test_a_setting_that_is_lost_is_not_measured_to_its_end(tmp_path: Path) -> None:
    """One replica that takes one request at a time answers 67 a second; 200 a second are lost within seconds."""
    space: dict[str, tuple[Any, ...]] = {"max_batch": (1,), "replicas": (1,)}
    search = Search({**base(200, 20), "adapters": ["triton"]}, space, OBJECTIVE, tmp_path, Observer(), seed=1)
    found = search.run(1, simulate_first=False, trials=1)
    assert (found.failed, found.best) == ([], None)
    (lost,) = found.pruned
    assert "arrivals had missed 500 ms" in lost.pruned
    (trial,) = RunFolder.open(tmp_path / lost.name).trials
    assert trial.facts.state == "pruned"
    recorded = trial.request_columns("phase")
    assert recorded is not None
    assert 0 < len(recorded) < 0.9 * (trial.facts.arrivals + 200), "what had been sent is kept, the rest was never sent"
    begun = trial.facts_path.stat().st_mtime_ns
    again = search.run(1, simulate_first=False, trials=1)
    assert [step.name for step in again.pruned] == [lost.name]
    assert trial.facts_path.stat().st_mtime_ns == begun, "it is not run again"


@measured_again
def test_the_frontier_is_measured_where_the_simulator_picks(tmp_path: Path) -> None:
    outcome = measure(["triton"], base(120, 6), OBJECTIVE, 1, tmp_path, Observer())
    assert {cell.scenario for cell in outcome.cells} > {"defaults"}
    for cell in outcome.cells:
        assert (cell.predicted is None) == (cell.scenario == "defaults")
        if cell.predicted is not None:
            assert cell.cell.offered_rps == pytest.approx(cell.predicted["arrived"] / 6, rel=0.2)
    best = outcome.best("triton", OBJECTIVE)
    sure = [cell for cell in outcome.cells if (cell.cell.p99_ci_ms or [0, 1e9])[1] <= OBJECTIVE.p99_ms]
    goodputs = [cell.cell.goodput_rps_per_device for cell in sure if cell.cell.verdict != "INVALID"]
    assert (best is None) == (not goodputs)
    assert best is None or best.cell.goodput_rps_per_device == max(goodputs)
    assert "on the frontier" in build([outcome.run]).lower()


@measured_again
def test_a_sweep_runs_every_cell_at_its_own_rate(tmp_path: Path) -> None:
    done = tailrace(
        "run", "smoke", "--adapter", "null", "--set", "tuning={replicas: [1, 2]}", "--set", "load.rates=[40, 80]",
        "--set", "trace={name: steady, params: {duration_s: 3}}", "--set", "warmup.duration_s=0.5", "--out", str(tmp_path),
        cwd=tmp_path.parent,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    assert "4 trials of 4 cells" in done.stderr
    run = RunFolder.open(tmp_path)
    cells = json.loads((tmp_path / "summary.json").read_text())["cells"]
    assert {cell["scenario"] for cell in cells} == {
        f"no-fault.replicas-{replicas}.rate-{rate}" for replicas in (1, 2) for rate in (40, 80)
    }
    for cell in cells:
        assert cell["offered_rps"] == pytest.approx(float(cell["scenario"].rpartition("-")[2]), rel=0.35)
        assert cell["tuning"]["replicas"] == int(cell["scenario"].split(".")[1].removeprefix("replicas-"))
    assert run.complete


@measured_again
def test_the_saturation_point_of_one_replica(tmp_path: Path) -> None:
    """One replica serves 267 requests a second at most, in full batches."""
    done = tailrace(
        "saturate", "smoke", "--adapter", "triton", "--slo", "p99=400ms", "--start", "120", "--format", "json",
        "--set", "trace={name: steady, params: {duration_s: 8, rate: 120}}", "--set", "warmup.duration_s=1",
        "--set", "tuning={max_batch: 16, batch_window_ms: 5, replicas: 1}", "--set", "devices=1", "--out", str(tmp_path),
        cwd=tmp_path.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    point = json.loads(done.stdout)["triton--no-fault"]
    assert point["holds"] < point["fails"] <= 480
    assert point["holds"] < 330, "what the device can do, and the backlog that eight seconds may build up within 400 ms"
    assert [load["held"] for load in sorted(point["loads"], key=lambda load: load["rate"])] != [True] * len(
        point["loads"]
    )
