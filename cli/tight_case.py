"""What ``tailrace tune --simulator`` shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailrace.cli.show import TableOrJson, sheet, show
from tailrace.harness.quantities import figure

if TYPE_CHECKING:
    from tailrace.tuner.objective import Objective
    from tailrace.tuner.tight import Case, TightCase

SHOWN_CASES = 12


def show_tight_case(objective: Objective, trace: str, seed: int, plot: Path | None, form: TableOrJson) -> None:
    """Search the simulator's own knobs on a trace, tell, and draw the frontier where ``plot`` says."""
    import numpy as np

    from tailrace.reports.case import plot as draw
    from tailrace.simulator.capacity import CHECKED_SEEDS
    from tailrace.tuner.tight import tight_case

    found = tight_case(objective, trace, seed)
    best = None if found.chosen is None else found.within[found.chosen]
    if plot is not None:
        draw(
            np.array([case.mean_replicas for case in found.cases]),
            np.array([case.figures["p99_ms"] for case in found.cases]),
            chosen=None if best is None else found.cases.index(best),
            slo_ms=objective.p99_ms,
            title=f"{trace}, seed {seed}",
            path=plot,
        )
    content = {
        "simulated": True,
        "tried": len(found.cases),
        "within_objective": [_content(case) for case in found.within],
        "chosen": None if best is None else {**_content(best), "held_seeds": found.held.get(found.chosen or 0)},
        "cheapest_of_all": _content(found.cheapest),
    }
    lost = "".join(f", a replica lost at second {failure.at_s:g}" for failure in found.failures)
    last = (found.chosen or 0) + 1
    first = max(0, last - SHOWN_CASES)
    rows: list[tuple[Case, int | None]] = [
        (case, found.held.get(position)) for position, case in enumerate(found.within)
    ][first : first + SHOWN_CASES]
    columns: dict[str, Callable[[tuple[Case, int | None]], str]] = {
        **{heading: _setting(knob) for heading, knob in KNOBS.items()},
        "p99 ms": lambda row: figure(row[0].figures["p99_ms"], ".1f"),
        "throughput/s": lambda row: figure(row[0].figures["answered"] / found.span_s, ".1f"),
        "used": lambda row: figure(row[0].figures["utilization"], ".1%"),
        "mean replicas": lambda row: figure(row[0].mean_replicas, ".2f"),
        "other seeds": lambda row: "" if row[1] is None else f"{row[1]} of {CHECKED_SEEDS}",
    }
    title = (
        f"simulated, not measured: {trace}, seed {seed}{lost}; "
        f"{len(found.within)} of {len(found.cases)} settings keep {objective.words}"
    )
    table = sheet([*rows, (found.cheapest, None)], columns, words=0)
    show(form, content, [title, table, _cost_of_the_tail(found, objective)])


KNOBS = {
    "max batch": "max_batch",
    "window ms": "window_ms",
    "up above": "up_above",
    "warm pool": "warm_pool",
    "replicas": "replicas",
}


def _setting(knob: str) -> Callable[[tuple[Case, int | None]], str]:
    return lambda row: figure(row[0].settings[knob], "g")


def _content(case: Case) -> dict[str, Any]:
    return {"settings": case.settings, "mean_replicas": case.mean_replicas, "figures": case.figures}


def _cost_of_the_tail(found: TightCase, objective: Objective) -> str:
    from tailrace.simulator.capacity import CHECKED_SEEDS, ENOUGH_SEEDS

    if not found.within:
        return f"No setting keeps {objective.words}; the row is the cheapest of all."
    if found.chosen is None:
        return (
            f"No setting keeps {objective.words} under {ENOUGH_SEEDS} of {CHECKED_SEEDS} other seeds: those above kept it "
            "by luck."
        )
    best, cheapest = found.within[found.chosen], found.cheapest
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in best.settings.items())
    why = (
        f"under {ENOUGH_SEEDS} of {CHECKED_SEEDS} other seeds too"
        if found.drawn
        else "on these very arrivals, and there are no others to try it on"
    )
    return (
        f"Chosen: {settings}; it is the cheapest that keeps {objective.words} {why}. The tail costs "
        f"{best.mean_replicas / cheapest.mean_replicas - 1:.0%} more replicas than the cheapest setting of all (last row), "
        f"whose p99 is {figure(cheapest.figures['p99_ms'], '.1f')} ms."
    )
