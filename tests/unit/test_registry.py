"""Adapters are found by folder and by entry point; one that breaks the interface is named."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from tailrace.adapters.null.adapter import Null
from tailrace.harness.contract.adapter import Tuning
from tailrace.harness.errors import InputError
from tailrace.harness.plan import plugins
from tailrace.harness.run import registry
from tailrace.harness.run.former_names import FORMER

ADAPTERS = Path(__file__).parents[2] / "adapters"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    registry.all_adapters.cache_clear()
    yield
    registry.all_adapters.cache_clear()


def declare(monkeypatch: pytest.MonkeyPatch, adapter: Any, value: str = "third_party:ADAPTER") -> None:
    module = types.ModuleType("third_party")
    module.ADAPTER = adapter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "third_party", module)
    point = EntryPoint(name="third", value=value, group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])


class Third(Null):
    name = "third"


def test_every_adapter_folder_is_found_and_places_or_refuses_every_knob() -> None:
    found = registry.all_adapters()
    assert {"kserve", "null", "ray_serve", "reference", "torchserve", "triton"} <= set(found)
    for name, adapter in found.items():
        assert adapter.name == name
        assert adapter.folder.name == name or not adapter.folder.is_relative_to(ADAPTERS)
        assert set(adapter.knobs) | set(adapter.refused) == set(Tuning.model_fields)
        assert adapter.requirements.is_file()


def test_an_entry_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, Third())
    assert isinstance(registry.get_adapter("third"), Third)


@pytest.mark.parametrize(
    ("adapter", "value", "message"),
    [
        (Third, "third_party:ADAPTER", "must be an instance"),
        (Null(), "third_party:ADAPTER", "exists already"),
        (Third(), "third_party:NOPE", "must be an instance"),
        (Third(), "no_such_module:ADAPTER", "cannot be loaded: ModuleNotFoundError"),
        (type("Half", (Third,), {"name": "half", "refused": {}})(), "third_party:ADAPTER", "exactly one of"),
    ],
)
def test_what_breaks_the_interface_is_named(
    monkeypatch: pytest.MonkeyPatch, adapter: Any, value: str, message: str
) -> None:
    declare(monkeypatch, adapter, value)
    with pytest.raises(InputError, match=message):
        registry.all_adapters()


def test_an_unknown_adapter_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'triton'"):
        registry.get_adapter("trition")


FORMER_ADAPTER = """
from harness import errors
from harness.adapter import Adapter, Tuning
from harness.control import choose_ports
from tailrace.adapters.null.adapter import Null
from {package}_config import Problem

assert issubclass(Null, Adapter)
class Old(Null):
    name = "old"
ADAPTER = Old()
"""


def former(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch, adapter: str = FORMER_ADAPTER) -> None:
    """An adapter as its author wrote it when tailrace's modules were called ``harness...``."""
    (folder / f"{package}_config.py").write_text("from harness.errors import InputError as Problem\n", encoding="utf-8")
    (folder / f"{package}.py").write_text(adapter.format(package=package), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    # As where people work; in the repository, `harness` is a folder that a path of "" finds.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "harness").is_dir()])
    point = EntryPoint(name="old", value=f"{package}:ADAPTER", group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])


def test_an_adapter_with_the_former_imports_is_loaded_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former(tmp_path, "of_old", monkeypatch)
    with pytest.warns(DeprecationWarning) as warned:
        assert registry.get_adapter("old").name == "old"
    said = {str(warning.message) for warning in warned}
    assert "harness.adapter is tailrace.harness.contract.adapter now: import Adapter from there" in said
    assert "harness.errors is tailrace.harness.errors now: import InputError from there" in said
    assert Path(warned[0].filename).parent == tmp_path, "it is the author's line that is told"
    assert sys.modules["of_old_config"].Problem is InputError, "the class of today, not another one of its name"
    assert not any(name.split(".")[0] == "harness" for name in sys.modules)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("harness.adapter")


def test_what_was_never_for_other_packages_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former(tmp_path, "too_deep", monkeypatch, "from harness.guardian import sweep\n")
    with pytest.raises(InputError, match=r"too_deep.*No module named 'harness"):
        registry.all_adapters()


def test_a_package_of_the_adapters_own_that_is_called_harness_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former(
        tmp_path,
        "with_its_own",
        monkeypatch,
        FORMER_ADAPTER.replace("from harness.adapter", "from tailrace.harness.contract.adapter"),
    )
    (tmp_path / "harness").mkdir()
    for name, content in {
        "__init__": "",
        "errors": "InputError = 'theirs'\n",
        "control": "choose_ports = None\n",
    }.items():
        (tmp_path / "harness" / f"{name}.py").write_text(content, encoding="utf-8")
    try:
        assert registry.get_adapter("old").name == "old"
        assert sys.modules["with_its_own_config"].Problem == "theirs"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "harness"]:
            del sys.modules[name]


def test_former_names_lead_to_modules_that_exist() -> None:
    for former_name, now in FORMER.items():
        assert importlib.import_module(now).__name__ == now
        assert former_name.rpartition(".")[2] == now.rpartition(".")[2]
