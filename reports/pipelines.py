"""What it costs to let a framework compose the stages of a pipeline, end to end and stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailrace.harness.analysis.comparison import paired_ratio
from tailrace.reports.evidence import CellView
from tailrace.reports.headline import pair, ratio_words
from tailrace.reports.text import NOTHING, listing, milliseconds, per_second, significant

PRICE_HEADINGS = (
    *(
        "Framework",
        "p50, composed",
        "in one process",
        "Ratio of p50",
        "p99, composed",
        "in one process",
        "Ratio of p99",
    ),
    *("CPU cores, composed", "in one process", "Ratio of CPU"),
)
STAGE_HEADINGS = (
    "Cell",
    "Stage",
    "Items/s",
    "Items a batch",
    "Computing, a batch",
    "Asked to answered",
    "Waiting and on the way",
)


@dataclass(frozen=True)
class Pipelines:
    """The section: a sentence, what composition costs by framework, and the stages of every cell."""

    sentence: str
    prices: list[tuple[str, ...]]
    """By :data:`PRICE_HEADINGS`; ratios are composed ÷ in one process, block by block."""
    stages: list[tuple[str, ...]]
    """By :data:`STAGE_HEADINGS`."""


def pipelines(cells: Sequence[CellView]) -> Pipelines | None:
    """Compare, framework by framework, the cell that it composes with the first in one process under equal conditions;
    ``None`` where no cell serves a pipeline."""
    served = [cell for cell in cells if cell.summary.composition]
    if not served:
        return None
    calm = [cell for cell in served if not cell.faulty]
    alone = [cell for cell in calm if cell.summary.composition == "one-process"]
    prices = []
    for cell in calm:
        if cell.summary.composition == "framework":
            other = next((one for one in alone if _basis(one) == _basis(cell)), None)
            if other is not None:
                prices.append(_price(cell, other))
    return Pipelines(_sentence(served), prices, [row for cell in served for row in _stages(cell)])


def _basis(cell: CellView) -> tuple[object, ...]:
    return cell.run, cell.framework, cell.conditions, cell.summary.mean_rate, cell.summary.tuning


def _price(composed: CellView, alone: CellView) -> tuple[str, ...]:
    comparable = composed.comparable and alone.comparable
    row = [composed.framework]
    for key in ("p50_ms", "p99_ms", "server_cpu_cores"):
        both = (composed.summary.figure(key), alone.summary.figure(key))
        ratio = paired_ratio(pair(composed, alone, key)) if comparable else None
        told = ratio_words(ratio) if ratio else NOTHING if comparable else "not compared: INVALID or empty"
        if key == "server_cpu_cores":
            row += [NOTHING if value is None else significant(value) for value in both]
        else:
            row += ["not claimed" if value is None else milliseconds(value) for value in both]
        row.append(told)
    return tuple(row)


def _stages(cell: CellView) -> list[tuple[str, ...]]:
    rows = []
    for stage in cell.summary.stages:
        answer_ms, predict_ms, size = stage.answer_ms, stage.predict_ms, stage.batch_size_mean
        beside = None if answer_ms is None or predict_ms is None else answer_ms - predict_ms
        rows.append(
            (
                cell.label,
                stage.stage,
                NOTHING if stage.items_rps is None else per_second(stage.items_rps),
                NOTHING if size is None else significant(size),
                *(NOTHING if value is None else milliseconds(value) for value in (predict_ms, answer_ms, beside)),
            )
        )
    return rows


def _sentence(served: Sequence[CellView]) -> str:
    cannot = {
        cell.framework: reason for cell in served if (reason := cell.summary.left_out.get("composition")) is not None
    }
    if not cannot:
        return ""
    one = len(cannot) == 1
    return (
        f"{listing(list(cannot))} ran {'its' if one else 'their'} stages in one process, whatever was asked for: "
        f"{'; '.join(cannot.values())}."
    )
