"""What this machine is: the facts that make a run comparable with another one, and nothing that identifies its user."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from tailrace.harness.errors import InputError
from tailrace.harness.gpus import gpus

ENVIRONMENT_VARIABLES = (
    "CI",
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONUNBUFFERED",
)
"""Environment variables that are kept with a run: an allow-list, so that no credential reaches a manifest."""

DROP_CACHES = Path("/proc/sys/vm/drop_caches")

HARNESS_PACKAGES = ("gevent", "geventhttpclient", "grpcio", "locust", "numpy", "pyarrow", "tritonclient")


def hardware() -> dict[str, Any]:
    """CPU, memory, GPUs and kernel."""
    return {
        "cpu_model": _cpu_model(),
        "cpu_count": cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [gpu.name for gpu in gpus()],
        "kernel": platform.release(),
        "os": _os_name(),
        "machine": platform.machine(),
    }


def software() -> dict[str, str]:
    """Versions of the interpreter and of what the figures depend on."""
    versions = {"python": platform.python_version()}
    for name in HARNESS_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def environment_variables() -> dict[str, str]:
    """The allowed environment variables that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ}


def cpu_count() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.system()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout around ``folder``; ``None`` outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def raise_file_limit() -> int:
    """Raise the soft limit on open files to the hard one; returns the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, 1 << 20)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return soft
    return hard


def command_line() -> list[str]:
    """The command as it was typed, without the path of the interpreter."""
    return ["tailrace", *sys.argv[1:]]


def page_cache_refusal() -> str | None:
    """Why the page cache cannot be dropped on this machine; ``None`` when it can."""
    return (
        None if os.access(DROP_CACHES, os.W_OK) else f"the page cache cannot be dropped: {DROP_CACHES} is not writable"
    )


def drop_page_cache() -> None:
    """Have the kernel forget the contents of files, once they are on the disk. Raises :class:`InputError` when refused."""
    os.sync()
    try:
        DROP_CACHES.write_text("1\n", encoding="ascii")
    except OSError as error:
        raise InputError(
            f"the page cache cannot be dropped: {DROP_CACHES}: {error.strerror}",
            remedy="run as root, outside of containers that may not write there; or leave the page cache alone (--mode process)",
        ) from error
