"""A page over a folder of runs: what each asked, how far it can be trusted, what it found, and the way to its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tailrace.harness.errors import InputError, TailraceError
from tailrace.harness.plan.matrix import spoken
from tailrace.harness.records.store import RunFolder
from tailrace.reports.answers import verdict_counts
from tailrace.reports.page import render, write_page
from tailrace.reports.text import count, milliseconds, per_second, share

HEADINGS = ("Run", "Started", "Question", "Conditions", "Trials", "Goodput per device, p99, within SLO")
CELLS = 6
"""Of one run; more are left to its report."""


@dataclass(frozen=True)
class _Row:
    name: str
    link: str
    """From the page to the report; empty where there is none."""
    started: str
    question: str
    conditions: str
    verdict: str
    cells: tuple[str, ...]


def write_index(folder: Path) -> Path:
    """Write ``index.html`` into a folder of runs, from their manifests and summaries alone, and return its path. Raises
    :class:`InputError` where there is no run, :class:`StorageError` where it cannot be written."""
    rows, unread = [], []
    for manifest in sorted(folder.rglob("manifest.json")):
        name = str(manifest.parent.relative_to(folder))
        try:
            rows.append(_row(RunFolder.open(manifest.parent), name))
        except (TailraceError, KeyError, TypeError) as error:
            unread.append((name, error.message if isinstance(error, TailraceError) else "it is incomplete"))
    if not rows and not unread:
        raise InputError(f"there is no run in {folder}", remedy="give the folder that runs are written to")
    rows.sort(key=lambda row: (row.started, row.name), reverse=True)
    page = render(
        "index.html.j2",
        title=folder.resolve().name,
        lede=f"{count(len(rows), 'run')}. Figures of emulated devices say so, and nothing about hardware.",
        headings=HEADINGS,
        rows=rows,
        unread=unread,
    )
    return write_page(page, folder / "index.html")


def _row(run: RunFolder, name: str) -> _Row:
    manifest = run.manifest
    path = run.folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    conditions = [str((manifest.get(part) or {}).get("name") or "") for part in ("workload", "trace")]
    if summary is not None and any(cell["emulated"] for cell in summary["cells"]):
        conditions.append("emulated")
    return _Row(
        name=name,
        link=f"{quote(name)}/report.html" if (run.folder / "report.html").is_file() else "",
        started=str(manifest["started_at"]),
        question=str(manifest["experiment"].get("question") or ""),
        conditions=", ".join(part for part in conditions if part),
        verdict=_verdict(manifest, summary),
        cells=() if summary is None else _cells(summary),
    )


def _verdict(manifest: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return f"{manifest['state']}, without a summary: tailrace report makes it"
    told = verdict_counts([trial["verdict"] for trial in summary["trials"]]) or "none"
    return told if manifest["state"] == "done" else f"{told}; {manifest['state']}"


def _cells(summary: Mapping[str, Any]) -> tuple[str, ...]:
    called = spoken(cell["scenario"] for cell in summary["cells"])
    lines = [
        f"{cell['adapter']}, {called[cell['scenario']]}: {per_second(cell['goodput_rps_per_device'])}, "
        f"{'not claimed' if cell['p99_ms'] is None else milliseconds(float(cell['p99_ms']))}, "
        f"{share(cell['slo_attainment'])}"
        for cell in summary["cells"]
    ]
    more = len(lines) - CELLS
    return (*lines[:CELLS], *([f"and {count(more, 'more cell')}"] if more > 0 else []))
