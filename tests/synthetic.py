"""Plausible run folders without servers: a small batch-server simulation writes what a real run would have stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tailrace.harness.contract.multiplexing import MemoryPlan, plan_memory
from tailrace.harness.plan.cells import interleave
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.records.schema import OUTCOME_NAMES, REQUEST_SCHEMA, SAMPLE_SCHEMA, Outcome
from tailrace.harness.records.store import EventLog, RunFolder, TrialFolder, write_json
from tailrace.harness.records.tables import TableWriter, finish_table
from tailrace.simulator import multiplexing
from tailrace.simulator.system import Batching, Service

Variant = Literal["complete", "killed", "empty", "one-request", "hostile"]
Floats = NDArray[np.float64]

SCRIPT = '<script>alert("tailrace")</script>'
"""What the hostile variant puts wherever a server, a trace or a user may put text."""
HOSTILE = SCRIPT + " {{ 7 * 7 }} $\\frac{ & ]]> </style></svg> \u202e"

SHARING = 6
STARTED_S = 0.2
"""What a load takes beyond :data:`COST`."""
COST = {"base_ms": 12.0, "per_item_ms": 3.0, "load_ms": 50.0, "load_gb_per_s": 1.0}

EPOCH_NS = 5_000_000_000_000
_BASE_S, _PER_ITEM_S, _MAX_BATCH, _TIMEOUT_S = 0.012, 0.003, 16, 10.0


def make_run(
    folder: Path,
    *,
    adapters: Sequence[str] = ("triton", "ray_serve"),
    scenarios: Sequence[str] = ("no-fault", "kill-replica"),
    trials: int = 1,
    seed: int = 7,
    span_s: float = 50.0,
    peak_rate: float = 520.0,
    fault_at: float = 20.0,
    fail_fraction: float = 0.0,
    device: Literal["emulated", "cpu", "cuda"] = "emulated",
    slo_ms: float = 200.0,
    name: str = "compare",
    variant: Variant = "complete",
    memories: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunFolder:
    """Write a run folder and open it.

    A scenario whose name is neither ``no-fault`` nor ``defaults`` loses one of two replicas at ``fault_at``; under
    ``defaults`` there is one replica, and it does not batch. Adapters differ in their overhead, and every second one
    brings the replica back after 4 s. ``fail_fraction`` of the arrivals fail besides.
    Variants: ``killed`` (the last trial is an unfinished Arrow stream cut in mid-batch, the one before it failed at
    deploy, when there are three), ``empty`` (no arrivals), ``one-request``, ``hostile`` (markup in every text).
    With ``memories`` by scenario (keys of ``multiplexing``) there are :data:`SHARING` models of 100 MiB, and no faults; the
    harness drives whatever is not the reference server.
    """
    memories = memories or {}
    experiment = Experiment.model_validate(
        {
            "name": name,
            "question": "Which framework serves this model best under a surge in which one of two replicas dies?"
            if variant != "hostile"
            else HOSTILE,
            "adapters": list(adapters),
            "devices": 1 if memories else 2,
            "models": {"count": SHARING, "size_mb": 100} if memories else 1,
            "device": device,
            "trace": {"name": "surge" if variant != "hostile" else f"surge {HOSTILE}", "tail_s": 20},
            "tuning": {"max_batch": _MAX_BATCH, "batch_window_ms": 10, "replicas": 2},
            "scenarios": [
                {
                    "name": s,
                    "faults": []
                    if s in ("no-fault", "defaults", *memories)
                    else [{"kind": "kill_replica", "at_s": fault_at}],
                    "tuning": "defaults" if s == "defaults" else None,
                    "multiplexing": memories.get(s),
                }
                for s in scenarios
            ],
            "trials": trials,
            "seed": seed,
        }
    )
    plans = interleave(experiment)
    run = RunFolder.create(folder, _manifest(experiment, variant))
    for index, plan in enumerate(plans):
        trial = run.trial(plan.id)
        trial.server.joinpath("config").mkdir(parents=True)
        (trial.server / "logs").mkdir()
        text = f"name: {plan.cell.adapter}\nmax_batch_size: {_MAX_BATCH}\n"
        (trial.server / "config" / "model.conf").write_text(text + (HOSTILE if variant == "hostile" else ""))
        has_fault = bool(plan.cell.scenario.faults)
        facts = _facts(experiment, plan.cell.adapter, span_s=span_s, slo_ms=slo_ms, device=device, variant=variant)
        if not experiment.tuning_of(plan.cell.scenario).chosen():
            facts["tuning"] = dict.fromkeys(facts["tuning"])
        facts.update(
            id=plan.id, cell=plan.cell.id, scenario=plan.cell.scenario.name, number=plan.number, seed=plan.seed
        )
        if variant == "killed" and index == len(plans) - 2 and len(plans) > 2:
            _write_failed(trial, facts)
            continue
        killed = variant == "killed" and index == len(plans) - 1
        rng = np.random.default_rng([plan.seed, len(plan.cell.adapter), sum(plan.cell.adapter.encode())])
        arrivals = _arrivals(np.random.default_rng(plan.seed), span_s, peak_rate, variant)
        position = list(adapters).index(plan.cell.adapter)
        simulated = _simulate(
            arrivals,
            overhead_s=0.002 + 0.0025 * (position % 5),
            fault_at=fault_at if has_fault else math.inf,
            back_at=fault_at + 4.0 if has_fault and position % 2 else math.inf,
            fail_fraction=fail_fraction,
            tuned=bool(experiment.tuning_of(plan.cell.scenario).chosen()),
            rng=rng,
        )
        if (choice := experiment.multiplexing_of(plan.cell.scenario)) is not None:
            names = experiment.models.names(experiment.workload)
            shared = plan_memory(choice, names, experiment.models.sizes_mb(), "memories")
            simulated = _sharing(arrivals, shared, overhead_ms=2 + 3 * position, seed=plan.seed)
            controlled = plan.cell.adapter != "reference"
            facts.update(models=list(names), memory={**asdict(shared), "controlled": controlled})
        _write_trial(trial, facts, simulated, span_s=span_s, killed=killed, variant=variant, rng=rng)
    if variant != "killed":
        run.amend_manifest(ended_at="2026-11-23T22:31:40Z")
    return RunFolder.open(folder)


def calibration(peak_rate: float, *, ceiling_rps: float | None = 19_200.0, at_least: bool = True) -> dict[str, Any]:
    """What a calibration leaves in the manifest for one protocol."""
    step = {
        "achieved": peak_rate,
        "arrivals": round(peak_rate / 2),
        "send_lag_p50_ms": 0.03,
        "send_lag_p99_ms": 0.07,
        "response_p50_ms": 0.15,
        "response_p99_ms": 0.6,
        "dropped": 0,
        "failed": 0,
    }
    return {
        "engine": "haproxy",
        "steps": [{**step, "rate": rate} for rate in (peak_rate / 4, peak_rate, 2 * peak_rate)],
        "cpu_us_per_request": 66.0,
        "workers": 1,
        "ceiling_rps": ceiling_rps,
        "at_least": at_least,
        "send_lag_p50_ms": 0.03,
        "send_lag_p99_ms": 0.07,
        "floor_p50_ms": 0.15,
        "floor_p99_ms": 0.6,
    }


def _manifest(experiment: Experiment, variant: Variant) -> dict[str, Any]:
    hostile = variant == "hostile"
    return {
        "tailrace_version": "0.1.0",
        "name": experiment.name,
        "state": "running" if variant == "killed" else "done",
        "started_at": "2026-11-23T22:24:05Z",
        "ended_at": None,
        "command": ["tailrace", "run", experiment.name, "--set", f"note={SCRIPT}" if hostile else "trials=1"],
        "experiment": experiment.model_dump(mode="json"),
        "experiment_sha256": experiment.sha256,
        "ruler": {"http": calibration(1200.0)},
        "hardware": {
            "cpu_model": "Synthetic CPU @ 2.00GHz",
            "cpu_count": 2,
            "memory_bytes": 8 * 2**30,
            "gpus": ["Synthetic GPU"] if experiment.device == "cuda" else [],
            "kernel": "6.1.0",
            "os": "Debian GNU/Linux 12 (bookworm)",
        },
        "software": {"python": "3.11.7", "locust": "2.43.0", "numpy": "2.3.0"},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "environment_variables": {"CI": "1"},
        "adapters": {adapter: _adapter(adapter, index, hostile) for index, adapter in enumerate(experiment.adapters)},
        "workload": {
            "name": HOSTILE if hostile else experiment.workload,
            "title": HOSTILE if hostile else "Emulated accelerator",
            "description": "Emulated: a model whose device takes 12 ms plus 3 ms per item for a batch.",
            "artifact_sha256": "ab" * 32,
            "payloads": 64,
            "tolerance": {"atol": 0.0, "rtol": 0.0},
            "cost": COST,
        },
        "trace": {
            "name": experiment.trace.name,
            "provenance": {"source": HOSTILE if hostile else "drawn from the seed of the run"},
            "description": {"rows": 7300, "span_s": 50.0, "mean_rate": 146.0, "index_of_dispersion_1s": 142.1},
        },
        "trials": [
            {
                "id": plan.id,
                "cell": plan.cell.id,
                "adapter": plan.cell.adapter,
                "scenario": plan.cell.scenario.name,
                "number": plan.number,
                "seed": plan.seed,
            }
            for plan in interleave(experiment)
        ],
        "cleaned": [],
    }


def _adapter(name: str, index: int, hostile: bool) -> dict[str, Any]:
    titles = {
        "reference": "Reference server",
        "triton": "Triton",
        "ray_serve": "Ray Serve",
        "torchserve": "TorchServe",
        "kserve": "KServe",
    }
    return {
        "title": HOSTILE if hostile and index == 0 else titles.get(name, name),
        "homepage": "javascript:alert(1)" if hostile else "https://example.org/" + name,
        "packages": {"numpy": "1.26.4", name: "1.0"},
        "environment": "venv",
        "knobs": {
            "max_batch": "max_batch_size",
            "batch_window_ms": "max_queue_delay_microseconds",
            "replicas": "instance_group.count",
        },
        "refused": {"autoscale": "an external scaler only"},
        "capabilities": ["replicas", "scrape", "applied"],
        "traits": {"batching": HOSTILE if hostile else f"{name} batches in its own way"},
        "left_out": {"queue_limit": f"{name} has no place for `queue_limit`: none"} if name == "kserve" else {},
        "observed": {
            "seen_at": "2026-11-23T20:00:00+00:00",
            "python": "3.11.7",
            "observations": [
                {"axis": "batching", "text": HOSTILE if hostile else "formed 7.6 requests per batch", "figures": {}},
                {"axis": "failure", "text": "one of 2 replicas killed: 3 of 141 requests failed", "figures": {}},
            ],
        }
        if index == 0
        else None,
    }


def _facts(
    experiment: Experiment,
    adapter: str,
    *,
    span_s: float,
    slo_ms: float,
    device: str,
    variant: Variant,
) -> dict[str, Any]:
    hostile = variant == "hostile"
    return {
        "adapter": adapter,
        "state": "running",
        "error": None,
        "workload": HOSTILE if hostile else experiment.workload,
        "trace": experiment.trace.name,
        "transient": True,
        "device": device,
        "devices": experiment.devices,
        "protocol": "http",
        "slo_ms": slo_ms,
        "span_s": span_s,
        "arrivals": 0,
        "models": [HOSTILE if hostile else "model"],
        "cpu_count": 2,
        "epoch_mono_ns": EPOCH_NS,
        "tuning": {"max_batch": _MAX_BATCH, "batch_window_ms": 10.0, "replicas": 2},
        "applied": {"max_batch": _MAX_BATCH, "replicas": 2},
        "not_applied": [],
        "faults": [],
        "warnings": [f"a warning {HOSTILE}"] if hostile else [],
    }


def _arrivals(rng: np.random.Generator, span_s: float, peak_rate: float, variant: Variant) -> Floats:
    """A triangle on a quiet base, like the catalogue's surge, by thinning; seconds."""
    if variant == "empty":
        return np.empty(0)
    if variant == "one-request":
        return np.array([span_s / 3])
    count = rng.poisson(peak_rate * span_s)
    t = np.sort(rng.uniform(0, span_s, count))
    rate = 40 + (peak_rate - 40) * np.maximum(0, 1 - np.abs(t - 15) / 9)
    return t[rng.uniform(0, peak_rate, count) < rate]


