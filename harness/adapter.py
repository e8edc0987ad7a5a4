"""What an adapter must do to let a serving framework race, and what it may add.

An adapter is a folder ``adapters/NAME`` (or a package that declares an entry point in the group
``tailrace.adapters``) whose ``adapter.py`` holds an instance of a subclass of :class:`Adapter` as ``ADAPTER``. It must render
the neutral tuning into the framework's native configuration, deploy it, give an endpoint, and stop. Whatever else a
framework can do is a capability: a method that the adapter overrides.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.codecs import Codec
from harness.errors import DeployError
from harness.processes import ProcessRef, log_tail
from harness.workload import PreparedWorkload

WireProtocol = Literal["http", "grpc"]


class Autoscale(BaseModel):
    """Scaling by queue depth: keep about ``target_ongoing`` requests per replica, within ``min`` and ``max`` replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    min: int = Field(ge=0)
    max: int = Field(ge=1)
    target_ongoing: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscale:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class Tuning(BaseModel):
    """The neutral knobs. ``None`` leaves the framework's own default alone; ``Tuning()`` is ``tuning: defaults``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    max_batch: int | None = Field(default=None, ge=1)
    batch_window_ms: float | None = Field(default=None, ge=0)
    replicas: int | None = Field(default=None, ge=1)
    queue_limit: int | None = Field(default=None, ge=1)
    server_timeout_s: float | None = Field(default=None, gt=0)
    autoscale: Autoscale | None = None

    def chosen(self) -> dict[str, object]:
        """The knobs that are set, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}


class NoOptions(BaseModel):
    """For adapters without options of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class ServerEnvironment:
    """The interpreter that a server runs in (built by :mod:`harness.environments`)."""

    python: Path
    kind: str
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed distributions and their versions, for the manifest."""

    @property
    def bin(self) -> Path:
        """The folder of the interpreter's scripts."""
        return self.python.parent


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
    tuning: Tuning
    options: BaseModel
    protocol: WireProtocol
    environment: ServerEnvironment
    workdir: Path
    scratch: Path
    server_env: Mapping[str, str]
    host: str = "127.0.0.1"
    ports: tuple[int, ...] = ()
    """Ports to use, in the adapter's own documented order; empty: choose free ones."""


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
class MetricSample:
    """One reading of a server's own metrics under a canonical name.

    Canonical names: ``queue_depth`` (requests waiting), ``in_flight`` (requests inside the server),
    ``batch_size`` (mean since the last scrape where the server gives counters), ``replicas`` (that can answer), and the counters
    ``requests_ok_total``, ``requests_failed_total``, ``batches_total``, ``items_total``. ``scope`` is the model or "server".
    """

    metric: str
    value: float
    scope: str = "server"
    unit: str = "1"


class ProcessHost(Protocol):
    """Who owns the processes of a run (the guardian): adapters start and signal servers through it alone."""

    def spawn(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> ProcessRef:
        """Start a process in a session of its own, stdout and stderr to ``log``. ``env`` is its whole environment."""

    def signal(self, process: ProcessRef, signal_number: int) -> bool:
        """Send a signal to this very process; False when it has gone already."""

    def stop_tree(self, process: ProcessRef, grace_s: float) -> None:
        """End a process and all that it started: SIGTERM, ``grace_s`` of patience, then SIGKILL; returns when none is left."""

    def remove_later(self, path: Path | str) -> None:
        """Remove this file, folder or glob pattern when the run ends, however it ends."""


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

    @abstractmethod
    def claims_ready(self) -> bool:
        """Whether the framework's own health interface says that every model can answer. Never raises."""

    def replicas(self) -> list[Replica]:
        """Capability: the model workers alive now. Overriding it is what makes ``kill_replica`` possible."""
        raise CapabilityMissingError("replicas")

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

    def check_alive(self) -> None:
        """Raise :class:`DeployError` with the log's tail when the server's main process has gone."""
        if not self.process.alive():
            raise DeployError(
                "the server's main process has ended",
                remedy=f"read the log: {self.log}",
                detail=log_tail(self.log),
            )

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server and everything that it started."""
        self.host.stop_tree(self.process, grace_s)


class CapabilityMissingError(Exception):
    """The adapter does not have this capability; never seen by users, because plans are checked against capabilities first."""


CAPABILITIES = ("replicas", "scrape", "applied", "load_model", "unload_model")


class Adapter(ABC):
    """One serving framework."""

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    protocols: ClassVar[tuple[WireProtocol, ...]]
    """The first one is the default."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    """The adapter's own options (``options: {NAME: …}`` in an experiment), every field with a description."""
    deployment_type: ClassVar[type[Deployment]]
    knobs: ClassVar[Mapping[str, str]]
    """Neutral knob → the native key that it lands in."""
    refused: ClassVar[Mapping[str, str]]
    """Neutral knob → why this framework has no place for it. Every knob is in exactly one of the two."""
    exposes: ClassVar[str] = ""
    """What of this server listens beyond loopback and cannot be told not to; printed, and kept with the run."""
    start_timeout_s: ClassVar[float] = 120.0
    """How long a start may take before it counts as failed."""

    @property
    def folder(self) -> Path:
        """The adapter's own folder."""
        return Path(inspect.getfile(type(self))).parent

    @property
    def requirements(self) -> Path:
        """The lock file of the server's environment."""
        return self.folder / "requirements.txt"

    def refusals(self, tuning: Tuning, options: BaseModel) -> list[str]:
        """Why this framework cannot express that tuning, one sentence per knob; empty when it can."""
        return [
            f"{self.name} has no place for `{knob}`: {self.refused[knob]}"
            for knob in tuning.chosen()
            if knob in self.refused
        ]

    def capabilities(self) -> list[str]:
        """The capabilities that this adapter's deployments override, in the order of :data:`CAPABILITIES`."""
        return [name for name in CAPABILITIES if getattr(self.deployment_type, name) is not getattr(Deployment, name)]

    @abstractmethod
    def render(self, request: DeployRequest) -> dict[str, str]:
        """The native configuration as files: path below ``workdir/config`` → text. Pure: nothing is started or written."""

    @abstractmethod
    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start the server and return at once; readiness is polled by the caller. ``render``'s files are already in place."""
