"""The experiment: what a user writes in YAML, validated, expanded into cells and trials."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from tailrace.harness.contract.adapter import Adapter, Tuning, WireProtocol
from tailrace.harness.contract.multiplexing import Multiplexing
from tailrace.harness.contract.popularity import Models
from tailrace.harness.contract.workload import ArtifactKind, Composition, Device, Precision, Slo
from tailrace.harness.errors import InputError
from tailrace.harness.plan.fault_kinds import FAULT_KINDS
from tailrace.harness.plan.matrix import multiplied_out

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TraceChoice(_Strict):
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


def _known_kind(kind: str) -> str:
    if kind not in FAULT_KINDS:
        near = nearest(kind, FAULT_KINDS)
        raise ValueError(f"there is no such fault; {f'did you mean {near!r}?' if near else ', '.join(FAULT_KINDS)}")
    return kind


FaultName = Annotated[str, AfterValidator(_known_kind)]


class FaultParameters(_Strict):
    """What a fault may be told beside its kind; each kind has its own (`tailrace adapters --faults`)."""

    duration_s: float | None = Field(default=None, ge=0, description="How long it lasts before it is healed.")
    cpus: float | None = Field(default=None, gt=0, description="`slow_node`: CPUs that are left to the node.")
    memory_mb: float | None = Field(default=None, ge=16, description="`memory_limit`: MiB that are left to the node.")
    round_trip_ms: float | None = Field(default=None, gt=0, description="`latency`: added to every round trip.")
    share: float | None = Field(
        default=None, gt=0, le=1, description="`packet_loss`: share of what is sent that stalls."
    )
    stall_ms: float | None = Field(default=None, gt=0, description="`packet_loss`: how long it stalls.")

    def parameters(self, kind: str) -> dict[str, float]:
        """All parameters of a kind: those that were given, and the defaults of the others."""
        given = {name: getattr(self, name) for name in FAULT_KINDS[kind].defaults}
        return {**FAULT_KINDS[kind].defaults, **{name: value for name, value in given.items() if value is not None}}

    def foreign(self, kinds: Iterable[str]) -> list[str]:
        """The parameters that were given and belong to none of these kinds."""
        own = {name for kind in kinds for name in FAULT_KINDS[kind].defaults}
        return [name for name in FaultParameters.model_fields if getattr(self, name) is not None and name not in own]


class FaultChoice(FaultParameters):
    """One fault on the trace clock."""

    kind: FaultName = Field(description="What happens: one of the kinds below.")
    at_s: float | None = Field(
        default=None,
        ge=0,
        description="When, in seconds of the trace. Left out: where the trace suggests it, else two thirds through.",
    )
    target: Literal["random"] | Annotated[int, Field(ge=0)] = Field(
        default="random",
        description="Which replica (oldest first), node, or model (most popular first): `random` (by the trial's seed) or its "
        "index from 0.",
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> FaultChoice:
        if foreign := self.foreign([self.kind]):
            own = ", ".join(FAULT_KINDS[self.kind].defaults) or "none"
            raise ValueError(f"{self.kind} has no {' and no '.join(foreign)}; its parameters: {own}")
        if FAULT_KINDS[self.kind].scope == "cluster" and self.target != "random":
            raise ValueError(f"{self.kind} comes to every node in turn: leave `target` out")
        return self


class FaultSchedule(FaultParameters):
    """Faults at random instants of the trace, a Poisson process by the trial's seed."""

    rate: str = Field(pattern=r"^\d+(\.\d+)?/(s|min|h)$", description="How many in the mean: `2/min`, `0.1/s`, `6/h`.")
    kinds: tuple[FaultName, ...] = Field(min_length=1, description="Each fault is one of these, drawn evenly.")

    @model_validator(mode="after")
    def _fits_its_kinds(self) -> FaultSchedule:
        if foreign := self.foreign(self.kinds):
            raise ValueError(f"none of {', '.join(self.kinds)} has {' or '.join(foreign)}")
        return self

    @property
    def per_s(self) -> float:
        """The rate in faults per second."""
        count, _, unit = self.rate.partition("/")
        return float(count) / {"s": 1, "min": 60, "h": 3600}[unit]


def _tuning_in_words(value: Any) -> Any:
    return {} if value == "defaults" else value


TuningChoice = Annotated[Tuning, BeforeValidator(_tuning_in_words)]
"""Neutral knobs, or the word ``defaults`` for none."""


