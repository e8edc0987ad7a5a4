"""The parts of the load generator that do arithmetic: messages, pacing, rows, distinct answers, the record file."""

from __future__ import annotations

import json
import select
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.records.schema import Outcome
from tailrace.harness.replay import recorder as recorder_module
from tailrace.harness.replay import wire
from tailrace.harness.replay.pacer import BURST, Pacer, TimerFd
from tailrace.harness.replay.recorder import Answers, Recorder


def test_rows_are_packed_as_numpy_reads_them() -> None:
    assert wire.ROW.size == wire.ROW_DTYPE.itemsize
    row = np.frombuffer(wire.ROW.pack(1, 2, 3, 4, 5, 6, 7, 8, 9), wire.ROW_DTYPE)[0]
    assert row.tolist() == (1, 2, 3, 4, 5, 6, 7, 8, 9)


@given(
    messages=st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.binary(max_size=50)), max_size=10),
    cuts=st.lists(st.integers(1, 40), max_size=40),
)
def test_messages_survive_any_fragmentation(messages: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    stream = b"".join(wire.Frame(*message).pack() for message in messages)
    buffer = wire.FrameBuffer()
    received: list[wire.Frame] = []
    for size in [*cuts, len(stream) + 1]:
        received += buffer.feed(stream[:size])
        stream = stream[size:]
    assert received == [wire.Frame(*message) for message in messages]


def test_a_plan_survives_the_journey_and_sends_equal_bytes_once() -> None:
    shard = wire.Shard(
        np.array([3, 5, 9]),
        np.array([-5, 0, 7]),
        np.array([0, 1, 2], np.int32),
        (b"a" * 1000, b"b" * 1000, b"a" * 1000),
        ("", "", "/m"),
    )
    target = wire.Target("grpc", "h", 1, 2.5, 4)
    payload = wire.pack_plan(shard, target)
    assert len(payload) < 2500
    again, where = wire.unpack_plan(payload)
    assert where == target
    assert again.data == shard.data
    assert again.methods == shard.methods
    for name in ("arrival_id", "intended_ns", "request"):
        assert getattr(again, name).tolist() == getattr(shard, name).tolist()


def test_the_timer_wakes_a_poll_at_its_instant_and_not_before() -> None:
    timer = TimerFd()
    poll = select.epoll()
    poll.register(timer.fileno(), select.EPOLLIN)
    instant = time.monotonic_ns() + 30_000_000
    timer.arm(instant)
    assert poll.poll(10)
    assert time.monotonic_ns() >= instant
    timer.arm(time.monotonic_ns() + 10_000_000_000)  # takes the expiry back
    assert not poll.poll(0)
    timer.arm(1)  # long past
    assert poll.poll(10)
    poll.close()
    timer.close()


def test_the_pacer_fires_each_arrival_once_and_in_order() -> None:
    fired: list[int] = []
    pacer = Pacer(np.array([-5, 0, 0, 0, 10_000_000_000]), fired.append)
    epoch_ns = time.monotonic_ns()
    pacer.begin(epoch_ns)
    pacer.fire()
    assert fired == [0, 1, 2, 3]
    assert pacer.due_ns == epoch_ns + 10_000_000_000
    assert not pacer.exhausted
    pacer.close()


def test_the_pacer_lets_answers_have_their_turn() -> None:
    fired: list[int] = []
    pacer = Pacer(np.zeros(BURST + 3, np.int64), fired.append)
    assert pacer.due_ns == Pacer.NEVER
    pacer.begin(time.monotonic_ns())
    pacer.fire()
    assert fired == list(range(BURST))
    assert not pacer.exhausted
    pacer.fire()
    assert fired == list(range(BURST + 3))
    assert pacer.exhausted
    assert pacer.due_ns == Pacer.NEVER
    pacer.fire()
    assert len(fired) == BURST + 3
    pacer.close()


def test_a_stopped_pacer_fires_nothing_more() -> None:
    fired: list[int] = []
    pacer = Pacer(np.array([0, 0]), fired.append)
    pacer.stop()
    pacer.begin(0)
    pacer.fire()
    assert fired == []
    assert pacer.exhausted
    pacer.close()


def lagging_pacer(monkeypatch: pytest.MonkeyPatch, intended_ms: list[float], lags_ms: list[float]) -> Pacer:
    """A pacer whose clock, once it has begun, stands at each arrival's lag after its intended instant."""
    pacer = Pacer((np.array(intended_ms) * 1e6).astype(np.int64), lambda position: None)
    now_ns = [round((at + lag) * 1e6) for at, lag in zip(intended_ms, lags_ms, strict=True)]
    monkeypatch.setattr("tailrace.harness.replay.pacer.monotonic_ns", lambda: 10**12 + now_ns[pacer.fired])
    pacer.begin(10**12)
    while not pacer.exhausted:
        pacer.fire()
    pacer.close()
    return pacer


def test_start_lag_counts_measured_arrivals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer = lagging_pacer(monkeypatch, [-20.0, -10.0, 0.0, 10.0, 20.0], [500.0, 500.0, 2.0, 4.0, 3.0])
    assert pacer.start_lag_ms() == (3.0, 4.0)


def test_start_lag_of_a_warm_up_alone_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lagging_pacer(monkeypatch, [-20.0, -10.0], [7.0, 5.0]).start_lag_ms() == (5.0, 7.0)
    assert lagging_pacer(monkeypatch, [], []).start_lag_ms() == (None, None)
    stopped = Pacer(np.array([0, 1]), lambda position: None)
    stopped.stop()
    assert stopped.start_lag_ms() == (None, None)
    stopped.close()


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=300))
def test_start_lag_percentiles_are_nearest_ranks(lags_ms: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pacer = lagging_pacer(patch, [0.0] * len(lags_ms), [float(lag) for lag in lags_ms])
    for percent, got in zip((50, 99), pacer.start_lag_ms(), strict=True):
        assert got in lags_ms
        assert sum(lag <= got for lag in lags_ms) * 100 >= percent * len(lags_ms)  # the smallest such value
        assert sum(lag < got for lag in lags_ms) * 100 < percent * len(lags_ms)


def record(count: int) -> tuple[Recorder, list[tuple[bytes, bytes]]]:
    messages: list[tuple[bytes, bytes]] = []
    return Recorder(lambda kind, payload: messages.append((kind, payload)), np.arange(count) * 10), messages


def test_rows_carry_the_schedules_ids_and_grow_past_the_first_buffer() -> None:
    recorder, messages = record(10_000)
    for position in range(10_000):
        recorder.row(position, 1, wire.NONE, 2, Outcome.OK, 200, -1, 3, 4)
    rows = recorder.flush()
    assert rows["arrival_id"].tolist() == list(range(0, 100_000, 10))
    assert (rows["first_byte_ns"] == wire.NONE).all()
    assert [kind for kind, _ in messages] == [wire.ROWS]
    assert len(recorder.flush()) == 0
    assert recorder.done == recorder.ok == 10_000


def test_error_texts_are_short_distinct_and_bounded() -> None:
    recorder, messages = record(1)
    first = recorder.error("HTTP 500", "x" * 10_000)
    assert recorder.error("HTTP 500", "x" * 20_000) == first
    numbers = {recorder.error("HTTP 500", f"trace id {number}") for number in range(20_000)}
    assert len(numbers) <= recorder_module.ERROR_TEXTS
    recorder.flush()
    texts = [text for kind, payload in messages if kind == wire.ERRORS for text in json.loads(payload)]
    assert len(texts) <= recorder_module.ERROR_TEXTS + 1
    assert texts[-1] == "HTTP 500"
    assert max(map(len, texts)) <= recorder_module.ERROR_CHARS + len("HTTP 500: ")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=200))
