"""The container engine (Docker's API, through the Docker SDK for Python): what tailrace asks of it, and how it finds its own.

Everything that is made carries labels: :data:`RUN` with the name of the run that owns it, so that one question finds
what a run has left, and :data:`IMAGE` on images, which outlive runs on purpose.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount
from requests.exceptions import RequestException

from tailrace.harness.errors import EngineError

RUN = "tailrace.run"
IMAGE = "tailrace.image"
_TIMEOUT_S = 60.0
_CPU_PERIOD_US = 100_000
_REMEDY = (
    "start Docker, or point DOCKER_HOST to an engine on this machine that you may use "
    "(`docker version` says whether you may), or choose `environment: venv`"
)

# Into the log as a process would write it: no copy of it goes through the engine while a trial runs.
_INTO_LOG = 'exec "$@" >>"$0" 2>&1'


@dataclass(frozen=True)
class ContainerSpec:
    """One container, in the words of a process: what is run, as whom, and what it gets."""

    name: str
    image: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    log: str
    """A file below ``folders`` that gets stdout and stderr."""
    user: str
    """``uid:gid``."""
    folders: dict[str, bool] = field(default_factory=dict)
    """Paths that it sees under the same name, and whether it may write there."""
    network: str = ""
    """The network that it stands on, or the id of the container whose network it shares, after ``container:``."""
    host: str = "127.0.0.1"
    """The address of this machine on which its ports are published, under the same numbers."""
    ports: list[int] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    cpus: float | None = None
    memory_bytes: int | None = None
    shared_memory_bytes: int | None = None
    gpus: bool = False


@contextlib.contextmanager
def told(purpose: str) -> Iterator[None]:
    """Turn what goes wrong with the engine into an :class:`EngineError` that says for what it was asked."""
    try:
        yield
    except APIError as error:
        raise EngineError(f"the container engine could not {purpose}: {error.explanation or error}") from error
    except (DockerException, RequestException) as error:
        raise EngineError(f"the container engine could not {purpose}: {error}", remedy=_REMEDY) from error


class Engine:
    """A connection to the engine. Whatever it refuses is an :class:`EngineError`."""

    def __init__(self, api: docker.APIClient) -> None:
        self.api = api

    @classmethod
    def connect(cls) -> Engine:
        """The engine of ``DOCKER_HOST``, else of the usual socket. Raises :class:`EngineError` when it gives no answer."""
        try:
            return cls(docker.APIClient(**docker.utils.kwargs_from_env(), version="auto", timeout=_TIMEOUT_S))
        except (DockerException, RequestException) as error:
            raise EngineError(
                f"`environment: docker` needs a container engine, and none answers: {error}", remedy=_REMEDY
            ) from error

    def version(self) -> str:
        """Its own version."""
        with told("tell its version"):
            return str(self.api.version()["Version"])

    def check_local(self) -> None:
        """Raise :class:`EngineError` when it is known to run on another machine: what servers read is mounted from this one,
        and faults are done to processes of this one."""
        with told("tell where it runs"):
            kernel = self.api.info()["KernelVersion"]
        if kernel != platform.release():
            raise EngineError(
                f"the container engine runs on another machine: its kernel is {kernel}, this one's {platform.release()}",
                remedy="point DOCKER_HOST to an engine on this machine, or choose `environment: venv`",
            )

    # -- what a run makes ----------------------------------------------------------------------------------------

    def make_network(self, name: str, run: str) -> None:
        """A bridge network of a run's own."""
        with told(f"make the network {name}"):
            self.api.create_network(name, driver="bridge", labels={RUN: run})

    def start(self, spec: ContainerSpec) -> str:
        """Create a container and start it; returns its id. One that cannot be started is removed again.

        Its first process is the engine's ``init``, which collects orphans and hands signals on: for what runs below it
        nothing is different from a process of this machine.
        """
        api = self.api
        joined = spec.network.startswith("container:")
        with told(f"create a container for {spec.name}"):
            host_config = api.create_host_config(
                init=True,
                mounts=[
                    Mount(path, path, type="bind", read_only=not writable) for path, writable in spec.folders.items()
                ],
                port_bindings={} if joined else {port: (spec.host, port) for port in spec.ports},
                network_mode=spec.network,
                shm_size=spec.shared_memory_bytes,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if spec.gpus else None,
                **_cpu_quota(spec.cpus),
                **_memory_limit(spec.memory_bytes),
            )
            container = api.create_container(
                spec.image,
                ["sh", "-c", _INTO_LOG, spec.log, *spec.argv],
                entrypoint=[],
                name=f"tailrace-{spec.labels[RUN]}-{spec.name}",
                user=spec.user,
                environment=spec.env,
                working_dir=spec.cwd,
                ports=[] if joined else list(spec.ports),
                labels=spec.labels,
                host_config=host_config,
                # The harness asks whoever it measures; a program started every half minute beside it would be measured too.
                healthcheck={"test": ["NONE"]},
            )["Id"]
        try:
            with told(f"start the container of {spec.name}"):
                api.start(container)
        except BaseException:
            self.remove(container)
            raise
        return str(container)

    def remove(self, container: str) -> None:
        """End a container, whatever its state, and remove it with its anonymous volumes."""
        with told(f"remove the container {container:.12}"), contextlib.suppress(NotFound):
            self.api.remove_container(container, force=True, v=True)

    def remove_all(self, run: str) -> list[str]:
        """End and remove all that a run has made, and say what that was."""
        removed = []
        chosen = {"label": f"{RUN}={run}"}
        with told(f"list what the run {run} has made"):
            containers, networks = self.api.containers(all=True, filters=chosen), self.api.networks(filters=chosen)
        for container in containers:
            self.remove(container["Id"])
            removed.append(f"the container {container['Names'][0].lstrip('/')}")
        for network in networks:
            with told(f"remove the network {network['Name']}"), contextlib.suppress(NotFound):
                self.api.remove_network(network["Id"])
            removed.append(f"the network {network['Name']}")
        return removed

    # -- what is done to a container -----------------------------------------------------------------------------

    def state(self, container: str) -> Mapping[str, Any]:
        """What the engine knows of a container's state. Raises :class:`EngineError` when there is no such container."""
        with told(f"tell the state of the container {container:.12}"):
            return dict(self.api.inspect_container(container)["State"])

    def stop(self, container: str, grace_s: float) -> None:
        """SIGTERM, ``grace_s`` of patience, then SIGKILL."""
        with told("stop a container"):
            self.api.stop(container, timeout=round(grace_s))

    def kill(self, container: str) -> None:
        """SIGKILL of all that runs in it; returns when it has ended. Nothing happens to one that has."""
        with told("kill a container"), contextlib.suppress(APIError):  # 409: it does not run
            self.api.kill(container)
        self.await_end(container)

    def await_end(self, container: str) -> None:
        """Return when it has ended."""
        with told("see a container end"):
            self.api.wait(container, timeout=_TIMEOUT_S)

    def pause(self, container: str) -> None:
        """Freeze all that runs in it, at once."""
        with told("pause a container"):
            self.api.pause(container)

    def unpause(self, container: str) -> None:
        """Let it go on."""
        with told("unpause a container"):
            self.api.unpause(container)

    def limit_cpus(self, container: str, cpus: float | None) -> None:
        """So many CPUs from now on; ``None``: as many as there are."""
        with told("limit a container's CPUs"):
            self.api.update_container(container, **(_cpu_quota(cpus) or {"cpu_quota": -1}))

    def limit_memory(self, container: str, memory_bytes: int) -> None:
        """So much memory from now on, and no swap beside it."""
        with told("limit a container's memory"):
            self.api.update_container(container, **_memory_limit(memory_bytes))

    def disconnect(self, container: str, network: str) -> None:
        """Take it off a network. What was published there is closed."""
        with told("disconnect a container"):
            self.api.disconnect_container_from_network(container, network)

    def connect_to(self, container: str, network: str) -> None:
        """Put it on a network; its ports are published again under their numbers."""
        with told("connect a container"):
            self.api.connect_container_to_network(container, network)

    def statistics(self, container: str) -> Mapping[str, Any]:
        """What the engine counts of a container now. Raises :class:`EngineError`."""
        with told("tell a container's statistics"):
            return dict(self.api.stats(container, stream=False, one_shot=True, decode=False))

    def output(self, container: str) -> str:
        """What the engine itself has caught of a container's output: of a program that could not be started."""
        with told("tell a container's output"):
            said: bytes = self.api.logs(container, tail=20)
        return said.decode("utf-8", "replace").strip()

    def run_briefly(self, image: str, argv: list[str]) -> str:
        """The standard output of a program in a container of its own, without a network, that is removed at once.

        Raises :class:`EngineError` with what it said when it fails.
        """
        with told(f"run a program in {image:.24}"):
            container = self.api.create_container(
                image,
                argv,
                entrypoint=[],
                host_config=self.api.create_host_config(network_mode="none", cap_drop=["ALL"]),
                labels={IMAGE: "question"},
                healthcheck={"test": ["NONE"]},
            )["Id"]
        try:
            with told(f"run a program in {image:.24}"):
                self.api.start(container)
                status = self.api.wait(container, timeout=_TIMEOUT_S)["StatusCode"]
                said: bytes = self.api.logs(container, stdout=True, stderr=status != 0)
        finally:
            self.remove(container)
        if status != 0:
            raise EngineError(
                f"a program in the image {image:.24} ended with {status}", detail=said.decode("utf-8", "replace")
            )
        return said.decode("utf-8")


def _cpu_quota(cpus: float | None) -> dict[str, int]:
    # Not NanoCpus: the engine refuses to change the one when the other was set.
    return {} if cpus is None else {"cpu_period": _CPU_PERIOD_US, "cpu_quota": max(1000, round(cpus * _CPU_PERIOD_US))}


def _memory_limit(memory_bytes: int | None) -> dict[str, int]:
    return {} if memory_bytes is None else {"mem_limit": memory_bytes, "memswap_limit": memory_bytes}
