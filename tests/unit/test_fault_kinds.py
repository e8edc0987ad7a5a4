"""Kinds of faults are found by file and by entry point; a new one is one file, and one that breaks the interface is named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tailrace import faults
from tailrace.cli.main import app
from tailrace.harness.errors import InputError
from tailrace.harness.plan import plugins
from tailrace.harness.plan.cells import cells
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.fault_kinds import ENTRY_POINT_GROUP, fault_kinds
from tailrace.harness.plan.faults import FaultChoice, FaultSchedule, plan_faults
from tailrace.harness.plan.loading import load_experiment
from tailrace.harness.run.preflight import check
from tests.unit.test_faults import FakeCluster, inject

ROOT = Path(__file__).parents[2]
ORDER = (
    *("kill_replica", "kill_node", "pause_replica", "pause_node", "slow_node", "memory_limit", "disconnect_node"),
    *("partition", "latency", "packet_loss", "reset", "rolling_restart", "model_reload", "kill_loading"),
    "load_failure",
)

ADD_A_FAULT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8").partition("\n## Add a fault\n")[2]
BROWNOUT = re.findall(r"```python\n(.*?)```", ADD_A_FAULT, re.DOTALL)[0]
"""The example of that page."""
EXPERIMENT = """
name: dim
adapters: ["null"]
nodes: 2
devices: 2
trace: {name: steady, params: {rate: 10, duration_s: 5}}
scenarios:
  - name: dimmed
    faults: [{kind: brownout, at_s: 0, target: 1, duration_s: 0.2, left: 0.25}]
"""


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Declares a module as an entry point, as an installed package would."""

    def declare(text: str, attribute: str = ":FAULT") -> None:
        name = f"third_party_fault_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        point = EntryPoint(name="third", value=name + attribute, group=ENTRY_POINT_GROUP)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == ENTRY_POINT_GROUP else [])
        fault_kinds.cache_clear()

    yield declare
    fault_kinds.cache_clear()


def test_every_file_is_a_kind_of_that_name_and_all_stand_in_their_order() -> None:
    assert tuple(fault_kinds()) == ORDER
    files = {path.stem for path in Path(faults.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {kind for kind, fault in fault_kinds().items() if fault.__module__ == f"tailrace.faults.{kind}"}


def test_a_new_kind_is_one_file(declared: Any, tmp_path: Path) -> None:
    path = tmp_path / "dim.yaml"
    path.write_text(EXPERIMENT)
    with pytest.raises(InputError, match=r"unknown key `scenarios.0.faults.0.left`"):
        load_experiment(str(path))
    declared(BROWNOUT)

    experiment = load_experiment(str(path))
    check(experiment)
    with pytest.raises(InputError, match="brownout cannot be done to null: somebody must hold out"):
        check(load_experiment(str(path), assignments=["nodes=1"]))
    for wrong, said in (
        ("left: 2", "less than or equal to 1"),
        ("lft: 1", "did you mean 'left'"),
        ("cpus: 1", "no cpus"),
    ):
        with pytest.raises(InputError, match=said):
            load_experiment(str(path), assignments=[f"scenarios.0.faults=[{{kind: brownout, {wrong}}}]"])

    stored = Experiment.model_validate(json.loads(json.dumps(experiment.model_dump(mode="json"))))
    assert (stored, stored.sha256) == (experiment, experiment.sha256)

    cluster = FakeCluster()
    planned = plan_faults(cells(stored)[0].scenario.faults, span_s=5, suggested_at_s=None, seed=1)
    nemesis = inject(tmp_path, cluster, planned, for_s=0.5)
    assert [(did, *rest[1:]) for did, *rest in cluster.did] == [("limit_cpus", 0.25), ("limit_cpus", None)]
    (told,) = nemesis.done
    assert (told["kind"], told["left"], told["duration_s"], told["target"]) == ("brownout", 0.25, 0.2, "node-1")
    assert told["healed_s"] - told["injected_s"] >= 0.2
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["kind"]) for event in events] == [("fault", "brownout"), ("heal", "brownout")]

    shown = CliRunner().invoke(app, ["adapters", "null", "--faults"]).stdout
    (row,) = (line for line in shown.splitlines() if "brownout" in line)
    assert row.rstrip(" │").endswith("yes")
    assert "left (0.5)" in shown


