"""Across trials: intervals that hold, ratios by block, and words that say no more than the intervals."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import t as student_t

from tailrace.cli.console import comparison_lines, summary_parts
from tailrace.cli.show import read
from tailrace.harness.analysis.comparison import (
    FIGURES,
    MIN_TRIALS_FOR_BOOTSTRAP,
    NOT_COMPARED,
    SAME,
    comparisons,
    over_trials,
    paired_ratio,
    t_interval,
)
from tailrace.harness.analysis.summary import summarise
from tailrace.harness.records.store import RunFolder
from tailrace.harness.records.summary import CellSummary, Comparison, RunSummary, TrialSummary
from tailrace.reports.report import build
from tests.records import cell_summary, change, trial_summary
from tests.synthetic import make_run


@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=7), st.booleans())
def test_up_to_seven_trials_the_interval_is_students(values: list[float], log: bool) -> None:
    made = over_trials(np.array(values), log=log)
    assert made is not None and made.method == "t"
    assert (made.centre, *made.ends) == t_interval(np.array(values), log=log)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.5, 50), min_size=8, max_size=20))
def test_from_eight_on_it_is_a_bootstrap_that_repeats_itself(values: list[float]) -> None:
    made = over_trials(np.array(values), log=True)
    assert made is not None
    assert made == over_trials(np.array(values), log=True)
    assert made.method == ("bootstrap" if max(values) > min(values) else "t")
    assert min(values) * (1 - 1e-9) <= made.low <= made.centre * (1 + 1e-9)
    assert made.centre <= made.high * (1 + 1e-9) <= max(values) * (1 + 1e-6)
    assert made.centre == pytest.approx(math.exp(np.mean(np.log(values))))


def test_from_fewer_than_three_or_with_a_failure_there_is_none() -> None:
    assert over_trials(np.array([1.0, 2.0]), log=False) is None
    assert over_trials(np.array([1.0, 2.0, math.inf]), log=True) is None
    assert over_trials(np.array([1.0, 2.0, 0.0]), log=True) is None
    assert over_trials(np.array([1.0, 2.0, math.nan]), log=False) is None


def test_the_bootstrap_of_eight_covers_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain BCa interval of eight normal values covers 90 %; with the raised level, about 95 %."""
    monkeypatch.setattr("tailrace.harness.analysis.comparison.RESAMPLES", 1999)
    rng = np.random.default_rng(6)
    draws, covered = 600, 0
    for _ in range(draws):
        made = over_trials(rng.normal(10, 1, MIN_TRIALS_FOR_BOOTSTRAP), log=False)
        assert made is not None
        covered += made.low <= 10 <= made.high
    assert covered / draws > 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)


def test_t_is_the_quantile_of_scipy() -> None:
    values = np.array([9.0, 10.0, 12.0, 8.0])
    low, high = student_t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    assert t_interval(values, log=False) == pytest.approx((values.mean(), low, high))


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=1, max_size=7))
def test_a_ratio_the_other_way_round_is_its_inverse(pairs: list[tuple[float, float]]) -> None:
    one, other = paired_ratio(pairs), paired_ratio([(b, a) for a, b in pairs])
    assert one is not None and other is not None
    assert one.value == pytest.approx(1 / other.value)
    assert (one.ends is None) == (other.ends is None) == (len(pairs) < 3)
    if one.ends and other.ends:
        assert one.ends == pytest.approx((1 / other.ends[1], 1 / other.ends[0]))


def test_what_is_not_known_has_no_ratio() -> None:
    assert paired_ratio([(1.0, None)] * 3) is None
    assert paired_ratio([(1.0, math.inf)] * 3) is None


# ---------------------------------------------------------------- verdicts


def cell(adapter: str, **changes: Any) -> CellSummary:
    return cell_summary(**{"cell": f"{adapter}--calm", "adapter": adapter, **changes})


def trials(adapter: str, p99: list[float | None], goodput: float = 100.0, state: str = "done") -> list[TrialSummary]:
    return [
        trial_summary(
            cell=f"{adapter}--calm",
            number=number + 1,
            state=state,
            p99_ms=value,
            p50_ms=value,
            goodput_rps_per_device=goodput,
        )
        for number, value in enumerate(p99)
    ]


def told(*members: list[TrialSummary], **changes: Any) -> dict[str, Comparison]:
    cells = [cell("a"), cell("b", **changes)]
    return {c.figure: c for c in comparisons(cells, [trial for group in members for trial in group])}


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([10, 11, 12], [20, 21, 25], "faster"),
        ([20, 21, 25], [10, 11, 12], "slower"),
        ([10, 20, 10], [11, 12, 20], SAME),
    ],
)
def test_a_latency_is_faster_or_slower_or_shows_no_difference(
    first: list[float | None], second: list[float | None], verdict: str
) -> None:
    result = told(trials("a", first), trials("b", second))["p99_ms"]
    assert (result.verdict, result.blocks, result.method, result.reason) == (verdict, 3, "t", None)
    assert result.interval is not None and result.ratio is not None
    assert result.interval[0] <= result.ratio <= result.interval[1]


