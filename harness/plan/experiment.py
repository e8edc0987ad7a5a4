"""The experiment: what a user writes in YAML, validated."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tailrace.harness.contract.adapter import Tuning, WireProtocol
from tailrace.harness.contract.multiplexing import Multiplexing
from tailrace.harness.contract.popularity import Models
from tailrace.harness.contract.workload import ArtifactKind, Composition, Device, Precision, Slo
from tailrace.harness.plan.faults import Faults, FaultSchedule
from tailrace.harness.plan.keys import Strict

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class TraceChoice(Strict):
    """Which traffic to replay, and what to make of it. A bare name stands for ``{name: NAME}``: the whole trace, unscaled."""

    name: str = Field(description="A trace of the catalogue, or one that `tailrace traces add` registered.")
    params: dict[str, Any] = Field(default={}, description="Parameters of a generated trace (`tailrace traces show`).")
    window_s: tuple[float, float] | None = Field(
        default=None, description="Replay only this part: start and end in seconds of the trace."
    )
    mean_rate: float | None = Field(
        default=None,
        gt=0,
        description="Rescale to this many arrivals/s: gap subdivision upwards, seeded thinning downwards; the shape stays.",
    )
    compress_time: float | None = Field(
        default=None,
        gt=0,
        description="Divide all times by this factor. Changes burstiness against every fixed clock; never done unasked.",
    )
    tail_s: float = Field(
        default=0.0,
        ge=0,
        description="Steady arrivals after the trace, at its closing rate, so that a recovery can be seen.",
    )


def _tuning_in_words(value: Any) -> Any:
    return {} if value == "defaults" else value


TuningChoice = Annotated[Tuning, BeforeValidator(_tuning_in_words)]
"""Neutral knobs, or the word ``defaults`` for none."""


ColdStart = Literal["process", "page-cache", "model"]


class ScalerChoice(Strict):
    """A queue-depth scaler of the harness's own, for frameworks that have none."""

    of: Literal["replicas", "nodes"] = Field(
        description="What it changes: `replicas` of every node, by the framework's own management interface, or `nodes` "
        "behind the load balancer."
    )
    min: int = Field(ge=1, description="The fewest, and how many there are at first.")
    max: int = Field(ge=1, le=64, description="The most; of nodes, the experiment's `nodes`.")
    up_above: float = Field(
        gt=0,
        description="More when so many requests for each are exceeded: waiting ones for replicas, all that are under way "
        "for nodes.",
    )
    down_below: float = Field(ge=0, description="One fewer when there are less.")
    period_s: float = Field(default=1.0, ge=0.1, description="How often it looks.")
    warm_pool: int = Field(default=0, ge=0, description="`nodes`: how many are kept started beyond those in use.")
    cold_start: ColdStart = Field(
        default="process",
        description="`nodes`: what one that is called upon beyond the warm pool has to do: start a fresh `process`, do so "
        "with an empty `page-cache`, or load its `model` in a process that is there.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ScalerChoice:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        if self.down_below >= self.up_above:
            raise ValueError(f"down_below ({self.down_below:g}) is not below up_above ({self.up_above:g})")
        if self.warm_pool and self.of == "replicas":
            raise ValueError("warm_pool: replicas cannot be kept warm outside, only nodes")
        if self.cold_start != "process" and self.of == "replicas":
            raise ValueError(
                "cold_start: how a replica starts is the framework's own affair; only nodes are started here"
            )
        return self


class Scenario(Strict):
    """Named conditions; every adapter runs under every scenario, unless that names its own. A sweep makes one for each
    combination of its values."""

    name: str = Field(description="Short name, used in folder names and in the report.")
    faults: Faults = Field(
        default=(),
        description="What goes wrong: a list (keys below), or a mapping for a random schedule; empty: nothing.",
    )
    tuning: TuningChoice | None = Field(
        default=None, description="Knobs in place of the experiment's, or `defaults`; left out: the experiment's."
    )
    scaler: ScalerChoice | None = Field(
        default=None, description="A queue-depth scaler of the harness's own (keys below); left out: none."
    )
    mean_rate: float | None = Field(
        default=None, gt=0, description="Mean arrivals/s in place of `trace.mean_rate`; left out: the experiment's."
    )
    composition: Composition | None = Field(
        default=None, description="How a pipeline is served, in place of the experiment's; left out: the experiment's."
    )
    multiplexing: Multiplexing | None = Field(
        default=None, description="The models' memory, in place of the experiment's; left out: the experiment's."
    )
    adapters: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Only these of the experiment's frameworks; left out: all of them."
    )

    @property
    def fault_kinds(self) -> tuple[str, ...]:
        """The kinds that may come, each once."""
        kinds = self.faults.kinds if isinstance(self.faults, FaultSchedule) else [fault.kind for fault in self.faults]
        return tuple(dict.fromkeys(kinds))

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("use letters, digits, '.', '_' and '-' only, for it becomes part of a folder's name")
        return name


