"""The fault ``latency``."""

from __future__ import annotations

from pydantic import Field

from tailrace.harness.contract.fault import Fault, Hit, lasting


class Latency(Fault):
    """A longer way to a node: half of it there, half of it back."""

    kind = "latency"
    does = "every round trip to a node takes longer"
    scope = "link"
    order = 90

    duration_s: float = lasting(10)
    round_trip_ms: float = Field(default=50, gt=0, description="Milliseconds that are added to every round trip.")

    def apply(self, hit: Hit) -> None:
        hit.nodes.links.latency(hit.name, self.round_trip_ms)

    def undo(self, hit: Hit) -> None:
        hit.nodes.links.clear(hit.name, "latency")


FAULT = Latency
