"""The report as Markdown, for a CI job's summary or a comment: the answer, the cells, who is what to whom, what is not VALID."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.store import RunFolder
from reports.answers import RATIO_HEADINGS, answers, conditions, device_note, kicker, question, ratios, verdict
from reports.evidence import CellView, view
from reports.text import interval, milliseconds, per_second, printable, share

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&@])")
CELL_HEADINGS = (
    *("cell", "trials", "offered", "goodput per device", "p50", "p99", "within SLO", "failed or shed", "verdict"),
)
REASONS = 10
"""More are left to the page."""


def markdown(runs: Sequence[RunFolder]) -> str:
    """One text for one run, or for several side by side. Whatever a server, a trace or an experiment said is escaped."""
    views = view(runs)
    cells = [cell for run in views for cell in run.cells]
    lines = [f"## {_safe(question(views))}", "", _safe(" · ".join(kicker(views))), ""]
    if note := device_note(views):
        lines += [f"> {_safe(note)}", ""]
    for answer in answers(views):
        where = f"{answer.label}: " if answer.label else ""
        lines += [f"**{_safe(where + answer.headline.lede)}**", ""]
        lines += [*(f"- {_safe(sentence)}" for sentence in answer.headline.support), ""]
    lines += [*_table(CELL_HEADINGS, [_row(cell) for cell in cells]), ""]
    if pairs := ratios(views):
        lines += [*_table(RATIO_HEADINGS, pairs), ""]
    told = verdict(views)
    lines += [f"**{told.word}**: {_safe(told.sentence)}", ""]
    lines += [
        f"- {_safe(reason.where)}: {_safe(reason.code)}: {_safe(reason.text)}. Remedy: {_safe(reason.remedy)}."
        for reason in told.reasons[:REASONS]
    ]
    if len(told.reasons) > REASONS:
        lines.append(f"- {len(told.reasons) - REASONS} more")
    lines += ["", *(f"- {_safe(sentence)}" for sentence in conditions(views))]
    return printable("\n".join(lines).rstrip() + "\n")


def _row(cell: CellView) -> tuple[str, ...]:
    s = cell.summary
    failed = s["errors"] + s["timeouts"] + s["connection_errors"] + s["dropped"] + s["shed"]
    p99 = "not claimed" if s["p99_ms"] is None else f"{milliseconds(s['p99_ms'])} {interval(s['p99_ci_ms'])}"
    return (
        cell.label,
        str(s["trials"]),
        per_second(s["offered_rps"]),
        f"{per_second(s['goodput_rps_per_device'])} {interval(s['goodput_rps_per_device_ci'])}",
        milliseconds(s["p50_ms"]),
        p99,
        share(s["slo_attainment"]),
        f"{failed:,} of {s['arrivals']:,}",
        s["verdict"],
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [" | ".join(headings), " | ".join("---" for _ in headings)]
    lines += [" | ".join(_safe(value.strip()) for value in row) for row in rows]
    return [f"| {line} |" for line in lines]


def _safe(text: str) -> str:
    """The text as itself: on one line, without a meaning for Markdown or HTML, and nobody is mentioned by it."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split(" "))).replace("\r", " ").replace("\n", " ")