_FORMS: Mapping[str, type[BaseModel]] = {"listed": FaultChoice, "scheduled": FaultSchedule}
"""How faults are given. Pydantic tells errors below these words, which no user has written."""

Faults = Annotated[
    Annotated[tuple[FaultChoice, ...], Tag("listed")] | Annotated[FaultSchedule, Tag("scheduled")],
    Discriminator(lambda value: "scheduled" if isinstance(value, dict | FaultSchedule) else "listed"),
]


ColdStart = Literal["process", "page-cache", "model"]


class ScalerChoice(_Strict):
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


class Scenario(_Strict):
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


class TailObjective(_Strict):
    """What a search for the saturation point holds a load to."""

    p99_ms: float = Field(gt=0, description="The p99 may be this at most; an answer within it is a good one.")
    attainment: float | None = Field(default=None, gt=0, le=1, description="The share of arrivals with a good answer.")


class LoadSearch(_Strict):
    """In place of the trace's own rate: the highest mean rate at which the objective still holds, found by search."""

    find: Literal["saturation"]
    slo: TailObjective = Field(description="The objective.")
    start: float = Field(default=50.0, gt=0, description="The first mean rate, arrivals/s.")


class Client(_Strict):
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


class Warmup(_Strict):
    """Traffic before the trace, recorded as `warmup` and left out of every figure."""

    duration_s: float = Field(default=3.0, ge=0, description="How long; 0 leaves the server as cold as it came up.")
    rate: float | None = Field(default=None, gt=0, description="Arrivals/s; left out: the trace's mean rate.")


class Calibration(_Strict):
    """Before the trials the generator is measured against a null server, at the experiment's own rates and beyond."""

    step_s: float = Field(default=0.5, ge=0.1, le=60, description="How long it sends at each rate.")


class ContainerChoice(_Strict):
    """How servers run under `environment: docker`."""

    base_images: dict[str, str] = Field(
        default={},
        description="The image that an adapter's own is built on, by adapter name; left out: the one that its Dockerfile names.",
    )
    cpus: float | None = Field(default=None, gt=0, description="CPUs that each container may use; left out: all.")
    memory_mb: int | None = Field(
        default=None, ge=64, description="MiB of memory, without swap, that each container may use; left out: all."
    )


class Experiment(_Strict):
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


@dataclass(frozen=True)
class Cell:
    """One point of the experiment's matrix."""

    adapter: str
    scenario: Scenario

    @property
    def id(self) -> str:
        """Unique within the run, and fit for a folder's name."""
        return f"{self.adapter}--{self.scenario.name}"


@dataclass(frozen=True)
class TrialPlan:
    """One repetition of a cell. ``seed`` is shared by all cells of a block, so that they meet the same arrivals."""

    cell: Cell
    number: int
    seed: int

    @property
    def id(self) -> str:
        """The trial's folder name."""
        return f"{self.cell.id}--{self.number}"


def cells(experiment: Experiment) -> list[Cell]:
    """The matrix: every adapter under every scenario that is for it."""
    return [
        Cell(adapter, scenario)
        for adapter, scenario in itertools.product(experiment.adapters, experiment.scenarios)
        if scenario.adapters is None or adapter in scenario.adapters
    ]


def interleave(experiment: Experiment) -> list[TrialPlan]:
    """Trials in the order in which they run: block by block, each block every cell once, shuffled by the seed."""
    plans: list[TrialPlan] = []
    for number in range(1, experiment.trials + 1):
        seed = int(np.random.SeedSequence([experiment.seed, number]).generate_state(1)[0])
        block = [TrialPlan(cell, number, seed) for cell in cells(experiment)]
        order = np.random.default_rng([experiment.seed, number, 1]).permutation(len(block))
        plans += [block[i] for i in order]
    return plans


