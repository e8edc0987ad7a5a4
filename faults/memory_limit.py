"""The fault ``memory_limit``."""

from __future__ import annotations

from pydantic import Field

from tailrace.harness.contract.fault import CONTAINERS_ALONE, Circumstances, Fault, Hit, lasting


class MemoryLimit(Fault):
    """A node that has less memory than before."""

    kind = "memory_limit"
    does = "a node's container may use less memory than before; what asks for more is killed by the kernel"
    scope = "node"
    order = 60

    duration_s: float = lasting(10)
    memory_mb: float = Field(default=512, ge=16, description="MiB that are left to the node.")

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """It is the container engine that does it."""
        return None if at.containers else CONTAINERS_ALONE

    def apply(self, hit: Hit) -> None:
        hit.nodes.containers.limit_memory(hit.process, round(self.memory_mb * 2**20))

    def undo(self, hit: Hit) -> None:
        hit.nodes.containers.limit_memory(hit.process, None)


FAULT = MemoryLimit
