"""The guardian's own process: it starts servers under keepers, and ends everything when the harness is gone.

What it promises, and to whom, is said in :mod:`tailrace.harness.servers.guardian`.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from tailrace.harness.cgroups import CpuGroup, is_group
from tailrace.harness.errors import TailraceError
from tailrace.harness.processes import ProcessRef

if TYPE_CHECKING:
    from tailrace.harness.servers.engine import Engine

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_PATIENCE_S = 20.0


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def pid_namespace() -> str:
    """In which the ids of processes mean something."""
    return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - not a path


def children(pid: int) -> list[psutil.Process]:
    """All that a process has started, and what that has started; none of one that has gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _reap() -> None:
    """Collect every child of this process that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass


def _kill_descendants() -> list[str]:
    """SIGKILL everything below this process until nothing is left; returns the command names of what was alive."""
    killed: list[str] = []
    deadline = time.monotonic() + _KILL_PATIENCE_S
    while time.monotonic() < deadline:
        _reap()
        alive = [child for child in children(os.getpid()) if child.is_running()]
        if not alive:
            break
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    killed.append(f"{child.name()} ({child.pid})")
                    child.kill()
        time.sleep(0.01)
    return sorted(set(killed))


def remove_paths(patterns: Sequence[str]) -> list[str]:
    """Remove files, folders and glob patterns; returns what was there. What cannot be removed is left and not listed."""
    removed: list[str] = []
    for pattern in patterns:
        for path in glob.glob(pattern):  # noqa: PTH207 - Path.glob takes no absolute pattern
            with contextlib.suppress(OSError):
                if is_group(Path(path)):
                    Path(path).rmdir()  # a control group: its files are the kernel's and cannot be unlinked
                elif Path(path).is_dir() and not Path(path).is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    Path(path).unlink()
                removed.append(path)
    return removed


def _run_keeper(request: dict[str, Any], report: int) -> NoReturn:
    """The body of a keeper: start the server, reap its orphans, end when its last descendant has ended."""

    def end_tree(_signal: int, _frame: FrameType | None) -> NoReturn:
        _kill_descendants()
        os._exit(0)

    signal.signal(signal.SIGUSR1, end_tree)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    try:
        with Path(request["log"]).open("ab") as log:
            server = subprocess.Popen(
                request["argv"],
                env=request["env"],
                cwd=request["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                restore_signals=True,
            )
        answer: dict[str, object] = {"pid": server.pid, "started_ticks": ProcessRef.of(server.pid).started_ticks}
    except ProcessLookupError:
        answer = {"error": "the process ended at once"}
    except OSError as error:
        answer = {"error": f"{error.strerror}: {error.filename or request['argv'][0]}"}
    os.write(report, json.dumps(answer).encode() + b"\n")
    os.close(report)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            os._exit(0)


class _GuardianServer:
    """The guardian's side of the socket: one JSON request a line, one JSON answer a line."""

    def __init__(self, control: socket.socket, ledger: Path) -> None:
        self._control = control
        self._ledger = ledger
        self._keepers: dict[tuple[int, int], int] = {}
        self._stopped: set[tuple[int, int]] = set()
        self._removals: list[str] = []
        self._groups: dict[tuple[int, int], CpuGroup] = {}
        self._engine: Engine | None = None

    def serve(self) -> None:
        """Answer requests until the harness says goodbye or its end of the socket closes; then clean up."""
        graceful = False
        # Whatever goes wrong between the two of us, cleaning up comes after it.
        with contextlib.suppress(OSError, ValueError):
            for line in self._lines():
                request = json.loads(line)
                if request["do"] == "goodbye":
                    graceful = True
                    break
                _reap()
                try:
                    answer = getattr(self, f"_{request['do']}")(request)
                except OSError as error:
                    answer = {"error": str(error)}
                except TailraceError as error:
                    answer = {"error": error.message}
                self._control.sendall(json.dumps({**answer, "id": request["id"]}).encode() + b"\n")
        contained, missed = self._remove_containers()
        killed = _kill_descendants()
        removed = remove_paths(self._removals)
        if missed:
            self._write_ledger()  # as of one that was killed: the next run tries again
        elif graceful:
            self._ledger.unlink(missing_ok=True)
        else:
            self._write_ledger(cleaned={"processes": killed, "paths": [*contained, *removed]})

    def _lines(self) -> Iterator[bytes]:
        buffer = b""
        while chunk := self._control.recv(65536):
            *lines, buffer = (buffer + chunk).split(b"\n")
            yield from lines

    def _write_ledger(self, cleaned: dict[str, list[str]] | None = None) -> None:
        own = ProcessRef.of(os.getpid())
        content = {
            "namespace": pid_namespace(),
            "guardian": [own.pid, own.started_ticks],
            "processes": [list(key) for key in self._keepers],
            "paths": self._removals,
            "containers": self._engine is not None,
            "cleaned": cleaned,
        }
        staged = self._ledger.with_suffix(".tmp")
        staged.write_text(json.dumps(content), encoding="utf-8")
        staged.replace(self._ledger)

    def _spawn(self, request: dict[str, Any]) -> dict[str, Any]:
        read_end, write_end = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            os.close(read_end)
            self._control.close()
            with contextlib.suppress(BaseException):
                _run_keeper(request, write_end)
            os._exit(1)
        os.close(write_end)
        with os.fdopen(read_end, encoding="utf-8") as pipe:
            line = pipe.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its keeper ended"}
        if "error" not in answer:
            self._keepers[(answer["pid"], answer["started_ticks"])] = keeper
            self._write_ledger()
        return answer

    def _signal(self, request: dict[str, Any]) -> dict[str, Any]:
        process = ProcessRef(request["pid"], request["started_ticks"])
        ours = process.alive() and any(child.pid == process.pid for child in children(os.getpid()))
        if ours:
            try:
                os.kill(process.pid, request["signal"])
            except ProcessLookupError:
                ours = False
        return {"sent": ours}

    def _stop_tree(self, request: dict[str, Any]) -> dict[str, Any]:
        key = (request["pid"], request["started_ticks"])
        if key in self._stopped:
            return {"killed": []}
        keeper = self._keepers.get(key)
        if keeper is None:
            return {"error": f"process {key[0]} was not started by this run"}
        # Without its main process nobody hands the signal on to what is left of a server.
        for pid in [key[0]] if ProcessRef(*key).alive() else [child.pid for child in children(keeper)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)  # a paused process cannot act on SIGTERM
        gone = _gone(keeper, request["grace_s"])
        killed = sorted({child.name() for child in _named(children(keeper))})
        if not gone and not _end_keeper(keeper):
            return {"error": f"processes that SIGKILL does not end: {killed}"}
        self._forget(key)
        return {"killed": killed}

    def _kill_tree(self, request: dict[str, Any]) -> dict[str, Any]:
        key = (request["pid"], request["started_ticks"])
        keeper = self._keepers.get(key)
        if keeper is None or not _alive(keeper):
            return {"killed": False}
        if not _end_keeper(keeper):
            return {"error": "processes that SIGKILL does not end"}
        self._forget(key)
        return {"killed": True}

    def _forget(self, key: tuple[int, int]) -> None:
        del self._keepers[key]
        self._stopped.add(key)
        self._write_ledger()

    def _signal_tree(self, request: dict[str, Any]) -> dict[str, Any]:
        keeper = self._keepers.get((request["pid"], request["started_ticks"]))
        if keeper is None:
            return {"sent": 0}
        reached: set[ProcessRef] = set()
        # What a process starts before the signal reaches it must get it too: again, until nobody new is found.
        while fresh := [ref for ref in map(_reference, children(keeper)) if ref is not None and ref not in reached]:
            for ref in fresh:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(ref.pid, request["signal"])
                reached.add(ref)
        return {"sent": len(reached)}

    def _limit_cpus(self, request: dict[str, Any]) -> dict[str, Any]:
        key = (request["pid"], request["started_ticks"])
        keeper = self._keepers.get(key)
        if keeper is None:
            return {"error": f"process {key[0]} was not started by this run"}
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = CpuGroup.create(f"tailrace-{os.getpid()}-{key[0]}")
            self._removals.append(str(group.folder))
            self._write_ledger()
        group.limit(request["cpus"], lambda: [child.pid for child in children(keeper)])
        return {}

    def _make_network(self, request: dict[str, Any]) -> dict[str, Any]:
        from tailrace.harness.servers.engine import Engine

        self._engine = Engine.connect()
        self._write_ledger()  # before there is anything to be found
        self._engine.make_network(f"tailrace-{self._run}", self._run)
        return {"network": f"tailrace-{self._run}"}

    def _start_container(self, request: dict[str, Any]) -> dict[str, Any]:
        from tailrace.harness.servers.engine import RUN, ContainerSpec

        assert self._engine is not None  # noqa: S101 - the network comes first
        spec = ContainerSpec(**request["spec"])
        spec.labels[RUN] = self._run
        return {"container": self._engine.start(spec)}

    @property
    def _run(self) -> str:
        return self._ledger.stem

    def _remove_containers(self) -> tuple[list[str], bool]:
        """What containers and networks there were, and whether some may still be there."""
        if self._engine is None:
            return [], False
        try:
            return self._engine.remove_all(self._run), False
        except TailraceError:
            return [], True

    def _remove_later(self, request: dict[str, Any]) -> dict[str, Any]:
        self._removals.append(request["path"])
        self._write_ledger()
        return {}


def _reference(process: psutil.Process) -> ProcessRef | None:
    try:
        return ProcessRef.of(process.pid)
    except ProcessLookupError:
        return None


def _named(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running()]


def _alive(child: int) -> bool:
    """Whether this child of ours still runs; reaps it when it does not."""
    try:
        return os.waitpid(child, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


def _gone(child: int, within_s: float) -> bool:
    """Wait until a child of ours has ended; False when it takes longer."""
    deadline = time.monotonic() + within_s
    while _alive(child):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def _end_keeper(keeper: int) -> bool:
    """Have a keeper end its whole tree at once; False when that does not work."""
    os.kill(keeper, signal.SIGUSR1)
    return _gone(keeper, _KILL_PATIENCE_S + 5)


def main(argv: Sequence[str]) -> None:
    """Entry point of the guardian process: the control socket's descriptor and the ledger's path."""
    # Signals meant for the harness (terminal, CI) must not end the one who cleans up after it.
    # Handlers, not SIG_IGN: what is ignored stays ignored in every server, what is handled is reset by exec.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _GuardianServer(socket.socket(fileno=int(argv[0])), Path(argv[1])).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
