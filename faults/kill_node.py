"""The fault ``kill_node``."""

from __future__ import annotations

from tailrace.harness.contract.fault import Fault, Hit, MissedError


class KillNode(Fault):
    """The death of a node."""

    kind = "kill_node"
    does = "SIGKILL of a server and all that it started, at once"
    scope = "node"
    order = 20

    def apply(self, hit: Hit) -> None:
        if not hit.nodes.host.kill_tree(hit.process):
            raise MissedError(f"node {hit.index} had gone by itself")


FAULT = KillNode
