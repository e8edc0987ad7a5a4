"""The fault ``partition``."""

from __future__ import annotations

from tailrace.harness.contract.fault import Fault, Hit, lasting


class Partition(Fault):
    """A partition between a node and those who ask it, health checks included."""

    kind = "partition"
    does = "nothing passes between a node and those who ask it; connections stay open, and what was sent arrives in the end"
    scope = "link"
    order = 80

    duration_s: float = lasting(5)

    def apply(self, hit: Hit) -> None:
        hit.nodes.links.partition(hit.name)

    def undo(self, hit: Hit) -> None:
        hit.nodes.links.clear(hit.name, "partition")


FAULT = Partition
