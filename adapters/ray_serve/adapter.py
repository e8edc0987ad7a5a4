"""Ray Serve as a contestant: how its server is started, asked, measured from inside, and stopped.

Two instances on one machine keep apart by their ports, by a folder of their own for Ray's session and for HAProxy's
sockets, and by Ray's access token. What they cannot move is tried again or given up by Ray itself: replicas look for
a port from 30000 on, and of the dashboard agent's (52365) only the first instance has one; nothing here uses it.

Ray's gRPC ports and its metrics, and HAProxy's metrics and statistics, listen on all interfaces; Ray has no option for
that. The token guards the gRPC ports. Everything that takes requests listens on the address asked for.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import psutil
from pydantic import BaseModel

from adapters.ray_serve import config
from adapters.ray_serve.metrics import Metrics
from harness.adapter import (
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    MetricSample,
    ProcessHost,
    Replica,
    Tuning,
    WireProtocol,
)
from harness.codecs import RawHTTP
from harness.errors import DeployError, InputError, ServerError
from harness.processes import ProcessRef, descendants, free_ports, log_tail

_TITLE = re.compile(rf"ray::ServeReplica:(?P<model>[^:]+):{config.DEPLOYMENT}\b")
_PREFIX = "ray-"
_SOCKET_PATH_BYTES = 107
_FOLDER = f"/{_PREFIX}12345678"
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_HAPROXY_SOCKET = f"/{'0' * 56}/a.1234567.tmp"
"""In a folder named after the node; HAProxy makes it under a temporary name first."""
_HEALTH_TIMEOUT_S = 1.0
_METRICS_TIMEOUT_S = 5.0
_REPORT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Ports:
    """In the order in which a request names them."""

    http: int
    metrics: int
    haproxy_metrics: int
    haproxy_statistics: int
    fallback: int
    """Of the Python proxy that stands by behind HAProxy."""


_PORTS = len(fields(_Ports))


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
    ) -> None:
        super().__init__(host, process, endpoint, log)
        self._request = request
        self._ports = ports
        self._folder = folder
        self._models = list(request.models)
        self._haproxy = config.behind_haproxy(request)
        self._metrics = Metrics()

    def claims_ready(self) -> bool:
        """Serve has said that every application runs, its proxy routes to each, and ``/-/healthz`` answers 200.

        ``/-/healthz`` alone proves little: behind HAProxy it is 200 before any application is there, and afterwards as
        long as one replica of one application answers its proxy's checks. A replica that is stopped or busy for long
        changes nothing in it.
        """
        if not _control_socket(self._folder).exists() or not self.process.alive():
            return False
        try:
            return self._get("/-/healthz")[0] == 200 and set(self._models) <= self._routed()
        except OSError:
            return False

    def replicas(self) -> list[Replica]:
        """The replica processes, oldest first, by the title that Ray gives them."""
        found = []
        for reference, process in descendants(self.process):
            try:
                title = _TITLE.match(" ".join(process.cmdline()))
            except psutil.Error:
                continue
            if title:
                found.append(Replica(f"{title['model']}-{reference.pid}", title["model"], reference))
        return sorted(found, key=lambda replica: (replica.process.started_ticks, replica.name))

    def scrape(self) -> list[MetricSample]:
        """Ray's metrics per model, one to two seconds old, and HAProxy's, which are of this moment.

        Sizes of batches are counted from the histogram's buckets (its sum is an estimate of Ray's), whose bounds this
        adapter sets so that every size up to 64 has one of its own. Behind HAProxy requests wait inside the replicas,
        in no metric of their own: ``queue_depth`` is what HAProxy has open less what Ray says the replicas work on,
        so it is off by what has changed within Ray's delay. ``replicas`` is known behind HAProxy alone. Ray writes
        all that it has, half a megabyte: each scrape costs the server some 50 ms of one core.
        """
        haproxy_page = None
        if self._haproxy:
            haproxy_page = self._page(self._ports.haproxy_metrics, "/metrics?scope=backend&scope=server")
        return self._metrics.read(self._models, self._page(self._ports.metrics, "/metrics"), haproxy_page)

    def applied(self) -> dict[str, object]:
        """From Serve's controller and, for batching, one replica of each model; should models disagree, a knob's value
        lists what they say."""
        return config.knobs_in(self._ask({"do": "report"}, _REPORT_TIMEOUT_S))

    def load_model(self, model: str) -> None:
        """Deploy one more application; returns when Serve says that it runs and the proxy routes to it."""
        self._ask({"do": "load", "application": config.application(self._request, model)}, RayServe.start_timeout_s)
        self._await_route(model, there=True)
        if model not in self._models:
            self._models.append(model)

    def unload_model(self, model: str) -> None:
        """Delete the application; returns when the proxy has no route to it: behind HAProxy that is after its replicas
        have drained, 30 s in which they still answer."""
        if model in self._models:
            self._models.remove(model)
        self._ask({"do": "unload", "model": model}, RayServe.start_timeout_s)
        self._await_route(model, there=False)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server, and remove its folder of sockets and sessions."""
        super().stop(grace_s)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _routed(self) -> set[str]:
        status, body = self._get("/-/routes")
        return set(json.loads(body).values()) if status == 200 else set()

    def _await_route(self, model: str, *, there: bool) -> None:
        deadline = time.monotonic() + RayServe.start_timeout_s
        while True:
            with contextlib.suppress(OSError):
                if (model in self._routed()) is there:
                    return
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"ray_serve did not {'add' if there else 'remove'} the route to the model {model!r} "
                    f"within {RayServe.start_timeout_s:.0f} s",
                    detail=log_tail(self.log),
                )
            time.sleep(0.05)

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

    def _get(self, path: str, *, port: int | None = None, timeout_s: float = _HEALTH_TIMEOUT_S) -> tuple[int, bytes]:
        """Status and body. Raises ``OSError`` when there is no whole answer in time."""
        connection = http.client.HTTPConnection(self.endpoint.host, port or self.endpoint.port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer to GET {path}: {error!r}") from error
        finally:
            connection.close()

    def _page(self, port: int, path: str) -> str:
        status, body = self._get(path, port=port, timeout_s=_METRICS_TIMEOUT_S)
        if status != 200:
            raise OSError(f"{self.endpoint.host}:{port}{path} answers {status}")
        return body.decode("utf-8", "replace")


class RayServe(Adapter):
    """The adapter. Ports, in order: HTTP, Ray's metrics, HAProxy's metrics, HAProxy's statistics, fallback proxy."""

    name: ClassVar[str] = "ray_serve"
    title: ClassVar[str] = "Ray Serve"
    homepage: ClassVar[str] = "https://docs.ray.io/en/latest/serve/"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http",)
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
    exposes: ClassVar[str] = (
        "Ray's gRPC ports (guarded by a token), its metrics and HAProxy's listen on all interfaces while it runs"
    )
    start_timeout_s: ClassVar[float] = 180.0

    def refusals(self, tuning: Tuning, options: BaseModel) -> list[str]:
        """Combinations: a batch window without batches, a fixed number of replicas that is to change."""
        refusals = super().refusals(tuning, options)
        if tuning.batch_window_ms is not None and tuning.max_batch is None:
            refusals.append(
                "ray_serve has no place for `batch_window_ms` without `max_batch`: "
                "only a function under @serve.batch batches, and nothing would wait"
            )
        if tuning.autoscale is not None and tuning.replicas is not None:
            refusals.append(
                "ray_serve has no place for `replicas` beside `autoscale`: "
                "a deployment has either num_replicas or autoscaling_config"
            )
        return refusals

    def render(self, request: DeployRequest) -> dict[str, str]:
        """``serve.json``, a configuration in Serve's own schema, and ``ray.json``: ``ray.init`` and the environment."""
        return config.files(request)

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start a Ray head with Serve in it."""
        ports = _ports(request)
        folder = _short_folder(request, host)
        (folder / "ray").mkdir()
        (folder / "token").write_text(secrets.token_hex(32), encoding="ascii")
        log = request.workdir / "logs" / "ray_serve.log"
        process = host.spawn(
            "ray_serve",
            [
                str(request.environment.python),
                str(self.folder / "server.py"),
                f"--config={request.workdir / 'config'}",
                f"--temp-dir={folder / 'ray'}",
                f"--control={_control_socket(folder)}",
                f"--port={ports.http}",
                f"--metrics-port={ports.metrics}",
            ],
            env=_environment(request, ports, folder),
            cwd=request.workdir,
            log=log,
        )
        inputs, outputs = request.workload.spec.inputs, request.workload.spec.outputs
        codec = RawHTTP(request.host, ports.http, config.ROUTE, inputs, outputs)
        endpoint = Endpoint("http", request.host, ports.http, codec)
        return RayServeDeployment(host, process, endpoint, log, request=request, ports=ports, folder=folder)


def _ports(request: DeployRequest) -> _Ports:
    if not request.ports:
        return _Ports(*free_ports(_PORTS, request.host))
    if len(set(request.ports)) != _PORTS:
        names = ", ".join(field.name for field in fields(_Ports))
        raise InputError(f"ray_serve takes {_PORTS} ports ({names}), not {list(request.ports)}")
    for port in request.ports:
        # Ray would start everything else first, and then wait a minute for its proxy.
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((request.host, port))
            except OSError as error:
                raise DeployError(
                    f"ray_serve cannot listen on {request.host}:{port}: {error.strerror}",
                    remedy="end what uses that port, choose another, or leave the ports out to get free ones",
                ) from error
    return _Ports(*request.ports)


def _short_folder(request: DeployRequest, host: ProcessHost) -> Path:
    """A folder with room in its name for those of Ray's and HAProxy's sockets: in ``scratch`` if that is short."""
    longest = len(_FOLDER) + max(len(_RAY_SOCKET), len(_HAPROXY_SOCKET))
    if len(os.fsencode(request.scratch)) + longest <= _SOCKET_PATH_BYTES:
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=request.scratch))
    folder = Path(tempfile.mkdtemp(prefix="tailrace-", dir="/tmp"))
    host.remove_later(folder)
    return folder


def _control_socket(folder: Path) -> Path:
    return folder / "control"


def _environment(request: DeployRequest, ports: _Ports, folder: Path) -> dict[str, str]:
    """The whole environment of the server: nothing of the harness's own reaches it but what is named here."""
    names = ["HOME", "CUDA_VISIBLE_DEVICES"]
    if request.workload.device == "cuda":
        names.append("LD_LIBRARY_PATH")  # in some containers the driver is found through it alone
    return {
        **{name: os.environ[name] for name in names if name in os.environ},
        "LANG": "C.UTF-8",
        "PATH": f"{request.environment.bin}:/usr/local/bin:/usr/bin:/bin",
        "TMPDIR": str(request.scratch),
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
        **request.server_env,
    }


ADAPTER = RayServe()
"""Ray Serve on a Ray of its own on this machine."""
