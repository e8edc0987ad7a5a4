"""The typed records: what older ones lack, what is written, and that the documentation says what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailrace.gate.rules import FIGURES as GATED
from tailrace.harness.analysis.comparison import FIGURES as COMPARED
from tailrace.harness.errors import StorageError
from tailrace.harness.records.document import RECORDS, filled, rows_of
from tailrace.harness.records.facts import Fault, TrialFacts
from tailrace.harness.records.summary import CellSummary, ResourceUse, TrialSummary
from tailrace.simulator.fitting import PREDICTED
from tailrace.tuner.search import SHOWN
from tests.records import facts

RECORD_MD = Path(__file__).parents[2] / "docs" / "record.md"


def test_the_documentation_says_what_the_records_say() -> None:
    text = RECORD_MD.read_text(encoding="utf-8")
    assert filled(text) == text, "python -m tailrace.harness.records.document docs/record.md"
    assert filled(text.replace("length of the trace, tail included", "anything")) == text


def test_every_field_is_documented() -> None:
    for name, model in RECORDS.items():
        told = {field for names, _ in rows_of(model) for field in names}
        if model in (
            CellSummary,
            ResourceUse,
        ):  # whose fields a trial has as well, but for those that the prose explains
            told |= TrialSummary.model_fields.keys() | {"trials"}
            told |= {field for field in model.model_fields if field.endswith(("_ci", "_source"))}
        assert model.model_fields.keys() <= told, name


def test_names_that_are_data_are_names_of_figures() -> None:
    for name in (*GATED, *COMPARED, *PREDICTED.values()):
        assert name in TrialSummary.model_fields
    for name in (*COMPARED, *SHOWN):
        assert name in TrialSummary.model_fields and name in CellSummary.model_fields
    with pytest.raises(KeyError):
        TrialSummary.model_construct().figure("p99")


def test_an_older_record_is_read_and_a_damaged_one_named() -> None:
    older = {key: value for key, value in facts().dump().items() if key != "state"}
    read = TrialFacts.load({**older, "state": "done", "of_a_time_long_gone": 1}, "trial.json")
    assert (read.nodes, read.supervision, read.faults, read.cold_start) == (1, "none", [], None)
    assert "of_a_time_long_gone" not in read.dump()
    with pytest.raises(StorageError, match=r"runs/a/trial\.json: state: "):
        TrialFacts.load({**older, "state": "well"}, "runs/a/trial.json")


def test_what_a_trial_did_not_come_to_is_not_written() -> None:
    growing = facts(warnings=[])
    assert "final_probe" not in growing.dump() and "epoch_mono_ns" not in growing.dump()
    growing.epoch_mono_ns = 5
    growing.warnings.append("a stand-in took its place")
    assert list(growing.dump())[-2:] == ["warnings", "epoch_mono_ns"]
    assert TrialFacts.load(growing.dump(), "trial.json") == growing


def test_the_parameters_of_a_fault_are_keys_of_their_own() -> None:
    told = {"kind": "latency", "at_s": 3.0, "round_trip_ms": 40, "duration_s": 2.5, "injected_s": None, "target": "l"}
    fault = Fault.model_validate(told)
    assert fault.parameters == {"round_trip_ms": 40, "duration_s": 2.5}
    assert list(fault.dump().items()) == list(told.items())
