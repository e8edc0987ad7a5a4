"""The fault ``kill_loading``."""

from __future__ import annotations

import signal
from dataclasses import replace

from tailrace.harness.contract.fault import NOTHING_LOADED, Circumstances, Fault, Hit, MissedError


class KillLoading(Fault):
    """The death of whoever loads a model."""

    kind = "kill_loading"
    does = "SIGKILL of the process that loads a model, at the first load from then on"
    scope = "model"
    order = 140
    waits = "no model was loaded from then on"

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """Models must come and go, and pids must mean the same to all."""
        if not at.multiplexed:
            return NOTHING_LOADED
        if at.containers:
            return (
                "who loads a model is told by a pid, and a container has pids of its own: "
                "leave `environment: docker` out"
            )
        return None

    def aim(self, hit: Hit) -> list[Hit]:
        """Who is loading that model at this moment, or any where the lot decided."""
        return [
            replace(hit, name=model, ref=process)
            for model, process in hit.nodes.loading()
            if hit.by_lot or model == hit.name
        ]

    def apply(self, hit: Hit) -> None:
        if not hit.nodes.host.signal(hit.process, signal.SIGKILL):
            raise MissedError("the load had ended by itself")


FAULT = KillLoading
