"""The harness's side of the emulated accelerator: where its locks and counters live, and how busy it was.

A model that emulates a device (``workloads/emulated/model.py``) keeps one file of counters for every copy of itself,
``device-DEVICE.PID.NONCE.busy``, three little-endian unsigned 64-bit integers: nanoseconds that it occupied the device,
batches, items. Files outlive their writers, so that a sum over a folder never goes backwards.

Where memory is limited (``memory.json``) each copy also has a file ``device-DEVICE.PID.NONCE.room``, «BYTES MODEL», which it
keeps locked as long as it lives, and ``loads.jsonl`` has a line for all that happens to it.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.multiplexing import MemoryPlan

DEVICE_FOLDER = "TAILRACE_DEVICE_DIR"
"""The environment variable that tells a model where its device is."""
LOADS = "loads.jsonl"
_BUSY = re.compile(r"device-(\d+)\.(\d+)\.[0-9a-f]+\.busy")


@dataclass(frozen=True)
class DeviceCounters:
    """What one copy of a model has done on its device since it started.

    ``busy_ns`` counts the time that it held the device, not the time that it waited for it, and is at most 10 ms behind
    within a batch; of a batch that its process did not survive it holds what had elapsed, never more.
    ``batches`` and ``items`` count finished batches.
    """

    device: int
    pid: int
    busy_ns: int
    batches: int
    items: int


def device_environment(folder: Path, devices: int) -> Mapping[str, str]:
    """The environment variables that every process of an emulated model needs. One ``folder`` per trial: the counters
    in it start at zero."""
    return {DEVICE_FOLDER: str(folder), "TAILRACE_DEVICES": str(devices)}


def read_counters(folder: Path) -> list[DeviceCounters]:
    """The counters of every copy that ever ran with this folder, by device and pid; never blocks a writer."""
    found = []
    for path in folder.glob("device-*.busy"):
        named = _BUSY.fullmatch(path.name)
        if named is None:
            continue
        try:
            # Mapped, not read: whole 64-bit loads cannot see half of a writer's store.
            counters = np.memmap(path, dtype="<u8", mode="r", shape=(3,))
        except (OSError, ValueError):
            continue  # being created just now, or removed
        busy_ns, batches, items = (int(value) for value in counters)
        found.append(DeviceCounters(int(named[1]), int(named[2]), busy_ns, batches, items))
    return sorted(found, key=lambda counters: (counters.device, counters.pid))


def limit_memory(folder: Path, plan: MemoryPlan) -> None:
    """Give the devices of a folder, which nobody uses yet, a limited memory."""
    told = {"budget_bytes": plan.budget_bytes, "sizes": dict(plan.sizes)}
    (folder / "memory.json").write_text(json.dumps(told), encoding="utf-8")


def read_rooms(folder: Path) -> dict[str, tuple[str, int]]:
    """What is in memory by the file's name: the model, and the bytes that it takes. Raises ``OSError`` when somebody is just
    taking room."""
    found = {}
    with (folder / "device-0.rooms.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob("device-*.room"):
            with path.open(encoding="utf-8") as room:
                try:
                    fcntl.flock(room, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    size, _, model = room.read().partition(" ")
                    found[path.name] = model, int(size)
    return found


def loads_under_way(folder: Path) -> list[tuple[str, int]]:
    """The models that are being loaded, each with the pid of the process that does it, in the order in which they began. A
    process that has died in a load is among them for ever."""
    begun: dict[tuple[str, int], None] = {}
    try:
        lines = (folder / LOADS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for line in lines:
        if not line.endswith("\n"):
            break  # it is just being written
        told = json.loads(line)
        load = told["model"], told["pid"]
        begun.pop(load, None)
        if told["what"] == "begun":
            begun[load] = None
    return list(begun)


def fail_loads(folder: Path, model: str, *, failing: bool) -> None:
    """Let every load of a model fail from now on, or succeed again."""
    mark = folder / f"load-fails.{model}"
    if failing:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)
