"""``trial.json``: what the harness learned about a trial beside requests, samples and events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tailrace.harness.records.probe import Probe
from tailrace.harness.records.record import Microseconds, Milliseconds, Seconds, Source, Unit
from tailrace.multiplexing.residency import Policy

State = Literal["running", "done", "failed", "interrupted", "pruned"]


class TrialError(Source):
    """What ended a trial before its end."""

    message: str
    """what went wrong, in a sentence"""
    remedy: str | None = None
    """what to do about it"""
    detail: str | None = None
    """the end of the server's log, or whatever else tells more"""


class GpuName(Source):
    """A GPU of the trial."""

    gpu: str
    """the scope of its samples"""
    name: str
    uuid: str
    """as NVML tells them"""


class Memory(Source):
    """What the models of a trial share, where not all of them are loaded."""

    budget_bytes: Annotated[int, Unit("B")]
    """what the models may take together"""
    sizes: dict[str, int]
    """bytes of every model, by popularity at the trace's beginning"""
    policy: Policy
    """which of them goes when there is no room"""
    pinned: list[str]
    """models that never go"""
    at_start: list[str]
    """in memory when the server starts"""
    controlled: bool
    """whether the harness's controller loads and unloads; false: the framework itself"""


class ColdStart(Source):
    """How a server came up; what it did not come to is absent."""

    environment_s: Seconds | None = None
    """the time to have the environment ready"""
    port_open_s: Seconds | None = None
    ready_s: Seconds | None = None
    first_answer_s: Seconds | None = None
    """since the spawn: until its port was open, until it said that it was ready, until its first correct answer"""


