"""What the contract suite saw of a framework on this machine, kept beside each claim that its adapter makes."""

from __future__ import annotations

import hashlib
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tailrace.harness.contract.adapter import AXES, Adapter
from tailrace.harness.errors import StorageError
from tailrace.harness.folders import state_folder

Axis = Literal["batching", "scaling", "models", "readiness", "failure", "metrics"]
TOPICS = {
    **AXES,
    "readiness": "health checks",
    "failure": "when a replica dies or stops",
    "metrics": "its own metrics",
}
"""The axes, and what no framework claims but every one shows."""


class Observation(BaseModel):
    """One thing seen: a sentence with its numbers and conditions, and the numbers alone (seconds end in ``_s``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    axis: Axis
    text: str
    figures: dict[str, float] = {}


class _Seen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    adapter: str
    lock_sha256: str
    python: str
    seen_at: str
    observations: list[Observation]


def record(adapter: Adapter, observations: list[Observation]) -> Path:
    """Keep what was seen of an adapter, in place of what was seen before. Raises :class:`StorageError`."""
    seen = _Seen(
        adapter=adapter.name,
        lock_sha256=_lock_sha256(adapter),
        python=platform.python_version(),
        seen_at=datetime.now(UTC).isoformat(timespec="seconds"),
        observations=observations,
    )
    path = _path(adapter)
    staged = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(seen.model_dump_json(indent=1), encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise StorageError.of(path, error) from error
    return path


def observations_of(adapter: Adapter) -> dict[str, object] | None:
    """What was seen of this adapter here (JSON: ``seen_at``, ``python``, ``observations``); ``None`` when nothing was, or
    with another lock file, for then it was another server."""
    try:
        seen = _Seen.model_validate(json.loads(_path(adapter).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
    if seen.lock_sha256 != _lock_sha256(adapter):
        return None
    return seen.model_dump(mode="json", include={"seen_at", "python", "observations"})


def _path(adapter: Adapter) -> Path:
    return state_folder() / "observations" / f"{adapter.name}.json"


def _lock_sha256(adapter: Adapter) -> str:
    return hashlib.sha256(adapter.requirements.read_bytes()).hexdigest()