@dataclass(frozen=True)
class _Simulated:
    arrival_s: Floats
    sent_s: Floats
    start_s: Floats
    done_s: Floats
    outcome: NDArray[np.uint8]
    busy: tuple[Floats, Floats]
    """Starts and ends of the batches, in order of their ends."""
    models: NDArray[np.int64] | None = None
    """Whom each arrival is for, where there are several."""
    events: tuple[tuple[float, str, dict[str, Any]], ...] = ()
    """When (s), what, and the details."""
    memory: tuple[Floats, Floats] | None = None
    """Bytes that are free, and from when on (s)."""


def _simulate(
    arrivals: Floats,
    *,
    overhead_s: float,
    fault_at: float,
    back_at: float,
    fail_fraction: float,
    tuned: bool,
    rng: np.random.Generator,
) -> _Simulated:
    """Two replicas that take batches from one queue; the second is dead between ``fault_at`` and ``back_at``.

    A dead one that never comes back keeps taking work and fails it after a second, as Triton's does. Not ``tuned``, there
    is one replica, and no batch has more than one request.
    """
    n = len(arrivals)
    largest = _MAX_BATCH if tuned else 1
    sent = arrivals + np.minimum(rng.lognormal(-9.2, 0.6, n), 0.0008)
    start, done = np.zeros(n), np.zeros(n)
    outcome = np.full(n, Outcome.OK, dtype=np.uint8)
    free = [0.0, 0.0 if tuned else math.inf]
    batches: list[tuple[float, float]] = []
    i = 0
    while i < n:
        replica = int(free[1] < free[0])
        begin = max(free[replica], sent[i] + 0.0005)
        dead = replica == 1 and fault_at <= begin < back_at
        if dead and math.isfinite(back_at):
            free[1] = back_at
            continue
        j = max(i + 1, min(i + largest, int(np.searchsorted(sent, begin, side="right"))))
        start[i:j] = begin
        if dead:
            done[i:j], outcome[i:j] = begin + 1.0, Outcome.ERROR
            free[replica] = begin + 0.05
        else:
            took = _BASE_S + _PER_ITEM_S * (j - i) + overhead_s * float(rng.lognormal(0, 0.4))
            free[replica] = begin + took
            done[i:j] = begin + took
            batches.append((begin, begin + took))
        i = j
    late = done - sent > _TIMEOUT_S
    outcome[late], done[late] = Outcome.TIMEOUT, sent[late] + _TIMEOUT_S
    failed = rng.uniform(size=n) < fail_fraction
    outcome[failed] = rng.choice([Outcome.ERROR, Outcome.SHED, Outcome.CONNECTION], int(failed.sum()))
    done[failed] = sent[failed] + 0.004
    ends = sorted(batches, key=lambda batch: batch[1])
    return _Simulated(
        arrivals, sent, start, done, outcome, (np.array([b for b, _ in ends]), np.array([e for _, e in ends]))
    )


