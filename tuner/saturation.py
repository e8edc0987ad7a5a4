"""The saturation point: the highest load at which an objective still holds, by bracketing and then bisection."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailrace.harness.analysis.summary import summarise
from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.cells import Cell, cells
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.records.store import RunFolder
from tailrace.harness.records.summary import CellSummary
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.runner import run_or_go_on
from tailrace.tuner.objective import Objective

MAX_STEPS = 24
STEPS_DOWN = 6
"""So often a first rate is halved that does not hold; then nothing holds."""

CONNECTIONS = 32_768
"""At the least, of a search that doubles the load: a slow server's backlog is not to be booked as our drop."""

Ended = Literal["narrow", "undecided", "nothing holds", "steps", "stopped"]


@dataclass(frozen=True)
class Load:
    """One rate that was tried."""

    rate: float
    held: bool
    undecided: bool
    """Whether the interval of its p99 has the objective within it."""
    figures: CellSummary
    """Its cell, as in ``summary.json``."""


@dataclass(frozen=True)
class Saturation:
    """Between the highest rate that held and the lowest that did not (arrivals/s; ``None``: there was none)."""

    holds: float | None
    fails: float | None
    ended: Ended
    loads: tuple[Load, ...]
    stopped_by: str = ""
    """Why a load could not be tried, or says nothing."""

    @property
    def words(self) -> str:
        """For a sentence."""
        stopped = f"; {self.stopped_by}" if self.stopped_by else ""
        if self.holds is None:
            return f"not even {self.loads[-1].rate:.4g}/s holds{stopped}" if self.loads else f"not known{stopped}"
        if self.fails is None:
            return f"at least {self.holds:.4g}/s{stopped or ': more was not tried'}"
        why = {
            "undecided": ", where the interval of the p99 has the objective within it: more trials would narrow it",
            "steps": f", after {len(self.loads)} loads",
        }.get(self.ended, "")
        return f"between {self.holds:.4g} and {self.fails:.4g}/s{why}{stopped}"


def find(
    measure: Callable[[float], CellSummary], start: float, objective: Objective, *, tolerance: float = 0.05
) -> Saturation:
    """Double the rate from ``start`` until the objective does not hold (never further: a saturated machine says nothing more
    at ten times the load), or halve it until it does; then halve the ratio between both, until they are within
    ``tolerance``, or a p99 cannot be told from the objective. ``measure`` gives a cell for a mean rate; where it raises
    :class:`TailraceError`, or gives a cell that is INVALID or claims no p99, what was found until then stands."""
    loads: list[Load] = []
    holds = fails = None
    rate = start
    while len(loads) < MAX_STEPS:
        try:
            load = _tried(rate, measure(rate), objective)
        except TailraceError as error:
            return Saturation(holds, fails, "stopped", tuple(loads), f"at {rate:.4g}/s: {error.message}")
        loads.append(load)
        if load.held:
            holds = rate
        else:
            fails = rate
        if holds is None and len(loads) > STEPS_DOWN:
            return Saturation(None, fails, "nothing holds", tuple(loads))
        if holds is None or fails is None:
            rate = rate * 2 if fails is None else rate / 2
            continue
        if load.undecided:
            return Saturation(holds, fails, "undecided", tuple(loads))
        if fails / holds <= 1 + tolerance:
            return Saturation(holds, fails, "narrow", tuple(loads))
        rate = math.sqrt(holds * fails)
    return Saturation(holds, fails, "steps", tuple(loads))


def _tried(rate: float, cell: CellSummary, objective: Objective) -> Load:
    if cell.verdict == "INVALID":
        raise TailraceError(f"INVALID ({', '.join(cell.reasons)}), which says nothing of the server")
    if cell.p99_ms is None:
        raise TailraceError(f"too few arrivals to claim a p99 ({cell.arrivals}): use a longer trace")
    ends = cell.p99_ci_ms
    undecided = ends is not None and ends[0] <= objective.p99_ms <= ends[1] and cell.p99_ci_ms_source == "across-trials"
    return Load(rate, objective.met(cell), undecided, cell)


@dataclass(frozen=True)
class Saturations:
    """What a search of every cell of an experiment found."""

    objective: Objective
    points: Mapping[str, Saturation]
    """By cell."""
    runs: list[RunFolder]


def saturate_cells(experiment: Experiment, folder: Path, observer: Observer) -> Saturations:
    """The saturation point of every cell of an experiment that has a ``load``, each rate a run below ``folder``. What an
    earlier, interrupted call has measured there stays."""
    load = experiment.load
    if load is None:
        raise ValueError("the experiment has no load to search")
    objective = Objective(load.slo.p99_ms, load.slo.attainment)
    base = experiment.model_dump(mode="json")
    client = {**base["client"], "max_connections": max(CONNECTIONS, base["client"]["max_connections"])}
    common = {**base, "name": "saturate", "load": None, "slo": {"latency_ms": objective.p99_ms}, "client": client}
    runs: list[RunFolder] = []

    def cell_at(cell: Cell, rate: float) -> CellSummary:
        scenario = {**cell.scenario.model_dump(mode="json"), "mean_rate": rate, "adapters": None}
        options = {name: value for name, value in base["options"].items() if name == cell.adapter}
        content = {**common, "adapters": [cell.adapter], "options": options, "scenarios": [scenario]}
        runs.append(run_or_go_on(folder / cell.id / f"rate-{rate:.6g}", content, observer))
        (measured,) = summarise(runs[-1]).cells
        return measured

    points = {cell.id: find(functools.partial(cell_at, cell), load.start, objective) for cell in cells(experiment)}
    return Saturations(objective, points, runs)
