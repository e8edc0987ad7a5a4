"""The catalogue: what comes with tailrace loads, what a user adds stays, and names are never confused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.harness.errors import InputError, StorageError
from tailrace.harness.folders import data_folder
from tailrace.traces import catalogue
from tailrace.traces.catalogue import add, entry, load, names
from tailrace.traces.trace import describe


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    path.write_text("timestamp,model\n10,a\n10,b\n12.5,a\n")
    return path


def test_the_built_in_traces_load() -> None:
    assert names() == ["bursty", "diurnal", "sample", "steady", "surge"]
    for name in names():
        trace = load(name, seed=1)
        assert trace.name == name
        assert len(trace) > 100
        assert trace.transient == entry(name).transient
        assert trace.fault_at_s == entry(name).fault_at_s
        assert entry(name).title
        assert entry(name).description
        assert entry(name).licence
    assert [name for name in names() if entry(name).transient] == ["diurnal", "surge"]


def test_the_surge_is_the_one_of_the_design() -> None:
    surge = entry("surge")
    assert (surge.fault_at_s, surge.transient) == (20, True)
    assert surge.params == {
        "duration_s": 30,
        "base_rate": 40,
        "surge_rate": 600,
        "peak_at_s": 15,
        "half_width_s": 9,
    }


def test_a_seed_decides_a_generated_trace_and_leaves_a_file_alone() -> None:
    for name in names():
        first, again, other = (load(name, seed=seed).arrivals_ns.tolist() for seed in (1, 1, 2))
        assert first == again
        assert (first == other) == (entry(name).kind == "file")


def test_parameters_replace_those_of_the_catalogue() -> None:
    trace = load("surge", seed=1, params={"duration_s": 10, "fault_at_s": None, "base_rate": "5"})
    assert (trace.span_s, trace.fault_at_s) == (10, None)
    parameters = trace.provenance["parameters"]
    assert isinstance(parameters, dict)
    assert (parameters["base_rate"], parameters["surge_rate"]) == (5, 600)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("surge", {"base_rte": 1}, "no parameter 'base_rte'; the nearest are 'base_rate'"),
        ("surge", {"duration_s": -1}, "parameter 'duration_s' .-1.: Input should be greater"),
        ("surge", {"duration_s": 10}, "fault_at_s .20. lies outside the trace"),
        ("steady", {"rate": "fast"}, "parameter 'rate' .'fast'.: Input should be a valid number"),
        ("sample", {"rate": 1}, "is a file and takes no parameters"),
    ],
)
def test_impossible_parameters_are_refused(name: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load(name, seed=1, params=params)
    assert caught.value.remedy


def test_an_unknown_name_gets_the_nearest_ones_and_a_way_out() -> None:
    with pytest.raises(InputError, match="no trace 'serge'; the nearest are 'surge'") as caught:
        load("serge", seed=1)
    assert "traces add FILE" in str(caught.value.remedy)


def test_an_added_trace_loads_as_it_was(recorded: Path, home: Path) -> None:
    trace, description = add(recorded, model_column="model", transient=True, fault_at_s=1.5)
    assert (trace.name, description) == ("mine", describe(trace))
    assert "mine" in names()
    recorded.unlink()
    loaded = load("mine", seed=9)
    assert loaded.arrivals_ns.tolist() == [0, 0, 2_500_000_000]
    assert loaded.model_index is not None
    assert loaded.model_index.tolist() == [0, 1, 0]
    assert loaded.provenance == trace.provenance
    assert loaded.provenance["models"] == ["a", "b"]
    assert (loaded.span_ns, loaded.transient, loaded.fault_at_s) == (trace.span_ns, True, 1.5)
    assert sorted(path.name for path in (home / "traces").iterdir()) == ["mine.parquet", "mine.yaml"]


def test_an_added_trace_declares_nothing_by_default(recorded: Path) -> None:
    add(recorded, name="plain-1.0_x")
    loaded = load("plain-1.0_x", seed=0)
    assert (loaded.transient, loaded.fault_at_s, loaded.model_index) == (False, None, None)


def test_the_resolution_of_counts_survives(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("timestamp,count\n0,5\n60,7\n")
    trace, _ = add(path, format="counts", seed=4)
    loaded = load("counts", seed=0)
    assert (loaded.resolution_s, loaded.arrivals_ns.tolist()) == (60, trace.arrivals_ns.tolist())


def test_a_taken_name_is_replaced_only_when_asked(recorded: Path) -> None:
    add(recorded)
    with pytest.raises(InputError, match="already is a trace 'mine'"):
        add(recorded)
    recorded.write_text("timestamp\n1\n")
    assert len(load("mine", seed=0)) == 3
    add(recorded, replace=True)
    assert len(load("mine", seed=0)) == 1


def test_a_built_in_trace_cannot_be_shadowed(recorded: Path, home: Path) -> None:
    for replacing in (False, True):
        with pytest.raises(InputError, match="'surge' is built in"):
            add(recorded, name="surge", replace=replacing)
    (home / "traces").mkdir(parents=True)
    (home / "traces" / "surge.yaml").write_text("title: mine\n")
    assert entry("surge").title == "Flash crowd"


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b", ".hidden", "ä", "-x", "a" * 101, "a\n"])
def test_an_unfit_name_is_refused(recorded: Path, home: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a trace"):
        add(recorded, name=name)
    assert not home.exists()


def test_a_bad_file_leaves_nothing_behind(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("timestamp\n2\n1\n")
    with pytest.raises(InputError, match="line 3"):
        add(path)
    with pytest.raises(InputError, match="fault_at_s"):
        path.write_text("timestamp\n1\n2\n")
        add(path, fault_at_s=5)
    assert not home.exists()


def test_a_write_that_fails_leaves_the_old_trace(recorded: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(recorded)

    def fails(path: Path, trace: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalogue, "_write_parquet", fails)
    with pytest.raises(StorageError, match="No space left on device"):
        add(recorded, replace=True)
    assert len(load("mine", seed=0)) == 3
    assert sorted(path.name for path in (home / "traces").iterdir()) == ["mine.parquet", "mine.yaml"]


def test_a_folder_that_cannot_be_written_is_named(recorded: Path, home: Path) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot be stored"):
        add(recorded)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("title: [", "cannot be read"),
        ("just text", "does not hold the fields"),
        ("title: x\n", "'description'"),
        ("{title: x, description: x, kind: file, source: x, licence: x}", "kind file needs `file`"),
        (
            "{title: x, description: x, kind: generator, generator: nope, source: x, licence: x}",
            "kind generator needs `generator`, one of surge",
        ),
        ("{title: x, description: x, kind: file, file: ../a.csv, source: x, licence: x}", "'file'"),
        ("{title: x, description: x, kind: file, file: a.csv, source: x, licence: x, colour: 1}", "'colour'"),
    ],
)
def test_a_broken_declaration_is_named(home: Path, content: str, says: str) -> None:
    (home / "traces").mkdir(parents=True)
    (home / "traces" / "odd.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"(?s)odd\.yaml.*{says}"):
        entry("odd")


def test_a_broken_store_is_named(recorded: Path, home: Path) -> None:
    add(recorded)
    stored = home / "traces" / "mine.parquet"
    for content in (b"", b"PAR1 no parquet PAR1"):
        stored.write_bytes(content)
        with pytest.raises(InputError, match=r"mine\.parquet.*cannot be read"):
            load("mine", seed=0)
    stored.unlink()
    with pytest.raises(InputError, match=r"mine\.parquet.*cannot be read"):
        load("mine", seed=0)


def test_the_default_folder_is_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TAILRACE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert data_folder() == Path.home() / ".local" / "share" / "tailrace"


def test_transformations_of_a_loaded_trace_leave_the_store_alone(recorded: Path) -> None:
    add(recorded)
    loaded = load("mine", seed=0)
    replace(loaded, arrivals_ns=np.zeros(0, dtype=np.int64))
    assert len(load("mine", seed=0)) == 3
