"""The nemesis: injects faults on the trace clock, on recorded processes only, heals them, and tells what it did."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from tailrace.harness.contract.adapter import Adapter, Containers, ProcessHost, Replica, Tuning
from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.fault_choices import FaultChoice, FaultSchedule
from tailrace.harness.plan.fault_kinds import FAULT_KINDS
from tailrace.harness.processes import ProcessRef, descendants
from tailrace.harness.records.store import EventLog
from tailrace.harness.servers.cgroups import refusal as cgroup_refusal
from tailrace.harness.servers.cluster import Cluster
from tailrace.harness.servers.device_memory import fail_loads, loads_under_way

_JOIN_S = 30.0
_LOADS_POLL_S = 0.01
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class PlannedFault:
    """A fault with its instant on the trace clock, and all its parameters."""

    kind: str
    at_s: float
    target: str | int = "random"
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """How long it lasts; 0: it is over at once."""
        return self.parameters.get("duration_s", 0.0)


def plan_faults(
    choices: Sequence[FaultChoice] | FaultSchedule, *, span_s: float, suggested_at_s: float | None, seed: int
) -> list[PlannedFault]:
    """The faults of a scenario in order of time.

    One without a time gets the trace's suggestion, else 2/3 of the span; those of a schedule are drawn by the seed: as
    many as a Poisson process has within the span, at instants spread evenly, of kinds drawn evenly.
    """
    if isinstance(choices, FaultSchedule):
        rng = np.random.default_rng([seed, 3])
        instants = np.sort(rng.uniform(0, span_s, rng.poisson(choices.per_s * span_s)))
        kinds = [choices.kinds[index] for index in rng.integers(len(choices.kinds), size=len(instants))]
        return [
            PlannedFault(kind, float(at_s), "random", choices.parameters(kind))
            for at_s, kind in zip(instants, kinds, strict=True)
        ]
    default = suggested_at_s if suggested_at_s is not None else span_s * 2 / 3
    planned = [
        PlannedFault(
            choice.kind,
            default if choice.at_s is None else choice.at_s,
            choice.target,
            choice.parameters(choice.kind),
        )
        for choice in choices
    ]
    return sorted(planned, key=lambda fault: fault.at_s)


def refusal(
    kind: str, adapter: Adapter, tuning: Tuning, nodes: int, *, containers: bool = False, multiplexed: bool = False
) -> str | None:
    """Why a fault cannot be done to a framework on this machine, whose nodes are ``containers`` or processes, and whose models
    share a memory that does not hold them all where it is ``multiplexed``; ``None`` when it can."""
    missing = [name for name in FAULT_KINDS[kind].needs if name not in adapter.capabilities()]
    if missing:
        return f"its adapter does not have the capability `{'`, `'.join(missing)}`"
    if kind == "rolling_restart" and nodes < 2:
        return "with one node it would be an outage: it needs `nodes: 2` or more"
    if FAULT_KINDS[kind].contained and not containers:
        return "it is done to containers alone: it needs `environment: docker`"
    if kind == "disconnect_node" and adapter.own_cluster and nodes > 1:
        return "the nodes of its own cluster share one address, and none can be taken off the network by itself"
    reason = cgroup_refusal() if kind == "slow_node" and not containers else None
    return (
        reason
        or _loading_refusal(kind, containers=containers, multiplexed=multiplexed)
        or adapter.fault_refusals(tuning).get(kind)
    )


def _loading_refusal(kind: str, *, containers: bool, multiplexed: bool) -> str | None:
    if FAULT_KINDS[kind].scope == "model" and not multiplexed:
        return "models are loaded while the trace runs only where they share a memory: it needs `multiplexing`"
    if kind == "kill_loading" and containers:
        return (
            "who loads a model is told by a pid, and a container has pids of its own: leave `environment: docker` out"
        )
    if kind == "model_reload" and multiplexed:
        return "with `multiplexing` models come and go by its policy"
    return None


def fault_matrix(adapters: Iterable[Adapter]) -> dict[str, dict[str, str | None]]:
    """Adapter → kind → why it cannot be done to two nodes of it, processes of this machine, ``None`` where it can."""
    tuning = Tuning(replicas=1)
    return {adapter.name: {kind: refusal(kind, adapter, tuning, 2) for kind in FAULT_KINDS} for adapter in adapters}


@dataclass(eq=False)
class _Hit:
    """An injected fault: what was hit, and how it is healed."""

    fault: PlannedFault
    told: dict[str, Any]
    """What is kept of it with the trial."""
    process: ProcessRef | None = None
    link: str = ""
    model: str = ""

    @property
    def place(self) -> object:
        """What it was done to. Two faults of one kind in one place are healed by the last one's end."""
        return self.process or self.link or self.model


