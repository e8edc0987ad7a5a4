"""Experiments: what is accepted, what is refused and in which words, and the order in which trials run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tailrace.harness.contract.adapter import Autoscale, Tuning
from tailrace.harness.contract.multiplexing import Multiplexing
from tailrace.harness.contract.popularity import Models, Popularity
from tailrace.harness.contract.workload import Slo
from tailrace.harness.errors import InputError
from tailrace.harness.plan.cells import cells, interleave
from tailrace.harness.plan.experiment import (
    Calibration,
    Client,
    ContainerChoice,
    Experiment,
    ScalerChoice,
    Scenario,
    TraceChoice,
    Warmup,
)
from tailrace.harness.plan.faults import FaultChoice, FaultSchedule
from tailrace.harness.plan.loading import builtin_experiments, load_experiment

ROOT = Path(__file__).parents[2]


def minimal(**changes: object) -> Experiment:
    return Experiment.model_validate({"name": "x", "adapters": ["null"], "trace": "steady", **changes})


@pytest.mark.parametrize("name", builtin_experiments())
def test_every_built_in_experiment_is_valid(name: str) -> None:
    assert load_experiment(name).name == name


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("tunning.max_batch=4", "unknown key `tunning`; did you mean 'tuning'?"),
        ("tuning.max_btch=4", "unknown key `tuning.max_btch`; did you mean 'max_batch'?"),
        ("trace.windw_s=[0,1]", "did you mean 'window_s'?"),
        ("scenarios.1.faults.0.knd=x", "did you mean 'kind'?"),
        ("slo.latency_ms=0", "`slo.latency_ms`: Input should be greater than 0"),
        ("trials=0", "`trials`"),
        ("adapters=[]", "`adapters`"),
        ("adapters=[triton, triton]", "triton is listed twice"),
        ("scenarios.0.name=a/b", "letters, digits"),
        ("options.nope={}", "'nope' is not among the adapters"),
        ("tuning.autoscale={min: 3, max: 1, target_ongoing: 2}", "min (3) is above max (1)"),
        ("scenarios.9.name=x", "no index"),
        ("adapters.0.name=x", "has no keys of its own"),
        ("adapters.0.name.more=x", "has no keys of its own"),
        ("containers.cpus=2", "`environment` is 'venv'"),
        ("environment=dockre", "`environment`"),
        ("client.timeout_s=.inf", "finite"),
        ("slo.latency_ms=.nan", "finite"),
        ("tuning.batch_window_ms=.inf", "finite"),
        ("scenarios.0.adapters=[kserve]", "no-fault is for 'kserve', which is not among the adapters"),
        ("load={find: saturation}", "`load.slo`"),
        ("load={find: bottom, slo: {p99_ms: 9}}", "`load.find`"),
        ("load={find: saturation, slo: {p99_ms: 9}, rates: [1]}", "unknown key `load.rates`"),
        ("load={find: saturation, slo: {p99: 9}}", "did you mean 'p99_ms'?"),
        ("trials", "write it as key=value"),
        ("trials=[", "not valid YAML"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_remedy(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment("default", assignments=[assignment])
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'default'"):
        load_experiment("defalt")


def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(InputError, match=r"list\.yaml: an experiment is a mapping"):
        load_experiment(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_experiment(str(path))


def test_command_line_overrides() -> None:
    chosen = load_experiment(
        "default", overrides={"adapters": ["null"], "trials": 2}, trace="bursty", assignments=["trace.mean_rate=12.5"]
    )
    assert chosen.adapters == ("null",)
    assert chosen.trials == 2
    assert chosen.trace == TraceChoice(name="bursty", mean_rate=12.5, tail_s=20)


def test_a_scenario_may_be_for_some_adapters_only(tmp_path: Path) -> None:
    experiment = minimal(adapters=["a", "b"], scenarios=[{"name": "s"}, {"name": "t", "adapters": ["b"]}])
    assert [cell.id for cell in cells(experiment)] == ["a--s", "b--s", "b--t"]
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    assert [cell.id for cell in cells(load_experiment(str(path), overrides={"adapters": ["a"]}))] == ["a--s"]
    only_b = load_experiment(str(path), overrides={"adapters": ["b", "c"]})
    assert [cell.id for cell in cells(only_b)] == ["b--s", "b--t", "c--s"]
    assert only_b.scenarios[1].adapters == ("b",)
    with pytest.raises(ValueError, match="none is for a; leave it out of `adapters`"):
        minimal(adapters=["a", "b"], scenarios=[{"name": "t", "adapters": ["b"]}])


def test_another_trace_leaves_the_parameters_of_the_former_behind() -> None:
    assert load_experiment("smoke").trace.params
    assert load_experiment("smoke", trace="surge").trace.params == {}


def test_tuning_defaults_sets_no_knob_and_can_be_extended_by_set() -> None:
    assert minimal(tuning="defaults").tuning.chosen() == {}
    assert load_experiment("default", assignments=["tuning=defaults"]).tuning == Tuning()
    assert load_experiment("default", assignments=["tuning=defaults", "tuning.replicas=3"]).tuning == Tuning(replicas=3)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_trials_interleave_in_blocks(adapters: int, scenarios: int, trials: int, seed: int) -> None:
    experiment = minimal(
        adapters=[f"a{i}" for i in range(adapters)],
        scenarios=[{"name": f"s{i}"} for i in range(scenarios)],
        trials=trials,
        seed=seed,
    )
    plans = interleave(experiment)
    size = adapters * scenarios
    assert len({plan.id for plan in plans}) == len(plans) == size * trials
    for block in range(trials):
        members = plans[block * size : (block + 1) * size]
        assert Counter(plan.number for plan in members) == {block + 1: size}
        assert len({plan.seed for plan in members}) == 1, "every cell of a block meets the same arrivals"
    assert len({plan.seed for plan in plans}) == trials
    assert [plan.id for plan in interleave(experiment)] == [plan.id for plan in plans]


def test_the_order_within_blocks_changes() -> None:
    plans = interleave(minimal(adapters=["a", "b", "c"], trials=8))
    orders = {tuple(plan.cell.adapter for plan in plans[i : i + 3]) for i in range(0, 24, 3)}
    assert len(orders) > 1


@pytest.mark.parametrize(
    "model",
    [
        Experiment,
        TraceChoice,
        Scenario,
        FaultChoice,
        FaultSchedule,
        ScalerChoice,
        Client,
        Models,
        Multiplexing,
        Popularity,
        Warmup,
        Calibration,
        ContainerChoice,
        Tuning,
        Autoscale,
        Slo,
    ],
)
def test_every_key_is_documented(model: type[BaseModel]) -> None:
    documentation = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for key in model.model_fields:
        assert f"`{key}`" in documentation, f"{model.__name__}.{key} is not in docs/experiments.md"