class Fault(Source):
    """A fault that came to its time."""

    kind: str
    """which"""
    at_s: Seconds = 0.0
    """when it was planned, on the trace's clock"""
    parameters: dict[str, int | float] = Field(default_factory=dict)
    """its parameters, each as a key of its own"""
    injected_s: Seconds | None = None
    """when it was injected, on the trace's clock; `null`: it hit nothing"""
    healed_s: Seconds | None = None
    """when it was healed; `null`: it was not, or there was nothing to heal"""
    target: str | None = None
    """what was hit"""
    pid: int | None = None
    """its process, where a process was hit"""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        """Keys that are none of a fault's own are its parameters."""
        if not isinstance(content, Mapping) or "parameters" in content:
            return content
        own = {key: value for key, value in content.items() if key in cls.model_fields}
        return {**own, "parameters": {key: value for key, value in content.items() if key not in own}}

    @model_serializer(mode="wrap")
    def _spread(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        spread: dict[str, Any] = {}
        for key, value in dump(self).items():
            spread |= value if key == "parameters" else {key: value}
        return spread


class LoadWorker(Source):
    """What one load worker said of itself at its end."""

    host: str | None = None
    """the machine of a remote one"""
    cpu_s: Seconds | None = None
    """CPU time from the go to the last row, all its threads"""
    start_lag_p50_ms: Milliseconds | None = None
    start_lag_p99_ms: Milliseconds | None = None
    """how long after its intended start it took an arrival up, the generator's own part of the send lag: nearest-rank
    percentiles over its measured arrivals (over all when there are none); `null`: nothing was due"""
    clock_offset_ms: Milliseconds | None = None
    clock_uncertainty_ms: Milliseconds | None = None
    """by how much its monotonic clock was ahead of the harness's, and how wrong an instant converted with that may be; both 0
    on the same clock; an uncertainty of `null` is unknown"""
    lost: str | None = None
    """why it did not live to say the above"""


class LoadGeneratorFacts(Source):
    """What the load generator took; of several workers CPU times and connections are summed, lags are the worst one's."""

    cpu_us_per_request: Microseconds | None = None
    """CPU time per arrival; `null`: none were due"""
    connections_opened: int | None = None
    peak_connections: int | None = None
    """how many were opened, and how many were open at once"""
    priority: str | None = None
    """the precedence over other processes that the workers had: `real-time` or `nice N`; `null`: none lived to say"""
    workers: list[LoadWorker] = Field(default_factory=list)
    """one entry for each"""
    start_lag_p50_ms: Milliseconds | None = None
    start_lag_p99_ms: Milliseconds | None = None
    """from the intended instant until an arrival was taken up"""
    measured_arrivals: int | None = None
    """arrivals of the trace, the warm-up's left out"""


class Outputs(Source):
    """The answers of the run, compared with the reference; counts are of requests."""

    checked: int = 0
    mismatched: int = 0
    unchecked: int = 0
    """requests whose answers were compared; of these, who differed; and those whose answers were not kept"""
    example: str | None = None
    """one difference"""


class ContainerEnd(Source):
    """A container that had ended before the trial stopped it."""

    container: str
    how: str
    """which, and how it ended"""


class TrialFacts(Source):
    """``trial.json``. It grows while the trial runs, and whoever grows it writes it again (``TrialFolder.write``): what the
    trial has not come to is absent."""

    id: str
    cell: str
    adapter: str
    scenario: str
    """names"""
    mean_rate: Annotated[float, Unit("arrivals/s")] | None = None
    """the rate that the scenario asked for in place of the experiment's; `null`: none"""
    number: int
    seed: int
    """the block, and the seed, which the trials of a block share"""
    state: State
    """`running` (also of a harness that was killed), `done`, `failed`, `interrupted`, or `pruned`: whoever watched it had seen
    enough"""
    error: TrialError | None = None
    """`message`, `remedy` and `detail` of what ended it before its end"""
    workload: str
    trace: str
    """what was served, and when it was asked"""
    transient: bool = False
    """whether the trace's load is meant to change"""
    device: str
    devices: int
    """`emulated`, `cpu` or `cuda`; and how many goodput is divided by"""
    gpus: list[GpuName] = Field(default_factory=list)
    """`gpu` (the scope of its samples), `name` and `uuid` of each"""
    device_price_per_hour: Annotated[float, Unit("US$/h")] | None = None
    """what the experiment says that one device costs; `null`: nothing"""
    protocol: str
    """what client and server spoke"""
    slo_ms: Milliseconds
    """the objective for one request"""
    span_s: Seconds
    """length of the trace, tail included"""
    arrivals: int = 0
    """of the trace"""
    models: list[str] = Field(default_factory=list)
    """that were served, the most popular at the beginning first"""
    popularity: dict[str, Any] = Field(default_factory=dict)
    """how requests spread over them"""
    cpu_count: int
    """CPUs of the host"""
    tuning: dict[str, Any] = Field(default_factory=dict)
    """the knobs that the framework was given; `null`: its own default"""
    left_out: dict[str, str] = Field(default_factory=dict)
    """knobs that were asked for and that it has no place for, each with the reason; `composition`, where it cannot compose a
    pipeline; `artifact`, where it cannot serve an export and served the Python model"""
    composition: str | None = None
    """of a pipeline, who joins its stages: `framework` or `one-process`; `null` for other workloads"""
    memory: Memory | None = None
    """of models that share a limited memory: `budget_bytes`, `sizes` of each, `policy`, those that are `pinned` and those that
    are there `at_start`, and whether the harness's controller loads them (`controlled`)"""
    artifact: str = "python"
    """what the servers ran: the workload's `python` code, or its export to `onnx` or `torchscript`"""
    stages: list[str] = Field(default_factory=list)
    """of a pipeline, their names"""
    options: dict[str, Any] = Field(default_factory=dict)
    """the adapter's own, with all defaults"""
    resolved: dict[str, Any] = Field(default_factory=dict)
    """the cell whole, as it was resolved before anything started: all of the above that its trials have in common, and what
    was asked of clients, containers and nodes besides"""
    nodes: int = 1
    supervision: str = "none"
    """how many nodes there may be; who starts a dead one again (`none`, `restart`)"""
    planned_faults: int = 0
    """how many faults were to be injected"""
    faults: list[Fault] = Field(default_factory=list)
    """those that came to their time: `kind`, `at_s` (planned), its parameters, `injected_s` and `healed_s` on the trace's clock,
    `target`, `pid`"""
    warnings: list[str] = Field(default_factory=list)
    """what a reader must know of the trial, in sentences"""
    cold_start: ColdStart | None = None
    """`environment_s`, `port_open_s`, `ready_s`, `first_answer_s`: see `cold_start_phases_s` of the summary"""
    verified_before: int = 0
    """answers that were compared with the reference before the clock started"""
    applied: dict[str, Any] | None = None
    """the knobs as the server reports them, where it does"""
    not_applied: list[str] = Field(default_factory=list)
    """those that it reports otherwise than they were asked for, a sentence each"""
    epoch_mono_ns: Annotated[int, Unit("ns")] | None = None
    """the first instant of the trace, on the host's monotonic clock"""
    node_deaths: int = 0
    """nodes that died, whether they were started again or not"""
    load_generator: LoadGeneratorFacts | None = None
    """what the load generator took: `cpu_us_per_request`, `connections_opened`, `peak_connections`, `priority`, `workers` (each
    with `host`, `cpu_s`, its lags, `clock_offset_ms`, `clock_uncertainty_ms` and why it was `lost`), `start_lag_p50_ms`,
    `start_lag_p99_ms`, `measured_arrivals`"""
    outputs: Outputs | None = None
    """answers compared with the reference during the run: `checked`, `mismatched`, `unchecked`, `example`"""
    final_probe: Probe | None = None
    """how the server stood in the end: `process_alive`, `claims_ready`, `answers`, and `busy`: it was
    working through a backlog"""
    containers_ended: list[ContainerEnd] = Field(default_factory=list)
    """containers that had ended, with `how`"""

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do: the trial is done, or whoever watched it had seen enough."""
        return self.state in ("done", "pruned")

    @property
    def injected(self) -> list[Fault]:
        """The faults that hit something."""
        return [fault for fault in self.faults if fault.injected_s is not None]