def test_what_fails_to_heal_is_told_and_others_are_healed(declared: Any, tmp_path: Path) -> None:
    declared(BROWNOUT.replace("limit_cpus(hit.process, None)", "no_such_thing()"))
    given = [
        {"kind": "brownout", "target": 0, "duration_s": 0.1},
        {"kind": "pause_node", "target": 1, "duration_s": 0.3},
    ]
    choices = [FaultChoice.model_validate({**fault, "at_s": 0}) for fault in given]
    nemesis = inject(tmp_path, FakeCluster(), plan_faults(choices, span_s=5, suggested_at_s=None, seed=1), for_s=0.6)
    assert [told["healed_s"] is None for told in nemesis.done] == [True, False]
    assert "AttributeError" in (tmp_path / "events.jsonl").read_text()


def test_a_new_kind_changes_the_hash_of_no_experiment(declared: Any) -> None:
    before = load_experiment("faults").sha256
    assert before == "6796bd7362a729ed324d447e7ce4721a3281a081cfabe71e11bdb3dc04383e47", "as manifests have held it"
    declared(BROWNOUT)
    assert load_experiment("faults").sha256 == before


def test_a_schedule_gives_each_kind_its_own_parameters(declared: Any) -> None:
    declared(BROWNOUT)
    schedule = FaultSchedule.model_validate(
        {"rate": "1/s", "kinds": ["brownout", "pause_node"], "left": 1, "duration_s": None, "cpus": None}
    )
    assert schedule.parameters("brownout") == {"duration_s": 3, "left": 1}
    assert schedule.parameters("pause_node") == {"duration_s": 5}


@pytest.mark.parametrize(
    ("text", "attribute", "said"),
    [
        ("FAULT = 3", ":FAULT", "FAULT must be a subclass"),
        (BROWNOUT, ":NOPE", "FAULT must be a subclass"),
        (BROWNOUT.replace('"brownout"', '"latency"'), ":FAULT", "a fault called 'latency' exists already"),
        (BROWNOUT.replace("default=0.5, ", ""), ":FAULT", "left must be a number, and have a default"),
        (BROWNOUT.replace("left: float", "target: float"), ":FAULT", "target says something else of every fault"),
        (BROWNOUT.replace('scope = "node"', 'scope = "node"\n    errand = True'), ":FAULT", "is no errand"),
        (BROWNOUT.replace("def undo", "def heal"), ":FAULT", "what has a duration_s must be undone"),
        (BROWNOUT.replace("def apply", "def do"), ":FAULT", "apply"),
        (BROWNOUT.replace('    scope = "node"\n', ""), ":FAULT", "scope"),
        ("import nothing_of_that_name", ":FAULT", "cannot be loaded: ModuleNotFoundError.*remove that fault"),
    ],
)
def test_what_breaks_the_interface_is_named(declared: Any, text: str, attribute: str, said: str) -> None:
    declared(text, attribute)
    with pytest.raises(InputError, match=f"(?s)entry point 'third'.*{said}"):
        fault_kinds()


def test_the_docs_have_every_kind_and_every_parameter_as_the_classes_say_them() -> None:
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    places = []
    meanings: dict[tuple[str, str], list[str]] = {}
    for kind, fault in fault_kinds().items():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{kind}` |"))
        places.append(table.index(row))
        defaults = ", ".join(f"`{name}` ({value:g})" for name, value in fault.parameters().items())
        assert row.endswith(f"| {defaults} |" if defaults else "| |")
        for name, field in fault.model_fields.items():
            assert field.description
            meanings.setdefault((name, field.description), []).append(f"`{kind}`")
    assert places == sorted(places)
    keys = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for (name, description), kinds in meanings.items():
        assert f"| `{name}` | {', '.join(kinds)} | {description.rstrip('.')} |" in keys
