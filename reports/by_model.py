"""Where several models are served: how each of them fared, the most asked-for first."""

from __future__ import annotations

from collections.abc import Sequence

from tailrace.harness.analysis.summary import Summary
from tailrace.reports.evidence import CellView
from tailrace.reports.text import interval, milliseconds, share

MODEL_HEADINGS = ("Cell", "Model", "Of all requests", "Within SLO", "p50", "p99")


def by_model(cells: Sequence[CellView]) -> list[tuple[str, ...]]:
    """A row for each model of each cell that served several; none where no cell did."""
    rows: list[tuple[str, ...]] = []
    for cell in cells:
        models: list[Summary] = cell.summary["models"]
        arrivals = sum(model["arrivals"] for model in models)
        for model in sorted(models, key=lambda model: -model["arrivals"]):
            of_all = share(model["arrivals"] / arrivals) if arrivals else share(None)
            rows.append((cell.label, model["model"], of_all, share(model["slo_attainment"]), *_percentiles(model)))
    return rows


def _percentiles(model: Summary) -> tuple[str, str]:
    p50, p99 = (
        "not claimed"
        if model[f"{key}_ms"] is None
        else f"{milliseconds(model[f'{key}_ms'])} {interval(model[f'{key}_ci_ms'])}".strip()
        for key in ("p50", "p99")
    )
    return p50, p99
