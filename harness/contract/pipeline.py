"""The harness's side of a pipeline: what its stages must know (``workloads/pipeline.py`` reads it), and what they counted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailrace.harness.contract.workload import PreparedWorkload, WorkloadSpec

_NAME = re.compile(r"(?P<stage>[a-z0-9_-]+)\.(?P<kind>computed|answered)\.\d+\.[0-9a-f]+\.clock")
_FILE = "pipeline.json"


@dataclass(frozen=True)
class StageCounts:
    """What all copies of a stage, or all who call it, have counted: seconds, events (batches computed, or answers got), and
    items."""

    seconds: float = 0.0
    events: int = 0
    items: int = 0

    def __add__(self, other: StageCounts) -> StageCounts:
        return StageCounts(self.seconds + other.seconds, self.events + other.events, self.items + other.items)


def description(spec: WorkloadSpec, stages_file: Path, clocks: Path | None) -> dict[str, Any]:
    """The contents of the file that ``TAILRACE_PIPELINE`` names."""
    return {
        "model_file": str(stages_file),
        "clocks": None if clocks is None else str(clocks),
        "outputs": [tensor.name for tensor in spec.outputs],
        "stages": [stage.model_dump(mode="json") for stage in spec.pipeline],
    }


def pipeline_environment(workload: PreparedWorkload, folder: Path) -> Mapping[str, str]:
    """The environment variables that every process of a pipeline needs, whoever composes it; none for other workloads.
    ``folder`` gets the description, and the clocks of the stages. One per trial: the clocks start at zero."""
    if not workload.spec.pipeline:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    told = description(workload.spec, workload.own_model_file, folder)
    (folder / _FILE).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return {"TAILRACE_PIPELINE": str(folder / _FILE)}


def read_clocks(folder: Path) -> dict[tuple[str, str], StageCounts]:
    """The sum of all clocks that were ever kept there, by stage and kind; never blocks a writer."""
    found: dict[tuple[str, str], StageCounts] = {}
    for path in folder.glob("*.clock"):
        named = _NAME.fullmatch(path.name)
        if named is None:
            continue
        try:
            # Mapped, not read: whole 64-bit loads cannot see half of a writer's store.
            busy_ns, events, items = (int(value) for value in np.memmap(path, dtype="<u8", mode="r", shape=(3,)))
        except (OSError, ValueError):
            continue  # being created just now, or removed
        key = (named["stage"], named["kind"])
        found[key] = found.get(key, StageCounts()) + StageCounts(busy_ns / 1e9, events, items)
    return found
