"""Ray Serve as a contestant: how its server is started, asked, measured from inside, and stopped.

Two instances on one machine keep apart by their ports, by a folder of their own for Ray's session and for HAProxy's
sockets, and by Ray's access token. What they cannot move is tried again or given up by Ray itself: replicas look for
a port from 30000 on, and of the dashboard agent's (52365) only the first instance has one; nothing here uses it.

Of several nodes the head is a server process that holds no replicas, and each worker node a ``ray start`` in a process
tree of its own, with a folder of its own for its session, in the environment of its own devices.

Ray's gRPC ports and its metrics, and HAProxy's metrics and statistics, listen on all interfaces; Ray has no option for
that. The token guards the gRPC ports. Everything that takes requests listens on the address asked for.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import psutil
from pydantic import BaseModel

from tailrace.adapters.ray_serve import config
from tailrace.adapters.ray_serve.metrics import Metrics
from tailrace.harness.contract.adapter import (
    NODE_NAME,
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    MetricSample,
    Node,
    ProcessHost,
    Replica,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.control import (
    TIMEOUT_S,
    ControlConnection,
    choose_ports,
    process_environment,
    raw_endpoint,
    recognised,
    socket_folder,
)
from tailrace.harness.contract.multiplexing import MIB, MemoryPlan, Policy
from tailrace.harness.errors import DeployError, ServerError
from tailrace.harness.processes import ProcessRef, free_ports, inner_pid, log_tail

_TITLE = re.compile(r"ray::ServeReplica:(?P<model>[^:]+):(?P<deployment>[\w-]+)")
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_HAPROXY_SOCKET = f"/{'0' * 56}/a.1234567.tmp"
"""In a folder named after the node; HAProxy makes it under a temporary name first."""
_OF_THE_WHOLE = ("in_flight", "replicas", "requests_ok_total", "requests_failed_total")
"""Metrics that mean the same of a pipeline that Serve composes as of one model."""
_METRICS_TIMEOUT_S = 5.0
_REPORT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Ports:
    """One for each of the adapter's ``port_names``."""

    http: int
    metrics: int
    haproxy_metrics: int
    haproxy_statistics: int
    fallback: int
    """Of the Python proxy that stands by behind HAProxy."""


@dataclass(frozen=True)
class _WorkerNode:
    """How one worker node is started, each time."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    folder: Path
    """Its session's: sockets, logs, and what it spills."""
    metrics_port: int
    log: Path


