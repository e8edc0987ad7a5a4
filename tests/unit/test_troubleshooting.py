"""Every reason of a verdict has its row in docs/troubleshooting.md, under the verdict that it makes."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def documented() -> dict[str, set[str]]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    parts = re.split(r"^## A trial is (\w+)$|^## .*$", page, flags=re.M)[1:]
    return {
        verdict: set(re.findall(r"^\| `([\w-]+)` \|", text, re.M))
        for verdict, text in zip(parts[::2], parts[1::2], strict=True)
        if verdict
    }


def test_every_reason_of_a_verdict_has_its_row() -> None:
    source = (ROOT / "harness" / "analysis" / "verdicts.py").read_text(encoding="utf-8")
    invalid = set(re.findall(r'_invalid\(\s*"([\w-]+)"', source))
    unknown = set(re.findall(r'_unknown\(\s*"([\w-]+)"', source))
    assert invalid and unknown
    assert documented() == {"INVALID": invalid, "UNKNOWN": unknown}
