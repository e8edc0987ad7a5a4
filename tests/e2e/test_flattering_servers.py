"""Servers whose figures would flatter them on a careless ruler: each ends INVALID, or with the numbers that are true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tailrace

pytestmark = pytest.mark.e2e

RUN = ["run", "smoke", "--adapter", "null", "--set", "tuning=defaults", "--out", "out"]
TRACE = "trace={{name: steady, params: {{rate: {rate}, duration_s: {duration_s}}}}}"
VERIFIED = 17
"""Requests before the clock starts: the first right answer, and the verification of 16 payloads."""


def race(
    folder: Path, *, rate: int, duration_s: int, warmup_s: int = 1, arguments: tuple[str, ...] = (), **script: Any
) -> tuple[int, str]:
    """One trial against a null server with this script: the exit code, and what was said."""
    settings = [TRACE.format(rate=rate, duration_s=duration_s), f"warmup.duration_s={warmup_s}"]
    settings += [f"options.null={json.dumps(script)}", *arguments]
    done = tailrace(*RUN, *(word for setting in settings for word in ("--set", setting)), cwd=folder)
    return done.returncode, done.stdout + done.stderr


def told(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """The summary of the only trial, and the codes of its verdict's reasons."""
    (trial,) = json.loads((folder / "out" / "summary.json").read_text())["trials"]
    return trial, {reason["code"] for reason in trial["reasons"]}


def test_a_server_that_refuses_most_requests_at_once_has_no_p99(tmp_path: Path) -> None:
    """Its refusals come in a millisecond; they are infinitely late, and misses of what was offered."""
    # From its eighteenth request on: before that the server is verified, and one that refuses is not raced at all.
    code, said = race(tmp_path, rate=300, duration_s=2, warmup_s=0, shed_share=0.7, honest_requests=VERIFIED)
    assert code in (0, 3), said
    trial, _ = told(tmp_path)
    assert json.loads(tailrace("summary", "out", "--format", "json", cwd=tmp_path).stdout)["trials"] == [trial]
    assert trial["shed"] + trial["ok"] == trial["arrivals"]
    assert 0.6 < trial["shed"] / trial["arrivals"] < 0.8
    assert trial["p99_ms"] == trial["p50_ms"] == "inf"
    assert trial["p99_ok_ms"] < 100, "which is labelled as what it is, the p99 of successes"
    assert trial["good"] <= trial["ok"]
    assert trial["slo_attainment"] == pytest.approx(trial["good"] / trial["arrivals"])
    assert trial["goodput_rps"] == pytest.approx(trial["good"] / trial["span_s"])
    assert trial["goodput_rps"] < 0.4 * trial["offered_rps"]


def test_a_server_that_computes_something_else_is_not_raced(tmp_path: Path) -> None:
    """All answers are 200, and wrong: it is told before the clock starts."""
    code, said = race(tmp_path, rate=100, duration_s=2, wrong_share=1.0)
    assert code == 1
    assert "does not compute what the reference computes" in said
    trial, codes = told(tmp_path)
    assert trial["verdict"] == "INVALID"
    assert "incomplete" in codes
    assert trial["ok"] == 0
    assert trial["p99_ms"] is None


def test_a_server_that_begins_to_answer_wrongly_is_caught_by_its_answers(tmp_path: Path) -> None:
    """One in twenty, once it has been verified."""
    code, said = race(tmp_path, rate=300, duration_s=2, warmup_s=0, wrong_share=0.05, honest_requests=VERIFIED)
    assert code == 3, said
    trial, codes = told(tmp_path)
    assert trial["verdict"] == "INVALID"
    assert "output-mismatch" in codes
    assert trial["outputs"]["checked"] == trial["ok"]
    assert 0.02 < trial["outputs"]["mismatched"] / trial["outputs"]["checked"] < 0.09


def test_a_server_that_dies_halfway_has_no_p99(tmp_path: Path) -> None:
    """What it answered until then was fast."""
    code, said = race(tmp_path, rate=100, duration_s=6, warmup_s=0, die_after_s=5)
    assert code == 3, said
    trial, codes = told(tmp_path)
    assert trial["verdict"] == "INVALID"
    assert "server-died" in codes
    assert 0 < trial["ok"] < trial["arrivals"]
    assert trial["connection_errors"] + trial["timeouts"] == trial["arrivals"] - trial["ok"]
    assert trial["p99_ms"] == "inf"


def test_the_slow_requests_of_a_server_that_was_never_warmed_up_count(tmp_path: Path) -> None:
    """A tenth of the trace meets a cold server, and so the p99 is a cold one's."""
    slow, rate, duration_s = 60, 200, 3
    code, said = race(
        tmp_path, rate=rate, duration_s=duration_s, warmup_s=0, cold_requests=VERIFIED + slow, cold_ms=400
    )
    assert code in (0, 3), said
    trial, codes = told(tmp_path)
    assert trial["ok"] == trial["arrivals"]
    assert trial["p50_ms"] < 100
    assert 400 < trial["p99_ms"] < 600
    assert trial["arrivals"] - trial["good"] == pytest.approx(slow, abs=0.02 * trial["arrivals"])
    assert trial["slo_attainment"] == pytest.approx(1 - slow / trial["arrivals"], abs=0.02)
    assert codes <= {"noisy-host", "generator-saturated", "not-steady"}
