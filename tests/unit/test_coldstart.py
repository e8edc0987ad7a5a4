"""Cold starts: the arithmetic, what is refused, a server followed from its start, and the page."""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.adapters.null.adapter import ADAPTER
from tailrace.harness import machine
from tailrace.harness.analysis.metrics import order_statistic_bounds
from tailrace.harness.contract.adapter import Adapter, Deployment, Endpoint, ProcessHost, ServerEnvironment
from tailrace.harness.contract.codecs import RawHTTP
from tailrace.harness.errors import DeployError, InputError, ServerError, StorageError
from tailrace.harness.processes import ProcessRef
from tailrace.harness.run.coldstart import (
    MODES,
    PHASES,
    SETTLING_REQUESTS,
    WARM_FACTOR,
    WARM_REQUESTS,
    ColdStarts,
    Mode,
    ask_until_warm,
    check,
    interleaved,
    lengths,
    penalty,
    phases_into,
    spread,
    summarise,
)
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.ruler import plain_workload
from tailrace.harness.run.setup import ServerSetup
from tailrace.harness.run.start import ServerStart
from tailrace.reports.coldstart import FIGURE_WORDS, build, write

REQUESTS = 1 + SETTLING_REQUESTS + WARM_REQUESTS
TIMES_MS = st.lists(st.floats(0.01, 1e5), min_size=REQUESTS, max_size=REQUESTS)


# ---------------------------------------------------------------- arithmetic


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=5))
def test_phases_sum_up_to_the_time_since_the_start(took: list[float]) -> None:
    since = {f"phase-{i}": end for i, end in enumerate(itertools.accumulate(took))}
    phases = lengths(since)
    assert list(phases) == list(since)
    assert all(length >= 0 for length in phases.values())
    assert list(phases.values()) == pytest.approx(took, abs=1e-6)
    assert sum(phases.values()) == pytest.approx(list(since.values())[-1])


def test_the_penalty_of_a_first_request_that_is_known() -> None:
    told = penalty([250.0, 90.0, 31.0, 30.0, 20.0, 20.0, *[20.0] * 19, 400.0])
    assert told == {
        "first_request_ms": 250.0,
        "warm_request_ms": 20.0,
        "first_request_penalty_ms": 230.0,
        "first_request_ratio": 12.5,
        "warm_after_requests": 3,  # the fourth took 1.5 times as long as a warm one
    }
    assert penalty([20.0] * REQUESTS)["warm_after_requests"] == 0


@given(TIMES_MS)
def test_difference_ratio_and_warmth_agree(times_ms: list[float]) -> None:
    told = penalty(times_ms)
    warm_ms, after = told["warm_request_ms"], int(told["warm_after_requests"])
    assert warm_ms in times_ms[-WARM_REQUESTS:]
    assert told["first_request_ms"] == times_ms[0]
    assert warm_ms + told["first_request_penalty_ms"] == pytest.approx(times_ms[0])
    assert warm_ms * told["first_request_ratio"] == pytest.approx(times_ms[0])
    assert all(took_ms > WARM_FACTOR * warm_ms for took_ms in times_ms[:after])
    assert times_ms[after] <= WARM_FACTOR * warm_ms


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=40))
def test_the_median_is_claimed_from_six_values_on_and_by_order_statistics(values: list[float]) -> None:
    told, ordered = spread(values), sorted(values)
    assert told["median"] == ordered[math.ceil(len(values) / 2) - 1]
    assert (told["min"], told["max"]) == (ordered[0], ordered[-1])
    low, high = order_statistic_bounds(len(values), 0.5)
    if len(values) < 6:
        assert told["interval"] is None
    else:
        assert low is not None
        assert high is not None
        assert told["interval"] == [ordered[low - 1], ordered[high - 1]]


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**32))
def test_every_round_has_every_adapter_once(adapters: int, trials: int, seed: int) -> None:
    names = [f"adapter-{i}" for i in range(adapters)]
    order = interleaved(names, trials, seed)
    assert order == interleaved(names, trials, seed)
    for number in range(1, trials + 1):
        block = order[(number - 1) * adapters : number * adapters]
        assert sorted(block) == [(name, number) for name in names]