def _sharing(arrivals: Floats, plan: MemoryPlan, *, overhead_ms: float, seed: int) -> _Simulated:
    """Models that share a memory, by the simulator of just that: loads take :data:`STARTED_S` more than the link does."""
    names = list(plan.sizes)
    shares = np.arange(1, len(names) + 1) ** -1.0
    models = np.random.default_rng(seed).choice(len(names), len(arrivals), p=shares / shares.sum())
    device = multiplexing.Device(
        Service(base_ms=12, per_item_ms=3),
        Batching(max_batch=_MAX_BATCH, window_ms=10),
        load_ms=COST["load_ms"],
        load_gb_per_s=COST["load_gb_per_s"],
        starts_s=(STARTED_S,),
        overhead_ms=overhead_ms,
    )
    memory = multiplexing.Memory(
        plan.budget_bytes,
        list(plan.sizes.values()),
        plan.policy,
        [names.index(name) for name in plan.pinned],
        [names.index(name) for name in plan.at_start],
    )
    done = multiplexing.simulate(device, memory, np.rint(arrivals * 1e9).astype(np.int64), models)
    told: list[tuple[float, str, dict[str, Any]]] = [(-9.0, "models-resident", {"models": list(plan.at_start)})]
    steps = [(-9.0, plan.budget_bytes - sum(plan.sizes[name] for name in plan.at_start))]
    for decided_ns, loaded_ns, model in done.loads.tolist():
        load = {"model": names[model], "pid": 4000 + len(told), "device": 0, "bytes": plan.sizes[names[model]]}
        told += [(decided_ns / 1e9 + STARTED_S, "model-begun", load), (loaded_ns / 1e9, "model-loaded", load)]
        steps.append((decided_ns / 1e9 + STARTED_S, -load["bytes"]))
    for at_ns, model in done.evictions.tolist():
        told.append((at_ns / 1e9, "model-gone", {"model": names[model]}))
        steps.append((at_ns / 1e9, plan.sizes[names[model]]))
    at_s, changes = np.array(sorted(steps), dtype=np.float64).T
    outcome = np.full(len(arrivals), Outcome.OK, dtype=np.uint8)
    done_s = arrivals + done.response_ms / 1e3
    nothing = np.empty(0)
    return _Simulated(
        arrivals,
        arrivals,
        arrivals,
        done_s,
        outcome,
        (nothing, nothing),
        models,
        tuple(told),
        (at_s, np.cumsum(changes)),
    )


