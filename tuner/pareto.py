"""How much throughput does each millisecond of allowed tail buy: the simulator, fitted on one trial of each framework,
picks the settings and loads that are worth measuring; real servers then say what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailrace.harness.analysis.frontier import non_dominated
from tailrace.harness.analysis.summary import summarise
from tailrace.harness.contract.adapter import Tuning
from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.matrix import words
from tailrace.harness.records.store import RunFolder
from tailrace.harness.records.summary import CellSummary
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.runner import run_or_go_on
from tailrace.simulator.engine import simulate
from tailrace.simulator.fitting import Fitted, Trial, fit, read_trial
from tailrace.simulator.system import System
from tailrace.traces.trace import Trace, rescale
from tailrace.tuner.grid import CALIBRATED_ON, Settings, applied, combinations, knobs, targets, tuning
from tailrace.tuner.objective import Expected, Objective

SHORT_SURGE = {"name": "surge", "params": {"duration_s": 20, "peak_at_s": 10, "half_width_s": 6, "fault_at_s": None}}
CALM = {"rate": 40}
"""The warm-up's rate is the surge's own first one: a scaler that had been woken by more would begin with replicas that it is
about to retire."""
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Mean rates that are tried, as multiples of the trace's own."""
PICKS = 2
"""Cells with a fixed number of replicas that each framework's simulation picks; every framework runs the picks of all. One
that scales itself runs one more, alone."""


@dataclass(frozen=True)
class Pick:
    """A cell that is worth measuring."""

    settings: Settings
    rate: float

    @property
    def name(self) -> str:
        """Fit for a scenario's name."""
        given = {name: value for name, value in self.settings.items() if value is not None}
        return ".".join(words(given, round(self.rate)))


@dataclass(frozen=True)
class Measured:
    """One cell beside what the simulator had said of it."""

    adapter: str
    scenario: str
    cell: CellSummary
    """As in ``summary.json``."""
    predicted: Mapping[str, float] | None
    """``None`` for the framework's defaults, which the simulator does not know."""


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured, in two runs."""

    run: RunFolder
    cells: tuple[Measured, ...]

    def best(self, adapter: str, objective: Objective) -> Measured | None:
        """The cell of a framework with the most goodput per device within the objective, of those that are not INVALID and
        whose p99 is within it up to the upper end of its interval."""
        within = [
            cell
            for cell in self.cells
            if cell.adapter == adapter
            and cell.cell.verdict != "INVALID"
            and objective.met(cell.cell)
            and cell.cell.p99_ci_ms is not None
            and cell.cell.p99_ci_ms[1] <= objective.p99_ms
        ]
        return max(within, key=lambda cell: cell.cell.goodput_rps_per_device or 0.0, default=None)


def measure(
    adapters: Sequence[str],
    base: Mapping[str, Any],
    objective: Objective,
    trials: int,
    folder: Path,
    observer: Observer,
) -> Outcome:
    """Calibrate, pick, run. ``base`` is an experiment with everything but name, adapters, scenarios and trials. What an
    earlier, interrupted call has measured in ``folder`` stays."""
    devices = int(base["devices"])
    spaces, scaling = {}, {}
    for name in adapters:
        adapter = get_adapter(name)
        contestant = adapter, adapter.Options(), adapter.protocols[0], devices
        spaces[name], scaling[name] = knobs(*contestant), targets(*contestant)
    common = {**base, "adapters": list(adapters), "slo": {"latency_ms": objective.p99_ms}}
    known = Tuning(**CALIBRATED_ON, replicas=devices)
    first = run_or_go_on(
        folder / "calibration",
        {**common, "name": "calibration", "tuning": known.chosen(), "when_refused": "leave_out"},
        observer,
    )
    measured = {folder.facts.adapter: read_trial(folder) for folder in first.trials if folder.done}
    if missing := [name for name in adapters if name not in measured]:
        raise TailraceError(
            f"{', '.join(missing)} could not be measured to fit the simulator on", remedy=f"see {first.folder}"
        )
    fitted = {name: fit(measured[name]) for name in adapters}
    picks: dict[str, Pick] = {}
    own: dict[str, str] = {}
    for name in adapters:
        for pick in choose(fitted[name].system, measured[name], spaces[name], objective, devices):
            picks.setdefault(pick.name, pick)
    for name in adapters:
        if scaling[name]:
            scaled = choose_scaled(fitted[name], measured[name], spaces[name], scaling[name], objective)
            picks[scaled.name] = scaled
            own[scaled.name] = name
    observer.note(f"the simulator picks {', '.join(picks)}")
    scenarios: list[dict[str, Any]] = [{"name": "defaults", "tuning": "defaults"}]
    scenarios += [
        {
            "name": pick.name,
            "mean_rate": pick.rate,
            "tuning": tuning(pick.settings, devices),
            **({"adapters": [own[pick.name]]} if pick.name in own else {}),
        }
        for pick in picks.values()
    ]
    run = run_or_go_on(
        folder / "frontier",
        {**common, "name": "pareto", "scenarios": scenarios, "trials": trials, "when_refused": "leave_out"},
        observer,
    )
    cells = []
    for cell in summarise(run).cells:
        chosen = picks.get(cell.scenario)
        predicted = None
        # Where a framework ran with other knobs than its own picks have, nobody simulated what it ran.
        knobs_ran = chosen is not None and chosen.settings.keys() - {"target_ongoing"} == spaces[cell.adapter].keys()
        if chosen is not None and knobs_ran and not cell.left_out:
            predicted = _predicted(fitted[cell.adapter], measured[cell.adapter], chosen, objective)
        cells.append(Measured(cell.adapter, cell.scenario, cell, predicted))
    return Outcome(run, tuple(cells))


def choose(
    system: System, trial: Trial, space: Mapping[str, tuple[Any, ...]], objective: Objective, devices: int
) -> list[Pick]:
    """From the simulated frontier of goodput per device against p99, over all settings and loads: the cell with the most
    goodput within the objective, and that with the shortest tail among those that still serve the trace's own load."""
    mean_rate = len(trial.arrivals_ns) / (trial.span_ns / 1e9)
    candidates: list[Pick] = []
    figures: list[dict[str, float]] = []
    for load in LOADS:
        arrivals_ns = _scaled(trial, load * mean_rate)
        for settings in combinations(space):
            candidates.append(Pick(settings, round(load * mean_rate, 1)))
            simulated = simulate(applied(system, settings), arrivals_ns, span_ns=trial.span_ns)
            figures.append(simulated.figures(objective.p99_ms))
    tail = np.array([told["p99_ms"] for told in figures])
    goodput = np.array([told["goodput_rps"] / devices for told in figures])
    on = np.flatnonzero(non_dominated(tail, goodput))
    within = [int(i) for i in on if objective.met(Expected.of(figures[i]))] or [int(i) for i in on]
    most = max(within, key=lambda i: goodput[i])
    serving = [i for i in within if candidates[i].rate >= round(mean_rate, 1)] or within
    return [candidates[i] for i in dict.fromkeys([most, min(serving, key=lambda i: tail[i])])][:PICKS]


