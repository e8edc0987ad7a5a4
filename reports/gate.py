"""What the gate said of the runs of a report, and what to do about it; from the file that it left beside each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailrace.gate.decision import GateVerdict
from tailrace.gate.judgement import COLUMNS, WORDS, Judgement, kept
from tailrace.reports.evidence import RunView
from tailrace.reports.reproduce import Portable

GATE_HEADINGS = tuple(COLUMNS)
_TONES: dict[GateVerdict, str] = {"pass": "valid", "inconclusive": "unknown", "fail": "invalid", "invalid": "invalid"}
"""The banner's class: that of a trial's verdict which is as serious."""


@dataclass(frozen=True)
class Gated:
    """The gate's word on one run."""

    label: str
    """The run's; empty when the report has but one."""
    word: str
    tone: str
    baseline: str
    advice: str
    rows: tuple[tuple[str, ...], ...]
    points: tuple[str, ...]


def gated(views: Sequence[RunView]) -> list[Gated]:
    """For each run that was judged what the gate last said. Raises :class:`InputError` for a spoilt file."""
    found = []
    for run in views:
        if (told := kept(run.folder)) is not None:
            portable = Portable(run.folder)
            found.append(
                Gated(
                    run.label,
                    WORDS[told.verdict],
                    _TONES[told.verdict],
                    portable(told.baseline),
                    _advice(told),
                    tuple(tuple(column(finding) for column in COLUMNS.values()) for finding in told.findings),
                    tuple(portable(point) for point in told.points),
                )
            )
    return found


def _advice(told: Judgement) -> str:
    if told.verdict == "pass":
        return "Every rule passes: there is nothing to do."
    if told.verdict == "fail":
        return (
            "Some rule fails: the whole interval lies beyond what it allows. Look for the cause in what changed; where nothing "
            "should have, measure both again, one soon after the other on the same machine."
        )
    if told.verdict == "invalid":
        return "INVALID trials decide nothing: do what their reasons say, and measure again."
    open_ones = [finding for finding in told.findings if finding.verdict == "inconclusive"]
    needed = [finding.trials_needed for finding in open_ones if finding.trials_needed is not None]
    many = f", about {max(needed)} of each run" if len(needed) == len(open_ones) else ""
    return f"No rule fails, and some are not settled: measure both again with more trials{many}, or give the rule more room."