def _write_failed(trial: TrialFolder, facts: dict[str, Any]) -> None:
    """A trial whose server never came up."""
    facts.update(
        state="failed",
        epoch_mono_ns=None,
        error={
            "message": "the server's main process has ended",
            "remedy": f"read the log: {trial.server}/logs/server.log",
            "detail": "E1123 failed to load 'model'",
        },
    )
    write_json(trial.facts_path, facts)
    events = EventLog(trial.folder / "events.jsonl")
    events.write("deploy", mono_ns=EPOCH_NS - 9_000_000_000)
    events.close()


def _write_trial(
    trial: TrialFolder,
    facts: dict[str, Any],
    simulated: _Simulated,
    *,
    span_s: float,
    killed: bool,
    variant: Variant,
    rng: np.random.Generator,
) -> None:
    _write_requests(trial, facts, simulated, variant, cut=killed)
    _write_samples(trial, facts, simulated, span_s, rng, cut=killed)
    events = EventLog(trial.folder / "events.jsonl")
    for offset_s, event in ((-9.0, "deploy"), (-6.5, "ready"), (-6.3, "verified"), (-4.0, "warm-up"), (0.0, "measure")):
        events.write(event, mono_ns=EPOCH_NS + int(offset_s * 1e9))
    for offset_s, event, details in simulated.events:
        events.write(event, mono_ns=EPOCH_NS + round(offset_s * 1e9), **details)
    if facts["scenario"] not in ("no-fault", "defaults") and simulated.models is None:
        at_s = trial_fault_s(trial)
        facts["faults"] = [
            {"kind": "kill_replica", "at_s": at_s, "injected_s": at_s + 0.002, "target": "model-1", "pid": 4242}
        ]
        events.write("fault", mono_ns=EPOCH_NS + int(at_s * 1e9), kind="kill_replica", target="model-1", pid=4242)
    if variant == "hostile":
        events.write(HOSTILE, mono_ns=EPOCH_NS + 1, note=HOSTILE)
    facts["arrivals"] = len(simulated.arrival_s)
    if not killed:
        spawn = 0.05 + 0.02 * float(rng.uniform())
        opened = spawn + 0.8 + 0.2 * float(rng.uniform()) + 0.3 * (len(facts["adapter"]) % 4)
        ready = opened + 1.2 + 2.0 * (len(facts["adapter"]) % 3)
        facts.update(
            state="done",
            cold_start={
                "process_s": spawn,
                "port_open_s": opened,
                "ready_s": ready,
                "first_answer_s": ready + 0.2,
                "environment_s": 0.4,
            },
            outputs={"checked": 128, "mismatched": 0, "unchecked": 3, "example": None},
            load_generator={
                "cpu_us_per_request": 412.0,
                "connections_opened": 96,
                "peak_connections": 88,
                "start_lag_p50_ms": 0.04,
                "start_lag_p99_ms": 0.31,
                "workers": [],
            },
            final_probe={"process_alive": True, "claims_ready": True, "answers": True},
        )
        events.write("stop", mono_ns=EPOCH_NS + int((span_s + 1) * 1e9))
    events.close()
    write_json(trial.facts_path, facts)


