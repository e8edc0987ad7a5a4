"""What a report says of models that share a memory: curves, theory, the simulator's error, and the recommendation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.records.store import RunFolder
from tailrace.reports.evidence import CellView, view
from tailrace.reports.figures.memory import headroom, memory_curves
from tailrace.reports.markdown import markdown
from tailrace.reports.multiplexing import (
    BRIEF_HEADINGS,
    MULTIPLEXING_HEADINGS,
    PREDICTION_HEADINGS,
    Multiplexing,
    knee,
    multiplexing,
    theory_of,
    words,
)
from tailrace.reports.report import build
from tailrace.reports.text import NOTHING
from tailrace.simulator.multiplexed_trial import fitted, predict, read_multiplexed
from tests.synthetic import COST, SHARING, STARTED_S, make_run

MEMORIES = {
    **{f"lru-{mb}": {"memory_mb": mb, "policy": "lru"} for mb in (200, 300, 400, 600)},
    **{f"pinned-{mb}": {"memory_mb": mb, "policy": "gdsf", "pinned": 1} for mb in (200, 400)},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(
        tmp_path_factory.mktemp("sharing") / "run",
        adapters=("reference", "triton"),
        scenarios=tuple(MEMORIES),
        memories=MEMORIES,
        span_s=150,
        peak_rate=3,
        slo_ms=700,
        name="sharing",
    )


@pytest.fixture(scope="module")
def told(run: RunFolder) -> Multiplexing:
    found = multiplexing(view([run]))
    assert found is not None
    return found


def column(rows: Sequence[Sequence[str]], headings: Sequence[str], place: int, cell: str) -> str:
    return next(row[place] for row in rows if row[0] == cell)


def test_there_is_a_line_for_each_framework_and_policy_by_memory(told: Multiplexing) -> None:
    (group,) = told.groups
    assert [line.label for line in group.lines] == [
        "Reference server · lru",
        "Reference server · gdsf, 1 pinned",
        "Triton · lru",
        "Triton · gdsf, 1 pinned",
    ]
    lru = group.lines[0]
    assert lru.memory_mb.tolist() == [200, 300, 400, 600]
    assert (np.diff(lru.cold) < 0).all()
    assert lru.cold[-1] == 0.0


def test_theory_is_of_the_recorded_arrivals_and_below_nobody(told: Multiplexing) -> None:
    (group,) = told.groups
    theory = group.theory
    assert theory is not None and theory.exact
    assert theory.memory_mb.tolist() == [200, 300, 400, 500, 600]
    assert theory.lru[-1] == theory.least[-1] == 0.0
    assert (theory.least[:-1] < theory.lru[:-1]).all()
    lru = group.lines[0]
    at = [theory.memory_mb.tolist().index(mb) for mb in lru.memory_mb]
    assert lru.cold == pytest.approx(theory.lru[at], abs=0.08)


def test_of_models_of_several_sizes_theory_has_a_bound(run: RunFolder) -> None:
    recorded = read_multiplexed(next(trial for trial in run.trials if trial.id == "reference--lru-200--1"))
    assert recorded is not None
    sizes = [size * (1 + place % 2) for place, size in enumerate(recorded.memory.sizes)]
    mixed = replace(recorded, memory=replace(recorded.memory, sizes=sizes))
    theory = theory_of(mixed, [300, 500, 900])
    assert not theory.exact
    assert {300, 500, 900} <= set(theory.memory_mb.tolist())
    assert (np.diff(theory.lru) <= 1e-12).all() and (np.diff(theory.least) <= 0).all()
    assert (theory.least <= theory.lru).all() and theory.least[0] > 0
    assert theory.lru[-1] == theory.least[-1] == 0.0


def test_the_simulator_finds_again_what_it_has_made(run: RunFolder, told: Multiplexing) -> None:
    assert {len(row) for row in told.predictions} == {len(PREDICTION_HEADINGS)}
    assert [row[-1] for row in told.predictions].count("this one") == 2
    trial = next(trial for trial in run.trials if trial.id == "reference--lru-200--1")
    recorded = read_multiplexed(trial)
    assert recorded is not None
    device = fitted(recorded, COST)
    assert np.median(device.starts_s) == pytest.approx(STARTED_S, abs=0.02)
    assert device.ready_s == pytest.approx(0.0, abs=0.01)
    assert device.overhead_ms == pytest.approx(2.0, abs=0.5)
    measured = (recorded.done_ns - recorded.arrivals_ns)[recorded.traced_from :] / 1e6
    predicted = predict(device, recorded)
    assert (predicted.met == recorded.met[recorded.traced_from :]).mean() > 0.95
    assert np.median(predicted.response_ms) == pytest.approx(np.median(measured), rel=0.05)


def test_a_trial_that_tells_nothing_of_memory_is_not_replayed(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), span_s=5)
    assert read_multiplexed(plain.trials[0]) is None
    assert multiplexing(view([plain])) is None
    html = build([plain])
    assert 'id="multiplexing"' not in html


def test_tables_say_what_each_cell_met(run: RunFolder, told: Multiplexing) -> None:
    assert {len(row) for row in told.rows} == {len(MULTIPLEXING_HEADINGS)}
    assert len(told.rows) == 12
    assert {len(row) for row in told.brief} == {len(BRIEF_HEADINGS)}
    driven = {row[0].split(" · ")[0]: row[3] for row in told.rows}
    assert driven == {"Reference server": "itself", "Triton": "the harness"}
    cell = next(c for c in view([run])[0].cells if c.summary.cell == "reference--pinned-200")
    row = next(row for row in told.rows if row[0] == cell.label)
    assert row[1:3] == ("200\u202fMiB", "gdsf, 1 pinned")
    assert cell.summary.multiplexing.models == SHARING
    assert row[MULTIPLEXING_HEADINGS.index("Loads")] == f"{cell.summary.multiplexing.loads:,}"
    assert row[MULTIPLEXING_HEADINGS.index("Least headroom")] == "0\u202fMiB"


def test_the_page_draws_it_says_emulated_and_names_the_controller(run: RunFolder, told: Multiplexing) -> None:
    html = build([run])
    assert 'href="#multiplexing"' in html
    section = html.split('<section id="multiplexing"')[1].split("</section>")[0]
    assert 'class="tag">emulated' in section.split("</h2>")[0]
    assert "Triton has no policy for that: the harness's own controller" in section.replace("&#39;", "'")
    curves = memory_curves(told)
    assert [figure.title for figure in curves] == ["Cold requests against memory", "p99 against memory"]
    assert all(str(figure.svg) in html for figure in curves)
    assert all(">emulated</text>" in str(figure.svg) for figure in curves)
    # Two lines of theory and a mark with its words for every cell.
    assert str(curves[0].svg).count("<title>") == 12
    assert {"LRU in theory (Che)", "the fewest, had the future been known"} <= {key.label for key in curves[0].keys}
    over_time = headroom(told.headroom)
    assert over_time is not None and str(over_time.svg) in html
    assert build([run]) == html


def test_of_one_memory_theory_is_a_level(tmp_path: Path) -> None:
    one = make_run(
        tmp_path / "run",
        adapters=("reference",),
        scenarios=("lru",),
        memories={"lru": {"memory_mb": 500}},
        span_s=60,
        peak_rate=3,
    )
    found = multiplexing(view([one]))
    assert found is not None
    dashed = re.findall(r'<path d="([^"]+)"[^>]*stroke-dasharray', str(memory_curves(found)[0].svg))
    assert len(dashed) == 2
    for path in dashed:
        xs = [float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", path)]
        assert max(xs) - min(xs) > 100, path


def test_markdown_has_the_recommendation_and_a_line_for_each_cell(run: RunFolder, told: Multiplexing) -> None:
    text = markdown([run])
    assert "The smallest memory that keeps p99 within" in text
    assert text.count("| Triton · pinned-") >= 2
    assert "LRU in theory" in text


# ---------------------------------------------------------------- the recommendation and the knee


def altered(cell: CellView, **changes: Any) -> CellView:
    return replace(cell, summary=cell.summary.model_copy(update=changes))


def sentence(run: RunFolder, **changes: Any) -> str:
    views = view([run])
    cells = tuple(altered(cell, **changes) for cell in views[0].cells)
    found = multiplexing([replace(views[0], cells=cells)])
    assert found is not None
    return words(found)[0]


def test_the_smallest_memory_within_the_objective_is_recommended_for_each_framework(run: RunFolder) -> None:
    cells = view([run])[0].cells
    smallest = {}
    for name in ("Reference server", "Triton"):
        own = [c for c in cells if c.framework == name and c.summary.p99_ms and c.summary.p99_ms <= 700]
        smallest[name] = min(c.summary.multiplexing.memory_mb for c in own)
        assert smallest[name] > 200
    told = sentence(run)
    assert told.startswith("The smallest memory that keeps p99 within 700\u202fms: ")
    for name, mb in smallest.items():
        assert re.search(rf"{mb:.0f}\u202fMiB under [^(]+ with {name} \(", told)
    views = view([run])
    slow = [altered(c, p99_ms=2500.0) if c.framework == "Triton" else c for c in views[0].cells]
    found = multiplexing([replace(views[0], cells=tuple(slow))])
    assert found is not None
    assert words(found)[0].endswith("; with Triton none of those that were tried does.")


def test_where_nothing_keeps_the_objective_it_says_so(run: RunFolder) -> None:
    assert sentence(run, p99_ms=2500.0).startswith("None of these memories and policies keeps p99 within 700\u202fms")
    assert sentence(run, p99_ms=math.inf).startswith("None of these")
    assert "not known: too few arrivals" in sentence(run, p99_ms=None)
    # What is INVALID recommends nothing, and has no line.
    views = view([run])
    invalid = [altered(cell, verdict="INVALID") for cell in views[0].cells]
    found = multiplexing([replace(views[0], cells=tuple(invalid))])
    assert found is not None
    assert found.groups[0].lines == () and memory_curves(found) == []
    assert len(found.rows) == 12
    assert all(NOTHING not in row for row in found.brief)


def test_the_knee_is_where_the_curve_hangs_deepest() -> None:
    memory = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert knee(memory, np.array([0.8, 0.3, 0.2, 0.1, 0.0])) == 2.0
    assert knee(memory, np.array([0.8, 0.6, 0.4, 0.2, 0.0])) is None
    assert knee(memory, np.array([0.8, 0.79, 0.7, 0.6, 0.0])) is None
    assert knee(memory[:2], np.array([0.8, 0.3])) is None
    assert knee(memory, np.array([0.8, math.nan, 0.1, 0.05, 0.0])) == 3.0


@given(cold=st.lists(st.floats(0, 1), min_size=3, max_size=8), scale=st.floats(0.1, 1000))
def test_the_knee_does_not_depend_on_units(cold: list[float], scale: float) -> None:
    memory, shares = np.arange(1.0, len(cold) + 1), np.round(np.array(cold), 3)
    one, other = knee(memory, shares), knee(memory * scale, shares)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        line = shares[0] + (shares[-1] - shares[0]) * (memory - 1) / (len(cold) - 1) - shares
        deepest = np.flatnonzero(line >= line.max() - 1e-9) + 1
        assert one in deepest and round(other / scale) in deepest