def load_experiment(
    source: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    trace: str | None = None,
    assignments: Sequence[str] = (),
) -> Experiment:
    """Read a built-in experiment by name, or a YAML file by path.

    ``overrides`` replace top-level keys (command-line options); ``trace`` replaces the trace's name and leaves behind
    what belongs to the former trace (``params``, ``window_s``); ``assignments`` are ``key.sub=value`` texts (``--set``),
    values in YAML. Raises :class:`InputError` that names the file, the key and the remedy.
    """
    path = find_experiment(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: an experiment is a mapping of keys, this is a {type(content).__name__}")
    content.update(overrides or {})
    if overrides and "adapters" in overrides and isinstance(content.get("options"), dict):
        # Options of an adapter that was not chosen have nothing to say.
        content["options"] = {k: v for k, v in content["options"].items() if k in overrides["adapters"]}
    if overrides and "adapters" in overrides and isinstance(content.get("scenarios"), list):
        content["scenarios"] = list(_narrowed(content["scenarios"], overrides["adapters"]))
    if trace is not None:
        former = content.get("trace")
        kept = {k: v for k, v in former.items() if k not in ("params", "window_s")} if isinstance(former, dict) else {}
        content["trace"] = {**kept, "name": trace}
    for assignment in assignments:
        assign(content, assignment)
    content = multiplied_out(content, str(path))
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, Experiment, str(path)))) from error


def _narrowed(scenarios: Sequence[Any], chosen: Sequence[str]) -> Iterator[Any]:
    """The scenarios without the adapters that were not chosen, and without those that were for none of the chosen."""
    for scenario in scenarios:
        named = scenario.get("adapters") if isinstance(scenario, dict) else None
        if not isinstance(named, list):
            yield scenario
        elif kept := [name for name in named if name in chosen]:
            yield {**scenario, "adapters": kept}


def builtin_experiments() -> dict[str, Path]:
    """The experiments that come with tailrace, by name."""
    from tailrace import experiments

    folder = Path(experiments.__path__[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_experiment(source: str) -> Path:
    """The file of a built-in name or a path."""
    builtin = builtin_experiments()
    if source in builtin:
        return builtin[source]
    path = Path(source)
    if path.is_file():
        return path
    near = nearest(source, builtin)
    raise InputError(
        f"there is no experiment {source!r}: neither a file nor one of {', '.join(builtin)}",
        remedy=f"did you mean {near!r}?" if near else "give the path of a YAML file, or one of the names above",
    )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def assign(content: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise InputError(f"--set {assignment!r}: write it as key=value, for example --set trials=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {assignment!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    place: Any = content
    for depth, parent in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(place, list):
            place = place[_index(place, parent, assignment)]
            continue
        if not isinstance(place, dict):
            raise InputError(
                f"--set {assignment!r}: {'.'.join(parents[:depth])} is {place!r}, which has no keys of its own"
            )
        inner = place.get(parent)
        if parent == "trace" and isinstance(inner, str):
            inner = {"name": inner}
        if parent == "tuning" and inner == "defaults":
            inner = {}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict | list):
            raise InputError(f"--set {assignment!r}: {where} is {inner!r}, which has no keys of its own")
        place[parent] = inner
        place = inner
    if isinstance(place, list):
        place[_index(place, last, assignment)] = value
    elif not isinstance(place, dict):
        raise InputError(f"--set {assignment!r}: {'.'.join(parents)} is {place!r}, which has no keys of its own")
    else:
        place[last] = value


def _index(place: list[Any], text: str, assignment: str) -> int:
    if not text.isdigit() or int(text) >= len(place):
        raise InputError(f"--set {assignment!r}: {text!r} is no index of a list of {len(place)} (they count from 0)")
    return int(text)


def explain(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """A validation error as sentences that name file, key, what is wrong and the nearest known key."""
    sentences = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"] if part not in _FORMS) or "(the whole)"
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            known = _keys_at(model, problem["loc"][:-1])
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
            sentences.append(f"{where}: unknown key `{location}`; {hint}")
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            shown = "" if problem["type"] == "missing" else f" (got {problem['input']!r:.80})"
            sentences.append(f"{where}: `{location}`: {reason}{shown}")
    return sentences


def validated_options(adapter: Adapter, given: Mapping[str, Any]) -> BaseModel:
    """An adapter's own options. Raises :class:`InputError` that names the key and the nearest known one."""
    try:
        return adapter.Options.model_validate(given)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, adapter.Options, f"options.{adapter.name}"))) from error


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that are allowed at a place inside ``model``."""
    current: Any = model
    for part in location:
        if part in _FORMS:
            current = _FORMS[str(part)]
            continue
        if isinstance(part, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field is not None else None
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as ``tuple[Scenario, ...]`` or ``Slo | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _model_in(argument)) is not None:
            return found
    return None
