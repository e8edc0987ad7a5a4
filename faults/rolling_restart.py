"""The fault ``rolling_restart``."""

from __future__ import annotations

from tailrace.harness.contract.fault import Circumstances, Fault, Hit


class RollingRestart(Fault):
    """An update of all nodes, one after the other."""

    kind = "rolling_restart"
    does = "every node in turn is ended in order and started again"
    scope = "cluster"
    order = 120
    errand = True

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """Somebody must go on serving."""
        return "with one node it would be an outage: it needs `nodes: 2` or more" if at.nodes < 2 else None

    def apply(self, hit: Hit) -> None:
        for index in range(hit.nodes.node_count):
            if hit.over.is_set():
                return
            hit.nodes.restart(index, stopped=hit.over)


FAULT = RollingRestart
