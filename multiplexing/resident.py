"""What a server imports in place of a ``model.py`` whose models share a memory that does not hold them all: :class:`Model` is the
workload's own, with a room in that memory for as long as it lives.

It needs the standard library alone. The environment variable ``TAILRACE_DEVICE_DIR`` names a folder with ``memory.json``:
``model_file`` (the workload's own), ``budget_bytes``, and ``sizes`` by model. The budget is enforced here, whatever the device: a
copy takes its room before it is loaded, or is refused, and gives it back when it is no more, its process alive or dead. What a
device really has free is its own business: where that is less, the model cannot be loaded, and ``loads.jsonl`` says so.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

DEVICE = 0
"""Models share the memory of one device."""


class Model:
    """The workload's model of this name, in its room."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        folder = Path(os.environ["TAILRACE_DEVICE_DIR"])
        limits = json.loads((folder / "memory.json").read_text())
        # What it imports takes no memory of a device, and seconds, which a server with a process for each model spends every time
        # and others once: it is no part of a load.
        own = _module(limits["model_file"])
        told = {"model": name, "pid": os.getpid(), "device": DEVICE, "bytes": limits["sizes"][name]}
        self._room: Room | None = Room.take(folder, limits, told)
        _tell(folder, "begun", told)
        try:
            self._model: Any = own.Model(artifact, name, device)
            if (folder / f"load-fails.{name}").exists():
                raise RuntimeError(f"{name} fails to load, as it was told to")
        except BaseException as error:
            try:
                _tell(folder, "failed", told)
            finally:
                traceback.clear_frames(error.__traceback__)  # which have hold of what was loaded until then
                self.close()
            raise
        _tell(folder, "loaded", told)

    def predict(self, inputs: Any) -> Any:
        """As the workload's own."""
        return self._model.predict(inputs)

    def close(self) -> None:
        """Let go of the model, and only then of its room."""
        self._model = None
        room = getattr(self, "_room", None)
        if room is None:
            return  # it was refused one, or has given it back
        self._room = None
        try:
            _free_for_others()
        finally:
            room.close()

    __del__ = close


def _free_for_others() -> None:
    """Have torch, where a model has used it, give back what it holds of models that are no more."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None:
        gc.collect()  # compiled networks refer to themselves
        if cuda.is_initialized():
            cuda.empty_cache()


class Room:
    """A copy's share of the budget: a file that it keeps locked, so that whoever dies gives it back."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        self._path = path
        self._pid = os.getpid()

    @classmethod
    def take(cls, folder: Path, limits: dict[str, Any], told: dict[str, Any]) -> Room:
        """The room of a model, as soon as nobody else is choosing. Raises ``MemoryError`` where there is none."""
        size = told["bytes"]
        path = folder / f"device-{DEVICE}.{os.getpid()}.{os.urandom(4).hex()}.room"
        with (folder / f"device-{DEVICE}.rooms.lock").open("w") as rooms:
            fcntl.flock(rooms, fcntl.LOCK_EX)
            free = limits["budget_bytes"] - sum(_taken(folder).values())
            if free < size:
                _tell(folder, "refused", {**told, "free_bytes": free})
                raise MemoryError(f"device {DEVICE} has {free:,} bytes free, and {told['model']} needs {size:,}")
            file = path.open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{size} {told['model']}")
            file.flush()
        return cls(file, path)

    def close(self) -> None:
        """Give it back."""
        if self._pid == os.getpid():  # a fork has the same open file, and gives nothing back
            self._path.unlink(missing_ok=True)
        self._file.close()


def _taken(folder: Path) -> dict[str, int]:
    """The rooms that somebody has: bytes by file name. Rooms of the dead are cleared; the caller holds their lock."""
    found = {}
    for path in folder.glob(f"device-{DEVICE}.*.room"):
        with path.open() as room:
            try:
                fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found[path.name] = int(room.read().split()[0])
            else:
                path.unlink(missing_ok=True)
    return found


def _tell(folder: Path, what: str, told: dict[str, Any]) -> None:
    """A line of ``loads.jsonl``: ``begun``, then ``loaded`` or ``failed``; or ``refused``, for want of room."""
    line = json.dumps({"what": what, "mono_ns": time.monotonic_ns(), **told}) + "\n"
    with (folder / "loads.jsonl").open("a") as log:
        log.write(line)  # one write of a few hundred bytes, which nobody else's comes between


@functools.cache
def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("workload_own_model", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
