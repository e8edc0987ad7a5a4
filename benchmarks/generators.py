"""Other people's load generators as the benchmarks run them: bounded in time, with what they saw of every request."""

from __future__ import annotations

import functools
import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailrace.harness.analysis.metrics import Floats
from tailrace.harness.contract.adapter import Endpoint
from tailrace.harness.errors import TailraceError
from tailrace.harness.machine import cpu_count

WRK = shutil.which("wrk")
WRK_REMEDY = "install wrk (on Debian and Ubuntu: apt-get install wrk)"
_SCRIPT = Path(__file__).with_name("wrk.lua")
_PATIENCE_S = 60.0
"""What a generator may take beyond the time that it was told to send for."""
_COMPLAINT_CHARS = 1000
"""Some print their whole manual after what went wrong."""


@dataclass(frozen=True)
class Run:
    """What a generator saw."""

    latencies_ms: Floats
    """Of every request that was answered with success, as the generator counts."""
    failed: int
    seconds: float
    cpu_s: float


def output_of(argv: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None) -> str:
    """What a program prints. Raises :class:`TailraceError` when it fails, or takes much longer than so many seconds."""
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=seconds + _PATIENCE_S, check=True, env=env
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = f"{getattr(error, 'stderr', None) or ''}"
        raise TailraceError(str(error), detail=said[:_COMPLAINT_CHARS] or None) from error


@functools.cache
def precedence() -> tuple[str, ...]:
    """What goes in front of a generator's command, so that it has the precedence over the server that tailrace's own load
    worker takes (:func:`take_precedence`)."""
    real_time = ("chrt", "--rr", "1")
    if cpu_count() > 1 and shutil.which("chrt"):
        tried = subprocess.run([*real_time, "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return real_time
    return ("nice", "-n", "-10")  # refused, it complains and runs the command all the same


def children_cpu_s() -> float:
    """CPU time of all children that have ended and been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def wrk(endpoint: Endpoint, request: bytes, *, connections: int, seconds: int, pause_ms: int = 0) -> Run:
    """Closed loop: each connection sends, waits for the answer, pauses, and sends again; one thread.

    wrk counts from the write to the end of the answer, to the microsecond.
    """
    if WRK is None:
        raise TailraceError("there is no wrk on the path", remedy=WRK_REMEDY)
    with tempfile.NamedTemporaryFile(prefix="tailrace-request-") as file:
        file.write(request)
        file.flush()
        command = [*precedence(), WRK, "--threads=1", f"--connections={connections}", f"--duration={seconds}s"]
        to = [f"--script={_SCRIPT}", f"http://{endpoint.host}:{endpoint.port}", "--", file.name, str(pause_ms)]
        before_s = children_cpu_s()
        said = output_of([*command, *to], seconds=seconds)
        cpu_s = children_cpu_s() - before_s
    seen = json.loads(said.splitlines()[-1])
    latencies_ms = np.repeat(np.array(seen["us"], dtype=np.float64) / 1e3, seen["counts"])
    return Run(latencies_ms, seen["failed"], seen["seconds"], cpu_s)
