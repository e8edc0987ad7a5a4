"""The arithmetic of the ruler: stepped schedules, what a step did, how high the ceiling is, clocks of other machines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.analysis.metrics import Measured
from tailrace.harness.plan.schedule import Phase, Schedule, offered_rates
from tailrace.harness.records.schema import REQUEST_SCHEMA, Outcome
from tailrace.harness.records.tables import read_table
from tailrace.harness.replay import wire
from tailrace.harness.replay.clocks import SAME_CLOCK, ClockReading, read_clock, uncertainty_ns
from tailrace.harness.replay.record_stream import RecordStream
from tailrace.harness.run.ruler import HELD_LAG_MS, STEP_LIMIT_S, Step, analyse, ceiling, climb, plain_workload, stepped

STEP = Step(
    rate=100.0,
    achieved=100.0,
    arrivals=50,
    send_lag_p50_ms=0.05,
    send_lag_p99_ms=0.2,
    response_p50_ms=0.3,
    response_p99_ms=0.9,
    dropped=0,
    failed=0,
)


def step(rate: float, **changes: Any) -> Step:
    return Step(**{**vars(STEP), "rate": rate, **changes})


@given(
    rates=st.lists(st.floats(0.5, 3000), min_size=1, max_size=5),
    step_s=st.floats(0.1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_step_holds_its_arrivals_and_no_others(rates: list[float], step_s: float, seed: int) -> None:
    schedule, edges = stepped(rates, step_s, payloads=3, seed=seed)
    assert (np.diff(schedule.intended_ns) >= 0).all()
    measured = schedule.intended_ns[schedule.phase == Phase.MEASURE]
    assert (schedule.intended_ns[schedule.phase == Phase.WARMUP] <= 0).all()
    assert edges[0][0] == 0
    assert [end for _, end in edges[:-1]] == [begin for begin, _ in edges[1:]]
    for rate, (begin_s, end_s) in zip(rates, edges, strict=True):
        assert step_s - 1e-9 <= end_s - begin_s <= max(step_s, STEP_LIMIT_S) + 1e-9
        within = (measured >= int(begin_s * 1e9)) & (measured < end_s * 1e9)
        assert abs(int(within.sum()) - max(1, round(rate * (end_s - begin_s)))) <= 1
    assert set(schedule.payload_id.tolist()) <= {0, 1, 2}


def test_a_step_is_told_by_its_own_arrivals() -> None:
    intended = np.array([0, 100, 200, 300], np.int64) * 1_000_000
    trace = Measured(
        intended_ns=intended,
        sent_ns=intended + np.array([10_000, 30_000, 20_000_000, -1], np.int64),
        first_byte_ns=intended,
        done_ns=intended + np.array([1_000_000, 3_000_000, 400_000_000, 0], np.int64),
        outcome=np.array([Outcome.OK, Outcome.OK, Outcome.OK, Outcome.DROPPED], np.uint8),
    )
    trace.sent_ns[3] = -1
    first, second = analyse(trace, 10, 0.0, 0.2), analyse(trace, 10, 0.2, 0.4)
    assert (first.arrivals, first.send_lag_p50_ms, first.send_lag_p99_ms) == (2, 0.01, 0.03)
    assert (first.response_p50_ms, first.response_p99_ms, first.achieved) == (1.0, 3.0, 10.0)
    assert first.held
    assert (second.arrivals, second.dropped, second.failed, second.send_lag_p50_ms) == (2, 1, 0, 20.0)
    assert second.achieved == pytest.approx(1 / 0.4), "the answer came 0.2 s after the step's end"
    assert not second.held
    nothing = analyse(trace, 10, 5.0, 6.0)
    assert (nothing.arrivals, nothing.send_lag_p50_ms, nothing.held) == (0, None, False)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"send_lag_p99_ms": 30.0}, True),
        ({"send_lag_p50_ms": HELD_LAG_MS + 0.01}, False),
        ({"dropped": 1}, False),
        ({"failed": 1}, False),
    ],
)
def test_a_rate_is_held_by_its_median_lag(changes: dict[str, Any], held: bool) -> None:
    assert step(10, **changes).held is held


def test_the_ceiling_is_the_last_step_before_the_first_that_was_missed() -> None:
    late = {"send_lag_p50_ms": 5.0}
    assert ceiling([step(1), step(2), step(4)])["ceiling_rps"] == 4
    assert ceiling([step(1), step(2), step(4)])["at_least"]
    missed = ceiling([step(1), step(2), step(4, **late), step(8)])
    assert (missed["ceiling_rps"], missed["at_least"]) == (2, False)
    assert ceiling([step(1, **late), step(2)])["ceiling_rps"] is None


def test_rates_double_from_the_peak_to_a_limit() -> None:
    assert climb(10, 25) == [10, 25, 50, 100, 200, 400, 800]
    assert climb(5000, 9000) == [5000, 9000, 18000]


def test_offered_rates_are_the_mean_and_the_busiest_second() -> None:
    arrivals = np.array([0.0, 1.0, 1.1, 1.2, 9.0]) * 1e9
    assert offered_rates(arrivals.astype(np.int64), 10.0) == (0.5, 3.0)


def test_plain_requests_have_the_size_that_was_asked_for() -> None:
    workload = plain_workload(100)
    assert {payload["body"].nbytes for payload in workload.payloads} == {100}
    assert len({payload["body"].tobytes() for payload in workload.payloads}) == len(workload.payloads)


@given(
    offset_ns=st.integers(-(10**15), 10**15),
    ways=st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)), min_size=1, max_size=30),
)
def test_a_clock_is_known_to_half_the_shortest_way(offset_ns: int, ways: list[tuple[int, int]]) -> None:
    now = 10**12
    waiting = list(ways)

    def ask() -> tuple[int, int, int]:
        there_ns, back_ns = waiting.pop()
        return now, now + there_ns + offset_ns, now + there_ns + back_ns

    reading = read_clock(ask, len(ways))
    assert abs(reading.offset_ns - offset_ns) <= reading.uncertainty_ns
    assert reading.uncertainty_ns <= min(sum(way) for way in ways) // 2 + 1


def test_what_clocks_drift_apart_is_uncertain_too() -> None:
    assert uncertainty_ns(ClockReading(100, 5), ClockReading(130, 7)) == 37
    assert uncertainty_ns(SAME_CLOCK, SAME_CLOCK) == 0


def test_rows_of_a_worker_are_told_on_the_harness_clock(tmp_path: Any) -> None:
    schedule = Schedule(
        intended_ns=np.array([0, 1_000_000], np.int64),
        model=np.zeros(2, np.uint16),
        payload_id=np.zeros(2, np.int32),
        phase=np.ones(2, np.uint8),
        models=("m",),
    )
    stream = RecordStream(tmp_path / "requests", schedule, 2, slo_ms=1.5)
    stream.epoch_ns = 5_000_000_000
    stream.offsets_ns = [0, 10**15]
    stream.open()
    for worker, ahead_ns in enumerate(stream.offsets_ns):
        rows = np.zeros(1, wire.ROW_DTYPE)
        rows["arrival_id"] = worker
        rows["sent_ns"] = rows["done_ns"] = stream.epoch_ns + ahead_ns + 2_000_000
        rows["first_byte_ns"] = wire.NONE
        rows["error"] = rows["status"] = -1
        stream.append(rows, worker)
    stream.close()
    table = read_table(tmp_path / "requests", REQUEST_SCHEMA)
    assert table is not None
    assert table["sent_ns"].to_pylist() == table["done_ns"].to_pylist() == [2_000_000, 2_000_000]
    assert table["first_byte_ns"].to_pylist() == [None, None]
    assert table["worker"].to_pylist() == [0, 1]
    assert (stream.measured, stream.missed) == (2, 1), "one took 2 ms, the other 1, whatever its worker's clock says"
