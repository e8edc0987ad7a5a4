"""The search on real servers: the framework's defaults first, then what Optuna or the simulator proposes, one run each; in
the end the best settings against the defaults, measured afresh in interleaved trials.

A search is a folder: ``search.journal`` (Optuna's), one run folder for each step, ``confirmation``. One that was cut off goes
on where it stopped.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tailrace.harness.analysis.comparison import Ratio, blocks, paired_ratio
from tailrace.harness.analysis.summary import jsonable, summarise
from tailrace.harness.errors import InputError, TailraceError, TrialPrunedError
from tailrace.harness.plan.cells import TrialPlan
from tailrace.harness.records.store import RunFolder
from tailrace.harness.records.summary import CellSummary, RunSummary, TrialSummary
from tailrace.harness.replay.driver import Progress
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.runner import run_or_go_on
from tailrace.simulator.engine import simulate
from tailrace.simulator.fitting import fit, read_trial
from tailrace.tuner.grid import CALIBRATED_ON, Settings, applied, best_by, combinations, sensible, tuning
from tailrace.tuner.objective import Expected, Objective

CONTROLS = 2
"""Settings that the simulator would have skipped and that are run all the same, to see what it misses."""
_ENDED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


@dataclass(frozen=True)
class Step:
    """One setting that was run."""

    name: str
    settings: Settings | None
    """``None``: the framework's defaults."""
    figures: TrialSummary
    """Its trial, as in ``summary.json``."""
    predicted_p99_ms: float | None = None
    control: bool = False
    pruned: str = ""
    """Why its trial was ended before its end, and its figures are of no use."""


class Pruner(Observer):
    """Ends a trial once it is lost for certain: when more arrivals have missed the objective than a p99 (or an attainment)
    within it leaves room for. Whatever came after could not bring it back."""

    def __init__(self, observer: Observer, objective: Objective) -> None:
        self._observer = observer
        self._objective = objective
        self.note = observer.note  # type: ignore[method-assign]
        self.trial_begins = observer.trial_begins  # type: ignore[method-assign]
        self.stage = observer.stage  # type: ignore[method-assign]
        self.trial_ends = observer.trial_ends  # type: ignore[method-assign]

    def progress(self, plan: TrialPlan, progress: Progress) -> None:
        """Pass the figures on, and judge them."""
        self._observer.progress(plan, progress)
        affordable = self._objective.affordable(progress.measured)
        if progress.missed > affordable:
            raise TrialPrunedError(
                f"after {progress.t_s:.1f} s {progress.missed} of {progress.measured} arrivals had missed "
                f"{self._objective.p99_ms:g} ms, and {affordable} may"
            )


@dataclass
class Found:
    """What a search found."""

    steps: list[Step] = field(default_factory=list)
    best: Step | None = None
    """The best of those within the objective; ``None`` where none was."""
    skipped: int = 0
    """Settings that the simulator ruled out."""
    confirmation: RunFolder | None = None
    confirmed: dict[str, CellSummary] = field(default_factory=dict)
    """The confirmation's cells: ``defaults`` and ``best``, as in ``summary.json``."""
    ratios: dict[str, Ratio | None] = field(default_factory=dict)
    """Defaults ÷ best, by figure, in the confirmation; empty where a trial of it is INVALID."""
    pruned: list[Step] = field(default_factory=list)
    """Steps that were lost before their end; ``steps`` has the others."""
    failed: list[str] = field(default_factory=list)
    """Steps that could not be measured, and why."""


