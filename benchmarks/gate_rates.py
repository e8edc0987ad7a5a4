"""How often the gate is wrong: `python benchmarks/gate_rates.py [RUN [RUN]]`, on recorded trials of one and the same thing.

Baseline and candidate are drawn at random, with replacement, from recorded A/A trials (`tailrace run aa`), as many of each as
`tailrace gate --plan` asks for, and the gate judges them by its default rules: first as they are (a regression is a false
alarm), then with the candidate's p99 multiplied by 1.15 (no regression is a miss). Of one run, trials of other arrivals are
compared; of two runs of the same seed, pairs of the same arrivals, and what differs between those two runs is in the rates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ending import leave
from tailrace.gate.baselines import Baseline, SavedTrial, find
from tailrace.gate.decision import EFFECT, decide, plan
from tailrace.gate.rules import DEFAULT_RULES, parse_rules
from tailrace.harness.errors import InputError

RECORDED = Path(__file__).parent / "recorded" / "aa.json"
"""22 trials each of Triton and Ray Serve, on two cores of a virtual machine, emulated accelerators."""
FEWEST = 20
RULES = parse_rules(DEFAULT_RULES)
Trials = Sequence[SavedTrial]
Draw = Callable[[np.random.Generator, int], tuple[Trials, Trials]]


@dataclass(frozen=True)
class Rates:
    """Of one cell; shares of the resamplings."""

    cell: str
    recorded: int
    planned: int | None
    drawn: int
    """As many as planned; as many as are recorded where the plan asks for more than a thousand."""
    false_alarms: float
    passed: float
    caught: float
    resamplings: int


def within(trials: Trials) -> Draw:
    """Baseline and candidate from one run; the candidate's seeds are changed, so that no trial is taken for its own pair."""

    def draw(random: np.random.Generator, count: int) -> tuple[Trials, Trials]:
        before, after = ([trials[i] for i in random.integers(len(trials), size=count)] for _ in range(2))
        return before, [trial.model_copy(update={"seed": -trial.seed - 1}) for trial in after]

    return draw


def between(first: Trials, second: Trials) -> Draw:
    """Baseline from one run and candidate from another, the same numbers of both."""
    partners = {trial.number: trial for trial in second}
    both = [trial for trial in first if trial.number in partners]

    def draw(random: np.random.Generator, count: int) -> tuple[Trials, Trials]:
        chosen = [both[i] for i in random.integers(len(both), size=count)]
        return chosen, [partners[trial.number] for trial in chosen]

    return draw


def slower(trial: SavedTrial) -> SavedTrial:
    """The trial with a p99 that is 15 % higher."""
    p99_ms = trial.figures["p99_ms"]
    return trial.model_copy(
        update={"figures": {**trial.figures, "p99_ms": None if p99_ms is None else p99_ms * EFFECT}}
    )


def verdict(before: Baseline, after: Baseline) -> str:
    """What the gate says of one draw."""
    return decide(before, after, RULES).verdict


def of(record: Baseline, cell: str, trials: Trials) -> Baseline:
    """The record with these trials of one cell, and no other cell."""
    saved = record.cells[cell].model_copy(update={"trials": tuple(trials)})
    return record.model_copy(update={"cells": {cell: saved}})


def rates(records: Sequence[Baseline], resamplings: int) -> Iterator[Rates]:
    """Of every cell of the first run. Raises :class:`InputError` for cells with too few trials, or INVALID ones."""
    first, last = records[0], records[-1]
    for cell in first.cells:
        usable = [
            [trial for trial in record.cells[cell].trials if trial.verdict != "INVALID"] if cell in record.cells else []
            for record in records
        ]
        if (fewest := min(map(len, usable))) < FEWEST:
            raise InputError(
                f"{cell} has {fewest} trials that are not INVALID in some run; {FEWEST} are needed",
                remedy="record them: tailrace run aa",
            )
        draw = within(usable[0]) if len(records) == 1 else between(*usable)
        again = of(last, cell, usable[1]) if len(records) > 1 else None
        asked = [row.needed for row in plan(of(first, cell, usable[0]), RULES, again)]
        planned = None if None in asked else max(count for count in asked if count is not None)
        count = planned or fewest
        random = np.random.default_rng(7)
        draws = [draw(random, count) for _ in range(resamplings)]
        told = [verdict(of(first, cell, before), of(last, cell, after)) for before, after in draws]
        worse = [
            verdict(of(first, cell, before), of(last, cell, [slower(trial) for trial in after]))
            for before, after in draws
        ]
        yield Rates(
            cell=cell,
            recorded=fewest,
            planned=planned,
            drawn=count,
            false_alarms=told.count("fail") / resamplings,
            passed=told.count("pass") / resamplings,
            caught=worse.count("fail") / resamplings,
            resamplings=resamplings,
        )


def main() -> int:
    """Resample, and print the rates of each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="*", default=[str(RECORDED)], metavar="RUN",
        help="one run or saved baseline, or two of the same seed; left out: those that come with tailrace",
    )  # fmt: skip
    parser.add_argument("--resamplings", type=int, default=1000)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    if len(arguments.runs) > 2 or arguments.resamplings < 1:
        parser.error("give one or two runs, and at least one resampling")
    found = list(rates([find(given, Path("baselines")) for given in arguments.runs], arguments.resamplings))
    if arguments.format == "json":
        print(json.dumps([asdict(row) for row in found], indent=1))
        return 0
    table = Table()
    headings = (
        "cell",
        "recorded",
        "planned",
        "drawn",
        "A/A: regression",
        "A/A: pass",
        f"p99 × {EFFECT}: caught",
        "draws",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for row in found:
        counts = (str(row.recorded), "> 1000" if row.planned is None else str(row.planned), str(row.drawn))
        shares = (f"{share:.1%}" for share in (row.false_alarms, row.passed, row.caught))
        table.add_row(row.cell, *counts, *shares, str(row.resamplings))
    Console(highlight=False, width=140).print(table)
    return 0


if __name__ == "__main__":
    leave(main)