class TailObjective(Strict):
    """What a search for the saturation point holds a load to."""

    p99_ms: float = Field(gt=0, description="The p99 may be this at most; an answer within it is a good one.")
    attainment: float | None = Field(default=None, gt=0, le=1, description="The share of arrivals with a good answer.")


class LoadSearch(Strict):
    """In place of the trace's own rate: the highest mean rate at which the objective still holds, found by search."""

    find: Literal["saturation"]
    slo: TailObjective = Field(description="The objective.")
    start: float = Field(default=50.0, gt=0, description="The first mean rate, arrivals/s.")


class Client(Strict):
    """How requests are sent."""

    protocol: WireProtocol | None = Field(default=None, description="`http` or `grpc`; left out: the adapter's first.")
    timeout_s: float = Field(default=10.0, gt=0, description="An answer later than this after sending is a `timeout`.")
    max_connections: int = Field(
        default=8192, ge=1, description="Connections (HTTP) or calls in flight (gRPC); an arrival past it is `dropped`."
    )
    workers: int = Field(default=1, ge=0, le=64, description="Load workers on this machine; arrivals are dealt out.")
    remote_workers: int = Field(
        default=0, ge=0, le=64, description="Load workers on other machines (`tailrace load-worker`), waited for."
    )
    listen: str = Field(
        default="127.0.0.1:0",
        pattern=r"^[^:/\s]+:\d{1,5}$",
        description="HOST:PORT where load workers connect to this run; port 0: a free one. Whoever reaches it can take part.",
    )

    @model_validator(mode="after")
    def _somebody_sends(self) -> Client:
        if self.workers + self.remote_workers == 0:
            raise ValueError("workers and remote_workers are both 0: nobody would send")
        if self.remote_workers and self.listen.endswith(":0"):
            raise ValueError("remote_workers need a port to connect to: set listen, for example 10.0.0.5:5557")
        return self


class Warmup(Strict):
    """Traffic before the trace, recorded as `warmup` and left out of every figure."""

    duration_s: float = Field(default=3.0, ge=0, description="How long; 0 leaves the server as cold as it came up.")
    rate: float | None = Field(default=None, gt=0, description="Arrivals/s; left out: the trace's mean rate.")


class Calibration(Strict):
    """Before the trials the generator is measured against a null server, at the experiment's own rates and beyond."""

    step_s: float = Field(default=0.5, ge=0.1, le=60, description="How long it sends at each rate.")


class ContainerChoice(Strict):
    """How servers run under `environment: docker`."""

    base_images: dict[str, str] = Field(
        default={},
        description="The image that an adapter's own is built on, by adapter name; left out: the one that its Dockerfile names.",
    )
    cpus: float | None = Field(default=None, gt=0, description="CPUs that each container may use; left out: all.")
    memory_mb: int | None = Field(
        default=None, ge=64, description="MiB of memory, without swap, that each container may use; left out: all."
    )


