"""Sweeps: knobs and loads with several values, multiplied out into scenarios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.errors import InputError
from tailrace.harness.plan.cells import cells
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.loading import load_experiment
from tailrace.harness.plan.matrix import multiplied_out, spoken, words
from tailrace.harness.run.preflight import check
from tests.conftest import tailrace

BASE: dict[str, Any] = {"name": "swept", "adapters": ["null"], "trace": "steady"}


def names(content: dict[str, Any]) -> list[str]:
    return [scenario["name"] for scenario in multiplied_out({**BASE, **content}, "x.yaml")["scenarios"]]


def loaded(tmp_path: Path, content: dict[str, Any], *assignments: str) -> Experiment:
    path = tmp_path / "swept.yaml"
    path.write_text(yaml.safe_dump({**BASE, **content}))
    return load_experiment(str(path), assignments=assignments)


def test_one_scenario_for_each_combination(tmp_path: Path) -> None:
    experiment = loaded(
        tmp_path,
        {
            "tuning": {"max_batch": [4, 16], "replicas": {"from": 1, "to": 3}, "batch_window_ms": 5},
            "scenarios": [{"name": "calm"}, {"name": "defaults", "tuning": "defaults"}],
            "load": {"rates": [50, 100]},
        },
    )
    told = {
        cell.scenario.name: (experiment.tuning_of(cell.scenario), cell.scenario.mean_rate) for cell in cells(experiment)
    }
    assert len(told) == 2 * 3 * 2 + 2
    tuning, rate = told["calm.max_batch-16.replicas-2.rate-50"]
    assert (tuning.max_batch, tuning.replicas, tuning.batch_window_ms, rate) == (16, 2, 5, 50)
    tuning, rate = told["defaults.rate-100"]
    assert (tuning.chosen(), rate) == ({}, 100)


def test_a_scenario_may_sweep_by_itself() -> None:
    assert names({"scenarios": [{"name": "a", "tuning": {"replicas": [1, 2]}}, {"name": "b"}]}) == [
        "a.replicas-1",
        "a.replicas-2",
        "b",
    ]


def test_a_knob_with_parts_may_be_swept() -> None:
    (one, other) = names(
        {"tuning": {"autoscale": [{"min": 1, "max": 2, "target": 4}, {"min": 1, "max": 4, "target": 4}]}}
    )
    assert one == "no-fault.autoscale-min-1-max-2-target-4"
    assert other == "no-fault.autoscale-min-1-max-4-target-4"


def test_what_is_not_swept_is_left_alone() -> None:
    for content in ({"tuning": "defaults"}, {"tuning": {"max_batch": 4}}, {"scenarios": "wrong"}, {}):
        assert multiplied_out({**BASE, **content}, "x.yaml") == {**BASE, **content}


@pytest.mark.parametrize(
    ("several", "values"),
    [
        ({"from": 1, "to": 16, "factor": 2}, [1, 2, 4, 8, 16]),
        ({"from": 1, "to": 4}, [1, 2, 3, 4]),
        ({"from": 0, "to": 1, "step": 0.1}, [0.1 * k for k in range(11)]),
        ({"from": 3, "to": 3}, [3]),
        ({"from": 1, "to": 10, "factor": 3}, [1, 3, 9]),
        ([8, 2], [8, 2]),
    ],
)
def test_ranges(several: Any, values: list[float]) -> None:
    scenarios = multiplied_out({**BASE, "tuning": {"batch_window_ms": several}}, "x.yaml")["scenarios"]
    assert [scenario["tuning"]["batch_window_ms"] for scenario in scenarios] == pytest.approx(values)


@given(first=st.integers(1, 50), span=st.integers(0, 200), step=st.integers(1, 20))
def test_a_range_stays_between_its_ends_and_reaches_the_last_step(first: int, span: int, step: int) -> None:
    told = {"from": first, "to": first + span, "step": step}
    scenarios = multiplied_out({**BASE, "tuning": {"max_batch": told}}, "x.yaml")["scenarios"]
    values = [scenario["tuning"]["max_batch"] for scenario in scenarios]
    assert values == list(range(first, first + span + 1, step))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"tuning": {"max_batch": []}}, "tuning`.max_batch is an empty list"),
        ({"tuning": {"max_batch": [4, 4]}}, "twice"),
        ({"tuning": {"max_batch": {"from": 4}}}, "`from` and `to`"),
        ({"tuning": {"max_batch": {"from": 4, "to": 1}}}, "never gets"),
        ({"tuning": {"max_batch": {"from": 1, "to": 4, "step": 0}}}, "never gets"),
        ({"tuning": {"max_batch": {"from": 0, "to": 4, "factor": 2}}}, "never gets"),
        ({"tuning": {"max_batch": {"from": 1, "to": 4, "step": 1, "factor": 2}}}, "one of `step` and `factor`"),
        ({"tuning": {"max_batch": {"from": "a", "to": 4}}}, "numbers"),
        ({"tuning": {"max_batch": {"from": 1, "to": 1e9}}}, "more than 1,000 values"),
        ({"tuning": {"max_bach": [1, 2]}}, "no knob 'max_bach'"),
        ({"load": {"rates": [0]}}, "load.rates"),
        ({"load": {"rates": []}}, "empty"),
        ({"load": {"rate": 5}}, "one key"),
        ({"load": [1]}, "one key"),
        (
            {"tuning": {"max_batch": {"from": 1, "to": 100}, "replicas": {"from": 1, "to": 21}}},
            "more than 2,000 scenarios",
        ),
    ],
)
def test_bad_sweeps_are_told_with_file_and_key(content: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        multiplied_out({**BASE, **content}, "x.yaml")
    assert "x.yaml" in caught.value.message


def test_each_rate_has_a_trace_of_its_own(tmp_path: Path) -> None:
    checked = check(loaded(tmp_path, {"load": {"rates": [50, 200]}, "trials": 2}))
    assert len(checked.traces) == 4
    for plan in checked.plans:
        assert checked.trace_of(plan).mean_rate == pytest.approx(plan.cell.scenario.mean_rate, rel=0.1)
    assert checked.traffic_s == pytest.approx(4 * (30 + 3))


def test_an_impossible_combination_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_batch"):
        check(loaded(tmp_path, {"adapters": ["kserve"], "tuning": {"max_batch": [4, 8]}}))


def test_a_dry_run_prints_the_cells_and_starts_nothing(tmp_path: Path) -> None:
    done = tailrace(
        "run", "smoke", "--adapter", "null", "--set", "tuning={replicas: [1, 2]}", "--set", "load.rates=[40, 80]",
        "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 trials of 4 cells" in done.stdout
    assert "no-fault.replicas-2.rate-80" in done.stdout
    assert not list(tmp_path.iterdir())
    refused = tailrace("run", "--resume", "x", "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--dry-run" in refused.stderr


def test_names_are_spoken_without_what_all_have() -> None:
    swept = names({"tuning": {"max_batch": [4, 16]}, "load": {"rates": [40, 62.5]}})
    assert list(spoken(swept).values()) == [f"max batch {b}, {rate:g}/s" for b in (4, 16) for rate in (40, 62.5)]
    plain = ["no-fault", "kill-replica", "v1.2-rate"]
    assert list(spoken(plain).values()) == plain, "what a user wrote is left alone"
    both = names({"tuning": {"replicas": [1, 2]}, "scenarios": [{"name": "calm"}, {"name": "kill"}]})
    assert list(spoken(both).values()) == [
        "calm, replicas 1",
        "calm, replicas 2",
        "kill, replicas 1",
        "kill, replicas 2",
    ]
    assert spoken(["max_batch-16.target_ongoing-8.rate-40"]) == {
        "max_batch-16.target_ongoing-8.rate-40": "max batch 16, target ongoing 8, 40/s"
    }


@given(
    st.lists(
        st.tuples(st.sampled_from(["calm", "kill"]), st.integers(1, 64), st.floats(1, 900)),
        min_size=1,
        unique_by=lambda told: (told[0], told[1], f"{told[2]:g}"),
    )
)
def test_no_two_scenarios_are_spoken_alike(scenarios: list[tuple[str, int, float]]) -> None:
    made = [".".join([base, *words({"max_batch": batch}, rate)]) for base, batch, rate in scenarios]
    assert len(set(spoken(made).values())) == len(made)
