"""What was recorded before everything moved into one import package is still read, with the same figures.

``tests/data/before_the_house`` holds what that tailrace wrote: runs, saved baselines, a registered trace, cold starts, and in
``expected`` what its commands then said of them. Its baseline ``slower`` is of a run like ``run`` with a longer batch window.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tailrace.reports.coldstart import build
from tests.conftest import tailrace

RECORDED = Path(__file__).parents[1] / "data" / "before_the_house"


@pytest.fixture
def then(tmp_path: Path) -> Path:
    """A copy, for commands write reports and locks beside what they read."""
    return shutil.copytree(RECORDED, tmp_path / "then")


def held(then: Any, now: Any, where: str = "") -> None:
    """All that was told then is told now, with the same value."""
    if isinstance(then, dict):
        for key, value in then.items():
            assert key in now, f"{where}.{key} is gone"
            held(value, now[key], f"{where}.{key}")
    elif isinstance(then, list):
        assert len(then) == len(now), f"{where} had {len(then)} items"
        for position, (a, b) in enumerate(zip(then, now, strict=True)):
            held(a, b, f"{where}[{position}]")
    elif isinstance(then, float):
        assert now == pytest.approx(then, rel=1e-9), where
    else:
        assert now == then, where


def expected(name: str) -> Any:
    return json.loads((RECORDED / "expected" / name).read_text(encoding="utf-8"))


def recorded_summary(run: str) -> Any:
    return json.loads((RECORDED / run / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", ["run", "pipeline", "multiplexing", "interrupted"])
def test_a_run_is_summarised_and_reported_again(run: str, then: Path) -> None:
    (then / run / "summary.json").unlink()
    reported = tailrace("report", run, cwd=then)
    assert reported.returncode == 0, reported.stderr
    held(recorded_summary(run), json.loads((then / run / "summary.json").read_text(encoding="utf-8")))
    assert (then / run / "report.html").stat().st_size > 10_000


def test_a_run_has_the_same_figures(then: Path) -> None:
    told = tailrace("summary", "run", "--format", "json", cwd=then)
    assert told.returncode == 0, told.stderr
    held(recorded_summary("run"), json.loads(told.stdout))


def test_the_report_in_other_forms_says_the_same(then: Path) -> None:
    said = tailrace("report", "run", "--format", "md", cwd=then)
    rows = [line for line in said.stdout.splitlines() if line.startswith("| Reference")]
    before = (RECORDED / "expected" / "report.md").read_text(encoding="utf-8")
    assert len(rows) == 2
    assert all(row in before for row in rows)
    (told,) = json.loads(tailrace("report", "run", "--format", "json", cwd=then).stdout).values()
    held(recorded_summary("run"), told)


@pytest.mark.parametrize(
    ("baseline", "candidate", "code", "said"),
    [("slower", "run", 0, "gate-pass.json"), ("run", "slower", 4, "gate-regression.json")],
)
def test_a_run_is_gated_against_a_baseline(baseline: str, candidate: str, code: int, said: str, then: Path) -> None:
    judged = tailrace("gate", baseline, candidate, "--format", "json", cwd=then)
    assert judged.returncode == code, judged.stderr
    held(expected(said), json.loads(judged.stdout))


def test_a_run_and_the_baseline_saved_of_it_are_known_for_the_same(then: Path) -> None:
    refused = tailrace("gate", "main", "run", cwd=then)
    assert refused.returncode == 2
    assert "the same run" in refused.stderr


def test_runs_are_compared(then: Path) -> None:
    compared = tailrace("compare", "run", "slower", "--format", "json", cwd=then)
    assert compared.returncode == 0, compared.stderr
    held(expected("compare.json"), json.loads(compared.stdout))


def test_a_registered_trace_is_shown_and_replayed(then: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILRACE_HOME", str(then / "home"))
    shown = tailrace("traces", "show", "mine", cwd=then)
    assert shown.returncode == 0, shown.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in shown.stdout.splitlines() if "│" in line]
    for row in (["rows", "400"], ["span s", "9.9571"], ["mean rate", "40.1723"], ["cv", "0.95626"]):
        assert row in cells
    planned = tailrace("run", "smoke", "--adapter", "null", "--trace", "mine", "--dry-run", cwd=then)
    assert planned.returncode == 0, planned.stderr
    assert "40.2" in planned.stdout
    assert "9.9571" in planned.stdout


def test_cold_starts_have_their_page() -> None:
    record = json.loads((RECORDED / "coldstart" / "coldstart.json").read_text(encoding="utf-8"))
    page = build(record, Path("coldstart"))
    assert "Reference server" in page
    assert "0.175" in page, "the median of the first correct answer"


def test_a_run_that_was_interrupted_is_not_gone_on_with_under_other_conditions(then: Path) -> None:
    refused = tailrace("run", "--resume", "interrupted", cwd=then)
    assert refused.returncode == 2
    assert "began under other conditions" in refused.stderr
    assert "hardware kernel: 6.1.0 when it began" in refused.stderr
    assert not (then / "interrupted" / "set-aside").exists(), "what was measured stays where it is"
