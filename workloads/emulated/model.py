"""A model on an emulated accelerator: a batch of n items occupies the device for base + per_item·n milliseconds.

The device sleeps instead of computing, and serves one batch at a time: whoever runs a batch holds the device's lock
file, which the kernel releases if the process dies. The harness sets two environment variables:
``TAILRACE_DEVICE_DIR``, the folder of locks and counters, and ``TAILRACE_DEVICES``, how many devices there are.

A copy of the model claims a seat for life: the first free one when seats are counted round after round over the
devices. So copies spread evenly, and one that replaces a dead copy gets its seat.

A file ``memory.json`` in that folder says that the device's memory is limited, and what each model takes of it. Then a copy
takes its room before anything else, or is refused; loading takes a time that goes with its size, one copy after the other; and
``loads.jsonl`` tells of it (:class:`Memory`). Room is given back when the copy is no more, its process alive or dead.

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
        self._memory = None
        if self._device is not None:
            self._memory = Memory.take(self._device.folder, self._device.number, name, config)

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


class Memory:
    """A copy's room in the memory of its device: a file that it keeps locked, so that whoever dies gives it back.

    ``loads.jsonl`` has a line for everything that happens to it: ``begun``, then ``loaded``, or ``failed`` for a model of which a
    file ``load-fails.MODEL`` says that it cannot be loaded; ``refused`` where there was no room. Times are monotonic nanoseconds.
    """

    def __init__(self, room: IO[str], path: Path) -> None:
        self._room = room
        self._path = path
        self._pid = os.getpid()

    @classmethod
    def take(cls, folder: Path, device: int, model: str, cost: dict[str, float]) -> Memory | None:
        """Take the room of a model and load it: ``load_ms``, and its bytes at ``load_gb_per_s``; ``None`` where memory is not
        limited. Raises ``MemoryError`` where there is no room, ``RuntimeError`` where loading is to fail."""
        try:
            limits = json.loads((folder / "memory.json").read_text())
        except FileNotFoundError:
            return None
        size = limits["sizes"][model]
        told = {"model": model, "pid": os.getpid(), "device": device, "bytes": size}
        path = folder / f"device-{device}.{os.getpid()}.{os.urandom(4).hex()}.room"
        with (folder / f"device-{device}.rooms.lock").open("w") as rooms:
            fcntl.flock(rooms, fcntl.LOCK_EX)
            free = limits["budget_bytes"] - sum(_taken(folder, device).values())
            if free < size:
                _tell(folder, "refused", {**told, "free_bytes": free})
                raise MemoryError(f"device {device} has {free:,} bytes free, and {model} needs {size:,}")
            room = path.open("w")
            fcntl.flock(room, fcntl.LOCK_EX)
            room.write(f"{size} {model}")
            room.flush()
        memory = cls(room, path)
        _tell(folder, "begun", told)
        # All models come over one link.
        with (folder / f"device-{device}.link.lock").open("w") as link:
            fcntl.flock(link, fcntl.LOCK_EX)
            time.sleep(cost["load_ms"] / 1e3 + size / (cost["load_gb_per_s"] * 1e9))
        if (folder / f"load-fails.{model}").exists():
            _tell(folder, "failed", told)
            memory.close()
            raise RuntimeError(f"{model} fails to load, as it was told to")
        _tell(folder, "loaded", told)
        return memory

    def close(self) -> None:
        """Give the room back."""
        if self._pid == os.getpid():  # a fork has the same open file, and gives nothing back
            self._path.unlink(missing_ok=True)
        self._room.close()

    __del__ = close


def _taken(folder: Path, device: int) -> dict[str, int]:
    """The rooms of a device that somebody has: bytes by file name. Rooms of the dead are cleared; the caller holds their lock."""
    found = {}
    for path in folder.glob(f"device-{device}.*.room"):
        with path.open() as room:
            try:
                fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found[path.name] = int(room.read().split()[0])
            else:
                path.unlink(missing_ok=True)
    return found


def _tell(folder: Path, what: str, told: dict[str, object]) -> None:
    line = json.dumps({"what": what, "mono_ns": time.monotonic_ns(), **told}) + "\n"
    with (folder / "loads.jsonl").open("a") as log:
        log.write(line)  # one write of a few hundred bytes, which nobody else's comes between


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
