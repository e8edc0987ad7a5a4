"""Servers in containers: a :class:`ProcessHost` whose ``spawn`` starts one container.

What runs in a container is a process of this machine: the reference that ``spawn`` returns is that of the server's main
process, so replicas are found, watched and hit by pid as they are everywhere else. The guardian starts the containers and
ends them, whatever becomes of the harness.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tailrace.harness.errors import DeployError, EngineError, StorageError, TailraceError
from tailrace.harness.processes import ProcessRef, descendants, log_tail
from tailrace.harness.servers.engine import ContainerSpec, Engine
from tailrace.harness.servers.guardian import Guardian
from tailrace.harness.servers.images import USER_ID

_START_PATIENCE_S = 10.0
_POLL_S = 0.005
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - whose size is asked
_KILLED = 128
_PUBLISHER = "docker-proxy"


@dataclass(frozen=True)
class Limits:
    """What one container may use; ``None``: all that there is."""

    cpus: float | None = None
    memory_bytes: int | None = None


@dataclass
class _Container:
    name: str
    id: str
    log: Path
    ports: list[int]
    paused: bool = False
    connected: bool = True
    ending: str | None = None
    """How it ended, once that is known."""
    removed: bool = False


class ContainerHost:
    """The containers of one trial, all of one image, on a network of their own."""

    def __init__(
        self,
        guardian: Guardian,
        engine: Engine,
        image: str,
        *,
        reads: Iterable[Path],
        writes: Iterable[Path],
        limits: Limits,
        address: str,
        gpus: bool = False,
        one_network: bool = False,
    ) -> None:
        """``reads`` and ``writes`` are what servers see of this machine's files, under the same paths. Ports are published
        on ``address``. With ``one_network`` all containers share one address, that of the first: the nodes of a cluster
        that finds its members on loopback."""
        self._guardian = guardian
        self._engine = engine
        self._image = image
        self._reads = list(reads)
        self._writes = list(writes)
        self._limits = limits
        self._address = address
        self._gpus = gpus
        self._one_network = one_network
        self._containers: dict[ProcessRef, _Container] = {}
        self._spawned_ns: dict[ProcessRef, int] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # faults come from a thread of their own
        self._published: set[ProcessRef] = set()
        self._publishers: list[ProcessRef] = []
        self._network = guardian.make_network()

    # -- a process host ------------------------------------------------------------------------------------------

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
        """See :class:`ProcessHost`. The image's own variables stand below those of ``env``.

        Raises :class:`DeployError` when the container does not start, or its process cannot be seen from here.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        spec = ContainerSpec(
            name=f"{name}-{next(self._numbers)}",
            image=self._image,
            argv=list(argv),
            # The image knows nothing of this machine's users.
            env={**env, "HOME": "/tmp", "USER": "tailrace"},  # noqa: S108 - in the container
            cwd=str(cwd),
            log=str(log),
            user=self._user(),
            folders={
                **{str(path): False for path in self._reads if path.exists()},
                **{str(path): True for path in self._writes if path.exists()},
            },
            network=self._network_of_next(),
            host=self._address,
            ports=list(ports),
            cpus=self._limits.cpus,
            memory_bytes=self._limits.memory_bytes,
            shared_memory_bytes=shutil.disk_usage(_SHARED_MEMORY).total,
            gpus=self._gpus,
        )
        self._hand_over()
        asked_ns = time.monotonic_ns()
        started = _Container(spec.name, self._guardian.start_container(spec), log, spec.ports)
        process = self._main_process(started)
        with self._lock:
            self._containers[process] = started
            self._spawned_ns[process] = asked_ns
        return process

    def spawned_ns(self, process: ProcessRef) -> int:
        """When the container of a process was asked for, on the monotonic clock: the zero of its cold start."""
        return self._spawned_ns[process]

    def signal(self, process: ProcessRef, signal_number: int) -> bool:
        """See :class:`ProcessHost`; never touches a process outside of these containers."""
        if not any(found == process for root, _ in self._all() for found, _ in descendants(root)):
            return False
        try:
            os.kill(process.pid, signal_number)
        except ProcessLookupError:
            return False
        return True

    def stop_tree(self, process: ProcessRef, grace_s: float) -> None:
        """See :class:`ProcessHost`: the container is stopped, and removed."""
        container = self._container(process)
        if container is None or container.removed:
            return
        self._thaw(container)
        self._engine.stop(container.id, grace_s)
        self._note_ending(container)
        container.removed = True
        self._engine.remove(container.id)

    def kill_tree(self, process: ProcessRef) -> bool:
        """See :class:`ProcessHost`: the container is killed. It is there until it is stopped, for its end to
        be told."""
        container = self._container(process)
        if container is None or container.removed or not process.alive():
            return False
        self._engine.kill(container.id)
        container.paused = False
        self._note_ending(container)
        return True

    def signal_tree(self, process: ProcessRef, signal_number: int) -> int:
        """See :class:`ProcessHost`: SIGSTOP is the engine's pause, which freezes what runs in the container
        at one instant; SIGCONT ends it."""
        container = self._container(process)
        if container is None or not process.alive():
            return 0
        reached = len(list(descendants(process)))
        if signal_number == signal.SIGSTOP:
            if not container.paused:
                self._engine.pause(container.id)
            container.paused = True
        elif signal_number == signal.SIGCONT:
            self._thaw(container)
        else:
            raise ValueError(f"a container takes no signal {signal_number}")
        return reached

    def limit_cpus(self, process: ProcessRef, cpus: float | None) -> None:
        """See :class:`ProcessHost`; ``None`` is what the experiment gives it."""
        self._engine.limit_cpus(self._living(process).id, self._limits.cpus if cpus is None else cpus)

    def remove_later(self, path: Path | str) -> None:
        """See :class:`ProcessHost`. A folder that is there is the servers' own: containers get it too."""
        self._guardian.remove_later(path)
        if Path(path).is_dir():
            self._writes.append(Path(path))

    def ending(self, process: ProcessRef) -> str | None:
        """See :class:`ProcessHost`: exit status, signal, and whether it had no memory left."""
        container = self._container(process)
        if container is None:
            return None
        if container.ending is None and not process.alive():
            # Its first process ends with the server's, and the engine knows of it an instant later.
            with contextlib.suppress(EngineError):
                self._engine.await_end(container.id)
            self._note_ending(container)
        return container.ending

    # -- what only containers can have done to them --------------------------------------------------------------

    def limit_memory(self, process: ProcessRef, memory_bytes: int | None) -> None:
        """Let a container have so much memory; ``None`` is what the experiment gives it, or all of the machine's.

        Raises :class:`EngineError` where the kernel cannot take away what is in use.
        """
        usual = self._limits.memory_bytes or psutil.virtual_memory().total
        self._engine.limit_memory(self._living(process).id, usual if memory_bytes is None else memory_bytes)

    def disconnect(self, process: ProcessRef) -> None:
        """Take a container off its network: open connections end, new ones are refused."""
        container = self._living(process)
        if container.connected:
            self._engine.disconnect(container.id, self._network)
        container.connected = False

    def reconnect(self, process: ProcessRef) -> None:
        """Put it back, with the same ports."""
        container = self._living(process)
        if not container.connected:
            self._engine.connect_to(container.id, self._network)
        container.connected = True

    # -- what is collected of them -------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Mapping[str, Any]]:
        """What the engine counts of the containers that run, by name."""
        found = {}
        for process, container in self._all():
            if process.alive():
                with contextlib.suppress(EngineError):  # it may end at this moment
                    found[container.name] = self._engine.statistics(container.id)
        return found

    def publishers(self) -> list[ProcessRef]:
        """The engine's processes through which connections reach the containers' ports."""
        seen = {process for process, container in self._all() if container.connected and process.alive()}
        if seen != self._published:
            self._published = seen
            self._publishers = _publishers({port for _, one in self._all() for port in one.ports})
        return self._publishers

    def endings(self) -> list[dict[str, str]]:
        """Every container that has ended, with how."""
        told = ((container.name, self.ending(process)) for process, container in self._all())
        return [{"container": name, "how": how} for name, how in told if how is not None]

    # ------------------------------------------------------------------------------------------------------------

    def _all(self) -> list[tuple[ProcessRef, _Container]]:
        with self._lock:
            return list(self._containers.items())

    def _container(self, process: ProcessRef) -> _Container | None:
        with self._lock:
            return self._containers.get(process)

    def _living(self, process: ProcessRef) -> _Container:
        container = self._container(process)
        if container is None or not process.alive():
            raise TailraceError("the container had ended by itself")
        return container

    def _thaw(self, container: _Container) -> None:
        if container.paused:
            container.paused = False
            self._engine.unpause(container.id)

    def _network_of_next(self) -> str:
        with self._lock:
            first = next(iter(self._containers.values()), None)
        return f"container:{first.id}" if self._one_network and first is not None else self._network

    def _user(self) -> str:
        """The harness's own user, whose files the server's are; root's servers get one without any rights."""
        return f"{USER_ID}:{USER_ID}" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"

    def _hand_over(self) -> None:
        """Give the servers' user what servers write, where that is another than the harness's."""
        if os.getuid() != 0:
            return
        for root in self._writes:
            for path in [root, *root.rglob("*")]:
                try:
                    os.chown(path, USER_ID, USER_ID, follow_symlinks=False)
                except FileNotFoundError:
                    continue  # what a server that runs has just removed
                except OSError as error:
                    raise StorageError.of(path, error) from error

    def _main_process(self, container: _Container) -> ProcessRef:
        """The server's main process: the one that the container's first process has started."""
        deadline = time.monotonic() + _START_PATIENCE_S
        while True:
            state = self._engine.state(container.id)
            if not state["Running"]:
                said = self._engine.output(container.id)
                self._note_ending(container)
                self._engine.remove(container.id)
                raise DeployError(
                    f"{container.name} ended at once: {container.ending}",
                    remedy=f"read the log: {container.log}",
                    detail="\n".join(filter(None, [said, log_tail(container.log)])),
                )
            # Not there yet, there no longer, or not on this machine.
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                children = psutil.Process(state["Pid"]).children()
                if children and container.id in _control_groups(state["Pid"]):
                    return ProcessRef.of(children[0].pid)
            if time.monotonic() > deadline:
                self._engine.remove(container.id)
                raise DeployError(
                    f"the process of the container of {container.name} cannot be seen from here",
                    remedy="use an engine that runs on this very machine, not in a virtual machine or elsewhere "
                    "(DOCKER_HOST), and run tailrace outside of containers",
                )
            time.sleep(_POLL_S)

    def _note_ending(self, container: _Container) -> None:
        try:
            state = self._engine.state(container.id)
        except EngineError:
            return
        if not state["Running"]:
            container.ending = describe_end(state)


def describe_end(state: Mapping[str, object]) -> str:
    """How a container ended, by its state."""
    status = int(str(state["ExitCode"]))
    if state.get("OOMKilled"):
        return f"the kernel killed what had no memory left (OOM), exit status {status}"
    if status > _KILLED:
        with contextlib.suppress(ValueError):  # no signal has that number
            return f"ended by {signal.Signals(status - _KILLED).name}, exit status {status}"
    return f"exit status {status}" + (f": {state['Error']}" if state.get("Error") else "")


def _publishers(ports: set[int]) -> list[ProcessRef]:
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["name"] == _PUBLISHER and any(
            word == "-host-port" and number in map(str, ports) for word, number in itertools.pairwise(words)
        ):
            with contextlib.suppress(ProcessLookupError):
                found.append(ProcessRef.of(process.pid))
    return found


def _control_groups(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii")
    except OSError:
        return ""
