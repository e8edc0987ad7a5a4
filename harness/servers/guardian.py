"""The guardian: a process that owns every server of a run and ends them all when the harness ends, however it ends.

Three layers, because each alone leaks:

* The *guardian* holds one end of a socket to the harness. When that closes, even by SIGKILL of the harness, it ends
  every descendant, removes what it was told to remove, and leaves a note for the next run.
* Each server has a *keeper* between it and the guardian: a child subreaper (``PR_SET_CHILD_SUBREAPER``), so that
  whatever the server daemonises still belongs to exactly one tree. Should the guardian die, the keeper is told by
  the kernel (``PR_SET_PDEATHSIG``; reliable here, for the guardian has one thread) and ends its tree.
* A *ledger* file names the processes and paths of a run, so that after a power cut ``tailrace clean`` can find them.

Containers are started by the guardian too, and carry its ledger's name as a label: by that it ends them, and so does the next
run should the guardian have been killed, for then nobody else does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tailrace.harness.errors import DeployError, StorageError, TailraceError
from tailrace.harness.folders import state_folder
from tailrace.harness.processes import ProcessRef
from tailrace.harness.servers.guardian_process import children, pid_namespace, remove_paths

if TYPE_CHECKING:
    from tailrace.harness.servers.engine import ContainerSpec


class Guardian:
    """The harness's side: a :class:`ProcessHost`. Use it as a context manager."""

    def __init__(self) -> None:
        folder = state_folder() / "guardians"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder} could not be made: {error.strerror}",
                remedy="set TAILRACE_STATE to a folder that you can write to",
            ) from error
        ours, theirs = socket.socketpair()
        ledger = folder / f"{os.getpid()}-{time.monotonic_ns()}.json"
        with theirs:
            # A session of its own: Ctrl-C on the terminal reaches the harness, which then stops servers in order.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "tailrace.harness.servers.guardian_process",
                    str(theirs.fileno()),
                    str(ledger),
                ],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._received = b""
        self._asked = 0
        self._lock = threading.Lock()  # faults are injected from a thread of their own
        self._spawned_ns: dict[ProcessRef, int] = {}

    def __enter__(self) -> Guardian:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything that was started, remove what was to be removed, and end the guardian."""
        with contextlib.suppress(OSError):
            self._socket.sendall(b'{"do": "goodbye"}\n')
        self._socket.close()
        self._process.wait()

    def _ask(self, **request: Any) -> dict[str, Any]:
        """One question and its answer. Ctrl-C may cut in anywhere: an answer that nobody waited for is passed over."""
        with self._lock:
            self._asked += 1
            try:
                self._socket.sendall(json.dumps({**request, "id": self._asked}).encode() + b"\n")
                while True:
                    line, newline, rest = self._received.partition(b"\n")
                    if not newline:
                        chunk = self._socket.recv(65536)
                        if not chunk:
                            raise ConnectionResetError
                        self._received += chunk
                        continue
                    self._received = rest
                    answer: dict[str, Any] = json.loads(line)
                    if answer["id"] == self._asked:
                        return answer
            except OSError as error:
                raise TailraceError("the guardian process has ended; its servers ended with it") from error

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        ports: Sequence[int] = (),
    ) -> ProcessRef:
        """See :class:`ProcessHost`. Raises :class:`DeployError` when the program cannot be started."""
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {"argv": list(argv), "env": dict(env), "cwd": str(cwd), "log": str(log)}
        asked_ns = time.monotonic_ns()
        answer = self._ask(do="spawn", **request)
        if "error" in answer:
            raise DeployError(f"{name} could not be started: {answer['error']}", detail=" ".join(argv))
        process = ProcessRef(answer["pid"], answer["started_ticks"])
        self._spawned_ns[process] = asked_ns
        return process

    def spawned_ns(self, process: ProcessRef) -> int:
        """When the start of a process was asked for, on the monotonic clock: the zero of its cold start."""
        return self._spawned_ns[process]

    def signal(self, process: ProcessRef, signal_number: int) -> bool:
        """See :class:`ProcessHost`; never touches a process that this run did not start."""
        answer = self._ask(do="signal", signal=int(signal_number), **vars(process))
        return bool(answer["sent"])

    def stop_tree(self, process: ProcessRef, grace_s: float) -> None:
        """See :class:`ProcessHost`."""
        self._checked("be stopped", do="stop_tree", grace_s=grace_s, **vars(process))

    def _checked(self, purpose: str, **request: Any) -> dict[str, Any]:
        answer = self._ask(**request)
        if "error" in answer:
            raise TailraceError(f"a server could not {purpose}: {answer['error']}")
        return answer

    def kill_tree(self, process: ProcessRef) -> bool:
        """See :class:`ProcessHost`."""
        return bool(self._checked("be killed", do="kill_tree", **vars(process))["killed"])

    def signal_tree(self, process: ProcessRef, signal_number: int) -> int:
        """See :class:`ProcessHost`."""
        return int(self._ask(do="signal_tree", signal=int(signal_number), **vars(process))["sent"])

    def limit_cpus(self, process: ProcessRef, cpus: float | None) -> None:
        """See :class:`ProcessHost`."""
        self._checked("be limited in its CPUs", do="limit_cpus", cpus=cpus, **vars(process))

    def remove_later(self, path: Path | str) -> None:
        """See :class:`ProcessHost`."""
        self._ask(do="remove_later", path=str(path))

    def ending(self, process: ProcessRef) -> str | None:
        """See :class:`ProcessHost`: of processes it is not known."""
        return None

    def make_network(self) -> str:
        """Make a container network of this run's own; returns its name. Before the first container."""
        return str(self._checked("get a network", do="make_network")["network"])

    def start_container(self, spec: ContainerSpec) -> str:
        """Start a container that ends with this run; returns its id. Raises :class:`DeployError` when it does not start."""
        answer = self._ask(do="start_container", spec=asdict(spec))
        if "error" in answer:
            raise DeployError(f"{spec.name} could not be started: {answer['error']}", detail=" ".join(spec.argv))
        return str(answer["container"])


def sweep() -> list[str]:
    """Clean what crashed runs left, and say so: one sentence for each thing that was ended or removed.

    Ledgers of guardians that still live belong to a run in progress and are left alone.
    """
    told: list[str] = []
    for ledger in sorted((state_folder() / "guardians").glob("*.json")):
        try:
            content = json.loads(ledger.read_text(encoding="utf-8"))
            guardian = ProcessRef(*content["guardian"])
            if content["namespace"] != pid_namespace():
                continue  # written in another container, where these pids mean something else
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if guardian.alive():
            continue
        cleaned = content["cleaned"] or {"processes": [], "paths": []}
        told += [f"after a crash its guardian ended {name}" for name in cleaned["processes"]]
        told += [f"after a crash its guardian removed {path}" for path in cleaned["paths"]]
        for pid, ticks in content["processes"]:
            if ProcessRef(pid, ticks).alive():
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in [*children(pid), psutil.Process(pid)]:
                        process.kill()
                told.append(f"ended process {pid} and what it had started, left by a crashed run")
        told += [f"removed {path}, left by a crashed run" for path in remove_paths(content["paths"])]
        if content.get("containers") and content["cleaned"] is None:
            from tailrace.harness.servers.engine import Engine

            try:
                left = Engine.connect().remove_all(ledger.stem)
            except TailraceError as error:
                told.append(f"a crashed run may have left containers, and they cannot be looked for: {error.message}")
                continue  # its ledger stays, for the next time
            told += [f"removed {thing}, left by a crashed run" for thing in left]
        ledger.unlink(missing_ok=True)
    return told
