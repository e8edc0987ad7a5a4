"""The generator measured against a server that costs nothing: what it can send, how late it is, what a request costs."""

from __future__ import annotations

import contextlib
import glob
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.analysis.metrics import NS_PER_S, Measured, measured, percentile
from tailrace.harness.contract.adapter import Deployment, DeployRequest, Tuning, WireProtocol
from tailrace.harness.contract.workload import PreparedWorkload, Slo, TensorSpec, WorkloadSpec
from tailrace.harness.errors import EnvironmentBuildError, StorageError
from tailrace.harness.plan.schedule import Phase, Schedule
from tailrace.harness.processes import log_tail
from tailrace.harness.records.schema import REQUEST_SCHEMA, Outcome
from tailrace.harness.records.store import write_json
from tailrace.harness.records.tables import finish_table, read_table
from tailrace.harness.replay.driver import LoadGenerator, ReplayResult, Workers
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.servers.devices import device_environment
from tailrace.harness.servers.environments import Kind, build
from tailrace.harness.servers.guardian import Guardian

NULL_SERVER = "null"
"""The one adapter that the harness knows by name, for it is part of the harness: it has no framework behind it."""
FIXED_ANSWER_BYTES = 1_000_000
"""The largest request that the null server's fast engine tells apart (its buffer, less a head)."""

WARMUP_S = 0.5
STEP_ARRIVALS = 20
"""The fewest arrivals of a step, as far as :data:`STEP_LIMIT_S` allows."""
STEP_LIMIT_S = 2.0
DOUBLINGS = 5
"""How far above the experiment's own peak the ceiling is looked for: 32 times."""
RATE_LIMIT = 20_000.0
"""No single machine's generator gets past this; looking there only takes time."""
HELD_LAG_MS = 1.0
"""A rate is held when the median send lag stays below this: one that is not lets the lag grow without bound, while a
hiccup of the machine moves the 99th percentile alone."""
CLIENT_TIMEOUT_S = 10.0
LEAD_S = 0.3


@dataclass(frozen=True)
class Step:
    """What the generator did at one rate. Lags and response times (from the intended start) in milliseconds, nearest rank;
    ``None`` where nothing was sent or answered."""

    rate: float
    """Arrivals/s that were asked for."""
    achieved: float
    """Answered with success per second, until the last of them."""
    arrivals: int
    send_lag_p50_ms: float | None
    send_lag_p99_ms: float | None
    response_p50_ms: float | None
    response_p99_ms: float | None
    dropped: int
    failed: int

    @property
    def held(self) -> bool:
        """Whether the generator kept up: nothing dropped, nothing failed, no lag that grows."""
        lag = self.send_lag_p50_ms
        return not self.dropped and not self.failed and lag is not None and lag <= HELD_LAG_MS


