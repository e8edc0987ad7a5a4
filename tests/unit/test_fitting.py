"""The calibration: a system whose times are known is found again from what a trial of it would have recorded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.analysis.samples import Samples
from tailrace.harness.errors import InputError
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.store import RunFolder
from tailrace.simulator.fitting import TOLD, counted_service, fit, fit_error, predict, read_trial
from tailrace.simulator.system import Service, System, load_system
from tests.conftest import tailrace
from tests.simulated import TRUE, TUNING, measured_trial
from tests.synthetic import make_run


def test_counters_give_the_service_times() -> None:
    service = counted_service(measured_trial(TRUE, 1).samples)
    assert service is not None
    assert service.base_ms == pytest.approx(12, rel=0.01)
    assert service.per_item_ms == pytest.approx(3, rel=0.01)
    assert counted_service(Samples(SAMPLE_SCHEMA.empty_table())) is None


def test_a_known_system_is_found_and_predicts_other_arrivals() -> None:
    found = fit(measured_trial(TRUE, 1))
    assert found.service_from == "the device's counters"
    assert found.error < 0.02
    assert found.system.router == "shared"
    assert found.system.overhead_ms == pytest.approx(TRUE.overhead_ms, abs=1.5)
    assert all(found.error <= error for _, error in found.others)
    for row in predict(found.system, [measured_trial(TRUE, 2)]):
        assert (row["error"] is None) == (row["figure"] == "mean_batch")
        assert row["error"] is None or abs(row["error"]) < 0.05, row
    # It can fail: the same system a quarter slower.
    slower = found.system.model_copy(update={"service": Service(base_ms=15, per_item_ms=3.75)})
    assert max(abs(row["error"] or 0) for row in predict(slower, [measured_trial(TRUE, 2)])) > 0.1


@pytest.mark.parametrize("router", ["round_robin", "random"])
def test_how_requests_find_replicas_is_found(router: Any) -> None:
    found = fit(measured_trial(TRUE.model_copy(update={"router": router}), 3))
    assert found.system.router == router


def test_what_a_server_says_of_itself_is_not_guessed() -> None:
    """Though another mechanism would fit a trial of this system better."""
    told = System(router="random", replicas=3, queue_limit=1024)
    found = fit(replace(measured_trial(TRUE, 1), told=told))
    assert (found.system.router, found.system.queue_limit, found.others) == ("random", 1024, ())
    assert found.system.service.base_ms == pytest.approx(12, rel=0.01)
    assert found.error > 2 * fit(measured_trial(TRUE, 1)).error


def test_what_a_server_says_of_itself_is_read_from_its_configuration(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", trials=1, span_s=30).trials[0]
    assert read_trial(folder).told is None
    (folder.server / "config").mkdir(parents=True, exist_ok=True)
    (folder.server / TOLD).write_text('{"router": "shortest_queue", "replicas": 2}')
    assert read_trial(folder).told == System(router="shortest_queue", replicas=2)
    (folder.server / TOLD).write_text('{"router": "psychic"}')
    with pytest.raises(InputError, match="router"):
        read_trial(folder)


def test_without_counters_the_service_is_fitted() -> None:
    found = fit(measured_trial(TRUE, 1, counters=False, tuning={**TUNING, "batch_window_ms": 0}))
    assert found.service_from == "the fit"
    assert found.error < 0.2
    assert fit_error(found.system, measured_trial(TRUE, 1)) == pytest.approx(found.error)


@pytest.mark.parametrize(
    ("tuning", "word"),
    [({"max_batch": 16}, "`replicas`"), ({"replicas": 1, "autoscale": {"min": 1}}, "scaled while it ran")],
)
def test_what_cannot_be_calibrated_is_told(tuning: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        fit(measured_trial(TRUE, 1, tuning=tuning))


def test_a_trial_with_a_fault_is_refused(tmp_path: Path) -> None:
    run = RunFolder.open(make_run(tmp_path / "run").folder)
    refused = set()
    for folder in run.trials:
        try:
            assert math.isfinite(read_trial(folder).figures.p99_ms or math.nan)
        except InputError as error:
            refused.add(error.message)
    assert any("had faults" in message for message in refused)


def test_the_commands_on_a_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", scenarios=("no-fault",), trials=2)
    fitted = tailrace("fit", "run", "--out", "system.yaml", "--format", "json", cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    told = json.loads(fitted.stdout)
    assert load_system(str(tmp_path / "system.yaml")) == System.model_validate(told["system"])
    assert tailrace("simulate", "system.yaml", cwd=tmp_path).returncode == 0
    assert "fitted to" in tailrace("fit", "run", "--trial", told["trial"], cwd=tmp_path).stdout
    former = tailrace("calibrate", "run", "--format", "json", cwd=tmp_path)
    assert json.loads(former.stdout) == told
    assert "`tailrace fit`" in former.stderr
    refused = tailrace("fit", "run", "--trial", "another", cwd=tmp_path)
    assert refused.returncode == 2
    assert told["trial"] in refused.stderr
    validated = tailrace("validate-sim", "run", "--format", "json", cwd=tmp_path)
    assert validated.returncode == 0, validated.stderr
    rows = json.loads(validated.stdout)["rows"]
    assert {row["figure"] for row in rows} == {"p50_ms", "p99_ms", "goodput_rps", "utilization", "mean_batch"}
    assert len(rows) == 2 * 5
    assert "predicted" in tailrace("validate-sim", "run", cwd=tmp_path).stdout


def test_one_trial_validates_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run", scenarios=("no-fault",), trials=1)
    done = tailrace("validate-sim", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "--trials 2" in done.stderr


def test_the_commands_tell_what_they_miss(tmp_path: Path) -> None:
    for arguments, word in (
        (["fit", "nowhere"], "nowhere"),
        (["validate-sim", "nowhere", "--trials", "3"], "for a new run"),
        (["validate-sim", "nowhere"], "nowhere"),
    ):
        done = tailrace(*arguments, cwd=tmp_path)
        assert done.returncode != 0
        assert word in done.stderr
        assert "Traceback" not in done.stderr
