"""The emulated device's memory: nobody has more than there is, and whoever goes gives it back."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.collectors import EmulatedMemory
from harness.emulated_device import LOADS, device_environment, fail_loads, limit_memory, read_rooms
from harness.multiplexing import MIB, MemoryPlan
from harness.store import EventLog
from workloads.emulated.build import build_artifact
from workloads.emulated.model import Model

PLAN = MemoryPlan(3 * MIB, {"a": MIB, "b": MIB, "c": 2 * MIB}, "lru", (), ("a",))
HOLD = """
import sys
from workloads.emulated.model import Model
model = Model(sys.argv[1], sys.argv[2], "emulated")
print("up", flush=True)
sys.stdin.read()
"""
PATIENCE_S = 60.0


@pytest.fixture
def artifact(tmp_path: Path) -> str:
    build_artifact(tmp_path, {"base_ms": 1, "per_item_ms": 0, "load_ms": 20, "load_gb_per_s": 1}, seed=7)
    return str(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "device"
    folder.mkdir()
    for name, value in device_environment(folder, 1).items():
        monkeypatch.setenv(name, value)
    limit_memory(folder, PLAN)
    return folder


def told(folder: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / LOADS).read_text().splitlines()]
    return [(line["what"], line["model"]) for line in lines]


def resident(folder: Path) -> list[str]:
    return sorted(model for model, _ in read_rooms(folder).values())


def test_a_copy_has_its_room_until_it_is_no_more(artifact: str, folder: Path) -> None:
    a, c = Model(artifact, "a", "emulated"), Model(artifact, "c", "emulated")
    assert resident(folder) == ["a", "c"]
    with pytest.raises(MemoryError, match=f"has 0 bytes free, and b needs {MIB:,}"):
        Model(artifact, "b", "emulated")
    del a
    gc.collect()
    assert resident(folder) == ["c"]
    b = Model(artifact, "b", "emulated")
    assert resident(folder) == ["b", "c"]
    assert told(folder) == [
        *(("begun", "a"), ("loaded", "a"), ("begun", "c"), ("loaded", "c"), ("refused", "b")),
        *(("begun", "b"), ("loaded", "b")),
    ]
    del b, c


def test_loading_takes_what_it_costs(artifact: str, folder: Path) -> None:
    began = time.monotonic()
    model = Model(artifact, "a", "emulated")
    assert time.monotonic() - began >= 0.020 + MIB / 1e9, "50 ms of fixed cost, and a mebibyte at 1 GB/s"
    del model


def test_without_a_limit_nothing_is_taken_and_nothing_told(artifact: str, folder: Path) -> None:
    (folder / "memory.json").unlink()
    model = Model(artifact, "a", "emulated")
    assert not (folder / LOADS).exists()
    del model


def test_a_model_that_fails_to_load_gives_its_room_back(artifact: str, folder: Path) -> None:
    fail_loads(folder, "a", failing=True)
    with pytest.raises(RuntimeError, match="a fails to load"):
        Model(artifact, "a", "emulated")
    assert resident(folder) == []
    fail_loads(folder, "a", failing=False)
    model = Model(artifact, "a", "emulated")
    assert told(folder)[-1] == ("loaded", "a")
    del model


def test_who_is_killed_gives_its_room_back(artifact: str, folder: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, artifact, "c"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ),
        cwd=Path(__file__).parents[2],
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        assert resident(folder) == ["c"]
        holder.send_signal(signal.SIGKILL)
        holder.wait(PATIENCE_S)
        assert resident(folder) == []
        other = Model(artifact, "c", "emulated")
        assert resident(folder) == ["c"]
        assert len(list(folder.glob("*.room"))) == 1, "what the dead one left is cleared"
        del other
    finally:
        holder.kill()
        holder.communicate()


def test_the_collector_tells_who_is_there_who_comes_and_who_goes(artifact: str, folder: Path, tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    collector = EmulatedMemory(folder, PLAN.budget_bytes, log)
    a = Model(artifact, "a", "emulated")

    def values() -> dict[str, float]:
        return {reading.metric: reading.value for reading in collector.read()}

    assert values() == {"memory_used_bytes": MIB, "memory_free_bytes": 2 * MIB, "models_resident": 1}
    c = Model(artifact, "c", "emulated")
    assert values()["memory_free_bytes"] == 0
    del a
    gc.collect()
    assert values()["models_resident"] == 1
    del c
    log.close()
    events: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event.get("model") or event.get("models")) for event in events] == [
        ("model-begun", "a"),
        ("model-loaded", "a"),
        ("models-resident", ["a"]),
        ("model-begun", "c"),
        ("model-loaded", "c"),
        ("model-gone", "a"),
    ]
    assert events[3]["mono_ns"] < events[4]["mono_ns"], "by the device's own clock"
