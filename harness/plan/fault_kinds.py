"""The kinds of faults: every module of the package ``faults``, and every installed entry point of ``tailrace.faults``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tailrace import faults
from tailrace.harness.contract.adapter import Adapter, Tuning
from tailrace.harness.contract.fault import Circumstances, Fault
from tailrace.harness.errors import InputError
from tailrace.harness.plan.plugins import found

ENTRY_POINT_GROUP = "tailrace.faults"
TAKEN = ("kind", "at_s", "target", "rate", "kinds", "injected_s", "healed_s", "pid")
"""What stands beside parameters in experiments and records."""


@cache
def fault_kinds() -> dict[str, type[Fault]]:
    """Every kind by name, in the order of docs and matrices. Raises :class:`InputError` naming the one that breaks the
    interface."""
    kinds: dict[str, type[Fault]] = {}
    ours = [
        (f"faults/{path.name}", f"{faults.__name__}.{path.stem}")
        for path in sorted(Path(faults.__path__[0]).glob("*.py"))
        if path.stem != "__init__"
    ]
    for where, fault in found("fault", ENTRY_POINT_GROUP, "FAULT", ours):
        if not (isinstance(fault, type) and issubclass(fault, Fault)):
            raise InputError(
                f"{where}: FAULT must be a subclass of tailrace.harness.contract.fault.Fault, not {fault!r}"
            )
        for name in ("kind", "does", "scope"):
            if not hasattr(fault, name):
                raise InputError(f"{where}: {fault.__name__} does not say its {name}")
        if fault.kind in kinds:
            raise InputError(f"{where}: a fault called {fault.kind!r} exists already", remedy="give it another name")
        if inspect.isabstract(fault):
            raise InputError(f"{where}: {fault.__name__} has no apply")
        for name, default in fault.parameters().items():
            if name in TAKEN:
                raise InputError(
                    f"{where}: {name} says something else of every fault", remedy="name the parameter otherwise"
                )
            if not isinstance(default, int | float):
                raise InputError(f"{where}: {name} must be a number, and have a default")
        if "duration_s" in fault.model_fields and (fault.errand or fault.undo is Fault.undo):
            raise InputError(f"{where}: what has a duration_s must be undone, and is no errand")
        kinds[fault.kind] = fault
    return dict(sorted(kinds.items(), key=lambda item: (item[1].order, item[0])))


def refusal(kind: str, at: Circumstances) -> str | None:
    """Why a fault cannot be done there; ``None`` when it can."""
    fault = fault_kinds()[kind]
    missing = [name for name in fault.needs if name not in at.adapter.capabilities()]
    if missing:
        return f"its adapter does not have the capability `{'`, `'.join(missing)}`"
    return fault.refusal(at) or at.adapter.fault_refusals(at.tuning).get(kind)


def fault_matrix(adapters: Iterable[Adapter]) -> dict[str, dict[str, str | None]]:
    """Adapter → kind → why it cannot be done to two nodes of it, processes of this machine, ``None`` where it can."""
    tuning = Tuning(replicas=1)
    return {
        adapter.name: {kind: refusal(kind, Circumstances(adapter, tuning, nodes=2)) for kind in fault_kinds()}
        for adapter in adapters
    }
