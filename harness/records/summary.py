"""``summary.json``: every figure of a run, derived from its sources; +∞ and NaN are floats here, ``"inf"`` and ``null`` there.

Long because every figure is described where it is declared, and each is declared once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tailrace.harness.records.facts import ColdStart, Fault, Outputs
from tailrace.harness.records.record import (
    Bytes,
    Celsius,
    Change,
    Cores,
    Ends,
    Joules,
    Mebibytes,
    Megahertz,
    Microseconds,
    Milliseconds,
    PerSecond,
    Proportion,
    Record,
    Seconds,
    Unit,
    Watts,
)

Verdict = Literal["VALID", "INVALID", "UNKNOWN"]
Method = Literal["t", "bootstrap"]
IntervalSource = Literal["across-trials", "within-trial"]
EndsMs = Annotated[Ends, Unit("ms")]


class Figures(Record):
    """Figures that are also asked for by a name which is data: a rule's, a column's."""

    def figure(self, name: str) -> float | None:
        """The number of that name; ``None``: not claimed, or not known. Raises :class:`KeyError` for a name that is none."""
        if name not in type(self).model_fields:
            raise KeyError(name)
        value: float | None = getattr(self, name)
        return value

    def ends(self, name: str) -> Ends | None:
        """The 95 % interval of that number; ``None`` where it has none."""
        found: Ends | None = getattr(self, _interval_of(name), None)
        return found

    def optimistic(self, name: str) -> bool:
        """Whether that interval comes from within trials, which takes arrivals as independent; a trial's has no other."""
        source = getattr(self, f"{_interval_of(name)}_source", None) or "within-trial"
        return source == "within-trial" and self.ends(name) is not None


def _interval_of(name: str) -> str:
    return f"{name.removesuffix('_ms')}_ci_ms" if name.endswith("_ms") else f"{name}_ci"


class Reason(Record):
    """Why a trial is not simply VALID."""

    code: str
    """stable, of the table [below](#verdict-reasons)"""
    text: str
    """a sentence with the numbers"""
    remedy: str
    """what to do about it"""
    effect: Literal["INVALID", "UNKNOWN"]
    """what it makes of the trial"""


class StageFigures(Record):
    """One stage of a pipeline over the trace; `null` for what is not counted."""

    stage: str
    """its name"""
    items_rps: PerSecond | None
    """items that it computed ÷ span"""
    batch_size_mean: float | None
    """items ÷ batches"""
    predict_ms: Milliseconds | None
    """mean time within its `predict`, a batch"""
    answer_ms: Milliseconds | None
    """mean time of an item from being asked to having answered, by the server or by what calls the stage; in one process nobody
    asks"""


class ModelFigures(Figures):
    """One of several models, of a trial or of a cell."""

    model: str
    """its name"""
    arrivals: int
    good: int
    """that asked for it, and that were answered within the objective"""
    slo_attainment: Proportion | None
    """the second ÷ the first"""
    p50_ms: Milliseconds | None
    p50_ci_ms: EndsMs | None
    p50_ci_ms_source: IntervalSource | None = None
    p99_ms: Milliseconds | None
    p99_ci_ms: EndsMs | None
    p99_ci_ms_source: IntervalSource | None = None
    """percentiles of the response time with their intervals, as of a trial; a cell's say where the interval comes from"""


class Meeting(Figures):
    """The requests that met their model in one way."""

    requests: int
    share: Proportion | None
    share_ci: Annotated[Ends, Unit("0..1")] | None
    """how many, and of all; with Wilson's interval, optimistic, for requests are not independent"""
    p50_ms: Milliseconds | None
    p50_ci_ms: EndsMs | None
    p50_ci_ms_source: IntervalSource | None = None
    p99_ms: Milliseconds | None
    p99_ci_ms: EndsMs | None
    p99_ci_ms_source: IntervalSource | None = None
    """percentiles of the response time with their intervals, failures as +∞"""
    failed: int
    """without success"""