def analyse(trace: Measured, rate: float, begin_s: float, end_s: float) -> Step:
    """The step of a replay between two instants of its clock (seconds)."""
    first, last = np.searchsorted(trace.intended_ns, [int(begin_s * NS_PER_S), int(end_s * NS_PER_S)])
    part = trace.those(slice(first, last))
    lag, response = part.send_lag_ms(), part.response_ms()
    answered = response[part.ok]
    until_s = max(end_s, float(part.done_ns[part.ok].max()) / NS_PER_S if part.ok.any() else end_s)
    return Step(
        rate=rate,
        achieved=int(np.count_nonzero(part.ok)) / (until_s - begin_s),
        arrivals=len(part),
        send_lag_p50_ms=_known(percentile(lag, 0.50)),
        send_lag_p99_ms=_known(percentile(lag, 0.99)),
        response_p50_ms=_known(percentile(answered, 0.50)),
        response_p99_ms=_known(percentile(answered, 0.99)),
        dropped=part.count(Outcome.DROPPED),
        failed=len(part) - int(np.count_nonzero(part.ok)) - part.count(Outcome.DROPPED),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def stepped(
    rates: Sequence[float], step_s: float, *, payloads: int, seed: int
) -> tuple[Schedule, list[tuple[float, float]]]:
    """Poisson arrivals at one rate after the other, with the beginning and end of each step in seconds.

    Every step holds ``rate × length`` arrivals exactly: their instants are what a Poisson process has when that many fall
    into it (uniform order statistics). Half a second of warm-up at the first rate precedes them.
    """
    rng = np.random.default_rng(seed)
    warm = max(1, round(rates[0] * WARMUP_S))
    instants: list[NDArray[np.float64]] = [np.sort(rng.uniform(-WARMUP_S, 0, warm))]
    edges: list[tuple[float, float]] = []
    begin_s = 0.0
    for rate in rates:
        length_s = min(max(step_s, STEP_ARRIVALS / rate), max(step_s, STEP_LIMIT_S))
        edges.append((begin_s, begin_s + length_s))
        instants.append(np.sort(rng.uniform(*edges[-1], max(1, round(rate * length_s)))))
        begin_s += length_s
    intended_ns = (np.concatenate(instants) * NS_PER_S).astype(np.int64)
    phase = np.full(len(intended_ns), Phase.MEASURE, np.uint8)
    phase[:warm] = Phase.WARMUP
    schedule = Schedule(
        intended_ns=intended_ns,
        model=np.zeros(len(intended_ns), np.uint16),
        payload_id=rng.integers(0, payloads, len(intended_ns), dtype=np.int32),
        phase=phase,
        models=(NULL_SERVER,),
    )
    return schedule, edges


def plain_workload(body_bytes: int, payloads: int = 8) -> PreparedWorkload:
    """Random requests of a given size, and short answers that tell them apart."""
    spec = WorkloadSpec(
        name=NULL_SERVER,
        title="Bytes",
        description="Bytes in, a number out.",
        devices=("cpu",),
        inputs=(TensorSpec(name="body", dtype="uint8", shape=(body_bytes,)),),
        outputs=(TensorSpec(name="number", dtype="int64", shape=(1,)),),
        slo=Slo(latency_ms=1000),
        payloads=payloads,
    )
    rng = np.random.default_rng(body_bytes)
    nowhere = Path("/nonexistent")  # the null server answers from memory and loads no model
    return PreparedWorkload(
        spec,
        "cpu",
        model_file=nowhere,
        artifact=nowhere,
        artifact_sha256="",
        requirements=None,
        payloads=tuple({"body": rng.integers(0, 256, body_bytes, dtype=np.uint8)} for _ in range(payloads)),
        references={NULL_SERVER: tuple({"number": np.array([index], np.int64)} for index in range(payloads))},
    )


class NullServer:
    """A running null server, and replays against it. A context manager; everything it leaves is removed."""

    def __init__(
        self,
        workload: PreparedWorkload,
        protocol: WireProtocol,
        *,
        environment: Kind = "venv",
        host: str = "127.0.0.1",
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self._adapter = get_adapter(NULL_SERVER)
        answers = next(iter(workload.references.values()))
        self._workload = replace(workload, device="cpu", references={NULL_SERVER: answers})
        self._protocol = protocol
        self._kind = environment
        self._host = host
        self._on_progress = on_progress
        self._exit = contextlib.ExitStack()

    @property
    def engine(self) -> str:
        """The fastest that can serve this: fixed answers over HTTP, else the script."""
        spec = self._workload.spec
        size = sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in spec.inputs)
        return "haproxy" if self._protocol == "http" and size <= FIXED_ANSWER_BYTES else "scripted"

    def __enter__(self) -> NullServer:
        with contextlib.ExitStack() as opened:
            self._folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="tailrace-ruler-")))
            guardian = opened.enter_context(Guardian())
            guardian.remove_later(glob.escape(str(self._folder)))
            self._deployment = self._deploy(guardian)
            opened.callback(self._deployment.stop, 2.0)
            self._wait_ready()
            self._exit = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _deploy(self, guardian: Guardian) -> Deployment:
        adapter = self._adapter
        environment = build(self._kind, [adapter.requirements], name=adapter.name, on_progress=self._on_progress)
        scratch = self._folder / "scratch"
        (scratch / "devices").mkdir(parents=True)
        request = DeployRequest(
            workload=self._workload,
            models=(NULL_SERVER,),
            tuning=Tuning(),
            options=adapter.Options.model_validate({"engine": self.engine}),
            protocol=self._protocol,
            environment=environment,
            workdir=self._folder,
            scratch=scratch,
            server_env=device_environment("cpu", scratch / "devices"),
            host=self._host,
        )
        return adapter.start(request, guardian)

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + self._adapter.start_timeout_s
        while not self._deployment.claims_ready():
            self._deployment.check_alive()
            if time.monotonic() > deadline_s:
                raise EnvironmentBuildError("the null server did not start", detail=log_tail(self._deployment.log))
            time.sleep(0.02)

    def replay(
        self, schedule: Schedule, records: Path, *, max_connections: int, workers: Workers
    ) -> tuple[Measured, ReplayResult]:
        """Send a schedule; the rows become ``records`` (the stem of a table), and their measured part is returned."""
        endpoint = self._deployment.endpoint
        requests = {
            (0, int(payload)): endpoint.codec.encode(NULL_SERVER, self._workload.payloads[payload])
            for payload in np.unique(schedule.payload_id)
        }
        generator = LoadGenerator(
            schedule=schedule,
            requests=requests,
            protocol=endpoint.protocol,
            host=endpoint.host,
            port=endpoint.port,
            timeout_s=CLIENT_TIMEOUT_S,
            max_connections=max_connections,
            records=records,
            log=records.with_name("load-generator.log"),
            workers=workers,
        )
        with generator:
            generator.start()
            generator.go(time.monotonic_ns() + int((WARMUP_S + LEAD_S) * NS_PER_S))
            result = generator.wait()
        finish_table(records, sort_by="arrival_id")
        table = read_table(records, REQUEST_SCHEMA)
        return measured(table if table is not None else REQUEST_SCHEMA.empty_table()), result


