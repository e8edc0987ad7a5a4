"""The ruler's own figures: what the load generator did against a server that costs nothing, before the trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailrace.reports.evidence import RunView
from tailrace.reports.text import NOTHING, milliseconds, per_second, printable, quantity

HEADINGS = (
    "Protocol",
    "Offered at most",
    "Proven",
    "Send lag p50, at what is offered at most",
    "p99",
    "Response floor p50, there",
    "p99",
    "CPU per request",
    "Start lag p99 in the trials, worst",
)


def ruler(runs: Sequence[RunView]) -> list[tuple[str, ...]]:
    """One row for each run and protocol that was calibrated; none for runs from before there was a calibration."""
    return [
        (f"{run.label} {protocol}".strip(), *_row(run, protocol, figures))
        for run in runs
        for protocol, figures in (run.manifest.get("ruler") or {}).items()
    ]


def _row(run: RunView, protocol: str, figures: dict[str, Any]) -> tuple[str, ...]:
    if "steps" not in figures:
        return (NOTHING, printable(f"not measured: {figures.get('error')}"), *[NOTHING] * 6)
    ceiling = figures["ceiling_rps"]
    lags = [t.start_lag_p99_ms for t in run.summary.trials if t.protocol == protocol]
    known = [lag for lag in lags if lag is not None]
    return (
        per_second(figures["steps"][1]["rate"]),
        NOTHING if ceiling is None else f"{'at least ' if figures['at_least'] else ''}{per_second(ceiling)}",
        *(milliseconds(figures[key]) for key in ("send_lag_p50_ms", "send_lag_p99_ms", "floor_p50_ms", "floor_p99_ms")),
        quantity(figures["cpu_us_per_request"], "µs"),
        milliseconds(max(known)) if known else NOTHING,
    )
