"""An adapter that lives in a package of its own (`tests/third_party`): found by its entry point, listed and raced."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tailrace.harness.run.registry import ENTRY_POINT_GROUP
from tests.conftest import tailrace

pytestmark = pytest.mark.e2e


def test_it_races_with_no_edit_elsewhere(tmp_path: Path) -> None:
    found = {entry_point.name for entry_point in entry_points(group=ENTRY_POINT_GROUP)}
    assert "plain" in found, "the suite needs it beside tailrace: pip install ./tests/third_party"
    assert "http.server has no settings" in tailrace("adapters", "plain", cwd=tmp_path).stdout

    traffic = ["--set", "trace={name: steady, params: {rate: 20, duration_s: 5}}", "--set", "warmup.duration_s=1"]
    done = tailrace("run", "smoke", "--adapter", "plain", *traffic, "--out", "out", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert "plain runs without it: plain has no place for `max_batch`: http.server has no settings" in done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (trial,) = summary["trials"]
    assert [r["code"] for r in trial["reasons"] if r["code"] not in ("noisy-host", "generator-saturated")] == []
    assert trial["ok"] == trial["arrivals"]
    assert trial["outputs"]["mismatched"] == 0
