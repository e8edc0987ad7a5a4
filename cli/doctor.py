"""What this machine has and lacks for a run, each with the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from tailrace.harness.errors import EngineError
from tailrace.harness.folders import cache_folder
from tailrace.harness.gpus import gpus
from tailrace.harness.machine import cpu_count, raise_file_limit
from tailrace.harness.run.registry import all_adapters
from tailrace.harness.servers import interpreters, package_index

_DISK_NEEDED_BYTES = 4 << 30
_MEMORY_NEEDED_BYTES = 4 << 30
_SHM_NEEDED_BYTES = 64 << 20
_FILES_NEEDED = 8192 + 256


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``needed``: without it the default experiment does not run."""

    what: str
    ok: bool
    found: str
    remedy: str
    needed: bool = True


def examine() -> list[Finding]:
    """Look at everything; starts nothing and changes nothing but the soft limit on open files of this process."""
    return [
        _python(),
        *_server_pythons(),
        _system(),
        _cores(),
        _memory(),
        _disk(),
        _shared_memory(),
        _files(),
        _indexes(),
        _gpu(),
        _engine(),
        _browser(),
    ]


def _python() -> Finding:
    version = platform.python_version()
    return Finding(
        "Python 3.11 to 3.13",
        (3, 11) <= sys.version_info[:2] <= (3, 13),
        version,
        "install Python 3.11, 3.12 or 3.13 and run nox with it; 3.14 installs, and is untested",
    )


def _server_pythons() -> list[Finding]:
    """The Python of each framework that cannot do with every one that tailrace runs on."""
    findings = []
    for adapter in all_adapters().values():
        if not (wanted := interpreters.declared([adapter.requirements])):
            continue
        found = interpreters.on_this_machine(wanted)
        findings.append(
            Finding(
                f"Python {wanted} for {adapter.name}",
                found is not None,
                str(found or "none"),
                f"uv fetches one when {adapter.name} is raced; without a network, install one",
                needed=False,
            )
        )
    return findings


def _system() -> Finding:
    return Finding(
        "Linux on x86-64",
        sys.platform == "linux" and platform.machine() == "x86_64",
        f"{platform.system()} {platform.release()} {platform.machine()}",
        "the servers' wheels exist for Linux on x86-64 only",
    )


def _cores() -> Finding:
    count = cpu_count()
    return Finding("2 CPU cores", count >= 2, str(count), "give this machine or container another core")


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    return Finding(
        "4 GiB of free memory",
        available >= _MEMORY_NEEDED_BYTES,
        f"{available / 2**30:.1f} GiB",
        "stop what uses memory; the largest servers take 2.5 GB before they serve anything",
    )


def _disk() -> Finding:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return Finding(
        "4 GiB of disk for server environments",
        free >= _DISK_NEEDED_BYTES and os.access(existing, os.W_OK),
        f"{free / 2**30:.1f} GiB below {folder}" + ("" if os.access(existing, os.W_OK) else ", not writable"),
        "free some space, or point TAILRACE_CACHE to another disk",
    )


def _shared_memory() -> Finding:
    path = Path("/dev/shm")  # noqa: S108 - a mount point, nothing is written there
    free = shutil.disk_usage(path).free if path.is_dir() else 0
    return Finding(
        "64 MiB of shared memory for the servers",
        free >= _SHM_NEEDED_BYTES,
        f"{free / 2**20:.0f} MiB in {path}",
        "in a container: docker run --shm-size=1g",
    )


def _files() -> Finding:
    limit = raise_file_limit()
    return Finding(
        f"{_FILES_NEEDED} open files", limit >= _FILES_NEEDED, str(limit), f"ulimit -n {_FILES_NEEDED} (hard limit)"
    )


def _indexes() -> Finding:
    left_out = package_index.left_out()
    return Finding(
        "package indexes that uv can read",
        not left_out,
        "; ".join(left_out) or "all that pip is configured with",
        "only needed when a package is found nowhere else: mend pip's configuration (pip config list)",
        needed=False,
    )


def _gpu() -> Finding:
    found = gpus()
    return Finding(
        "NVIDIA GPU",
        bool(found),
        ", ".join(gpu.name for gpu in found) or "none",
        "only for `device: cuda`; everything else runs without (tailrace doctor --gpu)",
        needed=False,
    )


def _engine() -> Finding:
    from tailrace.harness.servers.engine import Engine

    try:
        engine = Engine.connect()
        engine.check_local()
        found, remedy = f"Docker {engine.version()}", None
    except EngineError as error:
        found, remedy = error.message, error.remedy
    return Finding(
        "container engine",
        remedy is None,
        found,
        f"only for `environment: docker`: {remedy}",
        needed=False,
    )


def _browser() -> Finding:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return Finding(
        "Chromium (for the browser tests)",
        path is not None,
        path or "none",
        "apt-get install chromium chromium-driver",
        needed=False,
    )
