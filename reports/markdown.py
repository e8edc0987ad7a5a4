"""The report as Markdown, for a CI job's summary or a comment: the answer, the cells, who is what to whom, what is not VALID."""

from __future__ import annotations

from collections.abc import Sequence

from tailrace.harness.records.store import RunFolder
from tailrace.reports.answers import RATIO_HEADINGS, answers, conditions, device_note, kicker, question, ratios, verdict
from tailrace.reports.evidence import CellView, view
from tailrace.reports.multiplexing import BRIEF_HEADINGS, multiplexing, words
from tailrace.reports.pipelines import PRICE_HEADINGS, pipelines
from tailrace.reports.text import interval, markdown_safe, markdown_table, milliseconds, per_second, printable, share

CELL_HEADINGS = (
    *("cell", "trials", "offered", "goodput per device", "p50", "p99", "within SLO", "failed or shed", "verdict"),
)
REASONS = 10
"""More are left to the page."""


def markdown(runs: Sequence[RunFolder]) -> str:
    """One text for one run, or for several side by side. Whatever a server, a trace or an experiment said is escaped."""
    views = view(runs)
    cells = [cell for run in views for cell in run.cells]
    lines = [f"## {markdown_safe(question(views))}", "", markdown_safe(" · ".join(kicker(views))), ""]
    if note := device_note(views):
        lines += [f"> {markdown_safe(note)}", ""]
    for answer in answers(views):
        where = f"{answer.label}: " if answer.label else ""
        lines += [f"**{markdown_safe(where + answer.headline.lede)}**", ""]
        lines += [*(f"- {markdown_safe(sentence)}" for sentence in answer.headline.support), ""]
    lines += [*markdown_table(CELL_HEADINGS, [_row(cell) for cell in cells]), ""]
    if pairs := ratios(views):
        lines += [*markdown_table(RATIO_HEADINGS, pairs), ""]
    if composed := pipelines(cells):
        sentence = f": {markdown_safe(composed.sentence)}" if composed.sentence else ""
        lines += [f"**The price of composition**{sentence}", ""]
        lines += [*markdown_table(PRICE_HEADINGS, composed.prices), ""] if composed.prices else []
    if shared := multiplexing(views):
        lines += [*(f"- {markdown_safe(sentence)}" for sentence in words(shared)), ""]
        lines += [*markdown_table(BRIEF_HEADINGS, shared.brief), ""]
    told = verdict(views)
    lines += [f"**{told.word}**: {markdown_safe(told.sentence)}", ""]
    lines += [
        "- " + markdown_safe(f"{reason.where}: {reason.code}: {reason.text}. Remedy: {reason.remedy}.")
        for reason in told.reasons[:REASONS]
    ]
    if len(told.reasons) > REASONS:
        lines.append(f"- {len(told.reasons) - REASONS} more")
    lines += ["", *(f"- {markdown_safe(sentence)}" for sentence in conditions(views))]
    return printable("\n".join(lines).rstrip() + "\n")


def _row(cell: CellView) -> tuple[str, ...]:
    s = cell.summary
    failed = s.errors + s.timeouts + s.connection_errors + s.dropped + s.shed
    p99 = "not claimed" if s.p99_ms is None else f"{milliseconds(s.p99_ms)} {interval(s.p99_ci_ms)}"
    return (
        cell.label,
        str(s.trials),
        per_second(s.offered_rps),
        f"{per_second(s.goodput_rps_per_device)} {interval(s.goodput_rps_per_device_ci)}",
        milliseconds(s.p50_ms),
        p99,
        share(s.slo_attainment),
        f"{failed:,} of {s.arrivals:,}",
        s.verdict,
    )