def test_rounds_are_shuffled() -> None:
    order = interleaved(["a", "b", "c"], 10, 7)
    assert len({tuple(name for name, number in order if number == round_) for round_ in range(1, 11)}) > 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("names", "workload", "given_more", "said"),
    [
        (["tritn"], "emulated", {}, "there is no adapter 'tritn'"),
        (["null"], "emulatd", {}, "there is no workload `emulatd`"),
        (["null", "null"], "emulated", {}, "different ones"),
        ([], "emulated", {}, "one at the least"),
        (["null"], "emulated", {"trials": 0}, "0 trials"),
        (["null"], "emulated", {"mode": "model"}, "no `load_model`"),
        (["null"], "emulated", {"options": {"null": {"engine": "haproxy"}}}, "no place for `replicas`"),
        (["null"], "emulated", {"options": {"null": {"latency": 1}}}, "latency_ms"),
    ],
)
def test_what_cannot_be_measured_is_refused_up_front(
    names: list[str], workload: str, given_more: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check(names, workload, **given_more)


def test_the_page_cache_is_dropped_or_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DROP_CACHES", tmp_path / "drop_caches")
    assert check(["null"], "emulated", mode="page-cache").mode == "page-cache"
    assert (tmp_path / "drop_caches").read_text() == "1\n"
    monkeypatch.setattr(machine, "DROP_CACHES", tmp_path / "read-only" / "drop_caches")
    with pytest.raises(InputError, match=r"cannot be dropped: .*No such file") as refused:
        check(["null"], "emulated", mode="page-cache")
    assert "--mode process" in str(refused.value.remedy)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        ColdStarts(check(["null"], "emulated"), tmp_path, print).run()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# ---------------------------------------------------------------- one server


WORKLOAD = plain_workload(16)
RIGHT, WRONG = (np.array([number], np.int64).tobytes() for number in (0, 1))
Script = Callable[[int], tuple[int, bytes, float]]
"""Number of the request, from 0 → status, body, and seconds before the answer."""


class Impatient(type(ADAPTER)):  # type: ignore[misc]
    start_timeout_s = 0.5


class Scripted(Deployment):
    def open(self) -> bool:
        return True

    def claims_ready(self) -> bool:
        return True


@contextmanager
def scripted(script: Script) -> Iterator[Scripted]:
    numbers = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body, after_s = script(next(numbers))
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(after_s)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        host, port = "127.0.0.1", server.server_address[1]
        codec = RawHTTP(host, port, "/{model}", WORKLOAD.spec.inputs, WORKLOAD.spec.outputs)
        endpoint = Endpoint("http", host, port, codec)
        yield Scripted(cast(ProcessHost, None), ProcessRef.of(os.getpid()), endpoint, Path("/nonexistent.log"))
        server.shutdown()


def followed(script: Script, facts: dict[str, Any] | None = None, adapter: Adapter = ADAPTER) -> dict[str, Any]:
    facts = {} if facts is None else facts
    cell = check(["null"], "emulated").cell.model_copy(update={"models": tuple(WORKLOAD.references)})
    environment = ServerEnvironment(Path("/nonexistent/python"), "current")
    setup = ServerSetup(cell=cell, adapter=adapter, environment=environment, workload=WORKLOAD)
    with scripted(script) as deployment:
        start = ServerStart(setup, deployment, time.monotonic_ns(), phases_into(facts))
        start.come_up()
        ask_until_warm(start, facts)
    return facts


def test_a_first_request_that_is_slow_is_told() -> None:
    facts = followed(lambda number: (200, RIGHT, 0.4 if number < 2 else 0.0))
    assert list(facts["since_start"]) == list(PHASES["process"])
    assert sum(facts["phases"].values()) == pytest.approx(facts["since_start"]["first_answer_s"])
    assert facts["phases"]["first_answer_s"] >= 0.4
    assert facts["first_request_ms"] >= 400
    assert facts["first_request_penalty_ms"] > 0
    assert facts["warm_after_requests"] >= 2  # the machine may hold up more of them
    assert len(facts["request_ms"]) == REQUESTS
    assert (facts["failed_answers"], facts["lied_s"]) == (0, 0.0)


def test_a_server_that_says_ready_and_fails_has_lied_for_so_long() -> None:
    facts = followed(lambda number: (503, b"loading", 0.1) if number < 3 else (200, RIGHT, 0.0))
    assert facts["failed_answers"] == 3
    assert 0.3 <= facts["lied_s"] <= facts["phases"]["first_answer_s"]
    assert facts["first_request_ms"] == facts["request_ms"][0]


def test_a_wrong_answer_is_an_error_also_later() -> None:
    for first_wrong in (0, 3):
        with pytest.raises(ServerError, match="does not compute what the reference computes"):
            followed(lambda number, first=first_wrong: (200, WRONG if number >= first else RIGHT, 0.0))  # type: ignore[misc]


def test_a_failure_after_the_first_correct_answer_is_an_error() -> None:
    with pytest.raises(ServerError, match=r"failed after its first correct answer: HTTP 500"):
        followed(lambda number: (500, b"gone", 0.0) if number else (200, RIGHT, 0.0))


def test_a_server_that_never_answers_is_given_up_and_how_long_it_lied_is_kept() -> None:
    facts: dict[str, Any] = {}
    with pytest.raises(DeployError, match=r"though it says that it is ready; its last answer: HTTP 503: loading"):
        followed(lambda _: (503, b"loading", 0.0), facts, Impatient())
    assert list(facts["since_start"]) == ["port_open_s", "ready_s"]
    assert facts["lied_s"] > 0
    assert facts["failed_answers"] > 0


# ---------------------------------------------------------------- the page


def trial(name: str, number: int, scale: float, mode: Mode = "process") -> dict[str, Any]:
    since = {key: scale * (index + 1) for index, key in enumerate(PHASES[mode])}
    return {
        "adapter": name,
        "number": number,
        "state": "done",
        "server": f"servers/{name}--{number}",
        "error": None,
        "page_cache_bytes": 1 << 30,
        "since_start": since,
        "phases": lengths(since),
        "failed_answers": 0,
        "lied_s": 0.0,
        **penalty([100 * scale, *[20.0] * (REQUESTS - 1)]),
    }


def a_record(mode: Mode = "process", trials: int = 6) -> dict[str, Any]:
    plan = check(["null", "triton"], "emulated", trials=trials)
    record = ColdStarts(plan, Path("out"), print).record | {"mode": mode, "state": "done", "ended_at": "then"}
    names = ["null", "triton"]
    record["trials"] = [trial(name, n, n + i, mode) for n in range(1, trials + 1) for i, name in enumerate(names, 1)]
    record["summary"] = summarise(record["trials"], names)
    record["command"] = ["tailrace", "coldstart", "null", "triton"]
    return record


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("mode", list(MODES))
def test_the_page_has_its_parts_and_needs_nothing_else(mode: Mode) -> None:
    record = a_record(mode)
    html = build(record, Path("out"))
    assert html == build(copy.deepcopy(record), Path("out"))
    page = Page(html)
    assert not page.of("script")
    assert not [a for a in page.of("link") if a["href"] != "data:,"]
    assert not [a for _, a in page.elements if "src" in a or a.get("href", "").startswith("http")]
    assert "default-src 'none'" in next(a["content"] for a in page.of("meta") if "http-equiv" in a)
    assert "prefers-color-scheme: dark" in html
    assert page.texts["h1"] == [f"Cold starts: {ADAPTER.title} and {get_adapter('triton').title}"]
    assert page.texts["h2"] == ["By phase ", "Figures ", "Reproduce"]
    assert page.texts["span"].count("emulated") == 2
    assert "EMULATED" in page.texts["strong"]
    assert MODES[mode] in unescape(html)
    figures = [a for a in page.of("svg") if a.get("role") == "img"]
    assert len(figures) == 2
    for words in PHASES[mode].values():
        assert words in figures[0]["aria-label"]
    # One title for the page, and one for each thin mark: every start in each of the two figures.
    assert len(page.of("title")) == 1 + 2 * len(record["trials"])
    headings = [text for text in page.texts["th"] if text]
    for title, _, _ in FIGURE_WORDS.values():
        assert title in headings
    assert html.count("servers/triton--") == 6


def test_the_bar_ends_where_the_table_says() -> None:
    html = build(a_record(), Path("out"))
    # Six starts at 2 … 7 and 3 … 8 seconds a phase: nearest-rank medians are the third.
    assert "Null server 12.0\u202fs" in html
    assert "says ready at 8.00\u202fs" in html
    assert "2.00 to 7.00" in html


def test_what_failed_is_told_and_the_text_of_servers_is_only_text(tmp_path: Path) -> None:
    record = a_record(trials=1)
    evil = "<script>alert(1)</script>\x1b[31m"
    detail = f"{tmp_path}/servers: {evil}"
    record["trials"][1] |= {"state": "failed", "error": {"message": evil, "remedy": None, "detail": detail}}
    for key in ("phases", "since_start", "lied_s", "first_request_ms"):
        del record["trials"][1][key]
    record["summary"] = summarise(record["trials"], ["null", "triton"])
    html = build(record, tmp_path)
    assert "<script" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "RUN/servers" in html
    assert "FAILED" in html
    assert "0 of 1" in html


def test_what_an_adapter_says_of_its_starts_is_told_once() -> None:
    record = a_record(trials=2)
    for told in record["trials"]:
        told["notes"] = ["a stand-in took its place"] if told["adapter"] == "null" else []
    assert build(record, Path("out")).count("Null server: a stand-in took its place.") == 1


def test_a_measurement_that_was_cut_short_says_so() -> None:
    record = a_record(trials=2)
    assert "CUT SHORT" not in build(record, Path("out"))
    record |= {"state": "interrupted", "trials": [], "summary": summarise([], ["null", "triton"])}
    html = build(record, Path("out"))
    assert "CUT SHORT" in html
    assert "No start came to its end." in html
    assert 'role="img"' not in html


def test_a_server_that_lied_is_named() -> None:
    record = a_record(trials=2)
    record["trials"][0] |= {"failed_answers": 4, "lied_s": 1.5}
    html = build(record, Path("out"))
    assert (
        "said that it was ready, and then failed requests, in 1 of 2\u00a0starts, for 1.50\u202fs at the longest"
        in html
    )


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    assert write(a_record(), tmp_path).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["coldstart.html"]
    with pytest.raises(StorageError, match="could not be written"):
        write(a_record(), tmp_path / "coldstart.html")  # a file, where a folder is needed
