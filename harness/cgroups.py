"""CPU quotas by control group, of version 1 or 2, where this user may make one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000
_MEMBERS = "cgroup.procs"


def cpu_root(root: Path = _ROOT) -> Path | None:
    """The folder below which groups with a CPU quota can be made: of the CPU controller (version 1), or the root of the
    one hierarchy when it hands the controller on (version 2); ``None`` where there is none."""
    if (root / "cpu" / "cpu.cfs_quota_us").exists():
        return root / "cpu"
    try:
        handed_on = (root / "cgroup.subtree_control").read_text(encoding="ascii").split()
    except OSError:
        return None
    return root if "cpu" in handed_on else None


def refusal() -> str | None:
    """Why no process can be limited on this machine; ``None`` when one can. Tries it."""
    try:
        group = CpuGroup.create(f"tailrace-probe-{os.getpid()}")
        group.folder.rmdir()
    except OSError as error:
        return f"a CPU quota needs a control group, and none can be made here: {error.strerror or error}"
    return None


def is_group(folder: Path) -> bool:
    """Whether a folder is a control group."""
    return folder.is_dir() and (folder / _MEMBERS).exists() and _ROOT in folder.parents


@dataclass
class CpuGroup:
    """One control group."""

    folder: Path

    @classmethod
    def create(cls, name: str) -> CpuGroup:
        """Make it. Raises ``OSError`` where that is not possible or not permitted."""
        root = cpu_root()
        if root is None:
            raise OSError(0, "the kernel offers no CPU controller")
        folder = root / name
        folder.mkdir(exist_ok=True)
        return cls(folder)

    def limit(self, cpus: float | None, members: Callable[[], list[int]]) -> None:
        """Give all ``members`` together so many CPUs (``None``: no limit). Who is started meanwhile belongs to them too.

        Raises ``OSError`` when the kernel refuses.
        """
        quota_us = -1 if cpus is None else max(1000, round(cpus * _PERIOD_US))
        if (self.folder / "cpu.cfs_quota_us").exists():
            (self.folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US), encoding="ascii")
            (self.folder / "cpu.cfs_quota_us").write_text(str(quota_us), encoding="ascii")
        else:
            quota = "max" if cpus is None else str(quota_us)
            (self.folder / "cpu.max").write_text(f"{quota} {_PERIOD_US}", encoding="ascii")
        inside: set[int] = set()
        while fresh := set(members()) - inside:
            for pid in fresh:
                with contextlib.suppress(ProcessLookupError):
                    (self.folder / _MEMBERS).write_text(str(pid), encoding="ascii")
            inside |= fresh
