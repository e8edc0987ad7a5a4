"""Adapters are found by folder and by entry point; one that breaks the interface is named."""

from __future__ import annotations

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
from tailrace.harness.run import registry

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
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


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
