"""Cold starts by phase: fresh servers one after the other, and what the first request of each costs beyond a later one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc  # noqa: F401 - exchange() imports it when it is first needed: the first server must not pay for that
import numpy as np
import psutil

from tailrace import __version__
from tailrace.harness.analysis.metrics import claim_percentile, percentile
from tailrace.harness.contract.adapter import ServerEnvironment, Tuning
from tailrace.harness.contract.fault import Circumstances
from tailrace.harness.contract.workload import Composition, Device, Precision, PreparedWorkload, WorkloadSpec
from tailrace.harness.errors import InputError, StorageError, TailraceError
from tailrace.harness.gpus import gpus
from tailrace.harness.machine import command_line, drop_page_cache, environment_variables, git_state, hardware, software
from tailrace.harness.plan.fault_kinds import refusal
from tailrace.harness.plan.keys import validated_options
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.records.store import ending, make_new_folder, now, write_json
from tailrace.harness.run.deploy import deploy_request, deployed, scratch_folder
from tailrace.harness.run.facts import ended_by
from tailrace.harness.run.prepare import prepare
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.setup import ServerSetup
from tailrace.harness.run.start import ServerStart
from tailrace.harness.servers.environments import Kind, build
from tailrace.harness.servers.guardian import Guardian, sweep
from tailrace.workloads.catalogue import check_arithmetic, load_spec

SCHEMA_VERSION = 1
RECORD_FILE = "coldstart.json"

Mode = Literal["process", "page-cache", "model"]

MODES: Mapping[Mode, str] = {
    "process": "A fresh process tree each time. Its files were in the page cache, for an unmeasured start came before.",
    "page-cache": "A fresh process tree each time, after the kernel's page cache was dropped; the caches of disks and "
    "hypervisors stay.",
    "model": "The model alone: in a server that had answered, the model was unloaded, and the clock started when it was "
    "to be loaded again. The server was a fresh one each time, and its start is not measured.",
}
_START = {"port_open_s": "port open", "ready_s": "says ready", "first_answer_s": "first correct answer"}
PHASES: Mapping[Mode, Mapping[str, str]] = {
    "process": _START,
    "page-cache": _START,
    "model": {"load_s": "says that it is loaded", "first_answer_s": "first correct answer"},
}
"""What ends each phase: its key in the record, and in words."""
REQUEST_FIGURES = (
    "first_request_ms",
    "warm_request_ms",
    "first_request_penalty_ms",
    "first_request_ratio",
    "warm_after_requests",
    "lied_s",
)

SETTLING_REQUESTS = 5
"""Between the first answer and the requests that it is compared with."""
WARM_REQUESTS = 20
WARM_FACTOR = 1.5
"""A request that takes no longer than this times the median of the warm ones is warm."""


# ---------------------------------------------------------------- arithmetic


def lengths(since_start: Mapping[str, float]) -> dict[str, float]:
    """How long each phase took, from the seconds since the start at which each ended, in their order."""
    ends = list(since_start.values())
    return {key: end - begin for (key, end), begin in zip(since_start.items(), [0.0, *ends], strict=False)}


def penalty(service_ms: Sequence[float]) -> dict[str, float]:
    """What the first request cost beyond a warm one, by the service times of all in their order (milliseconds).

    A warm one is the median of the last :data:`WARM_REQUESTS`. ``warm_after_requests`` counts those before the first
    one that took no longer than :data:`WARM_FACTOR` times that: 0 when the very first did.
    """
    warm_ms = percentile(np.array(service_ms[-WARM_REQUESTS:], dtype=np.float64), 0.5)
    return {
        "first_request_ms": service_ms[0],
        "warm_request_ms": warm_ms,
        "first_request_penalty_ms": service_ms[0] - warm_ms,
        "first_request_ratio": service_ms[0] / warm_ms,
        "warm_after_requests": next(i for i, took_ms in enumerate(service_ms) if took_ms <= WARM_FACTOR * warm_ms),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median (nearest rank), least and greatest; ``interval`` holds the median at 95 %, ``None`` from too few values."""
    told = np.array(values, dtype=np.float64)
    claimed = claim_percentile(told, 0.5)
    return {
        "median": percentile(told, 0.5),
        "interval": None if claimed.value is None else [claimed.low, claimed.high],
        "min": float(told.min()),
        "max": float(told.max()),
    }


def summarise(trials: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Per adapter: how many trials there were and how many came to their end; of these, every figure's spread, by key:
    ``since_start`` and ``phases`` hold the phases, the rest is of requests."""
    return {name: _summary([trial for trial in trials if trial["adapter"] == name]) for name in names}


def _summary(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [trial for trial in trials if trial["state"] == "done"]
    counts = {"trials": len(trials), "done": len(done)}
    if not done:
        return counts
    by_phase = {
        part: {key: spread([trial[part][key] for trial in done]) for key in done[0][part]}
        for part in ("since_start", "phases")
    }
    return {**counts, **by_phase, **{key: spread([trial[key] for trial in done]) for key in REQUEST_FIGURES}}


def interleaved(names: Sequence[str], trials: int, seed: int) -> list[tuple[str, int]]:
    """Adapter and number of every trial in the order in which they run: block by block, each in shuffled order."""
    order = []
    for number in range(1, trials + 1):
        shuffled = np.random.default_rng([seed, number]).permutation(len(names))
        order += [(names[index], number) for index in shuffled]
    return order


# ---------------------------------------------------------------- what is to be measured


@dataclass(frozen=True)
class Plan:
    """Cold starts to be measured, checked as far as that needs no environment."""

    cells: Mapping[str, ResolvedCell]
    """By the adapter's name; of one workload, with one tuning, on one device."""
    spec: WorkloadSpec
    workload: str
    """Its name, or its folder."""
    trials: int
    mode: Mode
    seed: int
    precision: Precision | None
    environment: Kind

    @property
    def cell(self) -> ResolvedCell:
        """Any of them, for what all have in common."""
        return next(iter(self.cells.values()))


def check(
    names: Sequence[str],
    workload: str,
    *,
    trials: int = 10,
    mode: Mode = "process",
    replicas: int = 1,
    seed: int = 7,
    device: Device | None = None,
    precision: Precision | None = None,
    environment: Kind = "venv",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Check what is asked for. ``options`` are the adapters' own, by name; without a ``device``: the workload's first.

    Raises :class:`InputError` for what is unknown or impossible; with ``page-cache`` that is a machine on which this
    user may not drop the page cache, which is tried.
    """
    spec = load_spec(workload)
    if not names or len(set(names)) < len(names):
        raise InputError("the adapters must be different ones, and one at the least")
    if trials < 1:
        raise InputError(f"{trials} trials cannot be run", remedy="use 1 or more; an interval needs 6")
    chosen = device or spec.devices[0]
    if chosen not in spec.devices:
        raise InputError(
            f"the workload {spec.name} cannot run on {chosen}", remedy=f"choose one of: {', '.join(spec.devices)}"
        )
    if chosen == "cuda" and not gpus():
        raise InputError(
            f"the workload {spec.name} is to run on a GPU, and this machine has none",
            remedy="`tailrace doctor --gpu` says what is missing",
        )
    check_arithmetic(spec, precision, compiled=False)
    tuning = Tuning(replicas=replicas)
    cells = {
        name: _cell(name, (options or {}).get(name, {}), tuning, mode, spec, chosen, environment) for name in names
    }
    if mode == "page-cache":
        drop_page_cache()
    return Plan(cells, spec, workload, trials, mode, seed, precision, environment)


def _cell(
    name: str,
    options: Mapping[str, Any],
    tuning: Tuning,
    mode: Mode,
    spec: WorkloadSpec,
    device: Device,
    environment: Kind,
) -> ResolvedCell:
    adapter = get_adapter(name)
    validated = validated_options(adapter, options)
    protocol = adapter.protocols[0]
    if refusals := adapter.refusals(tuning, validated, protocol):
        raise InputError("\n".join(refusals.values()), remedy=f"leave {name} out")
    if mode == "model" and (reason := refusal("model_reload", Circumstances(adapter, tuning, nodes=1))):
        raise InputError(
            f"{name} can do no `load_model` by itself: {reason}",
            remedy=f"leave {name} out, or use --mode process",
        )
    composition: Composition = "framework" if adapter.composes else "one-process"
    return ResolvedCell(
        adapter=name,
        workload=spec.name,
        models=(spec.name,),
        stages=tuple(stage.name for stage in spec.pipeline),
        device=device,
        environment=environment,
        protocol=protocol,
        options=validated,
        tuning=tuning,
        composition=composition if spec.pipeline else None,
        slo_ms=spec.slo.latency_ms,
    )


# ---------------------------------------------------------------- one server


def ask_until_warm(start: ServerStart, told: dict[str, Any]) -> None:
    """The first correct answer, then one request at a time until warm times are known: what that took, into ``told``.

    Raises :class:`DeployError` when there is no answer in time, and :class:`ServerError` for a wrong one, or for a failure
    after it.
    """
    try:
        took_ms = [start.first_answer()]
    finally:
        told |= {"failed_answers": start.failed_answers, "lied_s": start.lied_s}
    took_ms += [start.next_answer() for _ in range(SETTLING_REQUESTS + WARM_REQUESTS)]
    told |= {**penalty(took_ms), "request_ms": took_ms}


def phases_into(told: dict[str, Any]) -> Callable[[str, float], None]:
    """What writes down when each phase of a start ended, and how long it took."""
    since_start: dict[str, float] = {}
    told |= {"since_start": since_start, "phases": {}, "failed_answers": 0, "lied_s": 0.0}

    def reached(phase: str, seconds: float) -> None:
        since_start[phase] = seconds
        told["phases"] = lengths(since_start)

    return reached


# ---------------------------------------------------------------- all of them


class ColdStarts:
    """Measures a plan into a new folder. ``record`` is what ``coldstart.json`` holds, written anew after each trial."""

    def __init__(self, plan: Plan, folder: Path, note: Callable[[str], None]) -> None:
        self._plan = plan
        self._folder = folder.absolute()  # servers run in folders of their own
        self._note = note
        self._environments: dict[str, ServerEnvironment] = {}
        spec, cell = plan.spec, plan.cell
        self.record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "tailrace_version": __version__,
            "state": "running",
            "started_at": now(),
            "ended_at": None,
            "command": command_line(),
            "mode": plan.mode,
            "trials_per_adapter": plan.trials,
            "replicas": cell.tuning.replicas,
            "seed": plan.seed,
            "workload": {"name": spec.name, "title": spec.title, "device": cell.device},
            "emulated": cell.device == "emulated",
            "hardware": hardware(),
            "software": software(),
            "environment_variables": environment_variables(),
            "git": git_state(Path.cwd()),
            "adapters": {
                name: {
                    "title": get_adapter(name).title,
                    "protocol": entrant.protocol,
                    "options": entrant.options.model_dump(mode="json"),
                    "packages": {},
                }
                for name, entrant in plan.cells.items()
            },
            "rehearsals": [],
            "trials": [],
            "summary": {},
        }

    def run(self) -> None:
        """Run all trials. One that fails is recorded as such and the others go on.

        Raises :class:`InputError` for a folder that holds anything, :class:`StorageError` for one that cannot be
        written, what building environments and workload raises, and :class:`KeyboardInterrupt`, after everything has
        been stopped and written.
        """
        make_new_folder(self._folder)
        self._save()
        plan, names = self._plan, list(self._plan.cells)
        with ending(self._end):
            workload = self._set_up()
            if plan.mode == "process":
                self._note("one start of each that is not measured, to have its files in the page cache")
                for name in names:
                    told = self._trial(name, 0, workload, self.record["rehearsals"])
                    self._note(f"{name}, not measured: {_outcome(told)}")
            order = interleaved(names, plan.trials, plan.seed)
            for position, (name, number) in enumerate(order, 1):
                told = self._trial(name, number, workload, self.record["trials"])
                self._save()
                self._note(f"[{position}/{len(order)}] {name}, trial {number}: {_outcome(told)}")

    def _end(self, state: str) -> None:
        self.record |= {"state": state, "ended_at": now()}
        self._save()

    def _save(self) -> None:
        self.record["summary"] = summarise(self.record["trials"], list(self._plan.cells))
        write_json(self._folder / RECORD_FILE, self.record)

    def _set_up(self) -> PreparedWorkload:
        plan = self._plan
        for sentence in sweep():
            self._note(f"cleaned: {sentence}")
        workload = prepare(
            plan.workload,
            models=plan.cell.models,
            device=plan.cell.device,
            seed=plan.seed,
            options={},
            environment_kind=plan.environment,
            precision=plan.precision,
            on_progress=self._note,
        )
        self.record["workload"]["artifact_sha256"] = workload.artifact_sha256
        for name in plan.cells:
            adapter = get_adapter(name)
            if adapter.exposes:
                self._note(f"{name}: {adapter.exposes}")
            needed = [adapter.requirements, *filter(None, [workload.requirements])]
            self._environments[name] = build(plan.environment, needed, name=name, on_progress=self._note)
            self.record["adapters"][name]["packages"] = dict(self._environments[name].packages)
            self.record["adapters"][name]["python"] = self._environments[name].interpreter
        return workload

    def _trial(
        self, name: str, number: int, workload: PreparedWorkload, trials: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """One server from its start to its end, recorded at the end of ``trials`` whatever becomes of it."""
        server = Path("servers") / f"{name}--{number}"
        told: dict[str, Any] = {
            "adapter": name,
            "number": number,
            "state": "running",
            "error": None,
            "server": str(server),
        }
        trials.append(told)
        try:
            with Guardian() as guardian:
                self._measure(name, self._folder / server, workload, guardian, told)
            told["state"] = "done"
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            told |= {"state": "interrupted" if interrupted else "failed", "error": ended_by(error).dump()}
            if isinstance(error, StorageError) or not isinstance(error, TailraceError | OSError):
                raise
        return told

    def _measure(
        self, name: str, workdir: Path, workload: PreparedWorkload, guardian: Guardian, told: dict[str, Any]
    ) -> None:
        """A trial without traffic: deploy, bring up, ask until warm, stop."""
        mode, cell = self._plan.mode, self._plan.cells[name]
        setup = ServerSetup(
            cell=cell, adapter=get_adapter(name), environment=self._environments[name], workload=workload
        )
        with scratch_folder(guardian) as scratch:
            request = deploy_request(setup, scratch, workdir, gpus()[:1] if cell.device == "cuda" else [])
            if mode == "page-cache":
                drop_page_cache()
            told |= {"page_cache_bytes": psutil.virtual_memory().cached, "load_average_1m": os.getloadavg()[0]}
            with deployed(setup, request, guardian, guardian) as server:
                told["notes"] = server.notes
                spawned_ns = guardian.spawned_ns(server.process)
                if mode == "model":
                    before = ServerStart(setup, server, spawned_ns, phases_into({}))
                    before.come_up()
                    ask_until_warm(before, {})
                    (model,) = cell.models
                    server.unload_model(model)
                    start = ServerStart(setup, server, time.monotonic_ns(), phases_into(told))
                    server.load_model(model)
                    start.reached("load_s", time.monotonic_ns())
                else:
                    start = ServerStart(setup, server, spawned_ns, phases_into(told))
                    start.come_up()
                ask_until_warm(start, told)


def _outcome(trial: Mapping[str, Any]) -> str:
    if error := trial["error"]:
        why = TailraceError(error["message"], remedy=error["remedy"], detail=error["detail"])
        return f"{trial['state']}: {why}"
    return (
        f"first correct answer after {trial['since_start']['first_answer_s']:.2f} s, "
        f"its request took {trial['first_request_ratio']:.1f} times as long as a warm one"
    )