class _MissedError(Exception):
    """There was nothing to hit."""


class Nemesis(threading.Thread):
    """Injects planned faults into one deployment; deterministic for a seed as far as what it finds alive allows."""

    def __init__(
        self, faults: Sequence[PlannedFault], cluster: Cluster, events: EventLog, *, epoch_ns: int, seed: int
    ) -> None:
        super().__init__(name="nemesis", daemon=True)
        self._cluster = cluster
        self._events = events
        self._epoch_ns = epoch_ns
        # Drawn beforehand, so that what one fault finds does not change whom the next one hits.
        draws = np.random.default_rng([seed, 2]).random(len(faults))
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        for fault, draw in zip(faults, draws, strict=True):
            self._at(fault.at_s, lambda fault=fault, draw=float(draw): self._begin(fault, draw))  # type: ignore[misc]
        self._active: list[_Hit] = []
        self._stopped = threading.Event()
        self._errands: list[threading.Thread] = []
        self.done: list[dict[str, Any]] = []
        """What was injected so far, for the trial's facts; ``injected_s`` is ``None`` when nothing could be hit."""

    def run(self) -> None:
        while self._due:
            at_s, _, action = self._due[0]
            wait_s = (self._epoch_ns - time.monotonic_ns()) / 1e9 + at_s
            if self._stopped.wait(max(0.0, wait_s)):
                return
            heapq.heappop(self._due)
            action()

    def stop(self) -> None:
        """Inject nothing more, wait for an injection under way, and heal whatever is not healed yet."""
        self._stopped.set()
        for thread in (self, *self._errands):
            if thread.is_alive():
                thread.join(_JOIN_S)
        for hit in list(self._active):
            self._heal(hit)

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), action))

    def _now_s(self) -> float:
        return (time.monotonic_ns() - self._epoch_ns) / 1e9

    def _begin(self, fault: PlannedFault, draw: float) -> None:
        told: dict[str, Any] = {
            "kind": fault.kind,
            "at_s": fault.at_s,
            **fault.parameters,
            "injected_s": None,
            "healed_s": None,
            "target": None,
            "pid": None,
        }
        self.done.append(told)
        with self._missing(fault):
            getattr(self, f"_{fault.kind}")(_Hit(fault, told), draw)

    @contextlib.contextmanager
    def _missing(self, fault: PlannedFault) -> Iterator[None]:
        """Tell of a fault that could not be injected: the trial goes on, and is INVALID."""
        try:
            yield
        except _MissedError as missed:
            self._events.write("fault-missed", kind=fault.kind, reason=str(missed))
        except Exception as error:
            self._events.write("fault-missed", kind=fault.kind, reason=f"{type(error).__name__}: {error}")

    def _injected(self, hit: _Hit, target: str, began_ns: int, **more: Any) -> None:
        """Tell of it, and see to its end."""
        hit.told.update(injected_s=(began_ns - self._epoch_ns) / 1e9, target=target, **more)
        self._events.write("fault", mono_ns=began_ns, kind=hit.fault.kind, target=target, **more)
        if hit.fault.duration_s > 0:
            self._active.append(hit)
            self._at(hit.told["injected_s"] + hit.fault.duration_s, lambda: self._heal(hit))

    def _healed(self, hit: _Hit) -> None:
        hit.told["healed_s"] = self._now_s()
        self._events.write("heal", kind=hit.fault.kind, target=hit.told["target"])

    def _heal(self, hit: _Hit) -> None:
        if hit not in self._active:
            return
        self._active.remove(hit)
        still = [other for other in self._active if (other.fault.kind, other.place) == (hit.fault.kind, hit.place)]
        # What has gone by itself meanwhile has no fault that could go on.
        try:
            with contextlib.suppress(_MissedError):
                if still:
                    self._apply(still[-1])
                else:
                    self._undo(hit)
        except TailraceError as error:  # what cannot be healed ends with the guardian
            self._events.write("heal-failed", kind=hit.fault.kind, target=hit.told["target"], reason=error.message)
            return
        self._healed(hit)

    # -- what is hit ---------------------------------------------------------------------------------------------

    @staticmethod
    def _chosen(found: Sequence[_Found], hit: _Hit, draw: float, what: str) -> _Found:
        if not found:
            raise _MissedError(f"no {what} was alive")
        index = int(draw * len(found)) if hit.fault.target == "random" else int(hit.fault.target)
        if index >= len(found):
            raise _MissedError(f"only {len(found)} {what}s were alive")
        return found[index]

    def _replica(self, hit: _Hit, draw: float) -> Replica:
        found = sorted(self._cluster.replicas(), key=lambda r: (r.process.started_ticks, r.process.pid))
        return self._chosen(found, hit, draw, "replica")

    def _node(self, hit: _Hit, draw: float) -> tuple[int, ProcessRef]:
        alive = self._cluster.living()
        if hit.fault.target != "random":
            index = int(hit.fault.target)
            if index not in alive:
                raise _MissedError(f"node {index} was not alive")
            return index, alive[index]
        return self._chosen(sorted(alive.items()), hit, draw, "node")

    # -- replicas and nodes --------------------------------------------------------------------------------------

    def _kill_replica(self, hit: _Hit, draw: float) -> None:
        victim = self._replica(hit, draw)
        now = time.monotonic_ns()
        if not self._cluster.host.signal(victim.process, signal.SIGKILL):
            raise _MissedError(f"{victim.name} had gone by itself")
        self._injected(hit, victim.name, now, pid=victim.process.pid)

    def _pause_replica(self, hit: _Hit, draw: float) -> None:
        victim = self._replica(hit, draw)
        hit.process = victim.process
        now = time.monotonic_ns()
        self._apply(hit)
        self._injected(hit, victim.name, now, pid=victim.process.pid)

    def _kill_node(self, hit: _Hit, draw: float) -> None:
        index, process = self._node(hit, draw)
        now = time.monotonic_ns()
        if not self._cluster.host.kill_tree(process):
            raise _MissedError(f"node {index} had gone by itself")
        self._injected(hit, self._cluster.node_name(index), now, pid=process.pid)

    def _do_to_node(self, hit: _Hit, draw: float) -> None:
        index, process = self._node(hit, draw)
        hit.process = process
        now = time.monotonic_ns()
        self._apply(hit)
        self._injected(hit, self._cluster.node_name(index), now, pid=process.pid)

    _pause_node = _slow_node = _memory_limit = _disconnect_node = _do_to_node

    # -- the connections to a node -------------------------------------------------------------------------------

    def _do_to_link(self, hit: _Hit, draw: float) -> None:
        hit.link = self._chosen(self._cluster.link_names, hit, draw, "link")
        now = time.monotonic_ns()
        self._apply(hit)
        self._injected(hit, hit.link, now)

    _partition = _latency = _packet_loss = _reset = _do_to_link

    # -- the loading of models -----------------------------------------------------------------------------------

    def _load_failure(self, hit: _Hit, draw: float) -> None:
        hit.model = self._chosen(self._cluster.sharing, hit, draw, "model")
        now = time.monotonic_ns()
        self._apply(hit)
        self._injected(hit, hit.model, now)

    def _kill_loading(self, hit: _Hit, _draw: float) -> None:
        models = self._cluster.sharing
        wanted = models if hit.fault.target == "random" else models[int(hit.fault.target) :][:1]

        def kill() -> None:
            while not self._stopped.wait(_LOADS_POLL_S):
                for model, process in self._loaders(wanted):
                    now = time.monotonic_ns()
                    if self._cluster.host.signal(process, signal.SIGKILL):
                        self._injected(hit, model, now, pid=process.pid)
                        return
            raise _MissedError("no model was loaded from then on")

        self._wait_and_do(hit, kill)

    def _loaders(self, models: Sequence[str]) -> list[tuple[str, ProcessRef]]:
        """Who loads one of these models at this moment. Processes that have died in a load are told of, too, but are no longer
        among the cluster's."""
        if not any(model in models for model, _ in loads_under_way(self._cluster.device_folder)):
            return []
        alive = {ref.pid: ref for root in self._cluster.trees() for ref, _ in descendants(root)}
        # Looking through processes takes a while, in which a load may have ended.
        return [
            (model, alive[pid])
            for model, pid in loads_under_way(self._cluster.device_folder)
            if model in models and pid in alive
        ]

    def _wait_and_do(self, hit: _Hit, task: Callable[[], None]) -> None:
        """Do a fault when its time has come, which others do not wait for."""

        def run() -> None:
            with self._missing(hit.fault):
                task()

        thread = threading.Thread(target=run, name=hit.fault.kind, daemon=True)
        self._errands.append(thread)
        thread.start()

    # -- errands that take as long as they take ------------------------------------------------------------------

    def _rolling_restart(self, hit: _Hit, _draw: float) -> None:
        def restart_all() -> None:
            for index in range(self._cluster.node_count):
                if self._stopped.is_set():
                    return
                self._cluster.restart(index, stopped=self._stopped)

        self._injected(hit, "all nodes", time.monotonic_ns())
        self._errand(hit, restart_all)

    def _model_reload(self, hit: _Hit, draw: float) -> None:
        index, _ = self._node(hit, draw)
        member = self._cluster.member(index)
        model = self._cluster.models[0]

        def reload() -> None:
            member.unload_model(model)
            member.load_model(model)

        self._injected(hit, f"{model} on {self._cluster.part_name(index)}", time.monotonic_ns())
        self._errand(hit, reload)

    def _errand(self, hit: _Hit, task: Callable[[], None]) -> None:
        def run() -> None:
            try:
                task()
                reason = "the trace ended before it did" if self._stopped.is_set() else None
            except Exception as error:  # the server's failure is a result, and must be told
                reason = f"{type(error).__name__}: {error}"
            if reason is None:
                self._healed(hit)
            else:
                self._events.write("heal-failed", kind=hit.fault.kind, target=hit.told["target"], reason=reason)

        thread = threading.Thread(target=run, name=hit.fault.kind, daemon=True)
        self._errands.append(thread)
        thread.start()

    # -- what lasts ----------------------------------------------------------------------------------------------

    def _apply(self, hit: _Hit) -> None:
        parameters, cluster, host = hit.fault.parameters, self._cluster, self._cluster.host
        match hit.fault.kind:
            case "pause_replica":
                if not host.signal(_known(hit.process), signal.SIGSTOP):
                    raise _MissedError("the replica had gone by itself")
            case "pause_node":
                if not host.signal_tree(_known(hit.process), signal.SIGSTOP):
                    raise _MissedError("the node had gone by itself")
            case "slow_node":
                host.limit_cpus(_known(hit.process), parameters["cpus"])
            case "memory_limit":
                _contained(host).limit_memory(_known(hit.process), round(parameters["memory_mb"] * 2**20))
            case "disconnect_node":
                _contained(host).disconnect(_known(hit.process))
            case "latency":
                cluster.links.latency(hit.link, parameters["round_trip_ms"])
            case "packet_loss":
                cluster.links.stalls(
                    hit.link, parameters["share"], parameters["stall_ms"], seed=int(hit.fault.at_s * 1000)
                )
            case "partition":
                cluster.links.partition(hit.link)
            case "reset":
                cluster.links.reset(hit.link, once=hit.fault.duration_s == 0)
            case "load_failure":
                fail_loads(cluster.device_folder, hit.model, failing=True)

    def _undo(self, hit: _Hit) -> None:
        cluster, host = self._cluster, self._cluster.host
        match hit.fault.kind:
            case "pause_replica":
                host.signal(_known(hit.process), signal.SIGCONT)
            case "pause_node":
                host.signal_tree(_known(hit.process), signal.SIGCONT)
            case "slow_node":
                host.limit_cpus(_known(hit.process), None)
            case "memory_limit":
                _contained(host).limit_memory(_known(hit.process), None)
            case "disconnect_node":
                _contained(host).reconnect(_known(hit.process))
            case "packet_loss":
                cluster.links.clear(hit.link, "stalls")
            case "load_failure":
                fail_loads(cluster.device_folder, hit.model, failing=False)
            case "latency" | "partition" | "reset":
                cluster.links.clear(hit.link, hit.fault.kind)


def _known(process: ProcessRef | None) -> ProcessRef:
    assert process is not None  # noqa: S101 - set by whoever hit a process
    return process


def _contained(host: ProcessHost) -> Containers:
    return cast(Containers, host)  # for other hosts such a fault is refused before the run


def link_faults(kinds: Iterable[str]) -> bool:
    """Whether any of these is done to the connections to a node, which then go through a proxy."""
    return any(FAULT_KINDS[kind].scope == "link" for kind in kinds)
