"""The null adapter: a server that follows a script, by which the harness tests itself."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tailrace.adapters.null import answers, haproxy
from tailrace.adapters.null.server import HEALTH_SERVICE, PATH, SERVICE, SERVING
from tailrace.harness.contract.adapter import (
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    HealthCheck,
    ProcessHost,
    Replica,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.codecs import PreparedRequest, RawGRPC
from tailrace.harness.contract.control import (
    HAPROXY_LAUNCH,
    TIMEOUT_S,
    ControlConnection,
    choose_ports,
    process_environment,
    raw_endpoint,
)
from tailrace.harness.contract.exchange import exchange
from tailrace.harness.errors import InputError
from tailrace.harness.processes import descendants

_CONFIG = "null.json"
_NO_FRAMEWORK = "the null server has no framework behind it; it follows its script (options.null)"


class NullOptions(BaseModel):
    """The script. Shares are probabilities per request, in 0..1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    engine: Literal["scripted", "haproxy"] = Field(
        default="scripted",
        description="scripted: a small server that follows the script; haproxy: HAProxy with right answers and no script, "
        "many times as fast",
    )
    latency_ms: float = Field(default=0.0, ge=0, description="constant time before every answer")
    jitter_ms: float = Field(default=0.0, ge=0, description="mean of an exponential time added to it")
    pareto_ms: float = Field(
        default=0.0, ge=0, description="smallest value of a Pareto time, whose tail is heavy, added to it; 0: none"
    )
    pareto_alpha: float = Field(
        default=2.0, gt=0, description="its shape: a time of x times the smallest is exceeded with probability x^-shape"
    )
    cold_requests: int = Field(default=0, ge=0, description="so many requests, the first of each replica, are slow")
    cold_ms: float = Field(default=0.0, ge=0, description="how much longer those take")
    shed_share: float = Field(
        default=0.0, ge=0, le=1, description="share of requests refused: 503, or RESOURCE_EXHAUSTED"
    )
    error_share: float = Field(default=0.0, ge=0, le=1, description="share of requests that fail: 500, or INTERNAL")
    wrong_share: float = Field(
        default=0.0, ge=0, le=1, description="share of requests answered with success and a wrong body"
    )
    honest_requests: int = Field(
        default=0,
        ge=0,
        description="so many requests, the first of each replica, are spared these shares: enough to pass verification",
    )
    stall_every_s: float = Field(default=0.0, ge=0, description="period of a stall, at whose beginning it lies")
    stall_ms: float = Field(default=0.0, ge=0, description="its length: an answer due within it is given at its end")
    die_after_s: float = Field(default=0.0, ge=0, description="the whole server dies so long after its start; 0: never")
    wedge_after_s: float = Field(
        default=0.0, ge=0, description="inference gets no answer from then on, while health goes on answering; 0: never"
    )
    mute_after_s: float = Field(
        default=0.0, ge=0, description="health gets no answer from then on, while inference goes on answering; 0: never"
    )
    fail_at_start: bool = Field(default=False, description="the server ends with an error before it opens its port")
    seed: int = Field(default=1, description="seed of the script's draws")
    log: bool = Field(
        default=False,
        description="the server's own record of every answer, logs/requests-REPLICA.csv: the body's CRC-32, when the "
        "request was read, when its answer was due and when it was written (ns, monotonic clock), the status",
    )

    @model_validator(mode="after")
    def _fixed_answers_have_no_script(self) -> NullOptions:
        if self.engine == "haproxy" and (scripted := sorted(self.model_fields_set - {"engine"})):
            raise ValueError(f"engine haproxy gives fixed answers: {', '.join(scripted)} needs engine scripted")
        return self


class NullDeployment(Deployment):
    """A running null server; its replicas are the children of its main process."""

    model: str

    def claims_ready(self) -> bool:
        return self.health()

    def health(self) -> bool:
        """Whether a replica, or HAProxy, listens: 200 to ``/ready``, or gRPC's own health protocol."""
        if self.endpoint.protocol == "grpc":
            asked = PreparedRequest(b"", f"/{HEALTH_SERVICE}/Check")
            return exchange(self.endpoint, asked, TIMEOUT_S).body == SERVING
        control = ControlConnection("null", self.endpoint.host, self.endpoint.port, self.log)
        return bool(control.says_ok("/ready"))

    def replicas(self) -> list[Replica]:
        family = [ref for ref, _ in descendants(self.process)]
        children = family[1:] or family  # HAProxy has none: it is its own replica
        return [Replica(f"replica-{index}", self.model, ref) for index, ref in enumerate(children)]