@dataclass
class Search:
    """One framework, one workload, one trace."""

    base: Mapping[str, Any]
    """An experiment with everything but scenarios, trials and name."""
    space: Mapping[str, tuple[Any, ...]]
    objective: Objective
    folder: Path
    observer: Observer
    seed: int

    def run(self, budget: int, *, simulate_first: bool, trials: int) -> Found:
        """Run at most ``budget`` settings besides the defaults, then confirm the best in ``trials`` interleaved trials."""
        found = Found()
        defaults = self._measure("defaults", None, found, prunes=False)
        propose = self._by_simulation if simulate_first else self._by_optuna
        propose(budget, found)
        chosen = [step for step in found.steps if step.settings is not None and self.objective.met(step.figures)]
        found.best = max(
            chosen,
            key=lambda step: self.objective.score(step.figures),
            default=None,
        )
        if found.best is not None and defaults is not None:
            self._confirm(found, found.best, trials)
        return found

    # ------------------------------------------------------------ steps

    def _measure(
        self, name: str, settings: Settings | None, found: Found, *, prunes: bool = True, **more: Any
    ) -> Step | None:
        """Run one setting, unless an earlier attempt has; ``None`` if it could not be measured. With ``prunes`` it is ended
        once it is lost."""
        observer = Pruner(self.observer, self.objective) if prunes else self.observer
        try:
            summary = self._summary(self.folder / name, [("candidate", settings)], 1, observer)
        except InputError:
            raise
        except TailraceError as error:
            found.failed.append(f"{name}: {error.message}")
            self.observer.note(f"{name} could not be measured: {error.message}")
            return None
        (trial,) = summary.trials
        if trial.state == "pruned":
            step = Step(name, settings, trial, **more, pruned=trial.reasons[0].text)
            found.pruned.append(step)
            return step
        step = Step(name, settings, trial, **more)
        if trial.verdict == "INVALID":
            found.failed.append(f"{name}: INVALID: {', '.join(reason.code for reason in trial.reasons)}")
            return None
        found.steps.append(step)
        return step

    def _summary(
        self, folder: Path, candidates: list[tuple[str, Settings | None]], trials: int, observer: Observer
    ) -> RunSummary:
        """The summary of a run of these settings: the one that is there, or gone on with, or a new one."""
        scenarios = [
            {"name": name, "tuning": "defaults" if settings is None else tuning(settings, self.base["devices"])}
            for name, settings in candidates
        ]
        content = {**self.base, "name": "tune", "trials": trials, "scenarios": scenarios}
        return summarise(run_or_go_on(folder, content, observer))

    def _by_optuna(self, budget: int, found: Found) -> None:
        """Tree-structured Parzen estimation over the knobs' values; a setting that was run is not run again."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = JournalStorage(JournalFileBackend(str(self.folder / "search.journal")))
            study = optuna.create_study(
                storage=storage,
                study_name="tune",
                load_if_exists=True,
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=max(4, budget // 4)),
            )
        tried: dict[str, Step | None] = {}
        for earlier in study.get_trials(states=_ENDED):  # of a search that was cut off
            settings = sensible(earlier.params, self.space)
            if _name(settings) not in tried:
                tried[_name(settings)] = self._measure(_name(settings), settings, found)
        most = min(budget, len(list(combinations(self.space))))
        for asked in range(20 * budget):  # it may ask for the same setting again
            if len(tried) >= most:
                return
            trial = study.ask()
            settings = sensible(
                {name: trial.suggest_categorical(name, values) for name, values in self.space.items()}, self.space
            )
            key = _name(settings)
            if key not in tried:
                self.observer.note(f"step {len(tried) + 1} of {budget} (asked {asked + 1} times): {key}")
                tried[key] = self._measure(key, settings, found)
            step = tried[key]
            if step is not None and step.pruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(
                    trial,
                    0.0 if step is None else self.objective.score(step.figures),
                )

    def _by_simulation(self, budget: int, found: Found) -> None:
        """One run to fit on; then those that the fitted simulator ranks highest, and some that it does not."""
        first = {name: _nearest(CALIBRATED_ON.get(name), values) for name, values in self.space.items()}
        step = self._measure(_name(first), first, found, prunes=False)
        if step is None:
            raise TailraceError(
                "the setting to fit the simulator on could not be measured",
                remedy="leave --simulate-first out",
                detail="\n".join(found.failed),
            )
        (folder,) = RunFolder.open(self.folder / step.name).trials
        trial = read_trial(folder)
        system = fit(trial).system
        grid = [settings for settings in combinations(self.space) if settings != first]
        figures = [
            simulate(applied(system, settings), trial.arrivals_ns, span_ns=trial.span_ns).figures(self.objective.p99_ms)
            for settings in grid
        ]
        chosen = best_by(
            [self.objective.score(Expected.of(told)) for told in figures],
            max(0, budget - 1 - CONTROLS),
        )
        rest = [position for position in range(len(grid)) if position not in set(chosen)]
        controls = np.random.default_rng(self.seed).permutation(rest)[:CONTROLS]
        found.skipped = len(rest) - len(controls)
        for position in [*chosen, *(int(control) for control in controls)]:
            self._measure(
                _name(grid[position]),
                grid[position],
                found,
                predicted_p99_ms=figures[position]["p99_ms"],
                control=position in controls,
            )

    # ------------------------------------------------------------ the end

    def _confirm(self, found: Found, best: Step, trials: int) -> None:
        # Named after the best, for a search that goes on may find another one.
        folder = self.folder / f"confirmation.{best.name}"
        candidates: list[tuple[str, Settings | None]] = [("defaults", None), ("best", best.settings)]
        try:
            summary = self._summary(folder, candidates, trials, self.observer)
        except InputError:
            raise
        except TailraceError as error:
            found.failed.append(f"confirmation: {error.message}")
            return
        found.confirmation = RunFolder.open(folder)
        found.confirmed = {cell.scenario: cell for cell in summary.cells}
        if all(cell.verdict != "INVALID" for cell in found.confirmed.values()):
            of = {name: [t for t in summary.trials if t.scenario == name] for name, _ in candidates}
            for figure in ("p99_ms", "goodput_rps_per_device"):
                found.ratios[figure] = paired_ratio(blocks(of["defaults"], of["best"], figure))
        self._keep_configuration(found.confirmation)

    def _keep_configuration(self, run: RunFolder) -> None:
        """The native configuration files of the best settings, ready to copy."""
        for trial in run.trials:
            if trial.facts.scenario == "best":
                shutil.copytree(trial.server / "config", self.folder / "best-configuration", dirs_exist_ok=True)
                return


def _name(settings: Settings) -> str:
    return ".".join(f"{name}-{'none' if value is None else format(value, 'g')}" for name, value in settings.items())


def _nearest(wanted: Any, values: tuple[Any, ...]) -> Any:
    """The value closest to a wanted one; without one the last, which for replicas is one for each device."""
    if wanted is None:
        return values[-1] if None not in values else None
    return min(values, key=lambda value: abs((value or 0) - wanted))


def told(found: Found, objective: Objective) -> dict[str, Any]:
    """The outcome for JSON."""
    answer = {
        "objective": vars(objective),
        "steps": [
            {
                "name": step.name,
                "settings": step.settings,
                "within_objective": objective.met(step.figures),
                "predicted_p99_ms": step.predicted_p99_ms,
                "control": step.control,
                **_shown(step.figures),
            }
            for step in found.steps
        ],
        "best": None if found.best is None else found.best.settings,
        "pruned": [{"name": step.name, "settings": step.settings, "reason": step.pruned} for step in found.pruned],
        "skipped_by_simulation": found.skipped,
        "confirmed": {
            name: {"within_objective": objective.met(cell), **_shown(cell, "p99_ci_ms")}
            for name, cell in found.confirmed.items()
        },
        "defaults_to_best": {
            figure: None if ratio is None else {"ratio": ratio.value, "interval": ratio.ends, "pairs": ratio.pairs}
            for figure, ratio in found.ratios.items()
        },
        "failed": found.failed,
    }
    plain: dict[str, Any] = jsonable(answer)
    return plain


SHOWN = ("p99_ms", "p50_ms", "goodput_rps_per_device", "slo_attainment", "utilization", "batch_size_mean", "verdict")


def _shown(figures: TrialSummary | CellSummary, *more: str) -> dict[str, Any]:
    return {name: getattr(figures, name) for name in (*SHOWN, *more)}