def trial_fault_s(trial: TrialFolder) -> float:
    """When the fault of a trial's scenario was planned."""
    experiment = RunFolder.open(trial.folder.parent.parent).manifest["experiment"]
    return float(max(fault["at_s"] for s in experiment["scenarios"] for fault in s["faults"]))


def _write_requests(
    trial: TrialFolder, facts: dict[str, Any], simulated: _Simulated, variant: Variant, *, cut: bool
) -> None:
    n = len(simulated.arrival_s)
    warm = 0 if variant in ("empty", "one-request") else 100
    warm_s = np.linspace(-4.0, -1.1, warm)
    intended = np.concatenate([warm_s, simulated.arrival_s])
    sent = np.concatenate([warm_s + 0.0001, simulated.sent_s])
    done = np.concatenate([warm_s + 0.030, simulated.done_s])
    outcome = np.concatenate([np.full(warm, Outcome.OK, dtype=np.uint8), simulated.outcome])
    names = np.array(OUTCOME_NAMES, dtype=object)[outcome]
    messages = {Outcome.ERROR: "the model's worker has died", Outcome.SHED: "queue full", Outcome.TIMEOUT: "10 s"}
    statuses = {Outcome.OK: 200, Outcome.ERROR: 500, Outcome.SHED: 503}
    text = HOSTILE if variant == "hostile" else facts["models"][0]
    asked = [text] * n if simulated.models is None else [facts["models"][model] for model in simulated.models]
    errors = [
        None if o == Outcome.OK else f"{messages.get(Outcome(o), 'reset')}{HOSTILE if variant == 'hostile' else ''}"
        for o in outcome
    ]
    total = warm + n
    columns = [
        pa.array(np.arange(total)),
        pa.array((intended * 1e9).astype(np.int64)),
        pa.array((sent * 1e9).astype(np.int64)),
        pa.array(((done - 0.0002) * 1e9).astype(np.int64)),
        pa.array((done * 1e9).astype(np.int64)),
        pa.array(names, type=pa.string()),
        pa.array([statuses.get(Outcome(o)) for o in outcome], type=pa.int16()),
        pa.array(errors, type=pa.string()),
        pa.array([text] * warm + asked, type=pa.string()),
        pa.array(np.arange(total) % 64, type=pa.int32()),
        pa.array(np.full(total, 310)),
        pa.array(np.full(total, 180)),
        pa.array(np.zeros(total), type=pa.int16()),
        pa.array(["warmup"] * warm + ["measure"] * n, type=pa.string()),
    ]
    _write_table(
        trial.folder / "requests", pa.RecordBatch.from_arrays(columns, schema=REQUEST_SCHEMA), cut, "intended_ns"
    )