class Multiplexing(Record):
    """Models that share a limited memory, of a trial or of a cell."""

    policy: str
    pinned: int
    memory_mb: Mebibytes
    """what was asked for"""
    controlled: bool
    """whether the harness's controller loads and unloads; false: the framework itself"""
    models: int
    """how many"""
    loads: int
    """models loaded within the trace"""
    evictions: int
    """copies that left memory, as seen twenty times a second; one that died is among them"""
    load_failures: int
    refused: int
    """within the trace: loads that failed or were cut off; loads for which there was no room"""
    reload_mb: Mebibytes
    """what was loaded, all together"""
    load_p50_s: Seconds | None
    """median time of a load, from taking room to having the model, without what the server needs before it"""
    hot: Meeting
    warm: Meeting
    cold: Meeting
    """each with `requests`, `share` of all (`share_ci`: Wilson's interval, optimistic, for requests are not independent),
    `failed`, and `p50_ms`, `p99_ms` of the response time with their intervals, failures as +∞; of `cold` it is the time to a cold
    model's first correct answer"""
    headroom_min_mb: Mebibytes | None
    headroom_mean_mb: Mebibytes | None
    """of `memory_mb`, what nobody had, by what each model is said to take"""
    resident_mean: float | None
    """models in memory"""


class GpuFigures(Record):
    """One GPU over the trace; `null` where it was not told."""

    gpu: str
    """the scope of its samples"""
    lost: bool
    """whether NVML lost it"""
    utilization: Proportion | None
    power_w: Watts | None
    sm_clock_mhz: Megahertz | None
    memory_clock_mhz: Megahertz | None
    """means over the trace"""
    other_utilization: Proportion | None
    """the part of it that processes had which are not the server's, in the mean"""
    throttled: Proportion | None
    throttled_thermal: Proportion | None
    throttled_power: Proportion | None
    throttled_hardware: Proportion | None
    """shares of the readings in which its clocks were held down, and why"""
    memory_bytes: Bytes | None
    server_memory_bytes: Bytes | None
    other_memory_bytes: Bytes | None
    other_processes: float | None
    temperature_c: Celsius | None
    """the largest; `other` as above"""
    sm_active: Proportion | None
    tensor_active: Proportion | None
    dram_active: Proportion | None
    """means, of a DCGM exporter"""
    ecc_corrected: int | None
    ecc_uncorrected: int | None
    """errors that came"""
    energy_j: Joules | None
    energy_from: Literal["counter", "power"] | None
    """over the trace, and whence: `counter` (the GPU's own) or `power` (its mean power × span)"""


class Recovery(Record):
    """What one fault cost."""

    at_s: Seconds
    """when it was injected"""
    baseline_attainment: Proportion | None
    """mean before it"""
    dip_attainment: Proportion
    """of the worst second after it"""
    recovery_s: Seconds | None
    """from the fault until 1-second attainment, having fallen below the baseline minus 5 points, is back there and stays for
    3 s; 0: it never fell; `null`: not back within the trace"""
    relapse_s: Annotated[int, Unit("s")]
    """later seconds in which it was below again"""
    lost: int
    """arrivals under way at the fault, or after it to the end of the trace, without success"""
    lost_by_outcome: dict[str, int]
    """the same by outcome, those that occurred; a `timeout` is indeterminate, its effect on the server unknown"""
    first_failure_s: Seconds | None
    """from the fault until the first of them was known to its client; `null`: none was lost"""
    baseline_goodput_rps: PerSecond | None
    """good answers in a second before it"""
    dip_goodput_rps: PerSecond
    """fewest good answers in a second until the recovery (or the end)"""
    outage_p99_ms: Milliseconds
    """of the arrivals until then, nearest-rank; +∞ where it falls among failures"""


class ComingBack(Record):
    """The cold start of a node that was started again, from the fault on; what it did not come to is absent."""

    spawned_s: Seconds | None = None
    port_open_s: Seconds | None = None
    ready_s: Seconds | None = None
    first_answer_s: Seconds | None = None
    """until its process was spawned, its port open, it said that it was ready, and it gave its first correct answer"""
    in_rotation_s: Seconds | None = None
    """until the load balancer sent requests to it again"""


class Aftermath(Fault):
    """A fault as the trial tells it, and what came of it; of one that hit nothing, ``recovery`` is ``None``, and the rest is not
    there."""

    recovery: Recovery | None
    """what it cost"""
    detected_s: Seconds | None = None
    """from the injection until anybody knew: the first client whose request had failed, or the load balancer"""
    marked_down_s: Seconds | None = None
    """until the balancer took the node out"""
    replica_born_s: Seconds | None = None
    """until a new replica was there"""
    came_back: ComingBack = Field(default_factory=ComingBack)
    """the cold start of a node that was started again (`spawned_s`, `port_open_s`, `ready_s`, `first_answer_s`,
    `in_rotation_s`)"""


