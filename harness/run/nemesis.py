"""The nemesis: injects faults on the trace clock, on recorded processes only, heals them, and tells what it did."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tailrace.harness.contract.fault import Fault, Hit, MissedError
from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.fault_kinds import fault_kinds
from tailrace.harness.plan.faults import PlannedFault
from tailrace.harness.processes import ProcessRef
from tailrace.harness.records.store import EventLog
from tailrace.harness.servers.cluster import Cluster

_JOIN_S = 30.0
_WAITING_POLL_S = 0.01
_Found = TypeVar("_Found")


@dataclass(eq=False)
class _Injection:
    """A fault, what it is done to, and what is kept of it with the trial."""

    fault: Fault
    hit: Hit
    told: dict[str, Any]

    @property
    def place(self) -> tuple[object, ...]:
        """Of two of one kind in one place the end of the last heals."""
        return (self.fault.kind, self.hit.name, self.hit.ref)


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
        self._active: list[_Injection] = []
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
        for injection in list(self._active):
            self._heal(injection)

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), action))

    def _begin(self, planned: PlannedFault, draw: float) -> None:
        told: dict[str, Any] = {
            "kind": planned.kind,
            "at_s": planned.at_s,
            **planned.parameters,
            "injected_s": None,
            "healed_s": None,
            "target": None,
            "pid": None,
        }
        self.done.append(told)
        with self._missing(planned.kind):
            fault = fault_kinds()[planned.kind](**planned.parameters)
            drawn = self._drawn(planned, fault, draw)
            if fault.waits:
                self._beside(fault, lambda: self._wait(fault, drawn, told))
            else:
                self._inject(_Injection(fault, fault.aim(drawn)[0], told))

    @contextlib.contextmanager
    def _missing(self, kind: str) -> Iterator[None]:
        """Tell of a fault that could not be injected: the trial goes on, and is INVALID."""
        try:
            yield
        except MissedError as missed:
            self._events.write("fault-missed", kind=kind, reason=str(missed))
        except Exception as error:
            self._events.write("fault-missed", kind=kind, reason=f"{type(error).__name__}: {error}")

    # -- what is hit ---------------------------------------------------------------------------------------------

    def _drawn(self, planned: PlannedFault, fault: Fault, draw: float) -> Hit:
        """What a fault is aimed at: what its target names, or the lot."""
        cluster, index = self._cluster, 0
        process: ProcessRef | None = None
        match fault.scope:
            case "replica":
                oldest_first = sorted(
                    cluster.replicas(), key=lambda replica: (replica.process.started_ticks, replica.process.pid)
                )
                replica = _chosen(oldest_first, planned, draw, "replica")
                name, process = replica.name, replica.process
            case "node":
                alive = cluster.living()
                if planned.target == "random":
                    index, process = _chosen(sorted(alive.items()), planned, draw, "node")
                else:
                    index = int(planned.target)
                    process = alive.get(index)
                    if process is None:
                        raise MissedError(f"node {index} was not alive")
                name = cluster.node_name(index)
            case "link":
                name = _chosen(cluster.link_names, planned, draw, "link")
            case "model":
                name = _chosen(cluster.sharing, planned, draw, "model")
            case "cluster":
                name = "all nodes"
        return Hit(
            cluster,
            name,
            process,
            index,
            by_lot=planned.target == "random",
            seed=int(planned.at_s * 1000),
            over=self._stopped,
        )

    # -- how it is done ------------------------------------------------------------------------------------------

    def _inject(self, injection: _Injection) -> None:
        now = time.monotonic_ns()
        if injection.fault.errand:
            self._tell(injection, now)
            self._beside(injection.fault, lambda: self._run_errand(injection))
            return
        injection.fault.apply(injection.hit)
        self._tell(injection, now)
        if duration_s := getattr(injection.fault, "duration_s", 0.0):
            self._active.append(injection)
            self._at(injection.told["injected_s"] + duration_s, lambda: self._heal(injection))

    def _wait(self, fault: Fault, drawn: Hit, told: dict[str, Any]) -> None:
        while not self._stopped.wait(_WAITING_POLL_S):
            for hit in fault.aim(drawn):
                with contextlib.suppress(MissedError):
                    self._inject(_Injection(fault, hit, told))
                    return
        raise MissedError(fault.waits)

    def _run_errand(self, injection: _Injection) -> None:
        try:
            injection.fault.apply(injection.hit)
            failure = "the trace ended before it did" if self._stopped.is_set() else None
        except Exception as error:  # the server's failure is a result, and must be told
            failure = f"{type(error).__name__}: {error}"
        self._tell_end(injection, failure)

    def _beside(self, fault: Fault, task: Callable[[], None]) -> None:
        """Do what others do not wait for."""

        def run() -> None:
            with self._missing(fault.kind):
                task()

        thread = threading.Thread(target=run, name=fault.kind, daemon=True)
        self._errands.append(thread)
        thread.start()

    def _heal(self, injection: _Injection) -> None:
        if injection not in self._active:
            return
        self._active.remove(injection)
        still = [other for other in self._active if other.place == injection.place]
        failure = None
        try:
            # What has gone by itself meanwhile has no fault that could go on.
            with contextlib.suppress(MissedError):
                if still:
                    still[-1].fault.apply(still[-1].hit)
                else:
                    injection.fault.undo(injection.hit)
        except TailraceError as error:  # what cannot be healed ends with the guardian
            failure = error.message
        except Exception as error:  # somebody's module may raise anything, and others are to be healed all the same
            failure = f"{type(error).__name__}: {error}"
        self._tell_end(injection, failure)

    # -- what is told --------------------------------------------------------------------------------------------

    def _tell(self, injection: _Injection, began_ns: int) -> None:
        hit = injection.hit
        more = {} if hit.ref is None else {"pid": hit.ref.pid}
        injection.told.update(injected_s=(began_ns - self._epoch_ns) / 1e9, target=hit.name, **more)
        self._events.write("fault", mono_ns=began_ns, kind=injection.fault.kind, target=hit.name, **more)

    def _tell_end(self, injection: _Injection, failure: str | None) -> None:
        kind, target = injection.fault.kind, injection.hit.name
        if failure is not None:
            self._events.write("heal-failed", kind=kind, target=target, reason=failure)
            return
        injection.told["healed_s"] = (time.monotonic_ns() - self._epoch_ns) / 1e9
        self._events.write("heal", kind=kind, target=target)


def _chosen(found: Sequence[_Found], planned: PlannedFault, draw: float, what: str) -> _Found:
    if not found:
        raise MissedError(f"no {what} was alive")
    index = int(draw * len(found)) if planned.target == "random" else int(planned.target)
    if index >= len(found):
        raise MissedError(f"only {len(found)} {what}s were alive")
    return found[index]
