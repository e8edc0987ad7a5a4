"""What was seen of an adapter is kept for its lock file, on this machine, and nothing broken is ever shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailrace.adapters.null.adapter import Null
from tailrace.harness.contract.observations import Observation, observations_of, record
from tailrace.harness.folders import state_folder

SEEN = Observation(axis="batching", text="formed 7.6 requests per batch", figures={"mean_batch": 7.6})


class Locked(Null):
    """The null adapter with a lock file of the test's own."""

    lock: Path

    @property
    def requirements(self) -> Path:
        return self.lock


@pytest.fixture
def adapter(tmp_path: Path) -> Locked:
    adapter = Locked()
    adapter.lock = tmp_path / "requirements.txt"
    adapter.lock.write_text("numpy==2.4.6\n")
    return adapter


def test_what_was_recorded_is_told(adapter: Locked) -> None:
    assert observations_of(adapter) is None
    record(adapter, [SEEN])
    told: Any = observations_of(adapter)
    assert told["observations"] == [
        {"axis": "batching", "text": "formed 7.6 requests per batch", "figures": {"mean_batch": 7.6}}
    ]
    assert set(told) == {"seen_at", "python", "observations"}
    record(adapter, [])
    told = observations_of(adapter)
    assert told["observations"] == [], "the latest look counts alone"


def test_another_lock_file_is_another_server(adapter: Locked) -> None:
    record(adapter, [SEEN])
    adapter.lock.write_text("numpy==2.5.5\n")
    assert observations_of(adapter) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"adapter": "null"}', '{"adapter": 1, "observations": [{}]}'])
def test_a_damaged_file_is_no_observation(adapter: Locked, content: str) -> None:
    path = record(adapter, [SEEN])
    assert path.is_relative_to(state_folder())
    path.write_text(content)
    assert observations_of(adapter) is None
