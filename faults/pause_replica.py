"""The fault ``pause_replica``."""

from __future__ import annotations

import signal

from tailrace.harness.contract.fault import Fault, Hit, MissedError, lasting


class PauseReplica(Fault):
    """A replica that stands still, and goes on."""

    kind = "pause_replica"
    does = "SIGSTOP of one worker process of the model, then SIGCONT"
    scope = "replica"
    order = 30
    needs = ("replicas",)

    duration_s: float = lasting(5)

    def apply(self, hit: Hit) -> None:
        if not hit.nodes.host.signal(hit.process, signal.SIGSTOP):
            raise MissedError("the replica had gone by itself")

    def undo(self, hit: Hit) -> None:
        hit.nodes.host.signal(hit.process, signal.SIGCONT)


FAULT = PauseReplica
