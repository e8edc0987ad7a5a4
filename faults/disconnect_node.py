"""The fault ``disconnect_node``."""

from __future__ import annotations

from tailrace.harness.contract.fault import CONTAINERS_ALONE, Circumstances, Fault, Hit, lasting


class DisconnectNode(Fault):
    """A node that is cut off the network."""

    kind = "disconnect_node"
    does = "a node's container is taken off its network, then put back: connections end, and new ones are refused"
    scope = "node"
    order = 70

    duration_s: float = lasting(5)

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """It is the container engine that does it, to one container at a time."""
        if not at.containers:
            return CONTAINERS_ALONE
        if at.adapter.own_cluster and at.nodes > 1:
            return "the nodes of its own cluster share one address, and none can be taken off the network by itself"
        return None

    def apply(self, hit: Hit) -> None:
        hit.nodes.containers.disconnect(hit.process)

    def undo(self, hit: Hit) -> None:
        hit.nodes.containers.reconnect(hit.process)


FAULT = DisconnectNode