class Accounting(Record):
    """Whether every request is accounted for, warm-up included."""

    arrivals: int
    outcomes: dict[str, int]
    """how many, and what became of them"""
    closed: bool
    """whether each has one outcome"""
    executed: int | None
    """items that the devices computed; `null` where they do not count"""
    unanswered_work: int | None
    """of these, what never reached a client as a success"""
    done_twice: int | None
    """what no failed request can explain: the least that was retried unseen"""
    server_ok: int | None
    server_ok_less_client_ok: int | None
    """what servers count as answered, and that less what clients got; what a server had counted since the last reading dies with
    it"""


class WithoutFault(Record):
    """The trial that met the same arrivals without a fault."""

    trial: str
    """its name"""
    slo_attainment: Proportion
    goodput_rps: PerSecond
    p99_ms: Milliseconds | None
    ok: int
    """its figures"""


class ResourceUse(Record):
    """Use of devices and host over the trace; `null` for what was not read."""

    utilization: Proportion | None = None
    server_cpu_cores: Cores | None = None
    server_memory_bytes: Bytes | None = None
    batch_size_mean: float | None = None
    queue_depth_max: float | None = None
    gpu_memory_bytes: Bytes | None = None
    gpu_power_w: Watts | None = None
    host_cpu: Proportion | None = None
    steal: Proportion | None = None
    outside_load: Proportion | None = None
    frequency_mhz: Megahertz | None = None
    frequency_change: Change | None = None
    throttled_per_s: PerSecond | None = None


