"""What an adapter of another package imported before everything was ``tailrace...`` is found while that adapter is loaded."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

FORMER = {
    "harness.adapter": "tailrace.harness.contract.adapter",
    "harness.codecs": "tailrace.harness.contract.codecs",
    "harness.control": "tailrace.harness.contract.control",
    "harness.exchange": "tailrace.harness.contract.exchange",
    "harness.multiplexing": "tailrace.harness.contract.multiplexing",
    "harness.observations": "tailrace.harness.contract.observations",
    "harness.pipeline": "tailrace.harness.contract.pipeline",
    "harness.popularity": "tailrace.harness.contract.popularity",
    "harness.workload": "tailrace.harness.contract.workload",
    "harness.differences": "tailrace.harness.differences",
    "harness.errors": "tailrace.harness.errors",
    "harness.folders": "tailrace.harness.folders",
    "harness.machine": "tailrace.harness.machine",
    "harness.processes": "tailrace.harness.processes",
    "harness.quantities": "tailrace.harness.quantities",
}
"""Former name → the module's name now."""


class _Former(ModuleType):
    """Stands for a module under its former name: gives what is in it, and warns whoever takes it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        now = FORMER[self.__name__]
        warnings.warn(f"{self.__name__} is {now} now: import {name} from there", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(now), name)


def load(module: str) -> ModuleType:
    """Import somebody else's module; where it asks for a former name, with a :class:`DeprecationWarning` that says the new one.

    A package of theirs that is called ``harness`` is theirs as long as it holds what they ask for.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in {"harness", *FORMER}:
            raise
    with _former_names():
        return importlib.import_module(module)


@contextmanager
def _former_names() -> Iterator[None]:
    package = ModuleType("harness")
    package.__path__ = []
    stand_ins = {"harness": package, **{name: _Former(name) for name in FORMER}}
    for name in FORMER:
        setattr(package, name.rpartition(".")[2], stand_ins[name])
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "harness"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)
