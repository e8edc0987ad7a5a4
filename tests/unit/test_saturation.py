"""The saturation point, of a system whose point is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from tests.conftest import tailrace
from tuner.objective import Objective
from tuner.saturation import STEPS_DOWN, find

OBJECTIVE = Objective(100)


def saturating_at(point: float, *, noise: float = 0.0) -> Callable[[float], Mapping[str, Any]]:
    """A p99 that rises with the rate and meets the objective at ``point``; with ``noise``, its interval is so wide."""

    def measure(rate: float) -> Mapping[str, Any]:
        p99_ms = 100 * rate / point if rate < 3 * point else math.inf
        ends = [p99_ms * (1 - noise), p99_ms * (1 + noise)]
        return {
            "p99_ms": p99_ms,
            "p99_ci_ms": ends,
            "p99_ci_ms_source": "across-trials" if noise else "within-trial",
            "slo_attainment": 1.0,
            "arrivals": 1000,
        }

    return measure


@given(point=st.floats(1, 5000), start=st.floats(1, 5000))
def test_what_is_found_holds_the_point_between_its_ends(point: float, start: float) -> None:
    found = find(saturating_at(point), start, OBJECTIVE)
    if point < start / 2**STEPS_DOWN:
        assert found.ended == "nothing holds"
        return
    assert found.holds is not None
    assert found.fails is not None
    assert found.holds <= point <= found.fails
    assert found.fails / found.holds <= 1.05
    assert max(load.rate for load in found.loads) <= max(start, 2 * point), "no load is far beyond the point"


def test_it_stops_where_the_interval_says_no_more() -> None:
    found = find(saturating_at(130, noise=0.1), 50, OBJECTIVE)
    assert found.ended == "undecided"
    assert found.holds is not None
    assert found.fails is not None
    assert found.fails / found.holds > 1.05
    assert "more trials" in found.words


def test_nothing_holds() -> None:
    found = find(saturating_at(0.001), 100, OBJECTIVE)
    assert (found.holds, found.ended) == (None, "nothing holds")
    assert len(found.loads) == STEPS_DOWN + 1
    assert "not even 1.562/s holds" in found.words


def test_everything_holds() -> None:
    found = find(saturating_at(1e30), 1, OBJECTIVE)
    assert found.fails is None
    assert found.ended == "steps"
    assert "at least" in found.words


def test_without_a_p99_there_is_no_point() -> None:
    def measure(rate: float) -> Mapping[str, Any]:
        return {"p99_ms": None, "p99_ci_ms": None, "p99_ci_ms_source": None, "arrivals": 12, "slo_attainment": 1.0}

    with pytest.raises(InputError, match="too few arrivals"):
        find(measure, 1, OBJECTIVE)


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    for arguments, word in ((("nothing",), "no experiment"), (("smoke", "--slo", "p9=1s"), "--slo")):
        done = tailrace("saturate", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert word in done.stderr
