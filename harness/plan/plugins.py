"""What others may add: a module in a folder of ours, or an entry point of an installed package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType

from tailrace.harness.errors import InputError


def found(
    what: str,
    group: str,
    attribute: str,
    modules: Iterable[tuple[str, str]],
    load: Callable[[str], ModuleType] = import_module,
) -> Iterator[tuple[str, object]]:
    """Every ``what`` (a word for messages): where it was found, and what is there, which may be anything.

    Ours first: the ``attribute`` of each of ``modules`` (a path for messages, the name to import), ``None`` without it; then
    what the entry points of ``group`` name, whose modules ``load`` imports. Raises :class:`InputError` for one that cannot be
    loaded.
    """
    ours = [(where, name, import_module) for where, name in modules]
    entries = [
        (f"entry point {entry.name!r} ({entry.value})", entry.value, load) for entry in entry_points(group=group)
    ]
    for where, name, imported in [*ours, *entries]:
        module, _, own = name.partition(":")
        try:
            there = getattr(imported(module), own or attribute, None)
        except Exception as error:  # somebody's module may raise anything
            raise InputError(
                f"{where} cannot be loaded: {type(error).__name__}: {error}", remedy=f"mend it, or remove that {what}"
            ) from error
        yield where, there
