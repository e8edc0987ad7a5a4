"""Which framework to take: first what decides before any figure does, then the figures of the user's own run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailrace.harness.analysis.aftermath import fault_sentence
from tailrace.harness.analysis.comparison import blocks, paired_ratio
from tailrace.harness.analysis.merit import comparable, merit, tail_ms, within_objective
from tailrace.harness.contract.adapter import NEEDS, Adapter
from tailrace.harness.errors import InputError
from tailrace.harness.records.summary import CellSummary, RunSummary, TrialSummary
from tailrace.tuner.objective import Objective

HOSTED = "hosted"


@dataclass(frozen=True)
class Recommendation:
    """An answer with its reasons, and what the obvious second choice would cost; ``framework`` is ``None`` where nothing that
    was measured can be recommended."""

    framework: str | None
    reasons: tuple[str, ...]
    second: str | None = None


def recommend(summary: RunSummary, adapters: Mapping[str, Adapter], needs: Sequence[str]) -> Recommendation:
    """The decision procedure. ``summary`` is that of a run; ``adapters`` are all that are known, by name.

    Hosted comes first, for then nobody asks which server it is; then the needs that a framework is the usual choice for; what
    is left is ranked by the run: within its objective first; then goodput per device, where its ratio is settled; then p99.
    Cells under faults do not rank, they are told. Raises :class:`InputError` for an unknown need and a run that has
    nothing to compare.
    """
    for need in needs:
        if need not in NEEDS:
            raise InputError(f"--need {need!r} is not known", remedy=f"one of {', '.join(NEEDS)}")
    if HOSTED in needs:
        return Recommendation(
            None,
            (
                "Hosted: take a managed endpoint, whose server is its operator's affair. None is measured here yet; what a "
                "framework gives on your own machines is the figure that its price has to beat.",
                *_measured_reasons(_calm(summary), summary),
            ),
        )
    baselines = {name for name, adapter in adapters.items() if adapter.baseline}
    # A baseline is what a framework has to beat, and nothing to take.
    calm = [cell for cell in _calm(summary) if cell.adapter not in baselines] or _calm(summary)
    reasons = []
    fit = [name for name in adapters if all(need in adapters[name].serves_needs for need in needs)] if needs else []
    for name in fit:
        reasons += [f"{name} is the usual choice for {need}: {adapters[name].serves_needs[need]}." for need in needs]
    if needs and not fit:
        usual = {need: [n for n in adapters if need in adapters[n].serves_needs] for need in needs}
        told = "; ".join(f"{need}: {', '.join(names) or 'none'}" for need, names in usual.items())
        reasons.append(f"No framework is the usual choice for all of that ({told}); the figures decide.")
    ranked = _ranked(calm, summary.trials)
    candidates = _ranked([c for c in calm if c.adapter in fit] or calm, summary.trials) if fit else ranked
    if fit and candidates[0].adapter not in fit:
        candidates = []
    if not candidates:
        missing = ", ".join(fit)
        reasons.append(f"{missing} was not measured in this run, or is INVALID there: run it before you take it.")
        return Recommendation(None, (*reasons, *_measured_reasons(calm, summary)))
    best = candidates[0]
    # Beside it under the same scenario, for only there did both meet the same arrivals.
    seconds = [c for c in ranked if c.adapter != best.adapter and c.scenario == best.scenario]
    reasons += _measured_reasons([best], summary)
    if not seconds:
        reasons.append(
            "No other framework was measured under the same scenario, so that nothing can be said of a second choice."
        )
        return Recommendation(best.adapter, tuple(reasons))
    reasons.append(_cost(best, seconds[0], summary.trials))
    return Recommendation(best.adapter, tuple(reasons), seconds[0].adapter)


def _calm(summary: RunSummary) -> list[CellSummary]:
    """The cells that may rank: without a fault and not INVALID, of each framework under each scenario."""
    faulty = {trial.cell for trial in summary.trials if trial.faults}
    cells = [cell for cell in summary.cells if cell.cell not in faulty and comparable(cell)]
    if not cells:
        raise InputError("this run has no cell without a fault that is not INVALID: there is nothing to go by")
    return cells


def _ranked(cells: Sequence[CellSummary], trials: Sequence[TrialSummary]) -> list[CellSummary]:
    """Best first. By figures alone a hair of goodput would decide; so the first gives way to one whose goodput is not shown
    to be less, under the same scenario, and whose p99 is shorter."""
    ranked = sorted(cells, key=merit, reverse=True)
    first = ranked[0]
    for other in ranked[1:]:
        if other.scenario != first.scenario or within_objective(other) != within_objective(first):
            continue
        ratio = paired_ratio(blocks(_of(trials, other), _of(trials, first), "goodput_rps_per_device"))
        if ratio is not None and not ratio.settled and tail_ms(other) < tail_ms(first):
            first = other
    return [first, *(cell for cell in ranked if cell is not first)]


def _of(trials: Sequence[TrialSummary], cell: CellSummary) -> list[TrialSummary]:
    return [trial for trial in trials if trial.cell == cell.cell and trial.state == "done"]


def _measured_reasons(cells: Sequence[CellSummary], summary: RunSummary) -> list[str]:
    reasons = []
    for cell in cells:
        limit = Objective(cell.slo_ms)
        p99 = "not claimed" if cell.p99_ms is None else f"{cell.p99_ms:.4g} ms"
        kind = "emulated device" if cell.emulated else "device"
        reasons.append(
            f"Measured, {cell.adapter} under {cell.scenario}: {cell.goodput_rps_per_device:.4g} good answers/s per "
            f"{kind}, p99 {p99} ({'within' if within_objective(cell) else 'not within'} {limit.words}), cold start "
            f"{'–' if cell.cold_start_s is None else format(cell.cold_start_s, '.2g')} s, {cell.verdict}."
        )
        for trial in summary.trials:
            if trial.adapter == cell.adapter:
                reasons += [f"Measured, {trial.trial}: {fault_sentence(fault)}." for fault in trial.faults]
    return list(dict.fromkeys(reasons))


def _cost(best: CellSummary, second: CellSummary, trials: Sequence[TrialSummary]) -> str:
    """What taking the second would cost, as ratios over blocks."""
    words = []
    for figure, name in (("goodput_rps_per_device", "goodput per device"), ("p99_ms", "p99")):
        ratio = paired_ratio(blocks(_of(trials, second), _of(trials, best), figure))
        if ratio is None:
            words.append(f"{name} not comparable")
            continue
        ends = "" if ratio.ends is None else f" [{ratio.ends[0]:.3g}, {ratio.ends[1]:.3g}]"
        sure = "" if ratio.settled else ", no difference shown"
        words.append(f"{ratio.value:.3g}×{ends} the {name}{sure}")
    return f"The second choice, {second.adapter} under {second.scenario}, has {' and '.join(words)}."