def _write_samples(
    trial: TrialFolder,
    facts: dict[str, Any],
    simulated: _Simulated,
    span_s: float,
    rng: np.random.Generator,
    *,
    cut: bool,
) -> None:
    rows: list[tuple[Floats, str, str, str, Floats, str]] = []
    t = np.arange(-5.0, span_s + 1, 0.5)
    begins, ends = simulated.busy
    if len(ends):
        total = np.concatenate([[0.0], np.cumsum(ends - begins)])
        busy = np.interp(t, np.concatenate([[begins[0]], ends]), total)
        waiting = np.searchsorted(simulated.arrival_s, t) - np.searchsorted(np.sort(simulated.start_s), t)
    else:
        busy, waiting = np.zeros_like(t), np.zeros_like(t)
    if simulated.memory is not None:
        at_s, free = simulated.memory
        row = free[np.searchsorted(at_s, t, side="right") - 1]
        rows += [(t, "memory", "device-0", "memory_free_bytes", row, "B")]
    if facts["device"] == "emulated":
        rows += [(t, "device", f"device-{d}", "busy_s_total", busy / 2, "s") for d in (0, 1)]
    elif facts["device"] == "cuda":
        share = np.clip(np.gradient(busy, t) / 2, 0, 1)
        for gpu in ("gpu-0", "gpu-1"):
            rows += [
                (t, "gpu", gpu, "utilization", share, "1"),
                (t, "gpu", gpu, "memory_bytes", np.full_like(t, 3e9), "B"),
                (t, "gpu", gpu, "power_w", 70 + 200 * share, "W"),
            ]
    rows += [
        (t, "server-process", "tree", "cpu_s_total", 0.5 * (t + 6) + 0.1 * busy, "s"),
        (t, "server-process", "tree", "memory_bytes", np.full_like(t, 4e8), "B"),
        (t, "load-generator", "process", "cpu_s_total", 0.3 * (t + 6), "s"),
        (t, "harness", "process", "cpu_s_total", 0.1 * (t + 6), "s"),
        (t, "host", "host", "cpu_busy", np.clip(0.5 + rng.normal(0, 0.02, len(t)), 0, 1), "1"),
        (t, "host", "host", "steal", np.full_like(t, 0.001), "1"),
        (t[::2], "server", "model", "queue_depth", np.maximum(waiting[::2], 0).astype(np.float64), "1"),
        (t[::2], "server", "model", "batch_size", np.full(len(t[::2]), 6.5), "1"),
    ]
    arrays = [
        pa.array(np.concatenate([(row[0] * 1e9).astype(np.int64) for row in rows])),
        *(pa.array([row[k] for row in rows for _ in row[0]], type=pa.string()) for k in (1, 2, 3)),
        pa.array(np.concatenate([row[4] for row in rows])),
        pa.array([row[5] for row in rows for _ in row[0]], type=pa.string()),
    ]
    _write_table(trial.folder / "samples", pa.RecordBatch.from_arrays(arrays, schema=SAMPLE_SCHEMA), cut, "t_ns")


def _write_table(stem: Path, batch: pa.RecordBatch, cut: bool, sort_by: str) -> None:
    with TableWriter(stem, batch.schema) as writer:
        if cut:
            ordered = batch.sort_by(sort_by)
            step = max(1, -(-ordered.num_rows // 20))
            for begin in range(0, ordered.num_rows, step):
                writer.append(ordered.slice(begin, step))
        else:
            writer.append(batch)
    if cut:
        content = writer.path.read_bytes()
        writer.path.write_bytes(content[: len(content) * 2 // 3])
    else:
        finish_table(stem, sort_by=sort_by)
