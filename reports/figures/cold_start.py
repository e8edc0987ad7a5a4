"""Cold starts by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailrace.reports import svg
from tailrace.reports.evidence import CellView
from tailrace.reports.figures.drawing import (
    Figure,
    Key,
    stamp,
)
from tailrace.reports.text import listing, seconds

if TYPE_CHECKING:
    pass


PHASES = (
    ("process_s", "process spawned"),
    ("port_open_s", "port open"),
    ("ready_s", "says ready"),
    ("first_answer_s", "first correct answer"),
)
"""Cold start, cumulative: key of the trial's facts and what has happened by then."""


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
        groups.setdefault((cell.run, cell.summary["adapter"]), []).append(cell)
    starts = []
    for members in groups.values():
        told = [t["cold_start_phases_s"] for c in members for t in c.repetitions if t["cold_start_phases_s"]]
        known = [(key, words) for key, words in PHASES if told and all(t.get(key) is not None for t in told)]
        if not known:
            continue
        means = [0.0, *(sum(t[key] for t in told) / len(told) for key, _ in known)]
        phases = tuple((words, max(0.0, b - a)) for (_, words), a, b in zip(known, means, means[1:], strict=False))
        first = members[0]
        label = " · ".join(part for part in (first.framework, first.run) if part)
        starts.append(ColdStart(label, first.slot, phases, means[-1], len(told)))
    return starts


def cold_start(cells: Sequence[CellView]) -> Figure | None:
    """Horizontal bars, stacked by phase from pale to full in the framework's colour."""
    starts = cold_starts(cells)
    if not starts:
        return None
    row = 46
    height = 18 + row * len(starts) + 34
    words = [w for _, w in PHASES if any(w == phase for start in starts for phase, _ in start.phases)]
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
    return dict(zip((words for _, words in PHASES), (0.25, 0.5, 0.75, 1.0), strict=True))[phase]


def _cold_words(start: ColdStart) -> str:
    phases = ", ".join(f"{phase} {seconds(took)}" for phase, took in start.phases)
    return f"{start.label}: {seconds(start.total_s)} ({phases})."
