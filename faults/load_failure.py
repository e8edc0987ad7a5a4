"""The fault ``load_failure``."""

from __future__ import annotations

from tailrace.harness.contract.fault import NOTHING_LOADED, Circumstances, Fault, Hit, lasting


class LoadFailure(Fault):
    """Loads of one model that fail, after they have taken their time."""

    kind = "load_failure"
    does = "every load of one model fails"
    scope = "model"
    order = 150

    duration_s: float = lasting(10)

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """Models must come and go."""
        return None if at.multiplexed else NOTHING_LOADED

    def apply(self, hit: Hit) -> None:
        hit.nodes.fail_loads(hit.name, failing=True)

    def undo(self, hit: Hit) -> None:
        hit.nodes.fail_loads(hit.name, failing=False)


FAULT = LoadFailure