class RayServeDeployment(Deployment):
    """A running Ray Serve; control goes over the server process's own socket and Serve's HTTP port."""

    def __init__(
        self,
        host: ProcessHost,
        process: ProcessRef,
        endpoint: Endpoint,
        log: Path,
        *,
        request: DeployRequest,
        ports: _Ports,
        folder: Path,
        worker_nodes: Sequence[_WorkerNode] = (),
    ) -> None:
        super().__init__(host, process, endpoint, log)
        self._request = request
        self._serve = ControlConnection("ray_serve", endpoint.host, endpoint.port, log)
        self._ray_metrics = ControlConnection("ray_serve", endpoint.host, ports.metrics, log)
        self._node_metrics = [
            ControlConnection("ray_serve", endpoint.host, node.metrics_port, node.log) for node in worker_nodes
        ]
        self._haproxy_metrics = ControlConnection("ray_serve", endpoint.host, ports.haproxy_metrics, log)
        self._folder = folder
        self._applications = config.applications(request)
        self._haproxy = config.behind_haproxy(request)
        self._metrics = Metrics()
        self._worker_nodes = worker_nodes
        self._node_processes = [self._spawn(node) for node in worker_nodes]

    def claims_ready(self) -> bool:
        """Serve has said that every application runs, its proxy routes to each, and ``/-/healthz`` answers 200. Of several
        nodes all are there at this moment, and no replica is missing."""
        if not _control_socket(self._folder).exists() or not self.process.alive():
            return False
        try:
            return self.health() and set(self._applications) <= self._routed() and self._whole()
        except (OSError, ServerError, DeployError):
            return False

    def health(self) -> bool:
        """``/-/healthz``: behind HAProxy it is 200 before any application is there, and afterwards as long as one replica of
        one application answers its proxy's checks. A replica that is stopped or busy for long changes nothing in it."""
        return bool(self._serve.says_ok("/-/healthz"))

    def replicas(self) -> list[Replica]:
        """The replica processes, oldest first, by the title that Ray gives them. One that holds many models is called after
        their application."""
        return recognised([self.process, *self._node_processes], _replica)

    def nodes(self) -> list[Node]:
        """The worker nodes that live; the only node when there is but one, which is head and worker."""
        if not self._worker_nodes:
            return super().nodes()
        return [
            Node(node.name, process)
            for node, process in zip(self._worker_nodes, self._node_processes, strict=True)
            if process.alive()
        ]

    def restart_node(self, index: int) -> None:
        """Start a worker node again, as after a machine's reboot: of its last session nothing is left."""
        node = self._worker_nodes[index]
        self.host.kill_tree(self._node_processes[index])
        shutil.rmtree(node.folder, ignore_errors=True)
        self._node_processes[index] = self._spawn(node)

    def scrape(self) -> list[MetricSample]:
        """Ray's metrics per model, one to two seconds old, and HAProxy's, which are of this moment.

        Sizes of batches are counted from the histogram's buckets (its sum is an estimate of Ray's), whose bounds this
        adapter sets so that every size up to 64 has one of its own. Models that share a memory are told of together, as one
        application. Behind HAProxy requests wait inside the replicas,
        in no metric of their own: ``queue_depth`` is what HAProxy has open less what Ray says the replicas work on,
        so it is off by what has changed within Ray's delay. ``replicas`` is known behind HAProxy alone. Ray writes
        all that it has, half a megabyte: each scrape costs the server some 50 ms of one core, and as much for each
        worker node.
        """
        haproxy_page = None
        if self._haproxy:
            path = "/metrics?scope=backend&scope=server"
            haproxy_page = self._haproxy_metrics.page(path, timeout_s=_METRICS_TIMEOUT_S)
        ray_pages = [self._ray_metrics.page("/metrics", timeout_s=_METRICS_TIMEOUT_S)]
        for node in self._node_metrics:
            with contextlib.suppress(OSError):  # a node may be down
                ray_pages.append(node.page("/metrics"))
        readings = self._metrics.read(self._applications, "\n".join(ray_pages), haproxy_page)
        if self._request.stages:
            # Batches are those of single stages, in which requests wait, too, in no metric: the stages' clocks tell.
            readings = [reading for reading in readings if reading.metric in _OF_THE_WHOLE]
        return readings

    def applied(self) -> dict[str, object]:
        """From Serve's controller and, for batching, one replica of each model; should models disagree, a knob's value
        lists what they say."""
        return config.knobs_in(self._ask({"do": "report"}, _REPORT_TIMEOUT_S), self._request.nodes)

    def load_model(self, model: str) -> None:
        """Deploy one more application; returns when Serve says that it runs and the proxy routes to it.

        Raises :class:`ServerError` where models share a memory: they come when they are asked for, by Serve's own policy.
        """
        self._refuse_if_multiplexed(model)
        self._ask({"do": "load", "application": config.application(self._request, model)}, RayServe.start_timeout_s)
        self.wait_for(lambda: self._has_route(model) is True, f"add the route to {model!r}", RayServe.start_timeout_s)
        if model not in self._applications:
            self._applications.append(model)

    def unload_model(self, model: str) -> None:
        """Delete the application; returns when the proxy has no route to it: behind HAProxy that is after its replicas
        have drained, 30 s in which they still answer. Raises :class:`ServerError` as :meth:`load_model`."""
        self._refuse_if_multiplexed(model)
        if model in self._applications:
            self._applications.remove(model)
        self._ask({"do": "unload", "model": model}, RayServe.start_timeout_s)
        gone = f"remove the route to {model!r}"
        self.wait_for(lambda: self._has_route(model) is False, gone, RayServe.start_timeout_s)

    def scale(self, replicas: int) -> None:
        """Deploy every application with another ``num_replicas``, which leaves the replicas that stay alone; returns when
        Serve says that all run.

        ``replicas`` are those of each node. Of several nodes Serve replaces every replica, one after the other, since
        ``max_replicas_per_node`` changes as well; behind HAProxy each of them drains for 35 s first.
        """
        self._ask({"do": "scale", "replicas": replicas}, RayServe.start_timeout_s)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server, and remove its folder of sockets and sessions.

        Worker nodes are killed: told to end, Ray would drain each for up to half a minute.
        """
        for process in self._node_processes:
            self.host.kill_tree(process)
        super().stop(grace_s)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _refuse_if_multiplexed(self, model: str) -> None:
        if self._request.memory is not None:
            raise ServerError(f"ray_serve itself says when {model!r} comes into memory and goes: @serve.multiplexed")

    def _spawn(self, node: _WorkerNode) -> ProcessRef:
        return self.host.spawn(node.name, node.argv, env=node.env, cwd=self._request.workdir, log=node.log)

    def _whole(self) -> bool:
        if not self._worker_nodes:
            return True
        # Ray takes 5 to 15 s to miss a node and its replicas.
        if len(self.nodes()) < len(self._worker_nodes):
            return False
        running = self._ask({"do": "whole"}, TIMEOUT_S)
        return running is not None and set(running) <= {inner_pid(replica.process) for replica in self.replicas()}

    def _routed(self) -> set[str]:
        status, body = self._serve.ask("GET", "/-/routes")
        return set(json.loads(body).values()) if status == 200 else set()

    def _has_route(self, model: str) -> bool | None:
        """Whether the proxy routes to a model; ``None`` when it does not say."""
        try:
            return model in self._routed()
        except OSError:
            return None

    def _ask(self, question: Mapping[str, Any], timeout_s: float) -> Any:
        """Ask the server process. Raises :class:`ServerError` with what Ray says when it cannot do as asked."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(timeout_s)
                connection.connect(str(_control_socket(self._folder)))
                connection.sendall(json.dumps(question).encode() + b"\n")
                said = json.loads(connection.makefile("rb").readline())
        except (OSError, ValueError) as error:
            self.check_alive()
            raise ServerError(
                f"ray_serve gives no answer to {question['do']!r}: {error}", detail=log_tail(self.log)
            ) from error
        if "error" in said:
            raise ServerError(f"ray_serve cannot {question['do']}: {said['error']}")
        return said["answer"]


