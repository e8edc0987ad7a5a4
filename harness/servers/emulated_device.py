"""The harness's side of the emulated accelerator: where its locks and counters live, and how busy it was.

A model that emulates a device (``workloads/emulated/model.py``) keeps one file of counters for every copy of itself,
``device-DEVICE.PID.NONCE.busy``, three little-endian unsigned 64-bit integers: nanoseconds that it occupied the device,
batches, items. Files outlive their writers, so that a sum over a folder never goes backwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEVICE_FOLDER = "TAILRACE_DEVICE_DIR"
"""The environment variable that tells a model where its device is."""
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
