"""The cells of an experiment, and its trials in the order in which they run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from tailrace.harness.plan.experiment import Experiment, Scenario


@dataclass(frozen=True)
class Cell:
    """One point of the experiment's matrix."""

    adapter: str
    scenario: Scenario

    @property
    def id(self) -> str:
        """Unique within the run, and fit for a folder's name."""
        return f"{self.adapter}--{self.scenario.name}"


@dataclass(frozen=True)
class TrialPlan:
    """One repetition of a cell. ``seed`` is shared by all cells of a block, so that they meet the same arrivals."""

    cell: Cell
    number: int
    seed: int

    @property
    def id(self) -> str:
        """The trial's folder name."""
        return f"{self.cell.id}--{self.number}"


def cells(experiment: Experiment) -> list[Cell]:
    """The matrix: every adapter under every scenario that is for it."""
    return [
        Cell(adapter, scenario)
        for adapter, scenario in itertools.product(experiment.adapters, experiment.scenarios)
        if scenario.adapters is None or adapter in scenario.adapters
    ]


def interleave(experiment: Experiment) -> list[TrialPlan]:
    """Trials in the order in which they run: block by block, each block every cell once, shuffled by the seed."""
    plans: list[TrialPlan] = []
    for number in range(1, experiment.trials + 1):
        seed = int(np.random.SeedSequence([experiment.seed, number]).generate_state(1)[0])
        block = [TrialPlan(cell, number, seed) for cell in cells(experiment)]
        order = np.random.default_rng([experiment.seed, number, 1]).permutation(len(block))
        plans += [block[i] for i in order]
    return plans
