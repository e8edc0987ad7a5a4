"""The null adapter: a server that follows a script, by which the harness tests itself."""

from __future__ import annotations

import http.client
import json
import os
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from harness.adapter import Adapter, Deployment, DeployRequest, Endpoint, ProcessHost, Replica, WireProtocol
from harness.codecs import RawHTTP
from harness.processes import descendants, free_ports

_CONFIG = "null.json"
_NO_FRAMEWORK = "the null server has no framework behind it; it follows its script (options.null)"


class NullOptions(BaseModel):
    """The script. Shares are probabilities per request, in 0..1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    latency_ms: float = Field(default=0.0, ge=0, description="constant time before every answer")
    jitter_ms: float = Field(default=0.0, ge=0, description="mean of an exponential time added to it")
    shed_share: float = Field(default=0.0, ge=0, le=1, description="share of requests answered with 503")
    error_share: float = Field(default=0.0, ge=0, le=1, description="share of requests answered with 500")
    wrong_share: float = Field(
        default=0.0, ge=0, le=1, description="share of requests answered with 200 and a wrong body"
    )
    stall_every_s: float = Field(default=0.0, ge=0, description="period of a stall during which nothing is answered")
    stall_ms: float = Field(default=0.0, ge=0, description="length of that stall")
    die_after_s: float = Field(default=0.0, ge=0, description="the whole server dies so long after its start; 0: never")
    fail_at_start: bool = Field(default=False, description="the server ends with an error before it opens its port")
    seed: int = Field(default=1, description="seed of the script's draws")


class NullDeployment(Deployment):
    """A running null server; its replicas are the children of its main process."""

    model: str

    def claims_ready(self) -> bool:
        connection = http.client.HTTPConnection(self.endpoint.host, self.endpoint.port, timeout=1)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def replicas(self) -> list[Replica]:
        children = [ref for ref, _ in descendants(self.process) if ref != self.process]
        return [Replica(f"replica-{index}", self.model, ref) for index, ref in enumerate(children)]


class Null(Adapter):
    """No framework: what remains when the server costs nothing."""

    name: ClassVar[str] = "null"
    title: ClassVar[str] = "Null server"
    homepage: ClassVar[str] = "part of tailrace"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http",)
    Options: ClassVar[type[BaseModel]] = NullOptions
    deployment_type: ClassVar[type[Deployment]] = NullDeployment
    knobs: ClassVar[dict[str, str]] = {"replicas": "processes that serve one socket"}
    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("max_batch", "batch_window_ms", "queue_limit", "server_timeout_s", "autoscale"), _NO_FRAMEWORK
    )
    start_timeout_s: ClassVar[float] = 30.0

    def render(self, request: DeployRequest) -> dict[str, str]:
        spec = request.workload.spec
        config = {
            **request.options.model_dump(),
            "replicas": request.tuning.replicas or 1,
            "models": list(request.models),
            "model_file": str(request.workload.model_file),
            "artifact": str(request.workload.artifact),
            "device": request.workload.device,
            "inputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in spec.inputs],
            "outputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in spec.outputs],
        }
        return {_CONFIG: json.dumps(config, indent=1)}

    def deploy(self, request: DeployRequest, host: ProcessHost) -> NullDeployment:
        port = request.ports[0] if request.ports else free_ports(1, request.host)[0]
        rendered = json.loads((request.workdir / "config" / _CONFIG).read_text(encoding="utf-8"))
        placed = request.scratch / _CONFIG
        placed.write_text(json.dumps({**rendered, "host": request.host, "port": port}), encoding="utf-8")
        log = request.workdir / "logs" / "server.log"
        process = host.spawn(
            self.name,
            [str(request.environment.python), str(self.folder / "server.py"), str(placed)],
            env={"PATH": os.defpath, "PYTHONUNBUFFERED": "1", **request.server_env},
            cwd=request.scratch,
            log=log,
        )
        spec = request.workload.spec
        codec = RawHTTP(request.host, port, "/models/{model}", spec.inputs, spec.outputs)
        deployment = NullDeployment(host, process, Endpoint("http", request.host, port, codec), log)
        deployment.model = request.models[0]
        return deployment


ADAPTER = Null()
