"""The figures of runs for people with their own plots: one row per trial, as CSV or Parquet, or whole summaries as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tailrace.harness.analysis.summary import jsonable
from tailrace.harness.errors import StorageError
from tailrace.harness.records.summary import RunSummary


def figures_csv(summaries: Mapping[str, RunSummary]) -> str:
    """One line per trial, headings first; nested values as ``key.subkey`` columns, lists joined by spaces. ``summaries``
    are by the name of their run, which is the first column unless there is only one without a name."""
    rows = _rows(summaries)
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0] if rows else (), lineterminator="\n")
    table.writeheader()
    table.writerows({name: "" if _unknown(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def write_parquet(summaries: Mapping[str, RunSummary], path: Path) -> None:
    """The same rows as :func:`figures_csv`, with their types. Raises :class:`StorageError`."""
    try:
        pq.write_table(pa.Table.from_pylist(_rows(summaries)), path)
    except OSError as error:
        raise StorageError.of(path, error) from error


def figures_json(summaries: Mapping[str, RunSummary]) -> str:
    """The whole summaries, by the name of their run; infinite figures are strings, as in ``summary.json``."""
    return (
        json.dumps({name: jsonable(summary.dump()) for name, summary in summaries.items()}, indent=1, allow_nan=False)
        + "\n"
    )


def _rows(summaries: Mapping[str, RunSummary]) -> list[dict[str, Any]]:
    """All with the same columns: those that some trial has."""
    named = len(summaries) > 1 or any(summaries)
    rows = [
        {**({"run": name} if named else {}), **_flat(trial.dump())}
        for name, summary in summaries.items()
        for trial in summary.trials
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list | tuple):
            flat[prefix + key] = " ".join(
                str(i["code"]) if isinstance(i, dict) and "code" in i else str(i) for i in item
            )
        else:
            flat[prefix + key] = item
    return flat