@pytest.mark.parametrize(("first", "second", "verdict"), [(120, 100, "more"), (80, 100, "less"), (100, 100, SAME)])
def test_a_goodput_is_more_or_less(first: float, second: float, verdict: str) -> None:
    members = trials("a", [1.0] * 3, first), trials("b", [1.0] * 3, second)
    assert told(*members)["goodput_rps_per_device"].verdict == verdict


def test_two_blocks_show_nothing_and_say_why() -> None:
    result = told(trials("a", [10, 10]), trials("b", [90, 90]))["p99_ms"]
    assert (result.verdict, result.reason, result.interval, result.method) == (SAME, "fewer than 3 blocks", None, None)
    assert result.ratio == pytest.approx(1 / 9)


def test_blocks_are_pairs_by_number_of_trials_that_finished() -> None:
    broken = trials("a", [10.0] * 5)
    broken[1].state = "failed"
    assert told(broken, trials("b", [20, 20, 20, 20]))["p99_ms"].blocks == 3


def test_what_cannot_be_compared_is_not_called_equal() -> None:
    for missing in (None, math.inf):
        result = told(trials("a", [10] * 3), trials("b", [10, 10, missing]))["p99_ms"]
        assert (result.verdict, result.ratio) == (NOT_COMPARED, None)
        assert result.reason == "not claimed, or ∞, in some trial"
    none = told(trials("a", [10] * 3, 0.0), trials("b", [10] * 3))["goodput_rps_per_device"]
    assert (none.verdict, none.reason) == (NOT_COMPARED, "0 in some trial")
    invalid = told(trials("a", [10] * 3), trials("b", [20] * 3), verdict="INVALID")["p99_ms"]
    assert (invalid.verdict, invalid.reason, invalid.blocks) == (NOT_COMPARED, "b INVALID", 0)
    apart = told(trials("a", [10] * 3), trials("b", [20] * 3, state="failed"))["p99_ms"]
    assert (apart.verdict, apart.reason) == (NOT_COMPARED, "no block that both finished")


def test_only_other_adapters_under_the_same_scenario_are_compared() -> None:
    cells = [cell("a"), cell("a", cell="a--kill", scenario="kill"), cell("b", cell="b--kill", scenario="kill")]
    made = comparisons(cells, [])
    assert {(c.scenario, c.first, c.second) for c in made} == {("kill", "a", "b")}
    assert [c.figure for c in made] == list(FIGURES)


# ---------------------------------------------------------------- where they are read


def _shown(summary: RunSummary, width: int = 200) -> str:
    out = io.StringIO()
    read(Console(file=out, width=width), *summary_parts(summary))
    return out.getvalue()


def test_terminal_and_report_tell_the_comparisons_of_the_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenarios=("no-fault",), trials=3, span_s=12)
    summary = summarise(run)
    (p99,) = [c for c in summary.comparisons if c.figure == "p99_ms"]
    (line,) = comparison_lines(summary.comparisons)
    assert line.startswith("no-fault: triton ÷ ray_serve (3 blocks): p99 ")
    assert p99.interval is not None
    assert f"{p99.ratio:.3f} [{p99.interval[0]:.3f}, {p99.interval[1]:.3f}] {p99.verdict}" in line
    assert line in _shown(summary)
    assert "optimistic" not in _shown(summary), "the intervals are over trials"
    page = build([run])
    assert "One against the other" in page and "Triton ÷ Ray Serve · no-fault" in page


def test_with_too_few_blocks_one_line_says_so_and_intervals_within_trials_are_called_optimistic(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenarios=("no-fault",), trials=1, span_s=12)
    summary = summarise(run)
    assert comparison_lines(summary.comparisons) == ["no adapter was shown to differ from another: fewer than 3 blocks"]
    shown = _shown(summary)
    assert "†" in shown and "as if arrivals were independent: optimistic" in shown
    assert '<span class="ends">[' in build([run])
    assert "] optimistic</span>" in build([run])
    assert comparison_lines([]) == []


def test_a_cell_with_an_invalid_trial_is_compared_with_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenarios=("no-fault",), trials=3, span_s=12)
    victim = next(trial for trial in run.trials if trial.facts.adapter == "triton")
    change(victim, outputs={"checked": 9, "mismatched": 1, "example": None})
    summary = summarise(RunFolder.open(run.folder))
    assert {c.reason for c in summary.comparisons} == {"triton INVALID"}
