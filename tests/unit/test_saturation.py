"""The saturation point, of a system whose point is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer import Exit

from tailrace.cli.saturate import search
from tailrace.cli.show import TableOrJson
from tailrace.harness.errors import InputError, TailraceError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.records.summary import CellSummary
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.runner import run_experiment
from tailrace.tuner.objective import Objective
from tailrace.tuner.saturation import STEPS_DOWN, find
from tests.conftest import tailrace
from tests.records import cell_summary

OBJECTIVE = Objective(100)


def saturating_at(point: float, *, noise: float = 0.0) -> Callable[[float], CellSummary]:
    """A p99 that rises with the rate and meets the objective at ``point``; with ``noise``, its interval is so wide."""

    def measure(rate: float) -> CellSummary:
        p99_ms = 100 * rate / point if rate < 3 * point else math.inf
        ends = [p99_ms * (1 - noise), p99_ms * (1 + noise)]
        source = "across-trials" if noise else "within-trial"
        return cell_summary(p99_ms=p99_ms, p99_ci_ms=ends, p99_ci_ms_source=source, slo_attainment=1.0, arrivals=1000)

    return measure


def test_an_experiment_may_ask_for_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cell is searched under its own conditions, from the rate and for the objective that the experiment names."""
    asked: list[Mapping[str, Any]] = []

    def run_or_go_on(folder: Path, content: Mapping[str, Any], _observer: Any) -> Path:
        asked.append(content)
        assert Experiment.model_validate(content).load is None, "each rate is a run without a search"
        return folder

    def summarise(folder: Path) -> SimpleNamespace:
        point = 300.0 if folder.parent.name == "triton--calm" else 150.0
        rate = float(folder.name.removeprefix("rate-"))
        changes = {"goodput_rps_per_device": rate, "verdict": verdict}
        return SimpleNamespace(cells=[saturating_at(point)(rate).model_copy(update=changes)])

    verdict = "VALID"

    monkeypatch.setattr("tailrace.tuner.saturation.run_or_go_on", run_or_go_on)
    monkeypatch.setattr("tailrace.tuner.saturation.summarise", summarise)
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "adapters": ["triton", "ray_serve"],
            "trace": "steady",
            "options": {"ray_serve": {"proxy": "python"}},
            "scenarios": [{"name": "calm"}, {"name": "small", "adapters": ["ray_serve"], "tuning": {"replicas": 1}}],
            "load": {"find": "saturation", "slo": {"p99_ms": 100}, "start": 40},
        }
    )
    with pytest.raises(InputError, match="several runs"):
        run_experiment(experiment, tmp_path / "run", Observer())
    search(experiment, tmp_path, TableOrJson.JSON, strict=True)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"triton--calm", "ray_serve--calm", "ray_serve--small"}
    for name, point in (("triton--calm", 300), ("ray_serve--calm", 150), ("ray_serve--small", 150)):
        assert found[name]["holds"] <= point < found[name]["fails"] <= 1.06 * found[name]["holds"]
    assert {content["scenarios"][0]["mean_rate"] for content in asked} >= {40, 80, 160}
    assert all(content["options"] == {} for content in asked if content["adapters"] == ["triton"])
    assert all(content["slo"] == {"latency_ms": 100} for content in asked)
    verdict = "UNKNOWN"
    search(experiment, tmp_path, TableOrJson.JSON)
    with pytest.raises(Exit) as ended:
        search(experiment, tmp_path, TableOrJson.JSON, strict=True)
    assert ended.value.exit_code == 3


@given(point=st.floats(1, 5000), start=st.floats(1, 5000))
def test_what_is_found_holds_the_point_between_its_ends(point: float, start: float) -> None:
    found = find(saturating_at(point), start, OBJECTIVE)
    if point < start / 2**STEPS_DOWN:
        assert found.ended == "nothing holds"
        return
    assert found.holds is not None
    assert found.fails is not None
    assert found.holds <= point <= found.fails
    assert found.fails / found.holds <= 1.05
    assert max(load.rate for load in found.loads) <= max(start, 2 * point), "no load is far beyond the point"


def test_it_stops_where_the_interval_says_no_more() -> None:
    found = find(saturating_at(130, noise=0.1), 50, OBJECTIVE)
    assert found.ended == "undecided"
    assert found.holds is not None
    assert found.fails is not None
    assert found.fails / found.holds > 1.05
    assert "more trials" in found.words


def test_nothing_holds() -> None:
    found = find(saturating_at(0.001), 100, OBJECTIVE)
    assert (found.holds, found.ended) == (None, "nothing holds")
    assert len(found.loads) == STEPS_DOWN + 1
    assert "not even 1.562/s holds" in found.words


def test_everything_holds() -> None:
    found = find(saturating_at(1e30), 1, OBJECTIVE)
    assert found.fails is None
    assert found.ended == "steps"
    assert "at least" in found.words


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        ({"p99_ms": None, "p99_ci_ms": None}, "too few arrivals"),
        ({"verdict": "INVALID", "reasons": ["generator-saturated"]}, "generator-saturated"),
        (None, "did not come up"),
    ],
)
def test_where_a_load_says_nothing_what_was_found_until_then_stands(broken: dict[str, Any] | None, word: str) -> None:
    def measure(rate: float) -> CellSummary:
        if rate <= 100:
            return saturating_at(1000)(rate)
        if broken is None:
            raise TailraceError("the server did not come up")
        return saturating_at(1000)(rate).model_copy(update=broken)

    found = find(measure, 50, OBJECTIVE)
    assert (found.holds, found.fails, found.ended) == (100, None, "stopped")
    assert "at least 100/s; at 200/s" in found.words
    assert word in found.words
    assert find(measure, 200, OBJECTIVE).words.startswith("not known; at 200/s")


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    for arguments, word in ((("nothing",), "no experiment"), (("smoke", "--slo", "p9=1s"), "--slo")):
        done = tailrace("saturate", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert word in done.stderr
