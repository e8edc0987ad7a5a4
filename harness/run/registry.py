"""Finds adapters: every folder of the ``adapters`` package, and every installed entry point of ``tailrace.adapters``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tailrace import adapters
from tailrace.harness.contract.adapter import Adapter, Tuning
from tailrace.harness.errors import InputError, nearest
from tailrace.harness.plan.plugins import found
from tailrace.harness.run import former_names

ENTRY_POINT_GROUP = "tailrace.adapters"


@cache
def all_adapters() -> dict[str, Adapter]:
    """Every adapter by name, ours first. Raises :class:`InputError` naming the one that breaks the interface."""
    adapters_by_name: dict[str, Adapter] = {}
    ours = [
        (f"adapters/{folder.name}/adapter.py", f"{adapters.__name__}.{folder.name}.adapter")
        for folder in sorted(Path(adapters.__path__[0]).iterdir())
        if (folder / "adapter.py").is_file()
    ]
    for where, adapter in found("adapter", ENTRY_POINT_GROUP, "ADAPTER", ours, former_names.load):
        _register(adapters_by_name, adapter, where)
    return adapters_by_name


def _register(known: dict[str, Adapter], adapter: object, where: str) -> None:
    if not isinstance(adapter, Adapter):
        raise InputError(
            f"{where}: ADAPTER must be an instance of tailrace.harness.contract.adapter.Adapter, not {adapter!r}"
        )
    if adapter.name in known:
        raise InputError(f"{where}: an adapter called {adapter.name!r} exists already", remedy="give it another name")
    placed, refused = set(adapter.knobs), set(adapter.refused)
    if placed & refused or placed | refused != set(Tuning.model_fields):
        raise InputError(
            f"{where}: every knob of {sorted(Tuning.model_fields)} must be in exactly one of knobs and refused"
        )
    known[adapter.name] = adapter


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
