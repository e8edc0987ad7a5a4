"""Cold starts by phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailrace.harness.records.facts import ColdStart as Facts
from tailrace.reports import svg
from tailrace.reports.evidence import CellView
from tailrace.reports.figures.drawing import (
    Figure,
    Key,
    stamp,
)
from tailrace.reports.text import listing, seconds

PHASES: tuple[tuple[str, float, Callable[[Facts], float | None]], ...] = (
    ("port open", 0.5, lambda told: told.port_open_s),
    ("says ready", 0.75, lambda told: told.ready_s),
    ("first correct answer", 1.0, lambda told: told.first_answer_s),
)
"""What happens one after the other, how full the bar is until then, and when it was, since the spawn."""


@dataclass(frozen=True)
class ColdStart:
    """Mean phases of one framework's cold starts in one run."""

    label: str
    slot: int
    phases: tuple[tuple[str, float], ...]
    """What had to happen, and how long it took after the one before, in seconds."""
    total_s: float
    starts: int


def cold_starts(cells: Sequence[CellView]) -> list[ColdStart]:
    """Cold start does not know what the trial will do, so the trials of all scenarios of a framework count together."""
    groups: dict[tuple[str, str], list[CellView]] = {}
    for cell in cells:
        groups.setdefault((cell.run, cell.summary.adapter), []).append(cell)
    starts = []
    for members in groups.values():
        told = [t.cold_start_phases_s for c in members for t in c.repetitions if t.cold_start_phases_s]
        known = {words: [s for t in told if (s := at(t)) is not None] for words, _, at in PHASES}
        means = {words: sum(times) / len(told) for words, times in known.items() if told and len(times) == len(told)}
        if not means:
            continue
        ends = [0.0, *means.values()]
        phases = tuple((words, max(0.0, b - a)) for words, a, b in zip(means, ends, ends[1:], strict=False))
        first = members[0]
        label = " · ".join(part for part in (first.framework, first.run) if part)
        starts.append(ColdStart(label, first.slot, phases, ends[-1], len(told)))
    return starts


def cold_start(cells: Sequence[CellView]) -> Figure | None:
    """Horizontal bars, stacked by phase from pale to full in the framework's colour."""
    starts = cold_starts(cells)
    if not starts:
        return None
    row = 46
    height = 18 + row * len(starts) + 34
    words = [w for w, _, _ in PHASES if any(w == phase for start in starts for phase, _ in start.phases)]
    with svg.style():
        canvas = svg.new_figure(height)
        ax = canvas.add_axes((0.02, 34 / height, 0.955, row * len(starts) / height))
        ax.grid(False)
        ax.grid(True, axis="x")
        for i, start in enumerate(starts):
            left = 0.0
            for phase, took in start.phases:
                ax.barh(i, took, left=left, height=0.42, color=svg.colour(start.slot), alpha=_phase_alpha(phase), lw=0)
                left += took
            text = f"{start.label}  {seconds(start.total_s)}"
            ax.text(0, i - 0.31, text, fontsize=12.5, va="bottom", ha="left")
        ax.set_ylim(len(starts) - 0.5, -0.72)
        ax.set_xlim(0, max(start.total_s for start in starts) * 1.02)
        ax.set_yticks([])
        ax.set_xlabel("seconds since the process was started", labelpad=2)
        alt = "Cold start by phase. " + " ".join(_cold_words(start) for start in starts)
        stamp(canvas, cells)
        drawn = svg.inline(canvas, name="cold", alt=alt)
    keys = tuple(Key(word, None, "area", strength=_phase_alpha(word)) for word in words)
    numbers = sorted({start.starts for start in starts})
    note = "" if numbers == [1] else f"Mean of {listing([str(n) for n in numbers])} cold starts per framework."
    return Figure("", drawn, keys, note)


def _phase_alpha(phase: str) -> float:
    return next(alpha for words, alpha, _ in PHASES if words == phase)


def _cold_words(start: ColdStart) -> str:
    phases = ", ".join(f"{phase} {seconds(took)}" for phase, took in start.phases)
    return f"{start.label}: {seconds(start.total_s)} ({phases})."
