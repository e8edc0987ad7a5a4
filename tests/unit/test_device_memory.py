"""The memory that models share: nobody has more than there is, and whoever goes gives it back."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tailrace.adapters.torchserve import torch_stand_in as stand_in
from tailrace.harness.contract.multiplexing import MIB, MemoryPlan
from tailrace.harness.records.store import EventLog
from tailrace.harness.run.collectors import SharedMemory
from tailrace.harness.servers.device_memory import LOADS, fail_loads, limit_memory, read_rooms
from tailrace.harness.servers.emulated_device import device_environment
from tailrace.multiplexing import resident as resident_module
from tailrace.multiplexing.resident import Model
from tailrace.workloads.emulated import model as emulated
from tailrace.workloads.emulated.build import build_artifact
from tests.standalone import answers_alone

PLAN = MemoryPlan(3 * MIB, {"a": MIB, "b": MIB, "c": 2 * MIB}, "lru", (), ("a",))
HOLD = """
import sys
from tailrace.multiplexing.resident import Model
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
    limit_memory(folder, PLAN, Path(emulated.__file__))
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


def test_without_a_limit_loading_takes_no_time(artifact: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "memory.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("it takes its time"))
        model = emulated.Model(artifact, "a", "emulated")
    assert model.predict({"x": np.zeros((1, 16), np.int32)})["y"].shape == (1, 4)


OWN = """
class Weights:
    def __init__(self):
        self.itself = self  # as what torch compiles is

class Model:
    def __init__(self, artifact, name, device):
        weights = Weights()
        if name == "b":
            raise OSError("torn weights")
        self.weights = weights
        self.device = device

    def predict(self, inputs):
        return {"y": (inputs["x"], self.device)}
"""


def _freeing_torch(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[str]]:
    """Who had room whenever a torch that has used a GPU was asked to give back what it holds of the dead; nobody's weights
    may live then."""
    asked: list[list[str]] = []

    def empty_cache() -> None:
        alive = [one for one in gc.get_objects() if type(one).__name__ == "Weights"]
        assert alive == [], "what is alive is not given back"
        asked.append(resident(folder))

    cuda = SimpleNamespace(is_initialized=lambda: True, empty_cache=empty_cache)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return asked


def test_any_workloads_own_model_answers_and_one_that_cannot_be_loaded_leaves_its_room(
    folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    limit_memory(folder, PLAN, own)
    a = Model("", "a", "cpu")
    assert a.predict({"x": 5}) == {"y": (5, "cpu")}
    with pytest.raises(OSError, match="torn weights"):
        Model("", "b", "cpu")
    assert resident(folder) == ["a"]
    assert told(folder) == [("begun", "a"), ("loaded", "a"), ("begun", "b"), ("failed", "b")]
    del a


def test_what_torch_keeps_of_a_gpus_memory_is_given_back_before_the_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    limit_memory(folder, PLAN, own)
    asked = _freeing_torch(monkeypatch, folder)
    model = Model("", "a", "cuda")
    del model
    assert asked == [["a"]]
    assert resident(folder) == []
    with pytest.raises(OSError, match="torn weights"):
        Model("", "b", "cuda")
    assert asked == [["a"], ["b"]]
    assert resident(folder) == []


@pytest.mark.parametrize("torch", [SimpleNamespace(), stand_in])
def test_where_torch_is_none_or_half_there_the_room_is_given_back_all_the_same(
    torch: Any, artifact: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    fail_loads(folder, "a", failing=True)
    with pytest.raises(RuntimeError, match="a fails to load"):
        Model(artifact, "a", "emulated")
    assert resident(folder) == []


def test_what_a_server_imports_stands_alone(artifact: str, folder: Path) -> None:
    answers_alone(resident_module.__file__, artifact, "a")


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
    collector = SharedMemory(folder, PLAN.budget_bytes, log)
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
