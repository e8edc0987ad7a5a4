"""How far a framework's own defaults are from the tuned settings, where a run measured both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailrace.harness.analysis.comparison import Ratio, paired_ratio
from tailrace.reports.evidence import CellView
from tailrace.reports.headline import pair, ratio_words
from tailrace.reports.text import NOTHING, listing, milliseconds, per_second, share


@dataclass(frozen=True)
class Defaults:
    """The section: a sentence that says whose defaults came closest, and a row for each framework."""

    sentence: str
    rows: list[tuple[str, ...]]
    """Framework, goodput per device with defaults, tuned, tuned ÷ defaults, attainment and p99 of both."""


def defaults(cells: Sequence[CellView]) -> Defaults | None:
    """Compare, framework by framework, the cell that sets no knob with the first one that does, both without a fault and
    under equal conditions; ``None`` where no framework ran both."""
    found: list[tuple[str, Ratio | None]] = []
    rows = []
    calm = [cell for cell in cells if not cell.faulty]
    for cell in calm:
        if cell.tuned:
            continue
        tuned = next((c for c in calm if c.tuned and _same(c, cell)), None)
        if tuned is None:
            continue
        comparable = cell.comparable and tuned.comparable
        ratio = paired_ratio(pair(tuned, cell, "goodput_rps_per_device")) if comparable else None
        found.append((cell.framework, ratio))
        both = (cell.summary, tuned.summary)
        rows.append(
            (
                cell.framework,
                *(per_second(s.goodput_rps_per_device) for s in both),
                ratio_words(ratio) if ratio else NOTHING if comparable else "not compared: INVALID or empty",
                *(share(s.slo_attainment) for s in both),
                *(milliseconds(s.p99_ms) if s.p99_ms is not None else "not claimed" for s in both),
            )
        )
    return Defaults(_sentence(found), rows) if rows else None


def _same(first: CellView, second: CellView) -> bool:
    def basis(cell: CellView) -> tuple[object, ...]:
        return cell.run, cell.framework, cell.conditions, cell.summary.mean_rate

    return basis(first) == basis(second)


def _sentence(found: Sequence[tuple[str, Ratio | None]]) -> str:
    known = [(framework, ratio) for framework, ratio in found if ratio is not None]
    if not known:
        return "No framework gave both figures in every trial."
    known.sort(key=lambda item: item[1].value)
    if len(known) == 1:
        return f"Tuned, {known[0][0]} reached {ratio_words(known[0][1])} the goodput of its own defaults."
    (nearest, ratio), others = known[0], known[1:]
    rest = listing([f"{framework} {ratio_words(other)}" for framework, other in others])
    return f"{nearest}'s own defaults came closest: tuned, it reached {ratio_words(ratio)} their goodput; {rest}."