class TrialSummary(Figures):
    """One trial."""

    trial: str
    cell: str
    number: int
    """names"""
    adapter: str
    scenario: str
    """what was measured, and under what"""
    mean_rate: Annotated[float, Unit("arrivals/s")] | None
    """the rate that the scenario asked for in place of the experiment's; `null`: none"""
    state: str
    """`done`, `failed`, `interrupted`, `pruned` (`tailrace tune` had seen that it was lost), or `running` when the harness was
    killed"""
    workload: str
    trace: str
    device: str
    """what was measured, on what"""
    emulated: bool
    """true when the device is the emulated accelerator"""
    devices: int
    """how many of them"""
    device_price_per_hour: Annotated[float, Unit("US$/h")] | None
    """what the experiment says that one device costs; `null`: nothing"""
    protocol: str
    """what client and server spoke"""
    tuning: dict[str, Any]
    """the knobs that the framework was given; empty: its own defaults"""
    left_out: dict[str, str]
    """knobs that were asked for and that it has no place for, each with the reason; `composition`, where it cannot compose a
    pipeline; `artifact`, where it cannot serve an export and served the Python model"""
    composition: str | None
    """of a pipeline, who joins its stages: `framework` or `one-process`; `null` for other workloads"""
    stages: list[StageFigures]
    """of a pipeline, one entry for each stage ([below](#a-stage))"""
    span_s: Seconds
    """length of the trace, tail included; of a trial cut short, the part that was measured"""
    slo_ms: Milliseconds
    """the objective for one request"""
    arrivals: int
    """arrivals of the trace (`measure`)"""
    offered_rps: PerSecond
    """arrivals ÷ span"""
    throughput_rps: PerSecond
    """`ok` ÷ span"""
    goodput_rps: PerSecond
    """answers within the objective ÷ span"""
    goodput_rps_per_device: PerSecond
    """goodput ÷ devices"""
    goodput_per_dollar: Annotated[float, Unit("1/US$")] | None
    """goodput × 3600 ÷ (devices × that price); `null` without one"""
    goodput_per_joule: Annotated[float, Unit("1/J")] | None
    """goodput ÷ mean power of all GPUs together (of each its energy over the trace ÷ span); `null` unless each of the devices
    told its own"""
    slo_attainment: Proportion
    """answers within the objective ÷ arrivals"""
    p50_ms: Milliseconds | None
    p50_ci_ms: EndsMs | None
    p90_ms: Milliseconds | None
    p90_ci_ms: EndsMs | None
    p99_ms: Milliseconds | None
    p99_ci_ms: EndsMs | None
    """nearest-rank percentile of the response time (done − intended) of **all** arrivals, failures as +∞; and its exact 95 %
    order-statistic interval within the trial (two-sided; optimistic, for arrivals are not independent)"""
    p99_more_needed: int
    """arrivals that are missing until p99 may be claimed (368 are needed)"""
    p50_ok_ms: Milliseconds
    p99_ok_ms: Milliseconds
    """the same over successes alone: what a tool that forgets failures would print"""
    p50_service_ms: Milliseconds
    p99_service_ms: Milliseconds
    """service time (done − sent) of successes"""
    models: list[ModelFigures]
    """of several models: for each `model`, the most popular at the beginning first, its `arrivals`, `good`, `slo_attainment`,
    `p50_ms` and `p99_ms` with their intervals; empty for a single one"""
    multiplexing: Multiplexing | None
    """of models that share a limited memory, what came of it ([below](#multiplexing)); `null` for others"""
    good: int
    """answers within the objective"""
    ok: int
    errors: int
    shed: int
    timeouts: int
    connection_errors: int
    dropped: int
    """arrivals by outcome; they add up to `arrivals`"""
    effective_arrivals: float
    """how many independent arrivals would tell as much about the level of the response time: arrivals ÷ integrated
    autocorrelation time of their ranks; `null` where nothing varies"""
    warmup_detected_s: Seconds | None
    """where MSER-5 puts the end of the initial transient, on the trace's clock: ≤ 0 lies before the trace; `null` where a change
    is meant (transient trace, injected fault) or fewer than 100 arrivals tell"""
    drift: Change | None
    """change of the median response time from the trace's begin to its end (Theil–Sen on logarithms of 20 batches), relative;
    `"inf"`: it came to be failures; `null` as above"""
    failure_drift: Change | None
    """change of the share of failures from the trace's begin to its end; `null` as above"""
    send_lag_p50_ms: Milliseconds
    send_lag_p99_ms: Milliseconds
    send_lag_max_ms: Milliseconds
    """sent − intended; holds the wait for a connection, which is the server's"""
    start_lag_p99_ms: Milliseconds | None
    """the generator's own part of it: from the intended instant until the arrival was taken up"""
    utilization: Proportion | None
    """emulated: busy time ÷ (span × devices); cuda: mean NVML utilization; cpu: CPU time of the server ÷ (span × cores)"""
    server_cpu_cores: Cores | None
    """CPU time of the server's process tree ÷ span"""
    server_memory_bytes: Bytes | None
    """largest proportional set size of that tree"""
    batch_size_mean: float | None
    queue_depth_max: float | None
    """from the server's own metrics: items ÷ batches, largest reading"""
    gpu_memory_bytes: Bytes | None
    gpu_power_w: Watts | None
    """largest, mean; of one GPU where there are several"""
    host_cpu: Proportion | None
    steal: Proportion | None
    outside_load: Proportion | None
    """mean shares of the host's CPU: busy, taken by the hypervisor, used by processes outside the trial"""
    frequency_mhz: Megahertz | None
    """mean frequency of the CPUs over the trace; `null` where it is not told. Virtual machines often report a nominal one"""
    frequency_change: Change | None
    """its mean over the second half of the trace ÷ over the first − 1"""
    throttled_per_s: PerSecond | None
    """thermal throttlings of the CPUs' cores; `null` where they are not counted"""
    gpus: list[GpuFigures]
    """one entry for each GPU that was read ([below](#a-gpu))"""
    cold_start_s: Seconds | None
    """process spawned → first correct answer"""
    cold_start_phases_s: Annotated[ColdStart, Unit("s")] | None
    """since the spawn: `port_open_s`, `ready_s`, `first_answer_s`; and `environment_s`, the time to have the environment ready"""
    outputs: Outputs | None
    """answers compared with the reference during the run: `checked`, `mismatched`, `unchecked`, `example`"""
    generator_cpu_us_per_request: Microseconds | None
    """CPU time of the load process per arrival"""
    nodes: int
    supervision: str
    """how many nodes there may be; who starts a dead one again (`none`, `restart`)"""
    cold_copies_hit: int | None
    """copies of the model that gave their first answer within the trace; 0: no cold replica was ever hit; `null`: not known (only
    the emulated accelerator tells)"""
    faults: list[Aftermath]
    """what was injected ([below](#a-fault))"""
    accounting: Accounting
    """whether every request is accounted for ([below](#accounting))"""
    verdict: Verdict
    reasons: list[Reason]
    """VALID, INVALID or UNKNOWN; each reason with `code`, `text`, `remedy`, `effect`"""
    without_fault: WithoutFault | None = None
    """of a trial with faults: figures of the one that met the same arrivals without (same framework, number, rate and tuning), or
    `null`"""


