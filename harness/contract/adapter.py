"""What an adapter must do to let a serving framework race, and what it may add.

An adapter is a folder ``adapters/NAME`` (or a package that declares an entry point in the group
``tailrace.adapters``) whose ``adapter.py`` holds an instance of a subclass of :class:`Adapter` as ``ADAPTER``. It must render
the neutral tuning into the framework's native configuration, deploy it, give an endpoint, and stop. Whatever else a
framework can do is a capability: a method that the adapter overrides.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tailrace.harness.contract.codecs import Codec
from tailrace.harness.contract.multiplexing import MemoryPlan, Policy
from tailrace.harness.contract.workload import ArtifactKind, PreparedWorkload, StageSpec
from tailrace.harness.errors import DeployError, ServerError, StorageError
from tailrace.harness.processes import ProcessRef, log_tail

WireProtocol = Literal["http", "grpc"]

_POLL_S = 0.02
_INTERPRETER_TIMEOUT_S = 60.0


class Autoscale(BaseModel):
    """Scaling by queue depth: keep about ``target_ongoing`` requests per replica, within ``min`` and ``max`` replicas.

    How quickly: requests are averaged over ``averaged_over_s``, and one replica more or fewer must have been wanted for
    ``up_after_s`` or ``down_after_s``; ``None`` leaves the framework's own default alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    min: int = Field(ge=0)
    max: int = Field(ge=1)
    target_ongoing: float = Field(gt=0)
    up_after_s: float | None = Field(default=None, ge=0)
    down_after_s: float | None = Field(default=None, ge=0)
    averaged_over_s: float | None = Field(default=None, gt=0)

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
    """The interpreter that a server runs in (built by :mod:`tailrace.harness.servers.environments`)."""

    python: Path
    kind: str
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed distributions and their versions, for the manifest."""
    image: str = ""
    """Of kind ``docker``: the id of the image, in which ``python`` is a path."""

    @property
    def bin(self) -> Path:
        """The folder of the interpreter's scripts."""
        return self.python.parent

    def ask(self, program: str) -> Any:
        """What a program prints as JSON in this interpreter, isolated from the user's settings and folder.

        Raises :class:`DeployError` when the interpreter does not run, and :class:`EngineError` when that is one of an image.
        """
        try:
            answer = subprocess.run(
                [self.python, "-I", "-c", program],
                capture_output=True,
                text=True,
                timeout=_INTERPRETER_TIMEOUT_S,
                check=True,
            )
            return json.loads(answer.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise DeployError(
                f"{self.python} does not run: {error}",
                remedy="use an environment with a working Python interpreter",
                detail=str(getattr(error, "stderr", None) or "") or None,
            ) from error


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


class ProcessHost(Protocol):
    """Who owns the processes of a run (the guardian): adapters start and signal servers through it alone."""

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
        """Start a process in a session of its own, stdout and stderr to ``log``. ``env`` is its whole environment. Where it
        runs in a container, ``ports`` are those that are published: all that the harness asks it on."""

    def signal(self, process: ProcessRef, signal_number: int) -> bool:
        """Send a signal to this very process; False when it has gone already."""

    def stop_tree(self, process: ProcessRef, grace_s: float) -> None:
        """End a process and all that it started: SIGTERM, ``grace_s`` of patience, then SIGKILL; returns when none is left."""

    def kill_tree(self, process: ProcessRef) -> bool:
        """SIGKILL a spawned process and all that it started, at once; returns when none is left, False when there was
        nothing."""

    def signal_tree(self, process: ProcessRef, signal_number: int) -> int:
        """Send a signal to a spawned process and all that it started; returns how many got it."""

    def limit_cpus(self, process: ProcessRef, cpus: float | None) -> None:
        """Let a spawned process and all that it started have so many CPUs together; ``None``: as many as there are.

        Raises :class:`TailraceError` where control groups cannot be used.
        """

    def remove_later(self, path: Path | str) -> None:
        """Remove this file, folder or glob pattern when the run ends, however it ends. A folder that exists is one that
        processes spawned from now on use beside those of the request."""

    def ending(self, process: ProcessRef) -> str | None:
        """How a spawned process ended, in words, as far as that is known."""


class Containers(ProcessHost, Protocol):
    """A process host whose processes run in containers, one for each that was spawned."""

    def limit_memory(self, process: ProcessRef, memory_bytes: int | None) -> None:
        """Let a container have so much memory; ``None``: as much as before. Raises :class:`TailraceError`."""

    def disconnect(self, process: ProcessRef) -> None:
        """Take a container off its network. Raises :class:`TailraceError`."""

    def reconnect(self, process: ProcessRef) -> None:
        """Put it back, with the ports that it had. Raises :class:`TailraceError`."""


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

AXES = {
    "batching": "how it batches",
    "scaling": "what it scales on",
    "models": "models per device",
    "pipelines": "how it composes stages",
    "kubernetes": "Kubernetes depth",
}
"""The axes on which people compare serving frameworks, in words."""


NEEDS: Mapping[str, str] = {
    "hosted": "somebody else runs the servers",
    "scale-to-zero": "no replica, and no cost, while nobody asks; on Kubernetes",
    "canary": "a new version gets a share of the traffic first; on Kubernetes",
    "python-pipeline": "several models and business rules, composed in Python",
    "one-model": "one optimised model, as much throughput for each device as can be had",
}
"""What may decide for a framework before any figure does."""


class Adapter(ABC):
    """One serving framework."""

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    protocols: ClassVar[tuple[WireProtocol, ...]]
    """The first one is the default."""
    port_names: ClassVar[tuple[str, ...]]
    """What each of its ports is for, in the order of ``DeployRequest.ports``."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    """The adapter's own options (``options: {NAME: …}`` in an experiment), every field with a description."""
    deployment_type: ClassVar[type[Deployment]]
    knobs: ClassVar[Mapping[str, str]]
    """Neutral knob → the native key that it lands in."""
    refused: ClassVar[Mapping[str, str]]
    """Neutral knob → why this framework has no place for it. Every knob is in exactly one of the two."""
    traits: ClassVar[Mapping[str, str]] = {}
    """Where the framework stands on each of :data:`AXES`, a sentence each. A claim: what a machine shows stands beside it
    (:mod:`tailrace.harness.contract.observations`)."""
    serves_needs: ClassVar[Mapping[str, str]] = {}
    """Of :data:`NEEDS`, those for which the framework is the usual choice, and why: what `tailrace recommend` goes by."""
    composes: ClassVar[bool] = False
    """Whether ``deploy`` heeds ``request.stages``; where it does not, the trait ``pipelines`` says why."""
    residency: ClassVar[Mapping[Policy, str]] = {}
    """Policies by which the framework itself says which of many models are in memory → the native key. Empty: it has none, and
    the harness's controller loads and unloads through its management interface."""
    artifacts: ClassVar[tuple[ArtifactKind, ...]] = ("python",)
    """What ``deploy`` heeds as ``request.artifact``. An export is run by the server itself: ``replicas`` finds no process that
    could be hit alone."""
    no_mig: ClassVar[str] = ""
    """Why a server cannot be given a MIG instance, which has a UUID and no number; empty: it can."""
    approximate: ClassVar[Mapping[str, str]] = {}
    """Canonical metric → why this server's figure is not exact."""
    exposes: ClassVar[str] = ""
    """What of this server listens beyond loopback and cannot be told not to; printed, and kept with the run."""
    baseline: ClassVar[bool] = False
    """Whether it is what the frameworks are measured against, and none itself."""
    deals_out_gpus: ClassVar[bool] = False
    """Whether one of its servers spreads its replicas over all GPUs that it sees (``DeployRequest.devices``)."""
    own_cluster: ClassVar[bool] = False
    """Whether several nodes are a cluster of the framework's own, with a way in of its own, rather than servers behind
    the harness's load balancer. ``deploy`` then heeds ``request.nodes``, and ``nodes`` and ``restart_node`` are there."""
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

    @property
    def dockerfile(self) -> Path:
        """What the image of ``environment: docker`` is made by; without this file there is none."""
        return self.folder / "Dockerfile"

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """Why this framework cannot express that tuning: knob → a sentence; empty when it can."""
        return {
            knob: f"{self.name} has no place for `{knob}`: {self.refused[knob]}"
            for knob in tuning.chosen()
            if knob in self.refused
        }

    def composition_refusal(self) -> str | None:
        """Why this framework cannot compose the stages of a pipeline; ``None`` when it can."""
        if self.composes:
            return None
        reason = self.traits.get("pipelines", "its adapter does not say how it would")
        return f"{self.name} cannot compose the stages of a pipeline: {reason}"

    def multiplexing_refusal(self, plan: MemoryPlan, tuning: Tuning, protocol: WireProtocol) -> str | None:
        """Why this framework cannot serve many models from a memory that does not hold them all; ``None`` when it can."""
        if tuning.autoscale is not None or (tuning.replicas or 1) > 1:
            return f"each model of {self.name} in memory has one replica: set `tuning.replicas: 1`, and no `autoscale`"
        if self.residency:
            known = ", ".join(self.residency)
            return None if plan.policy in self.residency else f"{self.name} knows only the policy {known}"
        if missing := [name for name in ("load_model", "unload_model") if name not in self.capabilities()]:
            return f"{self.name} has no policy of its own, and its adapter not the capability `{'`, `'.join(missing)}`"
        if protocol != "http":
            return (
                f"{self.name} has no policy of its own, and the harness's controller speaks HTTP: leave `protocol` out"
            )
        return None

    def artifact_refusal(self, artifact: ArtifactKind, environment: ServerEnvironment | None = None) -> str | None:
        """Why this framework, or its server in that very environment, cannot serve an export; ``None`` when it can."""
        if artifact in self.artifacts:
            return None
        return f"{self.name} has no place for `artifact: {artifact}`: it serves a model by its Python code alone"

    def expressible(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> tuple[Tuning, dict[str, str]]:
        """As much of a tuning as this framework can express, and why the rest was left out, by knob."""
        left_out: dict[str, str] = {}
        # A knob may have a place only beside another one: what is left is asked about again.
        while refusals := self.refusals(tuning, options, protocol):
            left_out |= refusals
            tuning = tuning.model_copy(update=dict.fromkeys(refusals))
        return tuning, left_out

    def described(self) -> dict[str, object]:
        """What it claims, for manifests and listings: JSON."""
        return {
            "title": self.title,
            "homepage": self.homepage,
            "protocols": list(self.protocols),
            "knobs": dict(self.knobs),
            "refused": dict(self.refused),
            "capabilities": self.capabilities(),
            "traits": dict(self.traits),
            "composes": self.composes,
            "residency": dict(self.residency),
            "approximate": dict(self.approximate),
            "exposes": self.exposes,
            "baseline": self.baseline,
        }

    def capabilities(self) -> list[str]:
        """The capabilities that this adapter's deployments override, in the order of :data:`CAPABILITIES`."""
        return [name for name in CAPABILITIES if getattr(self.deployment_type, name) is not getattr(Deployment, name)]

    @abstractmethod
    def render(self, request: DeployRequest) -> dict[str, str]:
        """The native configuration as files: path below ``workdir/config`` → text. Pure: nothing is started or written."""

    @abstractmethod
    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start the server and return at once; readiness is polled by the caller. ``render``'s files are already in place."""

    def start(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Write the rendered configuration below ``workdir/config``, and deploy. Raises :class:`StorageError` when it cannot
        be written, and what ``deploy`` raises."""
        for name, text in self.render(request).items():
            path = request.workdir / "config" / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise StorageError.of(path, error) from error
        return self.deploy(request, host)

    def health_check(self, protocol: WireProtocol) -> HealthCheck | None:
        """How a load balancer asks a node whether it may get requests, while that protocol is served; ``None``: none can."""
        return None

    def fault_refusals(self, tuning: Tuning) -> dict[str, str]:
        """Which faults cannot be done to this framework although it has the capabilities for them: kind → why."""
        return {}
