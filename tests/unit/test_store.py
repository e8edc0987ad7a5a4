"""The run folder: immutable, staged, readable after any crash, and refused when a newer tailrace wrote it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tailrace.harness.errors import InputError, StorageError
from tailrace.harness.records.store import SCHEMA_VERSION, EventLog, RunFolder, write_json
from tests.records import facts


def test_a_folder_that_holds_anything_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        RunFolder.create(tmp_path, {"trials": []})
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(InputError, match="already exists"):
        RunFolder.create(tmp_path / "precious", {"trials": []})


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, {"trials": []}).manifest["schema_version"] == SCHEMA_VERSION


def test_a_newer_schema_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(InputError, match="upgrade tailrace"):
        RunFolder.open(tmp_path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "tri')
    with pytest.raises(StorageError, match="not valid JSON"):
        RunFolder.open(tmp_path)


def test_only_trials_that_began_are_listed_in_their_planned_order(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"trials": [{"id": name} for name in ("c", "a", "b")]})
    for name in ("a", "c"):
        run.trial(name).folder.mkdir()
        run.trial(name).write(facts(id=name))
    assert [trial.id for trial in RunFolder.open(tmp_path / "run").trials] == ["c", "a"]


def test_events_count_from_the_epoch_and_survive_a_cut_line(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"trials": [{"id": "a"}]})
    trial = run.trial("a")
    trial.folder.mkdir()
    events = EventLog(trial.folder / "events.jsonl")
    events.write("fault", mono_ns=1_500, kind="kill_replica")
    events.write("spawned", mono_ns=400)
    events.close()
    with (trial.folder / "events.jsonl").open("a") as handle:
        handle.write('{"mono_ns": 9, "ev')
    trial.write(facts(epoch_mono_ns=1_000))
    assert [(event["event"], event["t_ns"]) for event in trial.events] == [("spawned", -600), ("fault", 500)]


def test_a_refused_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(StorageError, match="could not be written"):
        write_json(tmp_path / "missing" / "x.json", {})


def test_a_run_belongs_to_one_at_a_time(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"trials": []})
    with run.held(), pytest.raises(InputError, match=f"still going on: process {os.getpid()} "), run.held():
        pytest.fail("held twice")
    with run.held():  # let go of, it can be held again
        assert (run.folder / "lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", "done"])
def test_a_trial_is_done_only_when_it_says_so(tmp_path: Path, state: str) -> None:
    run = RunFolder.create(tmp_path / "run", {"trials": [{"id": "a"}]})
    run.trial("a").folder.mkdir()
    assert not run.trial("a").done
    run.trial("a").write(facts(state=state))
    assert run.trial("a").done == (state == "done")


def test_what_is_set_aside_overwrites_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"trials": [{"id": "a"}]})
    for number in (1, 2):
        run.trial("a").folder.mkdir()
        write_json(run.trial("a").facts_path, {"attempt": number})
        assert run.set_aside(run.trial("a").folder, "a") == f"set-aside/a-{number}"
    kept = [json.loads((run.folder / "set-aside" / f"a-{n}" / "trial.json").read_text())["attempt"] for n in (1, 2)]
    assert kept == [1, 2]
    assert run.trials == []
    with pytest.raises(StorageError, match="could not be written"):
        run.set_aside(run.trial("a").folder, "a")
