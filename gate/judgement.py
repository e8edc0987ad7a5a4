"""A decision as it is told and kept: what ``tailrace gate`` prints and leaves beside the run that it judged, for its report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from tailrace.gate.decision import Decision, Finding, GateVerdict
from tailrace.harness.analysis.summary import jsonable
from tailrace.harness.errors import EXIT_INVALID, InputError
from tailrace.harness.quantities import figure
from tailrace.harness.records.store import RunFolder, write_json
from tailrace.harness.records.summary import Method

FILE = "gate.json"
SCHEMA_VERSION = 1
EXIT_CODES: dict[GateVerdict, int] = {"pass": 0, "invalid": EXIT_INVALID, "fail": 4, "inconclusive": 5}
WORDS: dict[GateVerdict, str] = {
    "pass": "pass",
    "fail": "REGRESSION",
    "inconclusive": "inconclusive",
    "invalid": "INVALID",
}


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JudgedRule(_Kept):
    """One rule on one cell; what is ``None`` is not known."""

    cell: str
    rule: str
    figure: str
    bound: float
    verdict: GateVerdict
    ratio: float | None
    """Candidate ÷ baseline."""
    interval: tuple[float, float] | None
    """Of the ratio, at 95 %."""
    noise: float | None
    """Standard deviation of the logarithm of the ratio of single trials."""
    paired: bool | None
    """Whether both met the same arrivals."""
    method: Method | None
    baseline_trials: int
    candidate_trials: int
    reason: str | None
    """Why there is no pass and no fail."""
    trials_needed: int | None
    """Of each run, to settle it nine times in ten if the ratio is what it seems."""

    @classmethod
    def of(cls, finding: Finding) -> JudgedRule:
        """The finding, laid out flat."""
        rule, found = finding.rule, finding.against
        return cls(
            cell=finding.cell,
            rule=str(rule),
            figure=rule.figure,
            bound=rule.bound,
            verdict=finding.verdict,
            ratio=found.ratio,
            interval=found.interval,
            noise=found.noise,
            paired=found.paired,
            method=found.method,
            baseline_trials=finding.trials[0],
            candidate_trials=finding.trials[1],
            reason=finding.reason,
            trials_needed=finding.trials_needed,
        )

    @property
    def why(self) -> str:
        """Why it is not settled, and what would settle it where the ratio is known."""
        told = f"{self.cell}, {self.rule}: {self.reason}"
        if self.ratio is None:
            return told
        count = "more than a thousand" if self.trials_needed is None else f"about {self.trials_needed}"
        return f"{told}; {count} trials of each run would settle it, if the ratio is {self.ratio:.3f}"


class Judgement(_Kept):
    """All that the gate says of one run."""

    baseline: str
    """As it was named to the gate; so is the candidate."""
    candidate: str
    verdict: GateVerdict
    exit_code: int
    """Of what the verdict was taken for."""
    findings: tuple[JudgedRule, ...]
    allowed: tuple[str, ...]
    changed: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, baseline: str, candidate: str, decision: Decision, taken: GateVerdict) -> Judgement:
        """What is told of a decision between two runs of these names; ``taken`` is what its verdict is taken for."""
        return cls(
            baseline=baseline,
            candidate=candidate,
            verdict=decision.verdict,
            exit_code=EXIT_CODES[taken],
            findings=tuple(JudgedRule.of(finding) for finding in decision.findings),
            allowed=decision.allowed,
            changed=decision.changed,
            notes=decision.notes,
        )

    @property
    def points(self) -> list[str]:
        """What a reader must know beside the table, a sentence each."""
        taken = next(verdict for verdict, code in EXIT_CODES.items() if code == self.exit_code)
        return [
            *([f"taken for a {taken}: --inconclusive {taken}"] if taken != self.verdict else []),
            *(finding.why for finding in self.findings if finding.reason is not None),
            *(f"changed: {line}" for line in self.changed),
            *(f"different conditions, allowed: {line}" for line in self.allowed),
            *self.notes,
        ]


COLUMNS: dict[str, Callable[[JudgedRule], str]] = {
    "cell": lambda told: told.cell,
    "rule": lambda told: told.rule,
    "candidate ÷ baseline": lambda told: figure(told.ratio, ".3f"),
    "95 % interval": lambda told: interval_words(told.interval) or figure(None),
    "noise": lambda told: noise_words(told.noise),
    "trials": lambda told: f"{told.candidate_trials} against {told.baseline_trials}",
    "arrivals": lambda told: {True: "the same", False: "others", None: "–"}[told.paired],
    "verdict": lambda told: WORDS[told.verdict],
}
"""The table of a judgement, a line for each rule on each cell."""


def interval_words(interval: tuple[float, float] | None) -> str:
    """``[0.981, 1.042]``; empty where there is none."""
    return "" if interval is None else f"[{', '.join(figure(end, '.3f') for end in interval)}]"


def noise_words(noise: float | None) -> str:
    """By how many per cent the ratio of two single trials differs."""
    return figure(None if noise is None else math.expm1(noise), ".1%")


def keep(judgement: Judgement, run: RunFolder) -> None:
    """Leave it beside the run that was judged, in place of what was said before. Raises :class:`StorageError`."""
    write_json(run.folder / FILE, {"schema_version": SCHEMA_VERSION, **jsonable(judgement.model_dump())})


def kept(run: RunFolder) -> Judgement | None:
    """What the gate last said of a run; ``None`` where it was not asked. Raises :class:`InputError` for a file that no gate of
    this version wrote."""
    path = run.folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError("of no schema_version that is known")
        return Judgement.model_validate(content)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not what a gate of this version leaves", remedy="delete it; `tailrace gate` makes it again"
        ) from error
