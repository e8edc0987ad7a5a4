"""The harness's side of a memory that models share: what there is of it, what is in it, and what is just being loaded.

Every copy of a model (``multiplexing/resident.py``) has a file ``device-DEVICE.PID.NONCE.room``, «BYTES MODEL», which it keeps
locked as long as it lives, and ``loads.jsonl`` has a line for all that happens to it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tailrace.harness.contract.multiplexing import MemoryPlan
from tailrace.harness.processes import ProcessRef, descendants

LOADS = "loads.jsonl"


def limit_memory(folder: Path, plan: MemoryPlan, model_file: Path) -> None:
    """Give the device of a folder, which nobody uses yet, a limited memory. ``model_file`` is the workload's own."""
    told = {"model_file": str(model_file), "budget_bytes": plan.budget_bytes, "sizes": dict(plan.sizes)}
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


def loaders(folder: Path, roots: Callable[[], Iterable[ProcessRef]]) -> list[tuple[str, ProcessRef]]:
    """The models that are being loaded at this moment, each with the process that does it, of those that descend from
    ``roots``. Processes that have died in a load are told of, too, but are no longer among these."""
    if not loads_under_way(folder):
        return []
    alive = {ref.pid: ref for root in roots() for ref, _ in descendants(root)}
    # Looking through processes takes a while, in which a load may have ended.
    return [(model, alive[pid]) for model, pid in loads_under_way(folder) if pid in alive]


def fail_loads(folder: Path, model: str, *, failing: bool) -> None:
    """Let every load of a model fail from now on, or succeed again."""
    mark = folder / f"load-fails.{model}"
    if failing:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)