class Null(Adapter):
    """No framework: what remains when the server costs nothing."""

    name: ClassVar[str] = "null"
    title: ClassVar[str] = "Null server"
    homepage: ClassVar[str] = "part of tailrace"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http", "grpc")
    port_names: ClassVar[tuple[str, ...]] = ("HTTP or gRPC",)
    Options: ClassVar[type[BaseModel]] = NullOptions
    deployment_type: ClassVar[type[Deployment]] = NullDeployment
    knobs: ClassVar[dict[str, str]] = {"replicas": "processes that serve one port"}
    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("max_batch", "batch_window_ms", "queue_limit", "server_timeout_s", "autoscale"), _NO_FRAMEWORK
    )
    traits: ClassVar[dict[str, str]] = {
        "batching": "none",
        "scaling": "nothing: as many processes as it was started with",
        "models": "all of the artifact, one after the other in each process",
        "kubernetes": "none",
    }
    start_timeout_s: ClassVar[float] = 20.0

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """Beside what has no place in any script: HAProxy is one process.

        Raises :class:`InputError` for HAProxy over gRPC.
        """
        if _fixed(options) and protocol == "grpc":
            raise InputError(
                "`client.protocol`: the null server's engine haproxy does not speak grpc, only http",
                remedy="use `options.null.engine: scripted`, or leave `client.protocol` out",
            )
        refusals = super().refusals(tuning, options, protocol)
        if tuning.replicas is not None and _fixed(options):
            refusals["replicas"] = "null has no place for `replicas` with `engine: haproxy`, which is one process"
        return refusals

    def health_check(self, protocol: WireProtocol) -> HealthCheck | None:
        """Over HTTP alone: it has one port, and gRPC's health protocol is none that load balancers of HTTP ask."""
        return HealthCheck(self.port_names[0], "/ready") if protocol == "http" else None

    def render(self, request: DeployRequest) -> dict[str, str]:
        if _fixed(request.options):
            return {haproxy.CONFIG: haproxy.config(request)}
        spec = request.workload.spec
        config = {
            **request.options.model_dump(),
            "replicas": request.tuning.replicas or 1,
            "models": list(request.models),
            "model_file": str(request.workload.model_file),
            "artifact": str(request.workload.artifact),
            "device": request.workload.device,
            "protocol": request.protocol,
            "inputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in spec.inputs],
            "outputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in spec.outputs],
        }
        return {_CONFIG: json.dumps(config, indent=1)}

    def deploy(self, request: DeployRequest, host: ProcessHost) -> NullDeployment:
        (port,) = choose_ports(self, request)
        python, configured = str(request.environment.python), request.workdir / "config"
        environment = {**process_environment(request), "PYTHONUNBUFFERED": "1"}
        if _fixed(request.options):
            answers.place(request, request.scratch)
            environment |= {"TAILRACE_HOST": request.listen, "TAILRACE_PORT": str(port)}
            command = [python, "-c", HAPROXY_LAUNCH, "-db", "-f", str(configured / haproxy.CONFIG)]
        else:
            placed = request.scratch / _CONFIG
            rendered = json.loads((configured / _CONFIG).read_text(encoding="utf-8"))
            here = {
                "host": request.listen,
                "port": port,
                "answers": answers.place(request, request.scratch),
                "log_folder": str(request.workdir / "logs"),
            }
            placed.write_text(json.dumps({**rendered, **here}), encoding="utf-8")
            command = [python, str(self.folder / "server.py"), str(placed)]
        log = request.workdir / "logs" / "server.log"
        process = host.spawn(self.name, command, env=environment, cwd=request.scratch, log=log, ports=(port,))
        spec = request.workload.spec
        endpoint = (
            raw_endpoint(request, port, PATH + "{model}")
            if request.protocol == "http"
            else Endpoint("grpc", request.host, port, RawGRPC(f"/{SERVICE}/{{model}}", spec.inputs, spec.outputs))
        )
        deployment = NullDeployment(host, process, endpoint, log)
        deployment.model = request.models[0]
        return deployment


def _fixed(options: BaseModel) -> bool:
    return isinstance(options, NullOptions) and options.engine == "haproxy"


ADAPTER = Null()
