"""The fault ``kill_replica``."""

from __future__ import annotations

import signal

from tailrace.harness.contract.fault import Fault, Hit, MissedError


class KillReplica(Fault):
    """The death of a replica."""

    kind = "kill_replica"
    does = "SIGKILL of one worker process of the model"
    scope = "replica"
    order = 10
    needs = ("replicas",)

    def apply(self, hit: Hit) -> None:
        if not hit.nodes.host.signal(hit.process, signal.SIGKILL):
            raise MissedError(f"{hit.name} had gone by itself")


FAULT = KillReplica
