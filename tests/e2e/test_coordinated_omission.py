"""A closed-loop client misses a stalling server's tail by far, and the replay does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import measured_again

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "coordinated_omission.py"


@measured_again
def test_a_closed_loop_is_wrong_by_more_than_ten_times(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--seconds", "10", "--format", "json"]
    tmp_path.mkdir()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    closed, opened = told["seen"]
    truth_ms = told["truth"]["p99_ms"]
    assert truth_ms == pytest.approx(450)
    assert closed["p99_ms"] < truth_ms / 10
    assert opened["p99_ms"] == pytest.approx(truth_ms, rel=0.2)
    assert closed["rate_rps"] == pytest.approx(opened["rate_rps"], rel=0.25), "at about the same rate"
