"""Across trials: intervals of a figure over repetitions, and what one framework is to another as a ratio over blocks.

Requests within a trial depend on each other; trials do not, but they share what the machine does meanwhile. So what leads
is the spread over trials, and two cells are compared block by block: trials of the same number met the same arrivals, one
soon after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit
from scipy.stats import bootstrap

from tailrace.harness.analysis.metrics import Floats
from tailrace.harness.records.summary import CellSummary, Comparison, Method, TrialSummary

MIN_TRIALS = 3
"""From fewer there is no interval."""
MIN_TRIALS_FOR_BOOTSTRAP = 8
"""From fewer, resampling repeats the same handful of values and its intervals are too short; Student's t is used."""
RESAMPLES = 9_999
_SEED = 20_230_611
"""Of the resampling, so that the same records give the same interval."""

Pairs = Sequence[tuple[float | None, float | None]]


@dataclass(frozen=True)
class Interval:
    """The mean over trials with its 95 % interval, and how that was made."""

    centre: float
    low: float
    high: float
    method: Method

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high


def t_interval(values: Floats, *, log: bool) -> tuple[float, float, float] | None:
    """Mean and Student-t 95 % interval over trials, as (centre, low, high); on logarithms, and so of the geometric
    mean, when ``log``. ``None`` from fewer than three trials, or where a value is not finite (or not positive)."""
    if len(values) < MIN_TRIALS or not np.isfinite(values).all() or (log and not (values > 0).all()):
        return None
    scale = np.log(values) if log else values
    centre = float(scale.mean())
    half = _t(len(scale)) * float(scale.std(ddof=1)) / math.sqrt(len(scale))
    ends = (centre, centre - half, centre + half)
    return (math.exp(ends[0]), math.exp(ends[1]), math.exp(ends[2])) if log else ends


def over_trials(values: Floats, *, log: bool) -> Interval | None:
    """Mean and 95 % interval over trials: from three, :func:`t_interval`; from eight, which may look like what they are
    and not like a normal distribution, the BCa bootstrap over trials of the same mean (Efron, Better bootstrap confidence
    intervals, Journal of the American Statistical Association 82, 1987), seeded. ``None`` where there is no t interval.

    Plain bootstrap intervals of few values are too short: they hold the spread with n in place of n − 1, and normal
    quantiles in place of Student's. The confidence level is raised so that both are made up for (Hesterberg, What
    teachers should know about the bootstrap, The American Statistician 69, 2015: Φ(−√(n ÷ (n − 1)) · t) on each side).
    """
    student = t_interval(values, log=log)
    if student is None:
        return None
    n = len(values)
    if n >= MIN_TRIALS_FOR_BOOTSTRAP and np.ptp(values) > 0:
        ends = bootstrap(
            (np.log(values) if log else values,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=1 - 2 * float(ndtr(-math.sqrt(n / (n - 1)) * _t(n))),
            method="BCa",
            random_state=np.random.default_rng(_SEED),
        ).confidence_interval
        if math.isfinite(ends.low) and math.isfinite(ends.high):
            low, high = (math.exp(end) if log else float(end) for end in ends)
            return Interval(student[0], low, high, "bootstrap")
    return Interval(*student, "t")


def _t(n: int) -> float:
    """Student's quantile for a two-sided interval of 95 % from so many values."""
    return float(stdtrit(n - 1, 0.975))


@dataclass(frozen=True)
class Ratio:
    """How many times as much, with its 95 % interval over blocks; ``ends`` and ``method`` are ``None`` from fewer than
    three."""

    value: float
    ends: tuple[float, float] | None
    pairs: int
    method: Method | None = None

    @property
    def settled(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.ends is not None and not self.ends[0] <= 1 <= self.ends[1]


def paired_ratio(pairs: Pairs) -> Ratio | None:
    """Geometric mean over blocks of first ÷ second, with the interval of :func:`over_trials` on the logarithms of the
    ratios. ``None`` unless there is a block and every value is known, finite and positive."""
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)  # what is not known becomes NaN
    if not len(values) or not np.isfinite(values).all() or not (values > 0).all():
        return None
    ratios = values[:, 0] / values[:, 1]
    if (across := over_trials(ratios, log=True)) is None:
        return Ratio(float(np.exp(np.log(ratios).mean())), None, len(ratios))
    return Ratio(across.centre, across.ends, len(ratios), across.method)


def blocks(first: Sequence[TrialSummary], second: Sequence[TrialSummary], name: str) -> Pairs:
    """The figure of that name of the trials that both have, by number."""
    other = {trial.number: trial for trial in second}
    return [(trial.figure(name), other[trial.number].figure(name)) for trial in first if trial.number in other]


SAME = "no difference shown"
"""Not «the same»: more blocks might show one."""
NOT_COMPARED = "not compared"
FIGURES = {
    "p99_ms": ("faster", "slower"),
    "p50_ms": ("faster", "slower"),
    "goodput_rps_per_device": ("more", "less"),
}
"""What is compared, each with what is said of the first where the interval of first ÷ second leaves 1 out: the word for
the better side of it, and the word for the worse. Of a latency the lower side is the better one."""
HIGHER_IS_BETTER = frozenset({"goodput_rps_per_device"})


def comparisons(cells: Sequence[CellSummary], trials: Sequence[TrialSummary]) -> list[Comparison]:
    """Every figure of every two cells of different adapters under the same scenario, in the order of the cells.

    A cell with an INVALID trial is not compared: to leave out the trials that went wrong would choose the good ones. Each
    interval has 95 % of its own; among many, some will leave 1 out by chance.
    """
    made = []
    for one, other in itertools.combinations(cells, 2):
        if one.scenario == other.scenario and one.adapter != other.adapter:
            members = [[t for t in trials if t.cell == cell.cell and t.state == "done"] for cell in (one, other)]
            invalid = [cell.adapter for cell in (one, other) if cell.verdict == "INVALID"]
            for figure in FIGURES:
                made.append(_compare(one, other, figure, blocks(members[0], members[1], figure), invalid))
    return made


def _compare(one: CellSummary, other: CellSummary, figure: str, pairs: Pairs, invalid: Sequence[str]) -> Comparison:
    ratio = None if invalid else paired_ratio(pairs)
    verdict, reason = _verdict(figure, ratio, pairs, invalid)
    return Comparison(
        scenario=one.scenario,
        first=one.adapter,
        second=other.adapter,
        figure=figure,
        ratio=None if ratio is None else ratio.value,
        interval=None if ratio is None else ratio.ends,
        blocks=0 if invalid else len(pairs),
        method=None if ratio is None else ratio.method,
        verdict=verdict,
        reason=reason,
    )


def _verdict(figure: str, ratio: Ratio | None, pairs: Pairs, invalid: Sequence[str]) -> tuple[str, str | None]:
    if invalid:
        return NOT_COMPARED, f"{' and '.join(invalid)} INVALID"
    if not pairs:
        return NOT_COMPARED, "no block that both finished"
    if ratio is None:
        return NOT_COMPARED, "0 in some trial" if figure in HIGHER_IS_BETTER else "not claimed, or ∞, in some trial"
    if ratio.ends is None:
        return SAME, f"fewer than {MIN_TRIALS} blocks"
    if not ratio.settled:
        return SAME, None
    better, worse = FIGURES[figure]
    return better if (ratio.ends[0] > 1) == (figure in HIGHER_IS_BETTER) else worse, None