class CellSummary(Figures):
    """One cell. Keys that a trial has as well mean the same, over the trials that finished: counts are sums, rates and shares
    means, `queue_depth_max` and `server_memory_bytes` the largest."""

    cell: str
    adapter: str
    scenario: str
    mean_rate: Annotated[float, Unit("arrivals/s")] | None
    workload: str
    trace: str
    device: str
    emulated: bool
    devices: int
    device_price_per_hour: Annotated[float, Unit("US$/h")] | None
    nodes: int
    supervision: str
    protocol: str
    tuning: dict[str, Any]
    left_out: dict[str, str]
    composition: str | None
    slo_ms: Milliseconds
    trials: int
    offered_rps: PerSecond | None
    throughput_rps: PerSecond | None
    goodput_rps: PerSecond | None
    goodput_rps_per_device: PerSecond | None
    goodput_per_dollar: Annotated[float, Unit("1/US$")] | None
    goodput_per_joule: Annotated[float, Unit("1/J")] | None
    slo_attainment: Proportion | None
    utilization: Proportion | None
    cold_start_s: Seconds | None
    server_cpu_cores: Cores | None
    batch_size_mean: float | None
    stages: list[StageFigures]
    server_memory_bytes: Bytes | None
    queue_depth_max: float | None
    arrivals: int
    good: int
    ok: int
    errors: int
    shed: int
    timeouts: int
    connection_errors: int
    dropped: int
    goodput_rps_per_device_ci: Annotated[Ends, Unit("1/s")] | None
    goodput_per_dollar_ci: Annotated[Ends, Unit("1/US$")] | None
    goodput_per_joule_ci: Annotated[Ends, Unit("1/J")] | None
    slo_attainment_ci: Annotated[Ends, Unit("0..1")] | None
    p50_ms: Milliseconds | None
    p50_ci_ms: EndsMs | None
    p50_ci_ms_source: IntervalSource | None
    p99_ms: Milliseconds | None
    p99_ci_ms: EndsMs | None
    p99_ci_ms_source: IntervalSource | None
    models: list[ModelFigures]
    multiplexing: Multiplexing | None
    send_lag_p99_ms: Milliseconds
    verdict: Verdict
    reasons: list[str]


class Comparison(Record):
    """One figure of one cell against that of another adapter under the same scenario."""

    scenario: str
    first: str
    second: str
    """the two adapters; said of the first"""
    figure: str
    """`p99_ms`, `p50_ms` or `goodput_rps_per_device`"""
    ratio: float | None
    """geometric mean over blocks of first ÷ second; `null` where it is not compared"""
    interval: Ends | None
    """its 95 % interval; `null` from fewer than three blocks"""
    blocks: int
    """how many"""
    method: Method | None
    """`t` (Student's, on logarithms), from eight blocks `bootstrap` (BCa); `null` without an interval"""
    verdict: str
    """of a latency `faster` or `slower`, of goodput `more` or `less`, where the interval leaves 1 out; else `no
    difference shown`; `not compared` where a cell holds an INVALID trial, a percentile is not claimed or ∞, or goodput is 0"""
    reason: str | None
    """why there is no interval, or no comparison"""


class RunSummary(Record):
    """A run."""

    schema_version: int
    """1"""
    run: str
    question: str
    """the experiment's name, and what it asks"""
    verdict: Verdict
    """the worst of its trials"""
    planned_trials: int
    """how many were to be"""
    cells: list[CellSummary]
    """one entry per cell (adapter × scenario)"""
    ruler: dict[str, Any]
    """the calibration by protocol ([the ruler](#the-ruler))"""
    comparisons: list[Comparison]
    """one entry for each figure of every two cells of different adapters under the same scenario"""
    trials: list[TrialSummary]
    """one entry per trial that began"""
