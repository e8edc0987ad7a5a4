"""The fault ``reset``."""

from __future__ import annotations

from tailrace.harness.contract.fault import Fault, Hit, lasting


class Reset(Fault):
    """Connections to a node that are reset."""

    kind = "reset"
    does = "all connections to a node are reset; with a duration, new ones too while it lasts"
    scope = "link"
    order = 110

    duration_s: float = lasting(0)

    def apply(self, hit: Hit) -> None:
        hit.nodes.links.reset(hit.name, once=self.duration_s == 0)

    def undo(self, hit: Hit) -> None:
        hit.nodes.links.clear(hit.name, "reset")


FAULT = Reset
