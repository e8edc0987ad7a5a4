"""Finds adapters: every folder of the ``adapters`` package, and every installed entry point of ``tailrace.adapters``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from tailrace import adapters
from tailrace.harness.contract.adapter import Adapter, Tuning
from tailrace.harness.errors import InputError, nearest
from tailrace.harness.run import former_names

ENTRY_POINT_GROUP = "tailrace.adapters"


@cache
def all_adapters() -> dict[str, Adapter]:
    """Every adapter by name, ours first. Raises :class:`InputError` naming the one that breaks the interface."""
    found: dict[str, Adapter] = {}
    for folder in sorted(Path(adapters.__path__[0]).iterdir()):
        if (folder / "adapter.py").is_file():
            where = f"adapters/{folder.name}/adapter.py"
            module = f"{adapters.__name__}.{folder.name}.adapter"
            _register(found, _loaded(where, importlib.import_module, module), where)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        where = f"entry point {entry_point.name!r} ({entry_point.value})"
        module, _, attribute = entry_point.value.partition(":")
        _register(found, _loaded(where, former_names.load, module, attribute or "ADAPTER"), where)
    return found


def _loaded(where: str, load: Callable[[str], ModuleType], module: str, attribute: str = "ADAPTER") -> object:
    try:
        return getattr(load(module), attribute, None)
    except Exception as error:  # somebody's module may raise anything
        raise InputError(
            f"{where} cannot be loaded: {type(error).__name__}: {error}", remedy="mend it, or remove that adapter"
        ) from error


def _register(found: dict[str, Adapter], adapter: object, where: str) -> None:
    if not isinstance(adapter, Adapter):
        raise InputError(
            f"{where}: ADAPTER must be an instance of tailrace.harness.contract.adapter.Adapter, not {adapter!r}"
        )
    if adapter.name in found:
        raise InputError(f"{where}: an adapter called {adapter.name!r} exists already", remedy="give it another name")
    placed, refused = set(adapter.knobs), set(adapter.refused)
    if placed & refused or placed | refused != set(Tuning.model_fields):
        raise InputError(
            f"{where}: every knob of {sorted(Tuning.model_fields)} must be in exactly one of knobs and refused"
        )
    found[adapter.name] = adapter


def get_adapter(name: str) -> Adapter:
    """One adapter. Raises :class:`InputError` that names the nearest known one."""
    known = all_adapters()
    if name in known:
        return known[name]
    near = nearest(name, known)
    raise InputError(
        f"there is no adapter {name!r}; known: {', '.join(known)}",
        remedy=f"did you mean {near!r}?" if near else "see `tailrace adapters`",
    )
