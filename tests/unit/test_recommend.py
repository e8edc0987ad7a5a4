"""The decision procedure, on runs whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailrace.harness.analysis.summary import summarise
from tailrace.harness.contract.adapter import NEEDS
from tailrace.harness.errors import InputError
from tailrace.harness.records.summary import RunSummary
from tailrace.harness.run.registry import all_adapters
from tailrace.tuner.recommend import recommend
from tests.conftest import tailrace
from tests.synthetic import make_run

ADAPTERS = all_adapters()


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """Triton, Ray Serve and KServe: each with more overhead than the one before it, three trials."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return summarise(make_run(folder, adapters=("triton", "ray_serve", "kserve"), trials=3))


def test_without_a_need_the_figures_decide(summary: RunSummary) -> None:
    answer = recommend(summary, ADAPTERS, [])
    calm = [cell for cell in summary.cells if cell.scenario == "no-fault"]
    best = max(calm, key=lambda cell: (cell.goodput_rps_per_device, -cell.p99_ms))
    assert answer.framework == best.adapter
    assert answer.second not in (None, answer.framework)
    text = " ".join(answer.reasons)
    assert f"{best.goodput_rps_per_device:.4g} good answers/s per emulated device" in text
    assert "kill_replica" in text, "what a fault did to it is told"
    assert "the p99" in text
    assert "[" in text, "with an interval, for there are three blocks"


def test_a_need_decides_before_the_figures(summary: RunSummary) -> None:
    for need, framework in (("python-pipeline", "ray_serve"), ("one-model", "triton"), ("canary", "kserve")):
        answer = recommend(summary, ADAPTERS, [need])
        assert answer.framework == framework
        assert f"usual choice for {need}" in answer.reasons[0]


def test_needs_that_nobody_meets_together_leave_it_to_the_figures(summary: RunSummary) -> None:
    answer = recommend(summary, ADAPTERS, ["one-model", "canary"])
    assert "No framework is the usual choice for all of that" in answer.reasons[0]
    assert answer.framework == recommend(summary, ADAPTERS, []).framework


def test_hosted_comes_first(summary: RunSummary) -> None:
    answer = recommend(summary, ADAPTERS, ["one-model", "hosted"])
    assert answer.framework is None
    assert answer.reasons[0].startswith("Hosted")
    assert any(reason.startswith("Measured, triton") for reason in answer.reasons)


def test_what_was_not_measured_is_not_recommended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton", "ray_serve"), scenarios=("no-fault",))
    answer = recommend(summarise(run), ADAPTERS, ["canary"])
    assert answer.framework is None
    assert any("kserve was not measured" in reason for reason in answer.reasons)


def test_one_framework_has_no_second(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",))
    answer = recommend(summarise(run), ADAPTERS, [])
    assert (answer.framework, answer.second) == ("triton", None)
    assert any("p99 ≤ 200 ms" in reason for reason in answer.reasons)


def test_a_hair_of_goodput_does_not_decide(summary: RunSummary) -> None:
    """Where goodput is not shown to differ, the tail decides."""
    close = summary.model_copy(deep=True)
    figures = {
        "triton": ((73.96, 73.95, 73.97), 72.0),
        "ray_serve": ((73.97, 73.96, 73.96), 118.0),
        "kserve": ((9.0,) * 3, 5.0),
    }
    for cell in close.cells:
        goodputs, cell.p99_ms = figures[cell.adapter]
        cell.goodput_rps_per_device = sum(goodputs) / 3 + (0.02 if cell.adapter == "ray_serve" else 0)
    for trial in close.trials:
        goodputs, trial.p99_ms = figures[trial.adapter]
        trial.goodput_rps_per_device = goodputs[trial.number - 1]
    answer = recommend(close, ADAPTERS, [])
    assert answer.framework == "triton"
    assert answer.second == "ray_serve"
    assert "no difference shown" in answer.reasons[-1]


def test_a_run_with_faults_alone_says_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenarios=("kill-replica",))
    with pytest.raises(InputError, match="nothing to go by"):
        recommend(summarise(run), ADAPTERS, [])


def test_every_need_that_an_adapter_claims_is_known() -> None:
    for adapter in ADAPTERS.values():
        assert adapter.serves_needs.keys() <= NEEDS.keys()


def test_on_the_command_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run", scenarios=("no-fault",), trials=3)
    done = tailrace("recommend", "run", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {told["framework"], told["second"]} == {"triton", "ray_serve"}
    assert told["framework"] in tailrace("recommend", "run", cwd=tmp_path).stdout
    for arguments, word in ((("run", "--need", "cheap"), "--need 'cheap'"), (("nowhere",), "nowhere")):
        refused = tailrace("recommend", *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert word in refused.stderr


def test_a_baseline_is_nothing_to_take(tmp_path: Path) -> None:
    told = summarise(make_run(tmp_path / "run", adapters=("reference", "triton", "ray_serve"), trials=3))
    best = max(
        (cell for cell in told.cells if cell.scenario == "no-fault"),
        key=lambda cell: (cell.goodput_rps_per_device, -cell.p99_ms),
    )
    assert best.adapter == "reference", "or this would show nothing"
    answer = recommend(told, ADAPTERS, [])
    assert {answer.framework, answer.second} == {"triton", "ray_serve"}
    alone = summarise(make_run(tmp_path / "alone", adapters=("reference",), trials=1))
    assert recommend(alone, ADAPTERS, []).framework == "reference"
