"""A running server: what an adapter is given to start it, and what the harness may then ask of it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from tailrace.harness.contract.codecs import Codec, WireProtocol
from tailrace.harness.contract.environment import ServerEnvironment
from tailrace.harness.contract.multiplexing import MemoryPlan
from tailrace.harness.contract.process_host import ProcessHost
from tailrace.harness.contract.tuning import Tuning
from tailrace.harness.contract.workload import ArtifactKind, PreparedWorkload, StageSpec
from tailrace.harness.errors import DeployError, ServerError, StorageError
from tailrace.harness.processes import ProcessRef, log_tail

_POLL_S = 0.02


@dataclass(frozen=True)
class DeployRequest:
    """Everything an adapter needs to know to bring a server up.

    ``workdir`` is the trial's own folder for this server: the rendered configuration goes to ``workdir/config``,
    logs to ``workdir/logs``; both are kept with the run. ``scratch`` is a short path for sockets and temporary
    files; it is removed after the trial, whatever happens. ``server_env`` are environment variables that
    the workload's model needs (the emulated device's folder, for one): every server process must get them.
    """

    workload: PreparedWorkload
    models: tuple[str, ...]
    """To be loaded at the start; others of the artifact may follow through :meth:`Deployment.load_model`."""
    tuning: Tuning
    options: BaseModel
    protocol: WireProtocol
    environment: ServerEnvironment
    workdir: Path
    scratch: Path
    server_env: Mapping[str, str]
    host: str = "127.0.0.1"
    ports: tuple[int, ...] = ()
    """Ports to use, in the order of :attr:`Adapter.port_names`; empty: choose free ones."""
    nodes: int = 1
    """Of how many nodes a framework with a cluster of its own (:attr:`Adapter.own_cluster`) is to make it. Others are
    deployed once for each node, each time with 1."""
    devices: int = 1
    """How many devices each node has; its processes see no others."""
    node_envs: tuple[Mapping[str, str], ...] = ()
    """With a cluster of its own: what each node's processes must get on top of ``server_env``, by the node's index."""
    memory: MemoryPlan | None = None
    """Of a framework that says itself which models are in a memory that does not hold them all
    (:attr:`Adapter.residency`): what it goes by."""
    stages: tuple[StageSpec, ...] = ()
    """The stages of a pipeline that the framework is to compose itself (:attr:`Adapter.composes`), each run by a ``Stage`` of
    ``workload.model_file``; empty: its ``Model`` is all there is to serve."""
    artifact: ArtifactKind = "python"
    """What to serve, of those in :attr:`Adapter.artifacts`: ``workload.model_file``, or the file ``workload.exported``."""

    @property
    def listen(self) -> str:
        """The address that a server has to listen on for its ports to be reached on ``host``: in a container all of its
        own, since they are published on ``host`` and nowhere else."""
        return "0.0.0.0" if self.environment.image else self.host  # noqa: S104 - inside a container

    def write_config(self, files: Mapping[str, str]) -> None:
        """Write rendered files: path below ``workdir/config`` → text. Raises :class:`StorageError`."""
        for name, text in files.items():
            path = self.workdir / "config" / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise StorageError.of(path, error) from error


@dataclass(frozen=True)
class Endpoint:
    """Where and how requests go: the codec turns tensors into the bytes of a whole request and answers into tensors."""

    protocol: WireProtocol
    host: str
    port: int
    codec: Codec


@dataclass(frozen=True)
class Replica:
    """One copy of a model that can be found in the process table (and so be killed or paused)."""

    name: str
    model: str
    process: ProcessRef


@dataclass(frozen=True)
class Node:
    """One server process tree: what dies as a whole when a machine does. ``process`` is its root, started through
    :meth:`ProcessHost.spawn`."""

    name: str
    process: ProcessRef


NODE_NAME = "node-{index}"
"""The name of a node by its index, which stays the same when it is restarted."""


@dataclass(frozen=True)
class HealthCheck:
    """What a load balancer asks a node: ``GET path`` on one of the adapter's ports (by its name in ``port_names``),
    answered with 200 by a node that is to get requests."""

    port: str
    path: str


@dataclass(frozen=True)
class MetricSample:
    """One reading of a server's own metrics under a canonical name.

    Canonical names: ``queue_depth`` (requests waiting), ``in_flight`` (requests inside the server),
    ``batch_size`` (mean since the last scrape where the server gives counters), ``replicas`` (that can answer), and the counters
    ``requests_ok_total``, ``requests_failed_total``, ``batches_total``, ``items_total``. ``scope`` is the model or "server".

    Of a pipeline's stages, whose name is then the scope: ``stage_answers_total`` (requests that the stage has answered) and
    ``stage_answer_s_total`` (their time in it, from being asked to having answered, all together, in seconds).
    """

    metric: str
    value: float
    scope: str = "server"
    unit: str = "1"


class Deployment(ABC):
    """A running server. Made by :meth:`Adapter.deploy`; everything on it must be cheap enough to call every 100 ms."""

    endpoint: Endpoint
    process: ProcessRef
    log: Path

    def __init__(self, host: ProcessHost, process: ProcessRef, endpoint: Endpoint, log: Path) -> None:
        self.host = host
        self.process = process
        self.endpoint = endpoint
        self.log = log
        self.notes: list[str] = []
        """What a reader of this server's figures must know of this very start; kept with the trial as warnings."""

    @abstractmethod
    def claims_ready(self) -> bool:
        """Whether the framework says that every model can answer, by the best of what it offers to say so. Never raises."""

    def health(self) -> bool:
        """Capability: the framework's plainest health check, the one that a load balancer would ask; it may lie. Never
        raises."""
        raise CapabilityMissingError("health")

    def replicas(self) -> list[Replica]:
        """Capability: the model workers alive now. Overriding it is what makes ``kill_replica`` possible."""
        raise CapabilityMissingError("replicas")

    def nodes(self) -> list[Node]:
        """The nodes that live, by index. A framework with a cluster of its own tells them; others are one."""
        return [Node(NODE_NAME.format(index=0), self.process)] if self.process.alive() else []

    def restart_node(self, index: int) -> None:
        """Of a framework with a cluster of its own: start a node that has ended again, under its name; returns at once."""
        raise CapabilityMissingError("restart_node")

    def scrape(self) -> list[MetricSample]:
        """Capability: the server's own metrics under canonical names. Raises ``OSError`` when it cannot be reached."""
        raise CapabilityMissingError("scrape")

    def applied(self) -> dict[str, object]:
        """Capability: the neutral knobs as the running server reports them; knobs that it does not report are left out."""
        raise CapabilityMissingError("applied")

    def load_model(self, model: str) -> None:
        """Capability: load a model of the artifact at run time; returns when the server says it is ready."""
        raise CapabilityMissingError("load_model")

    def unload_model(self, model: str) -> None:
        """Capability: unload a model at run time; returns when the server no longer answers for it."""
        raise CapabilityMissingError("unload_model")

    def scale(self, replicas: int) -> None:
        """Capability: have so many replicas of every model from now on; returns when the server says it has them."""
        raise CapabilityMissingError("scale")

    def check_alive(self) -> None:
        """Raise :class:`DeployError` with the log's tail when the server's main process has gone."""
        if not self.process.alive():
            how = self.host.ending(self.process)
            raise DeployError(
                "the server's main process has ended" + (f": {how}" if how else ""),
                remedy=f"read the log: {self.log}",
                detail=log_tail(self.log),
            )

    def wait_for(self, reached: Callable[[], bool], purpose: str, timeout_s: float) -> None:
        """Poll until something that the server was told to do is done.

        Raises :class:`ServerError` with the log's tail when it takes longer, and whatever :meth:`check_alive` raises.
        """
        deadline = time.monotonic() + timeout_s
        while not reached():
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(f"the server did not {purpose} within {timeout_s:.0f} s", detail=log_tail(self.log))
            time.sleep(_POLL_S)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server and everything that it started; once ended, there is nothing more to do."""
        self.host.stop_tree(self.process, grace_s)


class CapabilityMissingError(Exception):
    """The adapter does not have this capability; never seen by users, because plans are checked against capabilities first."""


CAPABILITIES = ("health", "replicas", "scrape", "applied", "load_model", "unload_model", "scale")