class Experiment(Strict):
    """One experiment: adapters × scenarios, each repeated ``trials`` times, interleaved."""

    name: str = Field(description="Short name, used for the run's folder.")
    question: str = Field(default="", description="What the run is to answer; printed at the top of the report.")
    adapters: tuple[str, ...] = Field(min_length=1, description="The frameworks that race (`tailrace adapters`).")
    workload: str = Field(default="emulated", description="The model: a name, or the path of a workload folder.")
    workload_options: dict[str, float] = Field(
        default={}, description="Parameters of the workload (`emulated`: base_ms, per_item_ms, load_ms, load_gb_per_s)."
    )
    models: Models = Field(
        default=Models(count=1), description="How many models of the workload are served, a number or keys (below)."
    )
    multiplexing: Multiplexing | None = Field(
        default=None,
        description="The models share a memory that does not hold them all (keys below; [multiplexing](multiplexing.md)); left "
        "out: all are loaded.",
    )
    precision: Precision | None = Field(
        default=None, description="`fp32`, `bf16` or `fp16`, of those that the workload offers; left out: fp32."
    )
    compile: bool = Field(
        default=False, description="Whether the model is compiled (`torch.compile`), where the workload offers it."
    )
    artifact: ArtifactKind = Field(
        default="python",
        description="What servers run: the workload's own `python` code, or an export of it to `onnx` or `torchscript`, where "
        "the workload offers one and the framework runs such files itself ([GPUs](gpu.md#exports)).",
    )
    composition: Composition = Field(
        default="framework",
        description="Who joins the stages of a workload that is a pipeline: the `framework`, in its own way, or `one-process`: "
        "the model's process, one after the other ([pipelines](pipelines.md)).",
    )
    device: Device | None = Field(
        default=None, description="`emulated`, `cpu` or `cuda`; left out: the first that the workload declares."
    )
    devices: int = Field(
        default=1, ge=1, description="How many devices all nodes together may use; goodput is divided by it."
    )
    device_price_per_hour: float | None = Field(
        default=None,
        gt=0,
        description="What one device costs in an hour, US dollars: your own price, for nothing is assumed; left out: no figure "
        "per dollar.",
    )
    device_prices: str | None = Field(
        default=None, description="In place of that price: a YAML file of your own, device names and their prices."
    )
    dcgm_exporter: str | None = Field(
        default=None,
        pattern=r"^[^:/\s]+:\d{1,5}$",
        description="HOST:PORT of NVIDIA's DCGM exporter; left out: localhost:9400, if one answers there.",
    )
    nodes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="How many nodes serve, each with its share of the devices and the `replicas` of the tuning: servers "
        "behind HAProxy, or a cluster of the framework's own.",
    )
    supervision: Literal["none", "restart"] = Field(
        default="none",
        description="Who starts a node again that has died: nobody, or the harness, as systemd or Kubernetes would.",
    )
    restart_backoff_s: float = Field(
        default=1.0,
        ge=0,
        description="How long `supervision: restart` waits first; doubled with every death that follows within 10 s.",
    )
    environment: Literal["venv", "current", "docker"] = Field(
        default="venv",
        description="Where servers run: `venv` (built from the adapter's lock file, cached), `current` (this interpreter) or "
        "`docker` (a container of the adapter's image, built and cached likewise).",
    )
    containers: ContainerChoice = Field(
        default=ContainerChoice(), description="`environment: docker`: images and limits (keys below)."
    )
    trace: TraceChoice = Field(description="The traffic: a trace's name, or a mapping (keys below).")
    rate_by_workload: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Mean arrivals/s (as `trace.mean_rate`) for workloads that need another rate than the trace's own.",
    )
    load: LoadSearch | None = Field(
        default=None,
        description="`{find: saturation, slo: {p99_ms: 120}}`: search every cell's highest rate (keys below).",
    )
    tuning: TuningChoice = Field(default=Tuning(), description="Neutral knobs, or `defaults` for the framework's own.")
    when_refused: Literal["stop", "leave_out"] = Field(
        default="stop",
        description="What becomes of a knob that an adapter has no place for: `stop` refuses the experiment, `leave_out` "
        "runs that adapter without it, and says so.",
    )
    options: dict[str, dict[str, Any]] = Field(default={}, description="Options of single adapters, by adapter name.")
    scenarios: tuple[Scenario, ...] = Field(
        default=(Scenario(name="no-fault"),), min_length=1, description="What goes wrong (keys below)."
    )
    trials: int = Field(default=1, ge=1, le=1000, description="Repetitions of every cell, in seeded interleaved order.")
    seed: int = Field(default=7, ge=0, lt=2**32, description="Everything random follows from it.")
    slo: Slo | None = Field(default=None, description="`latency_ms`: the objective; left out: the workload's own.")
    client: Client = Field(default=Client(), description="How requests are sent (keys below).")
    warmup: Warmup = Field(default=Warmup(), description="Traffic before the trace (keys below).")
    calibration: Calibration = Field(
        default=Calibration(), description="How the generator is measured before the trials (keys below)."
    )
    server_host: str = Field(
        default="127.0.0.1",
        description="The address that servers listen on and load is sent to: loopback, unless load comes from elsewhere.",
    )

    @field_validator("trace", mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} becomes a folder's name; use letters, digits, '.', '_' and '-' only")
        for field, names in (("adapters", self.adapters), ("scenarios", [s.name for s in self.scenarios])):
            twice = {name for name in names if list(names).count(name) > 1}
            if twice:
                raise ValueError(f"{field}: {', '.join(sorted(twice))} is listed twice; use `trials` to repeat")
        for scenario in self.scenarios:
            for name in scenario.adapters or ():
                if name not in self.adapters:
                    raise ValueError(
                        f"scenarios: {scenario.name} is for {name!r}, which is not among the adapters {list(self.adapters)}"
                    )
        if idle := [
            name for name in self.adapters if all(s.adapters and name not in s.adapters for s in self.scenarios)
        ]:
            raise ValueError(f"scenarios: none is for {', '.join(idle)}; leave it out of `adapters`")
        if self.device_prices is not None and self.device_price_per_hour is not None:
            raise ValueError("device_prices and device_price_per_hour are both given: leave one of them out")
        if self.environment != "docker" and self.containers != ContainerChoice():
            raise ValueError(f"containers: says something about containers, and `environment` is {self.environment!r}")
        for key, told in (("options", self.options), ("containers.base_images", self.containers.base_images)):
            for name in told:
                if name not in self.adapters:
                    raise ValueError(f"{key}: {name!r} is not among the adapters {list(self.adapters)}")
        return self

    @property
    def own_interpreters(self) -> Literal["venv", "current"]:
        """Where runs what is beside the servers and no container: the builder of the artifact, the null server that the
        generator is measured against, the load balancer."""
        return "venv" if self.environment == "docker" else self.environment

    def tuning_of(self, scenario: Scenario) -> Tuning:
        """The knobs that are asked for under a scenario."""
        tuning = self.tuning if scenario.tuning is None else scenario.tuning
        scaled = scenario.scaler is not None and scenario.scaler.of == "replicas"
        return tuning.model_copy(update={"replicas": scenario.scaler.min}) if scaled and scenario.scaler else tuning

    def multiplexing_of(self, scenario: Scenario) -> Multiplexing | None:
        """The models' memory under a scenario."""
        return self.multiplexing if scenario.multiplexing is None else scenario.multiplexing

    @property
    def sha256(self) -> str:
        """Hash of the resolved experiment, for telling whether two runs asked the same question."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
