"""The closed form of the warm pool, against a fluid that is stepped through, and its command."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.simulator.capacity import Ramp, Shortfall, replica_rps, shortfall, shortfalls
from tailrace.simulator.system import Autoscaler, Batching, Service
from tests.conftest import tailrace

RAMP = Ramp(40, 640, 9)
PLAN = ("plan", "warm-pool", "--from", "40", "--to", "640", "--ramp", "9s")


def stepped(ramp: Ramp, found: Shortfall, rate: float, each_s: float, step_s: float = 1e-4) -> float:
    """The largest backlog of the same fluid, step by step."""
    if found.first_added_at_s is None:
        return 0.0
    backlog = largest = 0.0
    most = max(found.ready_at_start, math.ceil(ramp.to_rps / rate) + 1)
    for number in range(round(2 * ramp.ramp_s / step_s)):
        t = number * step_s
        added = 0 if t < found.first_added_at_s else 1 + math.floor((t - found.first_added_at_s) / each_s)
        replicas = min(most, found.ready_at_start + added)
        backlog = max(0.0, backlog + (ramp.demand(t + step_s / 2) - replicas * rate) * step_s)
        largest = max(largest, backlog)
    return largest


@given(
    low=st.floats(10, 200),
    rise=st.floats(10, 2000),
    ramp_s=st.floats(2, 20),
    cold_start_s=st.floats(0.1, 5),
    pool=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_the_closed_form_is_what_stepping_through_gives(
    low: float, rise: float, ramp_s: float, cold_start_s: float, pool: int
) -> None:
    ramp, scaler = Ramp(low, low + rise, ramp_s), Autoscaler(cold_start_s=cold_start_s)
    found = shortfall(ramp, Service(), Batching(), scaler, pool)
    rate = replica_rps(Service(), Batching())
    each_s = scaler.cold_start_s + scaler.period_s
    assert found.backlog == pytest.approx(stepped(ramp, found, rate, each_s, 1e-3), rel=0.02, abs=1)


def test_a_replica_serves_its_full_batches() -> None:
    assert replica_rps(Service(base_ms=12, per_item_ms=3), Batching(max_batch=16)) == pytest.approx(16 / 0.060)


def test_by_hand() -> None:
    """One warm beyond the one that is needed: 533/s are exceeded after 7.4 s, four requests later the scaler looks, and
    0.8 s after that three replicas are ready."""
    found = shortfall(RAMP, Service(), Batching(), Autoscaler(), 1)
    assert found.exceeded_at_s == pytest.approx((2 * 16 / 0.06 - 40) / (600 / 9))
    noticed_s = math.sqrt(2 * (10 * 2 - 16) / (600 / 9)) + 0.1 + 0.8
    assert found.first_added_at_s == pytest.approx(found.exceeded_at_s + noticed_s)
    assert found.backlog == pytest.approx(600 / 9 * noticed_s**2 / 2)
    assert found.worst_ms == pytest.approx(found.backlog / (2 * 16 / 0.06) * 1e3 + 60 + 30)


def test_a_larger_pool_is_never_worse() -> None:
    rows = shortfalls(Ramp(40, 2000, 9), Service(), Batching(), Autoscaler(cold_start_s=4))
    assert [row.warm_pool for row in rows] == list(range(len(rows)))
    assert rows[-1].exceeded_at_s is None
    assert rows[0].shortfall_rps > 0
    for one, larger in pairwise(rows):
        assert larger.shortfall_rps <= one.shortfall_rps


def test_the_command_recommends_what_its_simulation_confirms(tmp_path: Path) -> None:
    done = tailrace(*PLAN, "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    last = told["rows"][-1]
    assert last["warm_pool"] == told["recommended"]
    assert last["simulated_slo_met"] >= 19
    assert told["by_closed_form"] <= told["recommended"]
    assert all(row["simulated_slo_met"] < 19 or row["worst_ms"] > 200 for row in told["rows"][:-1])
    table = tailrace(*PLAN, cwd=tmp_path)
    assert f"Keep {told['recommended']} warm" in table.stdout
    assert "simulated, not measured" in table.stdout


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--slo", "30ms"), "No warm pool keeps 30 ms"),
    ],
)
def test_an_objective_out_of_reach_is_told(tmp_path: Path, more: tuple[str, ...], word: str) -> None:
    assert word in tailrace(*PLAN, *more, cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--to", "30"), "no ramp"),
        (("--ramp", "9"), "--ramp"),
        (("--ramp", "0s"), "no ramp"),
        (("--period", "0s"), "autoscaler.period_s"),
        (("--up-above", "2"), "down_below (3) is not below up_above (2)"),
        (("--service", "base=0ms"), "no time"),
        (("--to", "1e9"), "more than 1,000 replicas"),
        (("--service", "base=12"), "--service base"),
        (("--service", "setup=12ms"), "base, per_item"),
        (("--service", "base=12ms,base=13ms"), "twice"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    done = tailrace(*PLAN, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr
