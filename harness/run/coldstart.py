"""Cold starts by phase: fresh servers one after the other, and what the first request of each costs beyond a later one."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc  # noqa: F401 - exchange() imports it when it is first needed: the first server must not pay for that
import numpy as np
import psutil

from tailrace import __version__
from tailrace.harness.analysis.metrics import NS_PER_MS, NS_PER_S, claim_percentile, percentile
from tailrace.harness.contract.adapter import Adapter, Deployment, DeployRequest, ServerEnvironment, Tuning
from tailrace.harness.contract.exchange import Answer, check_answer, exchange
from tailrace.harness.contract.fault import Circumstances
from tailrace.harness.contract.pipeline import pipeline_environment
from tailrace.harness.contract.workload import Device, Precision, PreparedWorkload
from tailrace.harness.errors import DeployError, InputError, ServerError, StorageError, TailraceError
from tailrace.harness.gpus import gpus
from tailrace.harness.machine import command_line, drop_page_cache, environment_variables, git_state, hardware, software
from tailrace.harness.plan.fault_kinds import refusal
from tailrace.harness.plan.keys import validated_options
from tailrace.harness.processes import log_tail, port_open
from tailrace.harness.records.store import ending, make_new_folder, now, write_json
from tailrace.harness.run.prepare import prepare
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.resolve import Contestant
from tailrace.harness.servers.devices import device_environment
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

_ANSWER_TIMEOUT_S = 30.0
_POLL_S = 0.01
_STOP_GRACE_S = 10.0


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

    contestants: Mapping[str, Contestant]
    workload: str
    device: Device
    trials: int
    mode: Mode
    tuning: Tuning
    seed: int
    precision: Precision | None = None
    environment: Kind = "venv"


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
    contestants = {name: _contestant(name, (options or {}).get(name, {}), tuning, mode) for name in names}
    if mode == "page-cache":
        drop_page_cache()
    return Plan(contestants, workload, chosen, trials, mode, tuning, seed, precision, environment)


def _contestant(name: str, options: Mapping[str, Any], tuning: Tuning, mode: Mode) -> Contestant:
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
    return Contestant(adapter, validated, protocol)


# ---------------------------------------------------------------- one server


class ServerStart:
    """Follows one server to its first correct answer and beyond, and keeps ``facts`` of it as they come to be known."""

    def __init__(
        self,
        adapter: Adapter,
        deployment: Deployment,
        workload: PreparedWorkload,
        start_ns: int,
        facts: dict[str, Any],
    ) -> None:
        self._adapter = adapter
        self._deployment = deployment
        self._workload = workload
        self._model = next(iter(workload.references))
        self._request = deployment.endpoint.codec.encode(self._model, workload.payloads[0])
        self._start_ns = start_ns
        self._facts = facts
        facts |= {"since_start": {}, "phases": {}, "failed_answers": 0, "lied_s": 0.0}

    def come_up(self) -> None:
        """Wait for the port, and for the framework's own word. Raises :class:`DeployError` when either takes too long."""
        endpoint = self._deployment.endpoint
        self._wait("open its port", lambda: port_open(endpoint.host, endpoint.port))
        self.reached("port_open_s", time.monotonic_ns())
        self._wait("say that it is ready", self._deployment.claims_ready)
        self.reached("ready_s", time.monotonic_ns())

    def answer(self) -> None:
        """Ask until the first correct answer, then go on one request at a time, until warm times are known.

        Raises :class:`DeployError` when there is no answer in time, and :class:`ServerError` for a wrong one, or for a
        failure after it.
        """
        claimed_ns = time.monotonic_ns()
        while True:
            answer, sent_ns, done_ns = self._ask()
            if answer.ok:
                break
            self._facts["failed_answers"] += 1
            self._facts["lied_s"] = (time.monotonic_ns() - claimed_ns) / NS_PER_S
            self._go_on("answer a request", f", though it says that it is ready; its last answer: {answer.text}")
        self.reached("first_answer_s", done_ns)
        took_ms = [(done_ns - sent_ns) / NS_PER_MS]
        for _ in range(SETTLING_REQUESTS + WARM_REQUESTS):
            answer, sent_ns, done_ns = self._ask()
            if not answer.ok:
                raise ServerError(
                    f"{self._adapter.name} failed after its first correct answer: {answer.text}",
                    remedy=f"read the log: {self._deployment.log}",
                    detail=log_tail(self._deployment.log),
                )
            took_ms.append((done_ns - sent_ns) / NS_PER_MS)
        self._facts.update(penalty(took_ms), request_ms=took_ms)

    def reached(self, phase: str, at_ns: int) -> None:
        """Note that a phase has ended, at an instant of the monotonic clock."""
        self._facts["since_start"][phase] = (at_ns - self._start_ns) / NS_PER_S
        self._facts["phases"] = lengths(self._facts["since_start"])

    def _wait(self, purpose: str, reached: Callable[[], bool]) -> None:
        while not reached():
            self._go_on(purpose)

    def _go_on(self, purpose: str, excuse: str = "") -> None:
        """A short pause, unless there is nothing left to wait for."""
        self._deployment.check_alive()
        limit_s, log = self._adapter.start_timeout_s, self._deployment.log
        if time.monotonic_ns() - self._start_ns > limit_s * NS_PER_S:
            raise DeployError(
                f"{self._adapter.name} did not {purpose} within {limit_s:.0f} s{excuse}",
                remedy=f"read the log: {log}",
                detail=log_tail(log),
            )
        time.sleep(_POLL_S)

    def _ask(self) -> tuple[Answer, int, int]:
        """An answer, and when it was asked for and there. Always the same payload, so that times compare."""
        endpoint = self._deployment.endpoint
        sent_ns = time.monotonic_ns()
        answer = exchange(endpoint, self._request, _ANSWER_TIMEOUT_S)
        done_ns = time.monotonic_ns()
        if answer.ok:
            difference = check_answer(endpoint, self._workload, self._model, 0, answer.headers, answer.body)
            if difference is not None:
                raise ServerError(
                    f"{self._adapter.name} does not compute what the reference computes: {difference}",
                    remedy="the server runs another model, or the workload's tolerance is too tight for this device",
                    detail=log_tail(self._deployment.log),
                )
        return answer, sent_ns, done_ns


# ---------------------------------------------------------------- all of them


class ColdStarts:
    """Measures a plan into a new folder. ``record`` is what ``coldstart.json`` holds, written anew after each trial."""

    def __init__(self, plan: Plan, folder: Path, note: Callable[[str], None]) -> None:
        self._plan = plan
        self._folder = folder.absolute()  # servers run in folders of their own
        self._note = note
        self._environments: dict[str, ServerEnvironment] = {}
        spec = load_spec(plan.workload)
        self.record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "tailrace_version": __version__,
            "state": "running",
            "started_at": now(),
            "ended_at": None,
            "command": command_line(),
            "mode": plan.mode,
            "trials_per_adapter": plan.trials,
            "replicas": plan.tuning.replicas,
            "seed": plan.seed,
            "workload": {"name": spec.name, "title": spec.title, "device": plan.device},
            "emulated": plan.device == "emulated",
            "hardware": hardware(),
            "software": software(),
            "environment_variables": environment_variables(),
            "git": git_state(Path.cwd()),
            "adapters": {
                name: {
                    "title": contestant.adapter.title,
                    "protocol": contestant.protocol,
                    "options": contestant.options.model_dump(mode="json"),
                    "packages": {},
                }
                for name, contestant in plan.contestants.items()
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
        plan, names = self._plan, list(self._plan.contestants)
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
        self.record["summary"] = summarise(self.record["trials"], list(self._plan.contestants))
        write_json(self._folder / RECORD_FILE, self.record)

    def _set_up(self) -> PreparedWorkload:
        plan = self._plan
        for sentence in sweep():
            self._note(f"cleaned: {sentence}")
        name = self.record["workload"]["name"]
        workload = prepare(
            plan.workload,
            models=[name],
            device=plan.device,
            seed=plan.seed,
            options={},
            environment_kind=plan.environment,
            precision=plan.precision,
            on_progress=self._note,
        )
        self.record["workload"]["artifact_sha256"] = workload.artifact_sha256
        for name, contestant in plan.contestants.items():
            if contestant.adapter.exposes:
                self._note(f"{name}: {contestant.adapter.exposes}")
            needed = [contestant.adapter.requirements, *filter(None, [workload.requirements])]
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
            told |= {"state": "interrupted" if interrupted else "failed", "error": _told(error)}
            if isinstance(error, StorageError) or not isinstance(error, TailraceError | OSError):
                raise
        return told

    def _measure(
        self, name: str, workdir: Path, workload: PreparedWorkload, guardian: Guardian, told: dict[str, Any]
    ) -> None:
        adapter, mode = self._plan.contestants[name].adapter, self._plan.mode
        scratch = Path(tempfile.mkdtemp(prefix="tailrace-"))
        guardian.remove_later(glob.escape(str(scratch)))
        try:
            request = self._request(name, workdir, scratch, workload)
            if mode == "page-cache":
                drop_page_cache()
            told |= {"page_cache_bytes": psutil.virtual_memory().cached, "load_average_1m": os.getloadavg()[0]}
            deployment = adapter.start(request, guardian)
            told["notes"] = deployment.notes
            try:
                spawned_ns = guardian.spawned_ns(deployment.process)
                if mode == "model":
                    before = ServerStart(adapter, deployment, workload, spawned_ns, {})
                    before.come_up()
                    before.answer()
                    (model,) = workload.references
                    deployment.unload_model(model)
                    start = ServerStart(adapter, deployment, workload, time.monotonic_ns(), told)
                    deployment.load_model(model)
                    start.reached("load_s", time.monotonic_ns())
                else:
                    start = ServerStart(adapter, deployment, workload, spawned_ns, told)
                    start.come_up()
                start.answer()
            finally:
                # A Ctrl-C on its way must not be replaced by the failure of a server to stop.
                interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
                with contextlib.suppress(TailraceError) if interrupted else contextlib.nullcontext():
                    deployment.stop(_STOP_GRACE_S)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _request(self, name: str, workdir: Path, scratch: Path, workload: PreparedWorkload) -> DeployRequest:
        contestant = self._plan.contestants[name]
        devices = scratch / "devices"
        try:
            devices.mkdir()
            workdir.mkdir(parents=True)
        except OSError as error:
            raise StorageError.of(workdir, error) from error
        return DeployRequest(
            workload=workload,
            models=tuple(workload.references),
            tuning=self._plan.tuning,
            options=contestant.options,
            protocol=contestant.protocol,
            environment=self._environments[name],
            workdir=workdir,
            scratch=scratch,
            server_env={
                **device_environment(workload.device, devices, gpus()[:1]),
                **pipeline_environment(workload, scratch / "stages"),
            },
            stages=workload.spec.pipeline if contestant.adapter.composes else (),
        )


def _told(error: BaseException) -> dict[str, str | None]:
    if isinstance(error, KeyboardInterrupt):
        return {"message": "interrupted by the user", "remedy": None, "detail": None}
    if isinstance(error, TailraceError):
        return {"message": error.message, "remedy": error.remedy, "detail": error.detail}
    return {"message": f"{type(error).__name__}: {error}", "remedy": None, "detail": None}


def _outcome(trial: Mapping[str, Any]) -> str:
    if error := trial["error"]:
        why = TailraceError(error["message"], remedy=error["remedy"], detail=error["detail"])
        return f"{trial['state']}: {why}"
    return (
        f"first correct answer after {trial['since_start']['first_answer_s']:.2f} s, "
        f"its request took {trial['first_request_ratio']:.1f} times as long as a warm one"
    )