def _replica(reference: ProcessRef, process: psutil.Process) -> Replica | None:
    if (title := _TITLE.match(" ".join(process.cmdline()))) is None:
        return None
    model, stage = title["model"], title["deployment"]
    name = model if stage == config.DEPLOYMENT else f"{model}-{stage}"
    return Replica(f"{name}-{reference.pid}", model, reference)


class RayServe(Adapter):
    """The adapter."""

    name: ClassVar[str] = "ray_serve"
    deals_out_gpus: ClassVar[bool] = True
    title: ClassVar[str] = "Ray Serve"
    homepage: ClassVar[str] = "https://docs.ray.io/en/latest/serve/"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http",)
    port_names: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(_Ports))
    Options: ClassVar[type[BaseModel]] = config.Options
    deployment_type: ClassVar[type[Deployment]] = RayServeDeployment
    knobs: ClassVar[Mapping[str, str]] = {
        "max_batch": "@serve.batch max_batch_size, with max_ongoing_requests twice that",
        "batch_window_ms": "@serve.batch batch_wait_timeout_s",
        "replicas": "num_replicas",
        "queue_limit": "max_queued_requests (of each replica behind HAProxy, of the Python proxy otherwise)",
        "server_timeout_s": "http_options.request_timeout_s",
        "autoscale": "autoscaling_config",
    }
    refused: ClassVar[Mapping[str, str]] = {}
    serves_needs: ClassVar[Mapping[str, str]] = {
        "python-pipeline": "deployments are Python classes that call each other, each scaled by itself",
    }
    traits: ClassVar[Mapping[str, str]] = {
        "batching": "in each replica: @serve.batch around a method of the user's class, up to `max_batch_size` or until "
        "`batch_wait_timeout_s` has passed; off by default",
        "scaling": "ongoing requests per replica (`target_ongoing_requests`), decided by Serve's own controller",
        "models": "many: one application per model, or `@serve.multiplexed` within a replica; a device is shared by giving "
        "each replica a fraction of it",
        "kubernetes": "KubeRay's RayService: the cluster of Ray scales its pods, Serve the replicas in them",
        "pipelines": "in Python: a deployment for each stage with replicas of its own, called through handles by the one that "
        "takes the requests",
    }
    composes: ClassVar[bool] = True
    residency: ClassVar[Mapping[Policy, str]] = {
        "lru": "@serve.multiplexed max_num_models_per_replica: of each replica, so many models whatever their sizes",
    }
    approximate: ClassVar[Mapping[str, str]] = {
        "queue_depth": "behind HAProxy it is what HAProxy has open less what Ray said a second or two ago",
    }
    exposes: ClassVar[str] = (
        "Ray's gRPC ports (guarded by a token), its metrics and HAProxy's listen on all interfaces while it runs"
    )
    own_cluster: ClassVar[bool] = True
    start_timeout_s: ClassVar[float] = 180.0

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """Combinations: a batch window without batches, a fixed number of replicas that is to change."""
        refusals = super().refusals(tuning, options, protocol)
        if tuning.batch_window_ms is not None and tuning.max_batch is None:
            refusals["batch_window_ms"] = (
                "ray_serve has no place for `batch_window_ms` without `max_batch`: "
                "only a function under @serve.batch batches, and nothing would wait"
            )
        if tuning.autoscale is not None and tuning.replicas is not None:
            refusals["replicas"] = (
                "ray_serve has no place for `replicas` beside `autoscale`: "
                "a deployment has either num_replicas or autoscaling_config"
            )
        return refusals

    def multiplexing_refusal(self, plan: MemoryPlan, tuning: Tuning, protocol: WireProtocol) -> str | None:
        """Serve has one policy, which counts models, in each replica by itself."""
        if tuning.autoscale is not None:
            return "the replicas of ray_serve share the memory evenly, so their number must not change: no `autoscale`"
        if plan.policy not in self.residency:
            return f"ray_serve knows only the policy {', '.join(self.residency)}"
        if plan.pinned:
            return "ray_serve pins no model: @serve.multiplexed evicts whichever was asked for longest ago"
        replicas = tuning.replicas or 1
        if not config.models_per_replica(plan, replicas):
            largest = max(plan.sizes.values())
            return (
                f"each of {replicas} replicas of ray_serve must have room for the largest model by itself: "
                f"{replicas} × {largest / MIB:g} MiB are more than {plan.budget_bytes / MIB:g}"
            )
        return None

    def render(self, request: DeployRequest) -> dict[str, str]:
        """``serve.json``, a configuration in Serve's own schema, and ``ray.json``: ``ray.init`` and the environment."""
        return config.files(request)

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start a Ray head with Serve in it and, of several nodes, those that will join it."""
        ports = _Ports(*choose_ports(self, request))
        folder = socket_folder(request, host, prefix="ray-", longest=max(len(_RAY_SOCKET), len(_HAPROXY_SOCKET)))
        (folder / "ray").mkdir()
        (folder / "token").write_text(secrets.token_hex(32), encoding="ascii")
        env = _environment(request, ports, folder)
        log = request.workdir / "logs" / "ray_serve.log"
        worker_nodes = self._worker_nodes(request, folder, env) if request.nodes > 1 else []
        process = host.spawn(
            "ray_serve",
            [
                str(request.environment.python),
                str(self.folder / "server.py"),
                f"--config={request.workdir / 'config'}",
                f"--temp-dir={folder / 'ray'}",
                f"--head={_head_address(folder)}",
                f"--control={_control_socket(folder)}",
                f"--port={ports.http}",
                f"--metrics-port={ports.metrics}",
            ],
            env=env,
            cwd=request.workdir,
            log=log,
            # In containers the worker nodes share the network of this first one.
            ports=(*astuple(ports), *(node.metrics_port for node in worker_nodes)),
        )
        named = {} if request.memory is None else {config.MODEL_HEADER: "{model}"}
        return RayServeDeployment(
            host,
            process,
            raw_endpoint(request, ports.http, config.ROUTE, named),
            log,
            request=request,
            ports=ports,
            folder=folder,
            worker_nodes=worker_nodes,
        )

    def _worker_nodes(self, request: DeployRequest, folder: Path, env: Mapping[str, str]) -> list[_WorkerNode]:
        nodes = []
        for index, metrics_port in enumerate(free_ports(request.nodes, request.host)):
            name = NODE_NAME.format(index=index)
            session = folder / str(index)
            argv = (
                str(request.environment.python),
                str(self.folder / "node.py"),
                f"--config={request.workdir / 'config'}",
                f"--head={_head_address(folder)}",
                f"--temp-dir={session}",
                f"--metrics-port={metrics_port}",
            )
            own_env = request.node_envs[index] if request.node_envs else {}
            log = request.workdir / "logs" / f"{name}.log"
            nodes.append(_WorkerNode(name, argv, {**env, **own_env}, session, metrics_port, log))
        return nodes


def _control_socket(folder: Path) -> Path:
    return folder / "control"


def _head_address(folder: Path) -> Path:
    """The file in which worker nodes find where the head listens, which chooses its port itself."""
    return folder / "head"


def _environment(request: DeployRequest, ports: _Ports, folder: Path) -> dict[str, str]:
    """The whole environment of the server: nothing of the harness's own reaches it but what is named here."""
    return {
        **process_environment(request),
        **config.environment(request),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),
    }


ADAPTER = RayServe()
"""Ray Serve on a Ray of its own on this machine."""