def choose_scaled(
    fitted: Fitted,
    trial: Trial,
    space: Mapping[str, tuple[Any, ...]],
    targets: Sequence[int],
    objective: Objective,
) -> Pick:
    """Of the settings with which a framework scales itself, at the trace's own load, the one with the fewest replicas in the
    mean that keeps the objective; where none does, the one with the most goodput."""
    rate = round(len(trial.arrivals_ns) / (trial.span_ns / 1e9), 1)
    arrivals_ns = _scaled(trial, rate)
    most = max(space["replicas"])
    kept, fallback = [], []
    for settings in combinations({**space, "replicas": (most,)}):
        for target in targets:
            pick = Pick({**settings, "replicas": None, "target_ongoing": target}, rate)
            system = applied(fitted.system, pick.settings, fitted.cold_start_s.model_s)
            outcome = simulate(system, arrivals_ns, span_ns=trial.span_ns)
            figures = outcome.figures(objective.p99_ms)
            fallback.append((-figures["goodput_rps"], outcome.ready_ns, pick))
            if objective.met(Expected.of(figures)):
                kept.append((outcome.ready_ns, figures["p99_ms"], pick))
    return min(kept or fallback, key=lambda ranked: ranked[:2])[2]


def _scaled(trial: Trial, rate: float) -> Any:
    trace = Trace(
        name=trial.id, arrivals_ns=np.array(trial.arrivals_ns, np.int64), span_ns=trial.span_ns, transient=True
    )
    return rescale(trace, rate, 1).arrivals_ns


def _predicted(fitted: Fitted, trial: Trial, pick: Pick, objective: Objective) -> dict[str, float]:
    system = applied(fitted.system, pick.settings, fitted.cold_start_s.model_s)
    simulated = simulate(system, _scaled(trial, pick.rate), span_ns=trial.span_ns)
    return simulated.figures(objective.p99_ms)
