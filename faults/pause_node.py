"""The fault ``pause_node``."""

from __future__ import annotations

import signal

from tailrace.harness.contract.fault import Fault, Hit, MissedError, lasting


class PauseNode(Fault):
    """A node that stands still, and goes on."""

    kind = "pause_node"
    does = "SIGSTOP of a server and all that it started, then SIGCONT"
    scope = "node"
    order = 40

    duration_s: float = lasting(5)

    def apply(self, hit: Hit) -> None:
        if not hit.nodes.host.signal_tree(hit.process, signal.SIGSTOP):
            raise MissedError("the node had gone by itself")

    def undo(self, hit: Hit) -> None:
        hit.nodes.host.signal_tree(hit.process, signal.SIGCONT)


FAULT = PauseNode
