"""The decision: every rule on every cell that baseline and candidate share, and how many trials a rule takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tailrace.gate.baselines import CONDITIONS, Baseline, SavedCell, SavedTrial
from tailrace.gate.power import POWER, power, trials_needed
from tailrace.gate.ratios import Against, against, log_spread
from tailrace.gate.rules import Rule
from tailrace.harness.analysis.comparison import MIN_TRIALS
from tailrace.harness.differences import differences
from tailrace.harness.errors import InputError, nearest

GateVerdict = Literal["pass", "fail", "inconclusive", "invalid"]
WORST_LAST: tuple[GateVerdict, ...] = ("pass", "inconclusive", "fail", "invalid")
"""What a whole is, of which parts differ: INVALID trials leave nothing to go by, not even a regression elsewhere."""
EFFECT = 1.15


@dataclass(frozen=True)
class Finding:
    """One rule on one cell."""

    cell: str
    rule: Rule
    verdict: GateVerdict
    against: Against
    trials: tuple[int, int]
    """Of the baseline and of the candidate."""
    reason: str | None
    """Why there is no pass and no fail."""
    trials_needed: int | None
    """Of each run, to settle it nine times in ten if the ratio is what it seems; ``None`` where that cannot be said."""


@dataclass(frozen=True)
class Decision:
    """What the gate says, and what a reader must know beside it."""

    verdict: GateVerdict
    findings: tuple[Finding, ...]
    allowed: tuple[str, ...]
    """Different conditions, which were allowed."""
    changed: tuple[str, ...]
    """What else differs: the change under test, if it shows at all."""
    notes: tuple[str, ...]
    """Cells that one of both lacks, and trials that are UNKNOWN."""


def decide(
    baseline: Baseline,
    candidate: Baseline,
    rules: Sequence[Rule],
    *,
    allow_different: Collection[str] = (),
    strict: bool = False,
) -> Decision:
    """Judge the candidate. ``allow_different`` names conditions (:data:`CONDITIONS`) that need not be the
    same; ``strict`` treats UNKNOWN trials as INVALID ones.

    Raises :class:`InputError` where no cell is common, where both are the same run, and for other conditions.
    """
    common, different = _comparable(baseline, candidate, allow_different)
    findings = tuple(
        _find(cell, rule, baseline.cells[cell], candidate.cells[cell], strict=strict)
        for cell in common
        for rule in rules
    )
    return Decision(
        verdict=max((finding.verdict for finding in findings), key=WORST_LAST.index),
        findings=findings,
        allowed=tuple(line for lines in different.values() for line in lines),
        changed=tuple(_changed(baseline, candidate, common)),
        notes=tuple(_notes(baseline, candidate, common)),
    )


def _comparable(
    baseline: Baseline, candidate: Baseline, allow_different: Collection[str] | None
) -> tuple[list[str], dict[str, list[str]]]:
    """The cells that both have, and by condition what differs there, a line each. Raises :class:`InputError` where no cell
    is common, where both are the same run, and for differences that are not allowed; with ``None`` none can be."""
    for name in allow_different or ():
        if name not in CONDITIONS:
            near = nearest(name, CONDITIONS)
            raise InputError(
                f"--allow-different: there is no condition {name!r}",
                remedy=f"did you mean {near!r}?" if near else f"one of {', '.join(CONDITIONS)}",
            )
    common = [cell for cell in baseline.cells if cell in candidate.cells]
    if not common:
        raise InputError(
            f"no cell is common: the baseline has {', '.join(baseline.cells)}; the candidate {', '.join(candidate.cells)}",
            remedy="gate runs of the same adapters and scenarios",
        )
    if all(baseline.cells[cell].trials == candidate.cells[cell].trials for cell in common):
        raise InputError(
            "baseline and candidate are the same run, which passes whatever it holds",
            remedy="measure the candidate in a run of its own",
        )
    different = _different(baseline, candidate, common)
    refused = [line for name, lines in different.items() if name not in (allow_different or ()) for line in lines]
    if refused:
        names = ",".join(name for name, lines in different.items() if lines)
        raise InputError(
            "baseline and candidate were measured under different conditions:\n" + "\n".join(refused),
            remedy="measure both alike"
            + (
                ""
                if allow_different is None
                else f"; or, if that is what you mean to compare: --allow-different {names}"
            ),
        )
    return common, different


def _different(baseline: Baseline, candidate: Baseline, common: Sequence[str]) -> dict[str, list[str]]:
    """By condition what differs in the cells that both have, a line each."""
    return {
        name: _lines(
            {
                cell: list(
                    differences(name, baseline.cells[cell].conditions[name], candidate.cells[cell].conditions[name])
                )
                for cell in common
            }
        )
        for name in CONDITIONS
    }


def _find(cell: str, rule: Rule, baseline: SavedCell, candidate: SavedCell, *, strict: bool) -> Finding:
    trials = (len(baseline.trials), len(candidate.trials))
    bad = ("INVALID", "UNKNOWN") if strict else ("INVALID",)
    broken = [line for side, saved in _sides(baseline, candidate) for line in _doubted(side, saved, bad)]
    if broken:
        return Finding(cell, rule, "invalid", Against(), trials, "; ".join(broken), None)
    same_traffic = baseline.conditions["trace"] == candidate.conditions["trace"]
    found = against(baseline.trials, candidate.trials, rule.figure, same_traffic=same_traffic)
    side = "inconclusive" if found.interval is None else rule.side(found.interval)
    if side != "inconclusive":
        return Finding(cell, rule, side, found, trials, None, None)
    if found.ratio is None or found.noise is None:
        return Finding(cell, rule, side, found, trials, found.reason, None)
    reason = f"the interval reaches across {rule.bound:g}"
    return Finding(cell, rule, side, found, trials, reason, trials_needed(rule.distance(found.ratio), found.noise))


def _sides(baseline: SavedCell, candidate: SavedCell) -> tuple[tuple[str, SavedCell], tuple[str, SavedCell]]:
    return ("baseline", baseline), ("candidate", candidate)


def _doubted(side: str, cell: SavedCell, verdicts: Collection[str]) -> Iterator[str]:
    """For each of the verdicts that some trials have: whose, how many, and the reasons."""
    for verdict in verdicts:
        members = [trial for trial in cell.trials if trial.verdict == verdict]
        if members:
            codes = sorted({code for trial in members for code in trial.reasons})
            yield f"{len(members)} of {len(cell.trials)} trials of the {side} {verdict} ({', '.join(codes)})"


def _changed(baseline: Baseline, candidate: Baseline, common: Sequence[str]) -> Iterator[str]:
    """What differs of the subject, a line for each part of it: an upgrade changes dozens of packages."""
    for name in baseline.cells[common[0]].subject:
        found = {
            cell: list(differences(name, baseline.cells[cell].subject[name], candidate.cells[cell].subject.get(name)))
            for cell in common
        }
        if lines := _lines(found):
            yield "; ".join(lines)


def _lines(found: dict[str, list[tuple[str, object, object]]]) -> list[str]:
    """By cell what differs, a line each; it says of which cells, where it is not in all."""
    cells: dict[str, list[str]] = {}
    for cell, facts in found.items():
        for fact, before, after in facts:
            cells.setdefault(f"{fact}: {_shown(before)} → {_shown(after)}", []).append(cell)
    return [line if len(where) == len(found) else f"{line} ({', '.join(where)})" for line, where in cells.items()]


def _shown(value: object) -> str:
    return "none" if value is None or value == [] else str(value)


def _notes(baseline: Baseline, candidate: Baseline, common: Sequence[str]) -> Iterator[str]:
    for side, one, other in (("baseline", baseline, candidate), ("candidate", candidate, baseline)):
        if alone := [cell for cell in one.cells if cell not in other.cells]:
            yield f"only in the {side}, and not judged: {', '.join(alone)}"
    for cell in common:
        for side, saved in _sides(baseline.cells[cell], candidate.cells[cell]):
            for line in _doubted(side, saved, ["UNKNOWN"]):
                yield f"{cell}: {line}"


# ---------------------------------------------------------------- side by side


@dataclass(frozen=True)
class Beside:
    """One cell of one run beside the same cell of the first."""

    cell: str
    run: str
    trials: tuple[int, int]
    """Of the first and of this one."""
    ratios: Mapping[str, Against]
    """This ÷ the first, by figure."""


def side_by_side(runs: Mapping[str, Baseline], figures: Sequence[str]) -> tuple[list[Beside], list[str]]:
    """Every later run beside the first, in the cells that both have; and what else differs between them, a line each.

    Nothing is judged and nothing refused but runs without a common cell (:class:`InputError`). A cell with INVALID trials in
    either has no ratios.
    """
    (first, start), *others = runs.items()
    rows: list[Beside] = []
    told: list[str] = []
    for name, run in others:
        common = [cell for cell in start.cells if cell in run.cells]
        different = _different(start, run, common)
        told += [f"{name}: {line}" for lines in different.values() for line in lines]
        if common:
            told += [f"{name}: {line}" for line in (*_changed(start, run, common), *_notes(start, run, common))]
        for cell in common:
            one, other = start.cells[cell], run.cells[cell]
            broken = [
                line for side, saved in ((first, one), (name, other)) for line in _doubted(side, saved, ["INVALID"])
            ]
            same_traffic = not different["trace"]
            ratios = {
                figure: Against(reason="; ".join(broken))
                if broken
                else against(one.trials, other.trials, figure, same_traffic=same_traffic)
                for figure in figures
            }
            rows.append(Beside(cell, name, (len(one.trials), len(other.trials)), ratios))
    if not rows:
        raise InputError(
            f"no cell is common to {first} and another run", remedy="compare runs of the same adapters and scenarios"
        )
    return rows, told


# ---------------------------------------------------------------- planning


@dataclass(frozen=True)
class Planned:
    """How many trials one rule takes on one cell, each of baseline and candidate; ``None``: more than a thousand, or not
    known, and ``reason`` says why."""

    cell: str
    rule: Rule
    trials: int
    """That the baseline has."""
    noise: float | None
    """Standard deviation of the logarithm of the ratio of two single trials."""
    power_now: float | None
    """The chance that so many trials as the baseline has catch the regression."""
    to_catch: int | None
    """For the regression to be called one, with the wanted power."""
    to_pass: int | None
    """For no change at all to be settled, with the same."""
    reason: str | None = None

    @property
    def needed(self) -> int | None:
        """For both."""
        return None if self.to_catch is None or self.to_pass is None else max(self.to_catch, self.to_pass)


def plan(
    baseline: Baseline,
    rules: Sequence[Rule],
    again: Baseline | None = None,
    *,
    effect: float = EFFECT,
    wanted: float = POWER,
) -> list[Planned]:
    """What each rule takes on each cell, for a regression by the factor ``effect``.

    The noise is √2 times the spread over the baseline's own trials, by which two single trials differ; part of it is the
    traffic's, which pairs share. ``again``, a second run of the same thing, shows how much pairs differ, and takes its place.
    Raises :class:`InputError` for an effect that is no regression under a rule, and what :func:`decide` raises for two runs.
    """
    for rule in rules:
        if rule.side((_truth(rule, effect),) * 2) != "fail":
            raise InputError(
                f"--effect {effect:g} is no regression under `{rule}`",
                remedy="give an effect that the rule does not allow",
            )
    cells = list(baseline.cells) if again is None else _comparable(baseline, again, None)[0]
    planned = []
    for cell in cells:
        for rule in rules:
            trials = baseline.cells[cell].trials
            others = () if again is None else again.cells[cell].trials
            if any(trial.verdict == "INVALID" for trial in (*trials, *others)):
                found = Against(reason="it has INVALID trials")
            elif again is None:
                found = _own_noise(trials, rule.figure)
            else:
                found = against(trials, others, rule.figure)
            far = rule.distance(_truth(rule, effect))
            if found.noise is None:
                reason = found.reason or "∞ or 0 in every trial of one run"
                planned.append(Planned(cell, rule, len(trials), None, None, None, None, reason))
                continue
            now = power(len(trials), far, found.noise)
            to_catch, to_pass = (trials_needed(d, found.noise, wanted) for d in (far, rule.distance(1.0)))
            planned.append(Planned(cell, rule, len(trials), found.noise, now, to_catch, to_pass))
    return planned


def _truth(rule: Rule, effect: float) -> float:
    """The true ratio of a regression by that factor."""
    return effect if rule.at_most else 1 / effect


def _own_noise(trials: Sequence[SavedTrial], figure: str) -> Against:
    """Of a baseline against itself: its noise, or why it has none."""
    values = np.array([trial.figures[figure] for trial in trials], dtype=np.float64)
    if len(values) < MIN_TRIALS:
        return Against(reason=f"fewer than {MIN_TRIALS} trials")
    if not np.isfinite(values).all() or not values.all():
        return Against(reason="not claimed, ∞ or 0 in some trial")
    return Against(noise=math.sqrt(2) * log_spread(values))
