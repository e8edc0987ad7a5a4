"""Triton as a contestant: how its server is started, asked, measured from inside, and stopped."""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import shutil
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import psutil
from pydantic import BaseModel

from tailrace.adapters.triton.config import (
    NATIVE,
    batching_parts,
    flags,
    is_ensemble,
    knobs_in,
    model_files,
    parts,
    script_instances,
    stage_model,
)
from tailrace.harness.contract.adapter import (
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    HealthCheck,
    MetricSample,
    ProcessHost,
    Replica,
    ServerEnvironment,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.control import (
    BatchCounts,
    ControlConnection,
    OpenInferenceControl,
    agreed,
    choose_ports,
    open_inference_endpoint,
    process_environment,
    recognised,
)
from tailrace.harness.contract.workload import ArtifactKind
from tailrace.harness.errors import DeployError, StorageError
from tailrace.harness.processes import ProcessRef

_STUB = "triton_python_backend_stub"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
_TEMPORARY = Path("/tmp")  # noqa: S108 - fixed in the Python backend, which does not ask for TMPDIR
_STUB_ENVIRONMENTS = "python_env_*"

_INSTALLED = "/opt/tritonserver"
"""Where the vendor's images have the server, and this adapter's too."""

# Run in the server's interpreter, which may be in an image: where an installed server, the wheel and the worker that fits the
# interpreter lie, and the interpreter's shared library.
_PROBE = f"""
import glob, importlib.util, json, os, sys, sysconfig
def existing(paths):
    return next((path for path in paths if os.path.isfile(path)), None)
version = "%d.%d" % sys.version_info[:2]
spec = importlib.util.find_spec("pytriton")
server = spec.submodule_search_locations[0] + "/tritonserver" if spec else ""
installed = os.path.isfile("{_INSTALLED}/bin/tritonserver")
libraries = glob.glob(("{_INSTALLED}" if installed else server) + "/backends/*/libtriton_*.so")
stubs = server + "/python_backend_stubs/"
libdir = sysconfig.get_config_var("LIBDIR") or ""
folders = [libdir, os.path.join(libdir, sysconfig.get_config_var("MULTIARCH") or ""), os.path.join(sys.base_prefix, "lib")]
print(json.dumps({{
    "installed": installed,
    "backends": sorted(os.path.basename(path)[len("libtriton_"):-len(".so")] for path in libraries),
    "wheel": server,
    "version": version,
    "stub": existing([stubs + version + "/{_STUB}"]),
    "stub_versions": sorted(os.path.basename(path) for path in glob.glob(stubs + "3.*")),
    "library": existing(os.path.join(folder, "libpython%s.so.1.0" % version) for folder in folders if folder),
    "folders": [folder for folder in folders if folder],
}}))
"""


@dataclass(frozen=True)
class _Bundle:
    """The parts of the wheel and of the interpreter that a server needs."""

    server: Path
    """``pytriton/tritonserver`` in the environment's site-packages, or where a server is installed."""
    stub: Path | None
    """The backend's worker program, one per Python version; ``None``: the installed server has it in place."""
    libraries: tuple[Path, ...]
    """Folders for ``LD_LIBRARY_PATH``: without the second, workers miss libcudart and the server hangs silently."""

    backend_names: tuple[str, ...]
    """The backends that the server came with."""

    @classmethod
    def find(cls, environment: ServerEnvironment) -> _Bundle:
        """Ask the environment's interpreter. Raises :class:`DeployError` when something is missing."""
        python = environment.python
        found = environment.ask(_PROBE)
        names = tuple(found["backends"])
        if found["installed"] and not found["wheel"]:
            return cls(Path(_INSTALLED), None, (), names)  # the vendor's, whose image knows where its libraries are
        if not found["wheel"]:
            raise DeployError(
                f"{python} has no package nvidia-pytriton, which carries the server",
                remedy="use `environment: venv`, or install adapters/triton/requirements.txt into that interpreter",
            )
        version = found["version"]
        if not found["stub"]:
            raise DeployError(
                f"the nvidia-pytriton of {python} has no backend worker for Python {version}",
                remedy=f"use a Python among {', '.join(found['stub_versions']) or '(none: the wheel is damaged, reinstall it)'}",
            )
        if not found["library"]:
            raise DeployError(
                f"{python} comes without libpython{version}.so.1.0, which Triton's backend workers load",
                remedy="use a Python that was built with --enable-shared "
                f"(on Debian and Ubuntu: install the package libpython{version})",
                detail=f"looked in {', '.join(found['folders'])}",
            )
        libraries = (Path(found["library"]).parent, Path(found["wheel"]).parents[1] / "nvidia_pytriton.libs")
        if found["installed"]:
            return cls(Path(_INSTALLED), None, libraries, names)
        return cls(Path(found["wheel"]), Path(found["stub"]), libraries, names)

    def backends(self, folder: Path) -> Path:
        """The backend directory: that of the installed server, else one laid out in ``folder`` with the Python backend and
        the worker that fits the interpreter."""
        if self.stub is None:
            return self.server / "backends"
        shutil.copytree(self.server / "backends" / "python", folder / "python", dirs_exist_ok=True)
        shutil.copy(self.stub, folder / "python" / _STUB)
        return folder


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
        self._control = OpenInferenceControl("triton", endpoint.host, http_port, log)
        self._metrics = ControlConnection("triton", endpoint.host, metrics_port, log)
        self._shared_memory_prefix = shared_memory_prefix
        self._models = list(request.models)
        self._found_environments = frozenset(_TEMPORARY.glob(_STUB_ENVIRONMENTS))
        self._batches = BatchCounts()

    def claims_ready(self) -> bool:
        """``/v2/health/ready`` and the ``ready`` of every loaded model."""
        return self.health() and all(map(self._answers, self._models))

    def health(self) -> bool:
        """``/v2/health/ready``: 200 from before the first model is loaded until the server ends, whatever its workers do."""
        return self._control.ready()

    def replicas(self) -> list[Replica]:
        """The backend's worker processes, oldest first, named as Triton names its instances (``MODEL_0_1``)."""
        return recognised([self.process], _replica)

    def scrape(self) -> list[MetricSample]:
        """Triton's metrics per model.

        What a full queue refuses is in none of its counters; what waited too long counts as failed. A pipeline's stages, where
        Triton composes them, are models with counters of their own, and their batches are not the whole's.
        """
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, sample in self._metrics.samples():
            if (model := sample.labels.get("model")) is not None:  # summed over versions and failure reasons
                totals[model][name] += sample.value
        samples = self._stage_samples(totals)
        for model, total in totals.items():
            samples += [
                MetricSample("queue_depth", total["nv_inference_pending_request_count"], model),
                MetricSample("requests_ok_total", total["nv_inference_request_success"], model),
                MetricSample("requests_failed_total", total["nv_inference_request_failure"], model),
            ]
            if not self._request.stages:
                batches, items = total["nv_inference_exec_count"], total["nv_inference_count"]
                samples += self._batches.samples(model, batches=batches, items=items)
        return samples

    def applied(self) -> dict[str, object]:
        """From ``/v2/models/MODEL/config``; should loaded models disagree, a knob's value lists what they say."""
        asked = [part for model in self._models for part in batching_parts(self._request, model)]
        return agreed(knobs_in(self._control.json(f"/v2/models/{part}/config")) for part in asked)

    def load_model(self, model: str) -> None:
        """Write the model's folder if it has none, load it, and wait until its ``ready`` says so."""
        self._request.write_config(model_files(self._request, model))
        _link_export(self._request, self.host, model)
        for part in parts(self._request, model):
            self._control.load(part, timeout_s=Triton.start_timeout_s)
        self.wait_for(partial(self._answers, model), f"load the model {model!r}", Triton.start_timeout_s)
        if model not in self._models:
            self._models.append(model)

    def unload_model(self, model: str) -> None:
        """Unload and wait until the model's ``ready`` denies it."""
        if model in self._models:
            self._models.remove(model)
        for part in reversed(parts(self._request, model)):
            self._control.unload(part, timeout_s=Triton.start_timeout_s)
        self.wait_for(
            lambda: self._control.model_ready(model) is False, f"unload the model {model!r}", Triton.start_timeout_s
        )

    def scale(self, replicas: int) -> None:
        """Load every model again under its running configuration with another count of instances.

        Instances that stay are kept; new ones start beside them, and requests go on meanwhile.
        """
        request = self._request
        for model in self._models:
            for part in parts(request, model):
                composes = bool(request.stages) and part == model
                if composes and is_ensemble(request):
                    continue  # it has no instances
                config = self._control.json(f"/v2/models/{part}/config")
                for group in config["instance_group"]:
                    group["count"] = script_instances(request, replicas) if composes else replicas
                body = json.dumps({"parameters": {"config": json.dumps(config)}}).encode()
                self._control.load(part, body=body, timeout_s=Triton.start_timeout_s)
                self.wait_for(partial(self._is_ready, part), f"load the model {part!r} again", Triton.start_timeout_s)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server, and remove the shared memory and the empty folder that a killed worker or server has left."""
        super().stop(grace_s)
        for region in _SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            region.unlink(missing_ok=True)
        for folder in set(_TEMPORARY.glob(_STUB_ENVIRONMENTS)) - self._found_environments:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only an empty one: ours always are, for no environment is ever packed into a model

    def _stage_samples(self, totals: dict[str, dict[str, float]]) -> list[MetricSample]:
        """Takes the stages of composed pipelines, and the batches of what composes them, out of the totals."""
        samples = []
        for stage in self._request.stages:
            names = {stage_model(model, stage) for model in (*self._request.models, *self._models)}
            stages = [total for name in names if (total := totals.pop(name, None)) is not None]
            answers = sum(total["nv_inference_request_success"] for total in stages)
            answer_s = sum(total["nv_inference_request_duration_us"] for total in stages) / 1e6
            waiting = sum(total["nv_inference_pending_request_count"] for total in stages)
            samples += [
                MetricSample("stage_answers_total", answers, stage.name),
                MetricSample("stage_answer_s_total", answer_s, stage.name, "s"),
                MetricSample("queue_depth", waiting, stage.name),
            ]
        return samples

    def _answers(self, model: str) -> bool:
        return all(map(self._is_ready, parts(self._request, model)))

    def _is_ready(self, model: str) -> bool:
        return bool(self._control.model_ready(model))


def _replica(reference: ProcessRef, process: psutil.Process) -> Replica | None:
    # STUB MODEL_REPOSITORY/MODEL/1/model.py REGION SIZE GROWTH PARENT BACKENDS CONTROL INSTANCE RUNTIME
    command = process.cmdline()
    if len(command) < 9 or Path(command[0]).name != _STUB:
        return None
    return Replica(command[8], Path(command[1]).parts[-3], reference)


def _link_export(request: DeployRequest, host: ProcessHost, model: str) -> None:
    """Put an exported model into the repository, as a link for the time of the run. Raises :class:`StorageError`."""
    exported = request.workload.exported
    if request.artifact == "python" or exported is None:
        return
    link = request.workdir / "config" / "models" / model / "1" / NATIVE[request.artifact].file
    host.remove_later(link)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # of a server that is started again
        link.symlink_to(exported)
    except OSError as error:
        raise StorageError.of(link, error) from error


class Triton(Adapter):
    """The adapter."""

    name: ClassVar[str] = "triton"
    deals_out_gpus: ClassVar[bool] = True
    title: ClassVar[str] = "NVIDIA Triton"
    homepage: ClassVar[str] = "https://github.com/triton-inference-server/server"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http", "grpc")
    port_names: ClassVar[tuple[str, ...]] = ("HTTP", "gRPC", "metrics")
    deployment_type: ClassVar[type[Deployment]] = TritonDeployment
    knobs: ClassVar[dict[str, str]] = {
        "max_batch": "max_batch_size",
        "batch_window_ms": "dynamic_batching.max_queue_delay_microseconds",
        "replicas": "instance_group.count",
        "queue_limit": "dynamic_batching.default_queue_policy.max_queue_size",
        "server_timeout_s": "dynamic_batching.default_queue_policy.default_timeout_microseconds",
    }
    refused: ClassVar[dict[str, str]] = {"autoscale": "external scaler only"}
    serves_needs: ClassVar[dict[str, str]] = {
        "one-model": "its batcher and backends are native code, and one server holds several instances on a device",
    }
    traits: ClassVar[dict[str, str]] = {
        "batching": "in the server, per model: the dynamic batcher gathers requests up to `max_batch_size`, or until the "
        "oldest has waited its delay; off by default",
        "scaling": "nothing by itself: the number of instances is fixed until the model is loaded again; what watches the "
        "load, and adds servers, is somebody else's",
        "models": "many per server and device, loaded and unloaded through its API, each with its own instances",
        "kubernetes": "none of its own: a container image and health endpoints; KServe and others deploy it",
        "pipelines": "in the server: an ensemble hands tensors from model to model and knows no conditions; where a rule sends "
        "only some items on, a script of the Python backend (BLS) asks the models, and is busy until all have answered",
    }
    composes: ClassVar[bool] = True
    artifacts: ClassVar[tuple[ArtifactKind, ...]] = ("python", *NATIVE)

    def artifact_refusal(self, artifact: ArtifactKind, environment: ServerEnvironment | None = None) -> str | None:
        """By the backends that the environment's server came with: the vendor's images have those for exports, the wheel's
        has the Python backend alone."""
        if artifact == "python" or environment is None:
            return super().artifact_refusal(artifact)
        found, wanted = _Bundle.find(environment).backend_names, NATIVE[artifact].name
        if wanted in found:
            return None
        where = f"image {environment.image}" if environment.image else f"environment {environment.python.parents[1]}"
        return (
            f"the Triton of the {where} has no backend `{wanted}`, which `artifact: {artifact}` needs; it has: "
            f"{', '.join(found) or 'none'}"
        )

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """Beside autoscaling: a batch window without batches, for Triton's own default is not to batch."""
        refusals = super().refusals(tuning, options, protocol)
        if tuning.batch_window_ms is not None and tuning.max_batch is None:
            refusals["batch_window_ms"] = (
                "triton has no place for `batch_window_ms` without `max_batch`: "
                "unless told a largest batch it does not batch, and nothing would wait"
            )
        return refusals

    def health_check(self, protocol: WireProtocol) -> HealthCheck | None:
        """What its documentation gives to load balancers; it lies when workers are dead."""
        return HealthCheck("HTTP", "/v2/health/ready")

    def render(self, request: DeployRequest) -> dict[str, str]:
        """A model repository under ``models/``, and the flags that every start of this configuration shares."""
        files = {"tritonserver.args": "\n".join(flags(request)) + "\n"}
        for model in request.models:
            files |= model_files(request, model)
        return files

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start tritonserver in the folder of the rendered configuration."""
        bundle = _Bundle.find(request.environment)
        http_port, grpc_port, metrics_port = choose_ports(self, request)
        if shlex.quote(str(request.scratch)) != str(request.scratch):
            raise DeployError(
                f"triton starts its workers through a shell and quotes nothing, so it cannot use {str(request.scratch)!r}",
                remedy="set TMPDIR to a folder without blanks or other special characters in its path",
            )
        backends = bundle.backends(request.scratch / "backends")
        for model in request.models:
            _link_export(request, host, model)
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
            # The worker's embedded interpreter finds its site-packages through the first `python3` on the path.
            env=process_environment(request, library_path=bundle.libraries),
            cwd=request.workdir / "config",
            log=log,
            ports=(http_port, grpc_port, metrics_port),
        )
        return TritonDeployment(
            host,
            process,
            open_inference_endpoint(request, http_port, grpc_port),
            log,
            request=request,
            http_port=http_port,
            metrics_port=metrics_port,
            shared_memory_prefix=prefix,
        )


ADAPTER = Triton()
