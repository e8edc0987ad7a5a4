"""Triton as a contestant: how its server is started, asked, measured from inside, and stopped."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from adapters.triton.config import flags, knobs_in, model_files
from harness.adapter import (
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    MetricSample,
    ProcessHost,
    Replica,
    ServerEnvironment,
    Tuning,
    WireProtocol,
)
from harness.codecs import OpenInferenceGRPC, OpenInferenceHTTP
from harness.errors import DeployError, InputError, ServerError
from harness.processes import ProcessRef, descendants, free_ports, log_tail

_STUB = "triton_python_backend_stub"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
_PROBE_TIMEOUT_S = 60.0
_CONTROL_TIMEOUT_S = 1.0
"""For health, configuration and metrics. A wedged server accepts the connection and then says nothing."""

# Run in the server's interpreter: where the wheel lies, and where that interpreter's shared library may lie.
_PROBE = """
import importlib.util, json, os, sys, sysconfig
spec = importlib.util.find_spec("pytriton")
libdir = sysconfig.get_config_var("LIBDIR") or ""
print(json.dumps({
    "pytriton": spec.submodule_search_locations[0] if spec else None,
    "version": "%d.%d" % sys.version_info[:2],
    "folders": [
        libdir,
        os.path.join(libdir, sysconfig.get_config_var("MULTIARCH") or ""),
        os.path.join(sys.base_prefix, "lib"),
    ],
}))
"""


@dataclass(frozen=True)
class _Bundle:
    """The parts of the wheel and of the interpreter that a server needs."""

    server: Path
    """``pytriton/tritonserver`` in the environment's site-packages."""
    stub: Path
    """The backend's worker program, one per Python version."""
    library_path: tuple[Path, ...]
    """Folders for ``LD_LIBRARY_PATH``: without the second, workers miss libcudart and the server hangs silently."""

    @classmethod
    def find(cls, environment: ServerEnvironment) -> _Bundle:
        """Ask the environment's interpreter. Raises :class:`DeployError` when something is missing."""
        python = environment.python
        try:
            answer = subprocess.run(
                [python, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
            )
            found = json.loads(answer.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise DeployError(
                f"{python} does not run: {error}",
                remedy="use an environment with a working Python interpreter",
                detail=str(getattr(error, "stderr", None) or "") or None,
            ) from error
        if found["pytriton"] is None:
            raise DeployError(
                f"{python} has no package nvidia-pytriton, which carries the server",
                remedy="use `environment: venv`, or install adapters/triton/requirements.txt into that interpreter",
            )
        version = found["version"]
        server = Path(found["pytriton"]) / "tritonserver"
        stub = server / "python_backend_stubs" / version / _STUB
        if not stub.is_file():
            versions = sorted(path.name for path in stub.parent.parent.glob("3.*"))
            raise DeployError(
                f"the nvidia-pytriton of {python} has no backend worker for Python {version}",
                remedy=f"use a Python among {', '.join(versions) or '(none: the wheel is damaged, reinstall it)'}",
            )
        library = f"libpython{version}.so.1.0"
        folder = next((Path(f) for f in found["folders"] if f and (Path(f) / library).is_file()), None)
        if folder is None:
            raise DeployError(
                f"{python} comes without {library}, which Triton's backend workers load",
                remedy="use a Python that was built with --enable-shared "
                f"(on Debian and Ubuntu: install the package libpython{version})",
                detail=f"looked in {', '.join(f for f in found['folders'] if f)}",
            )
        return cls(server, stub, (folder, server.parent.parent / "nvidia_pytriton.libs"))

    def place_backend(self, folder: Path) -> None:
        """Lay out a backend directory with the Python backend and the worker that fits the interpreter."""
        shutil.copytree(self.server / "backends" / "python", folder / "python", dirs_exist_ok=True)
        shutil.copy(self.stub, folder / "python" / _STUB)


class TritonDeployment(Deployment):
    """A running tritonserver; control goes over its HTTP port, whichever protocol is measured."""

    def __init__(
        self,
        host: ProcessHost,
        process: ProcessRef,
        endpoint: Endpoint,
        log: Path,
        *,
        request: DeployRequest,
        http_port: int,
        metrics_port: int,
        shared_memory_prefix: str,
    ) -> None:
        super().__init__(host, process, endpoint, log)
        self._request = request
        self._http_port = http_port
        self._metrics_port = metrics_port
        self._shared_memory_prefix = shared_memory_prefix
        self._models = list(request.models)
        self._last_counts: dict[str, tuple[float, float]] = {}

    def claims_ready(self) -> bool:
        """``/v2/health/ready`` and the ``ready`` of every loaded model."""
        try:
            server_ready = self._ask("GET", "/v2/health/ready")[0] == 200
        except OSError:
            return False
        return server_ready and all(self._says_ready(model) for model in self._models)

    def replicas(self) -> list[Replica]:
        """The backend's worker processes, oldest first, named as Triton names its instances (``MODEL_0_1``)."""
        workers = []
        for reference, process in descendants(self.process):
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            # STUB MODEL_REPOSITORY/MODEL/1/model.py REGION SIZE GROWTH PARENT BACKENDS CONTROL INSTANCE RUNTIME
            if len(command) > 8 and Path(command[0]).name == _STUB:
                workers.append(Replica(command[8], Path(command[1]).parts[-3], reference))
        return sorted(workers, key=lambda worker: (worker.process.started_ticks, worker.name))

    def scrape(self) -> list[MetricSample]:
        """Triton's metrics per model.

        What a full queue refuses is in none of its counters; what waited too long counts as failed.
        """
        status, body = self._ask("GET", "/metrics", port=self._metrics_port)
        if status != 200:
            raise OSError(f"{self.endpoint.host}:{self._metrics_port}/metrics answers {status}")
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for family in text_string_to_metric_families(body.decode("utf-8", "replace")):
            for sample in family.samples:
                if (model := sample.labels.get("model")) is not None:  # summed over versions and failure reasons
                    # The family's name, for the parser renames the samples of counters.
                    totals[model][family.name] += sample.value
        samples = []
        for model, total in totals.items():
            items, batches = total["nv_inference_count"], total["nv_inference_exec_count"]
            samples += [
                MetricSample("queue_depth", total["nv_inference_pending_request_count"], model),
                MetricSample("requests_ok_total", total["nv_inference_request_success"], model),
                MetricSample("requests_failed_total", total["nv_inference_request_failure"], model),
                MetricSample("batches_total", batches, model),
                MetricSample("items_total", items, model),
            ]
            last_items, last_batches = self._last_counts.get(model, (0.0, 0.0))
            if batches > last_batches:  # neither idle nor counting anew after a reload
                samples.append(MetricSample("batch_size", (items - last_items) / (batches - last_batches), model))
            self._last_counts[model] = (items, batches)
        return samples

    def applied(self) -> dict[str, object]:
        """From ``/v2/models/MODEL/config``; should loaded models disagree, a knob's value lists what they say."""
        values: dict[str, list[object]] = defaultdict(list)
        for model in self._models:
            path = f"/v2/models/{model}/config"
            for knob, value in knobs_in(json.loads(self._expect_ok("GET", path))).items():
                if value not in values[knob]:
                    values[knob].append(value)
        return {knob: found[0] if len(found) == 1 else found for knob, found in values.items()}

    def load_model(self, model: str) -> None:
        """Write the model's folder if it has none, load it, and wait until its ``ready`` says so."""
        for path, text in model_files(self._request, model).items():
            file = self._request.workdir / "config" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        self._expect_ok("POST", f"/v2/repository/models/{model}/load", timeout_s=Triton.start_timeout_s)
        self._await_model(model, ready=True)
        if model not in self._models:
            self._models.append(model)

    def unload_model(self, model: str) -> None:
        """Unload and wait until the model's ``ready`` denies it."""
        if model in self._models:
            self._models.remove(model)
        self._expect_ok("POST", f"/v2/repository/models/{model}/unload", timeout_s=Triton.start_timeout_s)
        self._await_model(model, ready=False)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server, and remove the shared memory that a killed worker or server has left."""
        super().stop(grace_s)
        for region in _SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            region.unlink(missing_ok=True)

    def _await_model(self, model: str, *, ready: bool) -> None:
        deadline = time.monotonic() + Triton.start_timeout_s
        while self._says_ready(model) is not ready:
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"triton did not {'load' if ready else 'unload'} the model {model!r} "
                    f"within {Triton.start_timeout_s:.0f} s",
                    detail=log_tail(self.log),
                )
            time.sleep(0.01)

    def _says_ready(self, model: str) -> bool | None:
        """What the server says of one model; ``None`` when it says nothing."""
        try:
            return self._ask("GET", f"/v2/models/{model}/ready")[0] == 200
        except OSError:
            return None

    def _expect_ok(self, method: str, path: str, timeout_s: float = _CONTROL_TIMEOUT_S) -> bytes:
        try:
            status, body = self._ask(method, path, timeout_s=timeout_s)
        except OSError as error:
            raise ServerError(
                f"triton gives no answer to {method} {path}: {error}", detail=log_tail(self.log)
            ) from error
        if status != 200:
            raise ServerError(f"triton answers {status} to {method} {path}: {body.decode('utf-8', 'replace')}")
        return body

    def _ask(
        self, method: str, path: str, *, port: int | None = None, timeout_s: float = _CONTROL_TIMEOUT_S
    ) -> tuple[int, bytes]:
        """Status and body. Raises ``OSError`` when there is no whole answer in time."""
        connection = http.client.HTTPConnection(self.endpoint.host, port or self._http_port, timeout=timeout_s)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer to {method} {path}: {error!r}") from error
        finally:
            connection.close()


class Triton(Adapter):
    """The adapter. Ports, in order: HTTP, gRPC, metrics."""

    name: ClassVar[str] = "triton"
    title: ClassVar[str] = "NVIDIA Triton"
    homepage: ClassVar[str] = "https://github.com/triton-inference-server/server"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http", "grpc")
    deployment_type: ClassVar[type[Deployment]] = TritonDeployment
    knobs: ClassVar[dict[str, str]] = {
        "max_batch": "max_batch_size",
        "batch_window_ms": "dynamic_batching.max_queue_delay_microseconds",
        "replicas": "instance_group.count",
        "queue_limit": "dynamic_batching.default_queue_policy.max_queue_size",
        "server_timeout_s": "dynamic_batching.default_queue_policy.default_timeout_microseconds",
    }
    refused: ClassVar[dict[str, str]] = {"autoscale": "external scaler only"}

    def refusals(self, tuning: Tuning, options: BaseModel) -> list[str]:
        """Beside autoscaling: a batch window without batches, for Triton's own default is not to batch."""
        refusals = super().refusals(tuning, options)
        if tuning.batch_window_ms is not None and tuning.max_batch is None:
            refusals.append(
                "triton has no place for `batch_window_ms` without `max_batch`: "
                "unless told a largest batch it does not batch, and nothing would wait"
            )
        return refusals

    def render(self, request: DeployRequest) -> dict[str, str]:
        """A model repository under ``models/``, and the flags that every start of this configuration shares."""
        files = {"tritonserver.args": "\n".join(flags(request)) + "\n"}
        for model in request.models:
            files |= model_files(request, model)
        return files

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start tritonserver in the folder of the rendered configuration."""
        bundle = _Bundle.find(request.environment)
        http_port, grpc_port, metrics_port = _ports(request)
        backends = request.scratch / "backends"
        bundle.place_backend(backends)
        prefix = f"tailrace_triton_{secrets.token_hex(8)}_"
        host.remove_later(_SHARED_MEMORY / f"{prefix}*")
        log = request.workdir / "logs" / "tritonserver.log"
        process = host.spawn(
            "tritonserver",
            [
                str(bundle.server / "bin" / "tritonserver"),
                *flags(request),
                f"--backend-directory={backends}",
                f"--backend-config=python,shm-region-prefix-name={prefix}",
                f"--http-port={http_port}",
                f"--grpc-port={grpc_port}",
                f"--metrics-port={metrics_port}",
            ],
            env=_environment(request, bundle),
            cwd=request.workdir / "config",
            log=log,
        )
        inputs, outputs = request.workload.spec.inputs, request.workload.spec.outputs
        if request.protocol == "http":
            codec = OpenInferenceHTTP(request.host, http_port, inputs, outputs)
            endpoint = Endpoint("http", request.host, http_port, codec)
        else:
            endpoint = Endpoint("grpc", request.host, grpc_port, OpenInferenceGRPC(inputs, outputs))
        return TritonDeployment(
            host,
            process,
            endpoint,
            log,
            request=request,
            http_port=http_port,
            metrics_port=metrics_port,
            shared_memory_prefix=prefix,
        )


def _ports(request: DeployRequest) -> tuple[int, int, int]:
    if not request.ports:
        http_port, grpc_port, metrics_port = free_ports(3, request.host)
        return http_port, grpc_port, metrics_port
    if len(set(request.ports)) != 3:
        raise InputError(f"triton takes three ports (HTTP, gRPC, metrics), not {list(request.ports)}")
    for port in request.ports:
        # The server would load its models first and only then find out.
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((request.host, port))
            except OSError as error:
                raise DeployError(
                    f"triton cannot listen on {request.host}:{port}: {error.strerror}",
                    remedy="end what uses that port, choose another, or leave the ports out to get free ones",
                ) from error
    http_port, grpc_port, metrics_port = request.ports
    return http_port, grpc_port, metrics_port


def _environment(request: DeployRequest, bundle: _Bundle) -> dict[str, str]:
    """The whole environment of the server: nothing of the harness's own reaches it but what is named here."""
    library_path = [str(folder) for folder in bundle.library_path]
    if request.workload.device == "cuda" and (inherited := os.environ.get("LD_LIBRARY_PATH")):
        library_path.append(inherited)  # in some containers the driver is found through it alone
    kept = {name: os.environ[name] for name in ("HOME", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    return {
        **kept,
        "LANG": "C.UTF-8",
        # The worker's embedded interpreter finds its site-packages through the first `python3` on the path.
        "PATH": f"{request.environment.bin}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": ":".join(library_path),
        "TMPDIR": str(request.scratch),
        **request.server_env,
    }


ADAPTER = Triton()
