"""What is typed: ``tailrace adapters``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.show import Form, Part, Sheet, TableOrJson, show

if TYPE_CHECKING:
    from tailrace.harness.contract.adapter import Adapter


def adapters(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    faults: Annotated[bool, typer.Option("--faults", help="Which faults can be done to each on this machine.")] = False,
    form: Form = TableOrJson.TABLE,
) -> None:
    """List the adapters: what each can do, where each knob lands, what it refuses, and what was seen of it here.

    What was seen comes from the contract suite (`nox -s contract`), run on this machine.
    """
    from tailrace.harness.contract.observations import observations_of
    from tailrace.harness.plan.fault_kinds import fault_matrix
    from tailrace.harness.run.registry import all_adapters, get_adapter

    chosen = [get_adapter(name) for name in names] if names else list(all_adapters().values())
    if faults:
        matrix = fault_matrix(chosen)
        show(form, matrix, _faults(matrix))
        return
    observed = {adapter.name: observations_of(adapter) for adapter in chosen}
    content = {adapter.name: {**adapter.described(), "observed": observed[adapter.name]} for adapter in chosen}
    show(form, content, (part for adapter in chosen for part in _adapter(adapter, observed[adapter.name])))


def _adapter(adapter: Adapter, observed: Mapping[str, Any] | None) -> tuple[Text, Sheet]:
    """What it claims, beside each axis what this machine showed, and where each knob lands."""
    title = Text(f"{adapter.name}: {adapter.title} ({adapter.homepage})", style="bold")
    return title, Sheet((), list(_lines(adapter, observed)))


def _lines(adapter: Adapter, observed: Mapping[str, Any] | None) -> Iterator[tuple[str, str | Text]]:
    from tailrace.harness.contract.observations import TOPICS

    yield "protocols", ", ".join(adapter.protocols)
    yield "capabilities", ", ".join(adapter.capabilities()) or "none beyond deploy and stop"
    seen: dict[str, list[str]] = {}
    for observation in (observed or {}).get("observations", ()):
        seen.setdefault(observation["axis"], []).append(observation["text"])
    for axis, title in TOPICS.items():
        told: list[str | Text] = [adapter.traits[axis]] if adapter.traits.get(axis) else []
        told += [Text(f"seen here: {text}", style="cyan") for text in seen.get(axis, ())]
        yield from zip((title, *[""] * len(told)), told, strict=False)
    if observed is None:
        yield "seen here", Text(f"nothing yet: run `nox -s contract -- --adapter {adapter.name}`", style="dim")
    else:
        yield "seen", f"{observed['seen_at']}, on Python {observed['python']}"
    if adapter.exposes:
        yield "exposes", Text(adapter.exposes, style="yellow")
    yield from adapter.knobs.items()
    for knob, reason in adapter.refused.items():
        yield knob, Text(f"refused: {reason}", style="yellow")
    for metric, reason in adapter.approximate.items():
        yield metric, Text(f"approximate: {reason}", style="yellow")
    for name, field in adapter.Options.model_fields.items():
        yield f"option {name}", f"{field.description or ''} (default {field.default!r})"


def _faults(matrix: Mapping[str, Mapping[str, str | None]]) -> Iterator[Part]:
    """Kinds of faults against adapters; reasons below the table."""
    from tailrace.harness.plan.fault_kinds import fault_kinds

    reasons: list[str] = []
    rows: list[list[str | Text]] = []
    for kind, fault in fault_kinds().items():
        parameters = ", ".join(f"{name} ({value:g})" for name, value in fault.parameters().items())
        row: list[str | Text] = [kind, fault.does + (f": {parameters}" if parameters else "")]
        for name, refusals in matrix.items():
            if (reason := refusals[kind]) is not None:
                reasons.append(f"{kind} on {name}: {reason}")
            row.append(Text("yes", "green") if reason is None else Text(f"no ({len(reasons)})", "yellow"))
        rows.append(row)
    yield Sheet(("fault", "what it does, and its parameters", *matrix), rows, words=2)
    yield from (f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
