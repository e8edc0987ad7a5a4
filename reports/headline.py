"""The answer first: what a run found, in sentences made from its figures, each as sure as its intervals allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tailrace.harness.analysis.comparison import Pairs, Ratio, blocks, paired_ratio
from tailrace.harness.analysis.merit import merit, within_objective
from tailrace.harness.analysis.metrics import RECOVERY_MARGIN
from tailrace.reports.columns import optimistic
from tailrace.reports.evidence import CellView, RunView
from tailrace.reports.settings import setting_words, varied
from tailrace.reports.text import (
    count,
    humanly,
    interval,
    listing,
    milliseconds,
    per_second,
    quantity,
    share,
    significant,
)


def pair(first: CellView, second: CellView, key: str) -> Pairs:
    """The figure ``key`` of the trials that both cells finished, by number."""
    return blocks(first.repetitions, second.repetitions, key)


def ratio_words(ratio: Ratio) -> str:
    """``1.40× [1.31, 1.50]``."""
    return f"{significant(ratio.value)}×" + (f" {interval(ratio.ends)}" if ratio.ends else "")


@dataclass(frozen=True)
class Headline:
    """One sentence that answers, and the sentences that support it."""

    lede: str
    support: tuple[str, ...] = ()


MAX_SUPPORT = 5
MANY_SETTINGS = 3
"""From so many on the best setting of each framework answers, rather than one sentence for each setting."""
CLOSE = 1.05
"""Without an interval, a smaller ratio than this is not called a lead."""


def headline(run: RunView) -> Headline:
    """The verdict on one run, in words. Cells with INVALID trials take no part in any claim."""
    usable = [cell for cell in run.cells if cell.comparable]
    if not usable:
        return Headline(_nothing(run))
    baselines = [cell for cell in usable if cell.baseline]
    # A baseline is what a framework has to beat: it leads nobody, and has a sentence of its own.
    usable = [cell for cell in usable if not cell.baseline] or usable
    calm = [cell for cell in usable if not cell.faulty]
    knobs = varied(calm)
    if knobs and len({cell.scenario for cell in calm}) >= MANY_SETTINGS:
        lede, support = _sweep(calm, knobs)
    elif len({cell.summary.adapter for cell in usable}) == 1:
        lede, support = _single(usable[0], usable), []
    else:
        lede, support = _race(usable), [_single(cell, usable) for cell in _first_scenario(usable)]
    support = [*_over_baseline(_first_scenario(usable), baselines), *support]
    support += [told for cell in usable if (told := _fault_cost(cell, usable))]
    if len(support) > MAX_SUPPORT:
        left = count(len(support) - MAX_SUPPORT, "more comparison")
        support = [*support[:MAX_SUPPORT], f"{left} can be read from the tables below."]
    aside = [cell.label for cell in run.cells if not cell.comparable]
    if aside:
        support.append(f"Left out of every claim, for they are INVALID or empty: {listing(aside)}.")
    return Headline(lede, tuple(support))


def _nothing(run: RunView) -> str:
    if not run.cells:
        return "Nothing was measured: no trial had begun when the run ended."
    if all(cell.summary.arrivals == 0 for cell in run.cells):
        return "Nothing was measured: not one arrival of the trace was replayed."
    return "No claim can be made: every cell holds an INVALID trial."


def _first_scenario(cells: Sequence[CellView]) -> list[CellView]:
    return [cell for cell in cells if cell.scenario == cells[0].scenario]


def _device(cell: CellView) -> str:
    return "emulated device" if cell.summary.emulated else "device"


def _condition(cell: CellView, cells: Sequence[CellView]) -> str:
    """The scenario as part of a sentence."""
    calm = {c.scenario for c in cells if not c.faulty}
    if len({c.scenario for c in cells}) == 1 and not cell.faulty:
        return ""
    if not cell.faulty:
        return "without a fault" if len(calm) == 1 else f"in {cell.scenario}"
    return f"with {cell.scenario}"


def _single(cell: CellView, cells: Sequence[CellView], named: str = "") -> str:
    """One cell's figures; ``named`` says its settings too, in place of the scenario's name."""
    s = cell.summary
    where = " ".join(part for part in (f"Under {s.trace}", "" if named else _condition(cell, cells)) if part)
    p99 = s.p99_ms
    if p99 is None:
        tail = f"p99 is not claimed ({count(s.p99_more_needed, 'more arrival')} would do)"
    elif math.isinf(p99):
        tail = "p99 is ∞, for more than 1\u202f% failed"
    else:
        side = "above" if p99 > s.slo_ms else "within"
        ends = " ".join(part for part in (interval(s.p99_ci_ms), optimistic(s, "p99_ms")) if part)
        tail = f"p99 {milliseconds(p99)} {ends}".rstrip() + f", {side} the objective"
    return (
        f"{where}, {named or cell.framework} answered {share(s.slo_attainment)} of requests within "
        f"{milliseconds(s.slo_ms)}: {per_second(s.goodput_rps_per_device)} of goodput per {_device(cell)}, "
        f"{tail}."
    )


def _race(cells: Sequence[CellView]) -> str:
    """Who leads on goodput per device, scenario by scenario."""
    told: list[str] = []
    for scenario in dict.fromkeys(cell.scenario for cell in cells):
        members = [cell for cell in cells if cell.scenario == scenario]
        members.sort(key=_typical_goodput, reverse=True)
        condition = _condition(members[0], cells)
        if len(members) < 2:
            told.append(f"{condition} only {members[0].framework} gave a figure to compare")
            continue
        told.append(f"{condition} {_lead(members[0], members[1])}")
    if len(told) > 4:
        left = len(told) - 4
        told = [*told[:4], f"{count(left, 'more scenario')} {'is' if left == 1 else 'are'} in the table"]
    s = cells[0].summary
    told += [missed] if (missed := _missed(_first_scenario(cells))) else []
    clauses = "; ".join(clause.strip() for clause in told)
    return f"Under {s.trace}, measured by goodput per {_device(cells[0])}: {clauses}."


def _over_baseline(cells: Sequence[CellView], baselines: Sequence[CellView]) -> list[str]:
    """What each framework has over each baseline, under the same scenario: goodput and tail, as ratios."""
    told = []
    for base in baselines:
        shares = []
        for cell in cells:
            if cell.scenario != base.scenario or cell.run != base.run or cell.baseline:
                continue
            goodput, tail = (paired_ratio(pair(cell, base, key)) for key in ("goodput_rps_per_device", "p99_ms"))
            if goodput is not None:
                p99 = "" if tail is None else f" and {ratio_words(tail)} the p99"
                shares.append(f"{cell.framework} {ratio_words(goodput)} the goodput{p99}")
        if shares:
            condition = _condition(base, [*cells, *baselines])
            told.append(" ".join(f"Over {base.framework} {condition}".split()) + f": {'; '.join(shares)}.")
    return told


def _missed(cells: Sequence[CellView]) -> str:
    """Who of several did not keep the objective under the first scenario, which a lead alone would hide."""
    missed = [
        cell.framework for cell in cells if cell.summary.p99_ms is not None and not within_objective(cell.summary)
    ]
    objective = f"p99 ≤ {milliseconds(cells[0].summary.slo_ms)}"
    if not missed or len(missed) < len(cells):
        return f"{listing(missed)} missed {objective}" if missed else ""
    return f"none of them kept {objective}"


def _sweep(cells: Sequence[CellView], knobs: Sequence[str]) -> tuple[str, list[str]]:
    """Of many settings the best of each framework: who leads, and what each of them reached with what."""
    best: dict[str, CellView] = {}
    for cell in sorted(cells, key=lambda cell: merit(cell.summary), reverse=True):
        best.setdefault(cell.summary.adapter, cell)
    first, *others = best.values()
    s = first.summary
    settings = len({cell.scenario for cell in cells})
    where = f"Under {s.trace}, of {count(settings, 'setting')}"
    objective = f"p99 ≤ {milliseconds(s.slo_ms)}"
    within = f" within {objective}" if within_objective(first.summary) else ""
    where += "" if within else f", none of which is known to keep {objective}"
    named = {cell.key: f"{cell.framework} with {setting_words(cell, knobs)}" for cell in best.values()}
    missed = [
        cell.framework for cell in others if within_objective(first.summary) and not within_objective(cell.summary)
    ]
    rivals = [cell for cell in others if cell.framework not in missed]
    if rivals:
        lede = f"{where}, by goodput per {_device(first)}{within}: {_lead(first, rivals[0], named)}"
    else:
        most = f"{per_second(s.goodput_rps_per_device)} per {_device(first)}{within}"
        lede = f"{where}, {named[first.key]} gave the most goodput: {most}"
    if missed:
        lede += f"; no setting of {listing(missed)} is known to keep the objective"
    support = [_single(cell, cells, named[cell.key]) for cell in best.values()]
    if rivals or settings > 1:
        support.append(
            "Each is the best of several, which flatters it: measure it again alone where the lead is small."
        )
    return f"{lede}.", support


def _lead(first: CellView, second: CellView, named: Mapping[str, str] | None = None) -> str:
    """Who of two has more goodput per device, as far as their trials can tell."""
    ratio = paired_ratio(pair(first, second, "goodput_rps_per_device"))
    if ratio is not None and ratio.value < 1:  # a trial without its pair had put the other one first
        first, second = second, first
        ratio = paired_ratio(pair(first, second, "goodput_rps_per_device"))
    best, next_best = ((named or {}).get(cell.key, cell.framework) for cell in (first, second))
    if ratio is None:
        return "not every framework answered within the objective in every trial"
    caution = f" ({count(ratio.pairs, 'trial')} each: no interval)"
    if ratio.ends is None and ratio.value < CLOSE:
        percent = max(1, math.ceil((ratio.value - 1) * 100 - 1e-9))
        return f"{best} and {next_best} are within {percent}\u202f% of each other{caution}"
    if ratio.settled or ratio.ends is None:
        return f"{best} reaches {ratio_words(ratio)} the goodput of {next_best}{'' if ratio.settled else caution}"
    return f"{best} and {next_best} are level ({ratio_words(ratio)})"


def _typical_goodput(cell: CellView) -> float:
    """As the paired ratio weighs it: the geometric mean over trials, or the plain one where a trial has no goodput."""
    values = np.array([trial.goodput_rps_per_device for trial in cell.repetitions], dtype=np.float64)
    return float(np.exp(np.log(values).mean()) if (values > 0).all() else values.mean())


def _fault_cost(cell: CellView, cells: Sequence[CellView]) -> str:
    """What the faults of a cell cost against the same framework without them."""
    if not cell.faults:
        return ""
    if not any(window.seen for window in cell.faults):
        return f"{cell.framework}, {cell.scenario}: nothing arrived after the fault that could tell its cost."
    kinds = listing(list(dict.fromkeys(humanly(window.kind) for window in cell.faults)))
    told = []
    calm = [
        c
        for c in cells
        if c.summary.adapter == cell.summary.adapter
        and c.summary.tuning == cell.summary.tuning
        and c.summary.mean_rate == cell.summary.mean_rate
        and not c.faulty
    ]
    if calm:
        ratio = paired_ratio(pair(cell, calm[0], "goodput_rps_per_device"))
        if ratio is not None:
            told.append(f"goodput was {ratio_words(ratio)} that without it")
    recoveries = [f.recovery for trial in cell.repetitions for f in trial.faults if f.recovery]
    recoveries = [r for r in recoveries if not math.isnan(r.dip_attainment)]
    failed = [t.arrivals - t.ok for t in cell.repetitions]
    usual = [t.arrivals - t.ok for t in calm[0].repetitions] if calm else [0]
    extra = sum(failed) / len(failed) - sum(usual) / len(usual)
    if extra > 0:
        more = " more than without it" if calm and sum(usual) else ""
        told.append(f"{count(max(1, round(extra)), 'request')} failed{more}{' per trial' if len(failed) > 1 else ''}")
    else:
        told.append("no more requests failed than without it" if calm and sum(usual) else "no request failed")
    back = [r.recovery_s for r in recoveries if r.recovery_s is not None]
    if len(back) == len(recoveries):
        worst, again = max(back), max(r.relapse_s for r in recoveries)
        relapsed = f" and was low again in {count(again, 'later second')}" if again else ""
        held = f"attainment never fell by more than {RECOVERY_MARGIN * 100:g} points"
        told.append(held if worst == 0 else f"attainment was back after {quantity(worst, 's')}{relapsed}")
    elif back:
        told.append(f"attainment came back in {len(back)} of {len(recoveries)} faults")
    else:
        told.append("attainment did not come back before the trace ended")
    return f"{cell.framework}, {kinds}: {listing(told)}."
