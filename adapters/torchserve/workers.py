"""TorchServe's worker processes: which these are, and what they have printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from tailrace.harness.contract.adapter import Replica
from tailrace.harness.processes import ProcessRef, log_tail

_WORKER = "model_service_worker.py"
_SOCKET = re.compile(r"\.ts\.sock\.(\d+)$")
_OUTPUT_LINES = 40
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*")


def replica(frontend: ProcessRef, reference: ProcessRef, process: psutil.Process) -> Replica | None:
    """The worker that a process is, named after its model and socket: a new one takes the name of a dead one.

    Workers run in their model's folder. Their own children have the same command line and are none.
    """
    command = process.cmdline()
    if process.ppid() != frontend.pid or not any(Path(word).name == _WORKER for word in command):
        return None
    model = Path(process.cwd()).name
    socket = next((match[1] for word in command if (match := _SOCKET.search(word))), reference.pid)
    return Replica(f"{model}-{socket}", model, reference)


class Output:
    """What the workers of a server have printed, as its log tells it, and whether one was started again."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read_bytes = log.stat().st_size if log.exists() else 0
        self._lines: list[str] = []

    def failure(self) -> str | None:
        """What they had printed when the first of them ended, with its exception; ``None`` while none has ended.

        TorchServe itself only tries again, for five minutes.
        """
        for line in self._new_lines():
            if " MODEL_LOG - " in line:
                self._lines.append(line.partition(" MODEL_LOG - ")[2])
            elif " - Retry worker: " in line:
                return "\n".join(self._lines[-_OUTPUT_LINES:]) or log_tail(self._log)
        return None

    def _new_lines(self) -> Sequence[str]:
        try:
            with self._log.open("rb") as log:
                log.seek(self._read_bytes)
                whole_lines = log.read().rpartition(b"\n")[0]
        except OSError:
            return ()
        self._read_bytes += len(whole_lines)
        return whole_lines.decode("utf-8", "replace").splitlines()


def exception_in(output: str) -> str:
    """The first exception in what a worker has printed: those after it are what TorchServe made of it."""
    lines = (line.strip() for line in output.splitlines())
    return next((line for line in lines if _EXCEPTION.fullmatch(line)), "it ended without saying why")
