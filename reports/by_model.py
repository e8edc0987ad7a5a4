"""Where several models are served: how each of them fared, the most asked-for first."""

from __future__ import annotations

from collections.abc import Sequence

from tailrace.harness.records.summary import ModelFigures
from tailrace.reports.evidence import CellView
from tailrace.reports.text import interval, milliseconds, share

MODEL_HEADINGS = ("Cell", "Model", "Of all requests", "Within SLO", "p50", "p99")


def by_model(cells: Sequence[CellView]) -> list[tuple[str, ...]]:
    """A row for each model of each cell that served several; none where no cell did."""
    rows: list[tuple[str, ...]] = []
    for cell in cells:
        models = cell.summary.models
        arrivals = sum(model.arrivals for model in models)
        for model in sorted(models, key=lambda model: -model.arrivals):
            of_all = share(model.arrivals / arrivals) if arrivals else share(None)
            rows.append((cell.label, model.model, of_all, share(model.slo_attainment), *_percentiles(model)))
    return rows


def _percentiles(model: ModelFigures) -> tuple[str, str]:
    p50, p99 = (
        "not claimed" if value is None else f"{milliseconds(value)} {interval(ends)}".strip()
        for value, ends in ((model.p50_ms, model.p50_ci_ms), (model.p99_ms, model.p99_ci_ms))
    )
    return p50, p99
