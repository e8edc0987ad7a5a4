"""The nemesis: injects faults on the trace clock, on recorded processes only, and tells what it did."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.adapter import Deployment, ProcessHost
from harness.spec import FaultChoice
from harness.store import EventLog

CAPABILITY_NEEDED = {"kill_replica": "replicas"}
"""Fault kind → the adapter capability without which it is refused before the run."""


_JOIN_S = 30.0


@dataclass(frozen=True)
class PlannedFault:
    """A fault with its instant on the trace clock."""

    kind: str
    at_s: float
    target: str | int


def plan_faults(choices: Sequence[FaultChoice], *, span_s: float, suggested_at_s: float | None) -> list[PlannedFault]:
    """The faults of a scenario in order of time; one without a time gets the trace's suggestion, else 2/3 of the span."""
    default = suggested_at_s if suggested_at_s is not None else span_s * 2 / 3
    planned = [
        PlannedFault(choice.kind, default if choice.at_s is None else choice.at_s, choice.target) for choice in choices
    ]
    return sorted(planned, key=lambda fault: fault.at_s)


class Nemesis(threading.Thread):
    """Injects planned faults into one deployment; deterministic for a seed as far as the replicas found allow."""

    def __init__(
        self,
        faults: Sequence[PlannedFault],
        deployment: Deployment,
        host: ProcessHost,
        events: EventLog,
        *,
        epoch_ns: int,
        seed: int,
    ) -> None:
        super().__init__(name="nemesis", daemon=True)
        self._faults = faults
        self._deployment = deployment
        self._host = host
        self._events = events
        self._epoch_ns = epoch_ns
        self._rng = np.random.default_rng([seed, 2])
        self._stopped = threading.Event()
        self.done: list[dict[str, Any]] = []
        """What was injected so far, for the trial's facts; ``injected_s`` is ``None`` when nothing could be hit."""

    def run(self) -> None:
        for fault in self._faults:
            wait_s = (self._epoch_ns - time.monotonic_ns()) / 1e9 + fault.at_s
            if self._stopped.wait(max(0.0, wait_s)):
                return
            told: dict[str, Any] = {
                "kind": fault.kind,
                "at_s": fault.at_s,
                "injected_s": None,
                "target": None,
                "pid": None,
            }
            self.done.append(told)
            try:
                self._kill_replica(fault, told)
            except Exception as error:  # the trial goes on, and is INVALID: the fault was not injected
                self._events.write("fault-missed", kind=fault.kind, reason=f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        """Inject nothing more, and wait for an injection under way."""
        self._stopped.set()
        if self.is_alive():
            self.join(_JOIN_S)

    def _kill_replica(self, fault: PlannedFault, told: dict[str, Any]) -> None:
        replicas = sorted(self._deployment.replicas(), key=lambda r: (r.process.started_ticks, r.process.pid))
        if not replicas:
            self._events.write("fault-missed", kind=fault.kind, reason="no replica was alive")
            return
        index = int(self._rng.integers(len(replicas))) if fault.target == "random" else int(fault.target)
        if index >= len(replicas):
            self._events.write("fault-missed", kind=fault.kind, reason=f"only {len(replicas)} replicas were alive")
            return
        victim = replicas[index]
        now = time.monotonic_ns()
        if self._host.signal(victim.process, signal.SIGKILL):
            told.update(injected_s=(now - self._epoch_ns) / 1e9, target=victim.name, pid=victim.process.pid)
            self._events.write(
                "fault",
                mono_ns=now,
                kind=fault.kind,
                target=victim.name,
                pid=victim.process.pid,
                replicas_before=len(replicas),
            )
        else:
            self._events.write("fault-missed", kind=fault.kind, reason=f"{victim.name} had gone by itself")
