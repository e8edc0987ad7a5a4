"""The fault ``packet_loss``."""

from __future__ import annotations

from pydantic import Field

from tailrace.harness.contract.fault import Fault, Hit, lasting


class PacketLoss(Fault):
    """Lost segments on the way to a node and back, each with all that follows it on its connection."""

    kind = "packet_loss"
    does = "a share of what is sent to and from a node stalls, as a lost segment waits to be sent again"
    scope = "link"
    order = 100

    duration_s: float = lasting(10)
    share: float = Field(default=0.05, gt=0, le=1, description="Share of what is sent that stalls, 0 to 1.")
    stall_ms: float = Field(default=200, gt=0, description="Milliseconds for which it stalls.")

    def apply(self, hit: Hit) -> None:
        hit.nodes.links.stalls(hit.name, self.share, self.stall_ms, seed=hit.seed)

    def undo(self, hit: Hit) -> None:
        hit.nodes.links.clear(hit.name, "stalls")


FAULT = PacketLoss