def climb(mean_rate: float, peak_rate: float) -> list[float]:
    """The rates of a calibration: the experiment's mean and peak, then twice as much each time."""
    higher = [peak_rate * 2**k for k in range(1, DOUBLINGS + 1) if peak_rate * 2**k <= RATE_LIMIT]
    return [mean_rate, peak_rate, *higher]


def calibrate(
    folder: Path,
    workload: PreparedWorkload,
    protocol: WireProtocol,
    *,
    mean_rate: float,
    peak_rate: float,
    step_s: float,
    environment: Kind,
    host: str,
    workers: Workers,
    max_connections: int,
    seed: int,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the generator against the null server with an experiment's own requests, at its own rates and beyond.

    The rows are kept as ``folder/requests.parquet``. Returns the figures of ``calibration.json`` (docs/record.md).
    Raises what building the null server's environment or starting it raises.
    """
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError.of(folder, error) from error
    rates = climb(mean_rate, peak_rate)
    schedule, edges = stepped(rates, step_s, payloads=len(workload.payloads), seed=seed)
    with NullServer(workload, protocol, environment=environment, host=host, on_progress=on_progress) as server:
        trace, result = server.replay(schedule, folder / "requests", max_connections=max_connections, workers=workers)
        engine = server.engine
    steps = [analyse(trace, rate, *edge) for rate, edge in zip(rates, edges, strict=True)]
    figures = {
        "engine": engine,
        "steps": [asdict(step) for step in steps],
        "cpu_us_per_request": result.cpu_s / len(schedule) * 1e6,
        "workers": workers.count,
        **ceiling(steps),
    }
    write_json(folder / "calibration.json", figures)
    return figures


def ceiling(steps: Sequence[Step]) -> dict[str, Any]:
    """The highest rate up to which every step was held (``None``: not even the lowest was), whether the generator's limit
    lies above it (``at_least``) or was met, and the lag and floor at the experiment's peak, the second step."""
    held = [step.rate for step in steps]
    first_missed = next((index for index, step in enumerate(steps) if not step.held), None)
    if first_missed is not None:
        held = held[:first_missed]
    peak = steps[1]
    return {
        "ceiling_rps": max(held, default=None),
        "at_least": first_missed is None,
        "send_lag_p50_ms": peak.send_lag_p50_ms,
        "send_lag_p99_ms": peak.send_lag_p99_ms,
        "floor_p50_ms": peak.response_p50_ms,
        "floor_p99_ms": peak.response_p99_ms,
    }


def measure_rates(
    rates: Sequence[float],
    *,
    duration_s: float,
    body_bytes: int,
    protocol: WireProtocol,
    workers: Workers,
    max_connections: int,
    environment: Kind = "venv",
    on_progress: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """One replay at each rate, as ``tailrace loadgen`` prints it: the fields of :class:`Step` and the CPU time that the
    generator's processes used for one request, in microseconds."""
    workload = plain_workload(body_bytes)
    scratch = Path(tempfile.mkdtemp(prefix="tailrace-loadgen-"))
    try:
        with NullServer(workload, protocol, environment=environment, on_progress=on_progress) as server:
            for number, rate in enumerate(rates):
                schedule, ((begin_s, end_s),) = stepped(
                    [rate], duration_s, payloads=len(workload.payloads), seed=number
                )
                records = scratch / str(number) / "requests"
                records.parent.mkdir()
                trace, result = server.replay(schedule, records, max_connections=max_connections, workers=workers)
                step = analyse(trace, rate, begin_s, end_s)
                yield {**asdict(step), "cpu_us_per_request": result.cpu_s / len(schedule) * 1e6}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
