"""The fault ``slow_node``."""

from __future__ import annotations

from pydantic import Field

from tailrace.harness import cgroups
from tailrace.harness.contract.fault import Circumstances, Fault, Hit, lasting


class SlowNode(Fault):
    """A node that has fewer CPUs than before."""

    kind = "slow_node"
    does = "a CPU quota for a server and all that it started, by control group"
    scope = "node"
    order = 50

    duration_s: float = lasting(10)
    cpus: float = Field(default=0.2, gt=0, description="CPUs that are left to the node.")

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """The engine has control groups of its own for its containers."""
        return None if at.containers else cgroups.refusal()

    def apply(self, hit: Hit) -> None:
        hit.nodes.host.limit_cpus(hit.process, self.cpus)

    def undo(self, hit: Hit) -> None:
        hit.nodes.host.limit_cpus(hit.process, None)


FAULT = SlowNode