def test_every_answer_is_counted_or_counted_as_unchecked(sequence: list[tuple[int, int]]) -> None:
    answers = Answers(3)
    for request, variant in sequence:
        answers.add(request, ("t", None), b"%d" % variant)
    meta, bodies = wire.unpack(answers.pack())
    assert sum(entry["count"] for entry in meta["answers"]) + meta["unchecked"] == len(sequence)
    for request in range(3):
        mine = [entry for entry in meta["answers"] if entry["request"] == request]
        assert len(mine) <= recorder_module.DISTINCT_PER_REQUEST
        distinct = dict.fromkeys(variant for which, variant in sequence if which == request)
        assert len(mine) == min(len(distinct), recorder_module.DISTINCT_PER_REQUEST)
    assert all(entry["headers"] == {"content-type": "t"} for entry in meta["answers"])
    assert len(bodies) == len(meta["answers"])


def test_equal_bytes_under_another_meaning_are_another_answer() -> None:
    answers = Answers(1)
    answers.add(0, (None, "10"), b"abc")
    answers.add(0, (None, "20"), b"abc")
    assert len(wire.unpack(answers.pack())[1]) == 2


def test_an_answer_that_turns_wrong_late_can_still_be_seen() -> None:
    seen = 0
    for seed in range(40):
        answers = Answers(1)
        answers._random.seed(seed)
        for variant in range(100):
            answers.add(0, (None, None), b"variant %d" % variant)
        answers_kept = wire.unpack(answers.pack())[1]
        assert answers_kept[:3] == [b"variant 0", b"variant 1", b"variant 2"]
        seen += answers_kept[3] >= b"variant 50"
    assert seen > 5


def test_distinct_answers_have_a_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "DISTINCT_BYTES", 1000)
    answers = Answers(100)
    for request in range(100):
        answers.add(request, (None, None), b"x" * 90)
    assert sum(map(len, wire.unpack(answers.pack())[1])) <= 1000
    assert answers.unchecked == 89


def test_large_answers_are_sampled_but_the_first_of_each_request_is_always_wanted() -> None:
    answers = Answers(1)
    assert answers.wanted(0, 123)
    answers.add(0, (None, None), b"x")
    for start in (0, 1_000_000):
        share = sum(answers.wanted(0, start + arrival) for arrival in range(16_000))
        assert 700 < share < 1300
