"""A model on an emulated accelerator: a batch of n items occupies the device for base + per_item·n milliseconds.

The device sleeps instead of computing, and serves one batch at a time: whoever runs a batch holds the device's lock
file, which the kernel releases if the process dies. The harness sets two environment variables:
``TAILRACE_DEVICE_DIR``, the folder of locks and counters, and ``TAILRACE_DEVICES``, how many devices there are.

A copy of the model claims a seat for life: the first free one when seats are counted round after round over the
devices. So copies spread evenly, and one that replaces a dead copy gets its seat.

A file ``memory.json`` in that folder says that the device's memory is limited, and what each model takes of it (``sizes``,
bytes). Then loading takes a time that goes with the model's size, one copy after the other.

Every copy keeps ``device-DEVICE.PID.NONCE.busy``: three little-endian unsigned 64-bit integers, the nanoseconds that it
occupied the device, batches, items. It is brought up to date every 10 ms within a batch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

_PROGRESS_NS = 10_000_000
_BUSY_NS, _BATCHES, _ITEMS = range(3)
_INPUTS, _OUTPUTS = 16, 4


class Model:
    """y = x·W + b over integers, W and b drawn from the artifact's seed and the model's name.

    ``device`` is ``emulated``; on any other the answers come at once and no device is claimed, which is how
    references are made.
    """

    def __init__(self, artifact: str, name: str, device: str) -> None:
        config = json.loads((Path(artifact) / "config.json").read_text())
        self._base_ns = config["base_ms"] * 1e6
        self._per_item_ns = config["per_item_ms"] * 1e6
        # Not numpy's generator: its streams may differ between the versions that servers and harness run.
        drawn = hashlib.shake_256(f"{config['seed']}/{name}".encode()).digest(8 * (_INPUTS + 1) * _OUTPUTS)
        weights = np.frombuffer(drawn, dtype="<i8").reshape(_INPUTS + 1, _OUTPUTS)
        # 24 bits of weight times 32 bits of input, summed over 16 inputs, stay within 64 bits.
        self._weights, self._bias = weights[:-1] >> 40, weights[-1] >> 4
        self._device = Device() if device == "emulated" else None
        if self._device is not None:
            self._device.load(name, config)

    def predict(self, inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """``x`` int32[n, 16] → ``y`` int64[n, 4]; returns when the device has done the batch."""
        x = inputs["x"].astype(np.int64)
        if self._device is not None:
            if self._device.pid != os.getpid():
                self._device = Device()  # a server that forks after loading has made another copy of the model
            self._device.occupy(round(self._base_ns + self._per_item_ns * len(x)), len(x))
        return {"y": x @ self._weights + self._bias}


class Device:
    """One copy's seat at an emulated device."""

    def __init__(self) -> None:
        if "TAILRACE_DEVICE_DIR" not in os.environ:
            raise RuntimeError("the emulated device needs the environment variable TAILRACE_DEVICE_DIR")
        folder = Path(os.environ["TAILRACE_DEVICE_DIR"])
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pid = os.getpid()
        self._seat, self.number = _claim_seat(folder, int(os.environ.get("TAILRACE_DEVICES", "1")))
        number = self.number
        self._lock = folder / f"device-{number}.lock"
        self._next = folder / f"device-{number}.next.lock"
        counters = folder / f"device-{number}.{self.pid}.{os.urandom(4).hex()}.busy"
        self._counters = np.memmap(counters, dtype="<u8", mode="w+", shape=(3,))

    def load(self, model: str, cost: dict[str, float]) -> None:
        """Take the time that it takes to load a model, ``load_ms`` and its bytes at ``load_gb_per_s``; none where memory is not
        limited."""
        try:
            sizes = json.loads((self.folder / "memory.json").read_text())["sizes"]
        except FileNotFoundError:
            return
        # All models come over one link.
        with (self.folder / f"device-{self.number}.link.lock").open("w") as link:
            fcntl.flock(link, fcntl.LOCK_EX)
            time.sleep(cost["load_ms"] / 1e3 + sizes[model] / (cost["load_gb_per_s"] * 1e9))

    def occupy(self, duration_ns: int, items: int) -> None:
        """Hold the device for so many nanoseconds, once it is free, and count a batch of so many items."""
        # Files are opened per batch: a lock belongs to the open file, so this excludes threads as well as processes.
        with self._lock.open("w") as lock:
            # Waiting for the device happens one at a time, holding «next». Without it, whoever has just released the
            # device would have it again before those who wait are awake, and one copy could starve the others.
            with self._next.open("w") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                fcntl.flock(lock, fcntl.LOCK_EX)
            counted = time.monotonic_ns()
            end = counted + duration_ns
            while counted < end:
                time.sleep(min(end - counted, _PROGRESS_NS) / 1e9)
                now = time.monotonic_ns()
                self._counters[_BUSY_NS] += np.uint64(now - counted)
                counted = now
            self._counters[_BATCHES] += np.uint64(1)
            self._counters[_ITEMS] += np.uint64(items)


def _claim_seat(folder: Path, devices: int) -> tuple[IO[str], int]:
    """The open, locked file of the first free seat, and its device."""
    number = 0
    while True:
        seat_round, device = divmod(number, devices)
        seat = (folder / f"device-{device}.seat-{seat_round}.lock").open("w")
        try:
            fcntl.flock(seat, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            seat.close()
            number += 1
        else:
            return seat, device
