"""Candidate ÷ baseline of one figure of one cell, with its interval: over pairs that met the same arrivals, or unpaired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from tailrace.gate.baselines import SavedTrial
from tailrace.harness.analysis.comparison import MIN_TRIALS, paired_ratio
from tailrace.harness.analysis.metrics import Floats
from tailrace.harness.records.summary import Method

Trials = Sequence[SavedTrial]


@dataclass(frozen=True)
class Against:
    """Candidate ÷ baseline over trials; what is ``None`` is not known, and ``reason`` says why."""

    ratio: float | None = None
    """Of geometric means; ``inf`` or 0 where one side's figure is ∞ or 0 in every trial, and the other's in none."""
    interval: tuple[float, float] | None = None
    """At 95 %."""
    noise: float | None = None
    """Standard deviation of the logarithm of the ratio of single trials."""
    paired: bool | None = None
    method: Method | None = None
    reason: str | None = None


def same_arrivals(baseline: Trials, candidate: Trials) -> list[tuple[SavedTrial, SavedTrial]] | None:
    """Candidate and baseline by pairs of the same number, where every trial of the shorter side has a partner that met the
    same arrivals (same seed, as many arrivals); else ``None``. Which pairs there are is never a matter of their figures."""
    partners = {(trial.number, trial.seed, trial.arrivals): trial for trial in baseline}
    pairs = [
        (trial, partners[key]) for trial in candidate if (key := (trial.number, trial.seed, trial.arrivals)) in partners
    ]
    return pairs if len(pairs) == min(len(baseline), len(candidate)) else None


def against(baseline: Trials, candidate: Trials, figure: str, *, same_traffic: bool = True) -> Against:
    """What the candidate's ``figure`` is to the baseline's. ``same_traffic`` says whether equal seeds mean equal arrivals.

    Pairs share their arrivals, so that what chance did to the traffic is in no ratio; what the machine did is in it, as in
    the spread over unpaired trials. Neither interval knows what differs between the two runs as wholes.
    """
    if min(len(baseline), len(candidate)) < MIN_TRIALS:
        return Against(reason=f"from fewer than {MIN_TRIALS} trials of each there is no interval")
    for side, trials in (("baseline", baseline), ("candidate", candidate)):
        if unknown := sum(trial.figures[figure] is None for trial in trials):
            return Against(reason=f"not claimed, or not known, in {unknown} of {len(trials)} trials of the {side}")
    pairs = same_arrivals(baseline, candidate) if same_traffic else None
    if pairs is not None:
        candidate, baseline = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    before, after = _values(baseline, figure), _values(candidate, figure)
    states = {"baseline": _state(before), "candidate": _state(after)}
    if set(states.values()) != {"proper"}:
        return _extreme(states, before, after)
    return _unpaired(before, after) if pairs is None else _paired(before, after)


def _values(trials: Trials, figure: str) -> Floats:
    return np.array([trial.figures[figure] for trial in trials], dtype=np.float64)


def log_spread(values: Floats) -> float:
    """Standard deviation of the logarithms, with n − 1; of two or more values that are finite and positive."""
    return float(np.log(values).std(ddof=1))


def _paired(before: Floats, after: Floats) -> Against:
    found = paired_ratio(list(zip(after.tolist(), before.tolist(), strict=True)))
    if found is None:
        raise ValueError("only proper figures have a ratio")
    return Against(found.value, found.ends, log_spread(after / before), True, found.method)


def _unpaired(before: Floats, after: Floats) -> Against:
    """Welch's interval on logarithms. The candidate's spread counts as no less than the baseline's, which is what trials of
    one and the same thing differ by (A against A): a candidate that was quiet by chance narrows nothing."""
    spread = log_spread(before)
    own = max(spread, log_spread(after))
    terms = spread**2 / len(before), own**2 / len(after)
    centre = float(np.log(after).mean() - np.log(before).mean())
    half = 0.0
    if (variance := sum(terms)) > 0:
        df = variance**2 / (terms[0] ** 2 / (len(before) - 1) + terms[1] ** 2 / (len(after) - 1))
        half = float(stdtrit(df, 0.975)) * math.sqrt(variance)
    ends = (math.exp(centre - half), math.exp(centre + half))
    return Against(math.exp(centre), ends, math.hypot(spread, own), False, "t")


def _state(values: Floats) -> Literal["proper", "∞", "0", "mixed"]:
    if np.isinf(values).all():
        return "∞"
    if not values.any():
        return "0"
    return "proper" if np.isfinite(values).all() and values.all() else "mixed"


def _extreme(states: Mapping[str, str], before: Floats, after: Floats) -> Against:
    """Where a figure is ∞ or 0. In every trial of one side and no trial of the other, that is a difference which no spread
    explains; in some trials, or on both sides, there is no ratio."""
    one, other = states.values()
    if "mixed" in (one, other) or one == other:
        counts = [
            f"∞ or 0 in {np.count_nonzero(np.isinf(values) | (values == 0))} of {len(values)} trials of the {side}"
            for side, values in zip(states, (before, after), strict=True)
        ]
        return Against(reason=" and ".join(counts))
    ratio = math.inf if other == "∞" or one == "0" else 0.0
    return Against(ratio, (ratio, ratio))
