"""How a user writes faults in an experiment: one by one, or as a random schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from tailrace.harness.errors import nearest
from tailrace.harness.plan.fault_kinds import FAULT_KINDS
from tailrace.harness.plan.keys import Strict


def _known_kind(kind: str) -> str:
    if kind not in FAULT_KINDS:
        near = nearest(kind, FAULT_KINDS)
        raise ValueError(f"there is no such fault; {f'did you mean {near!r}?' if near else ', '.join(FAULT_KINDS)}")
    return kind


FaultName = Annotated[str, AfterValidator(_known_kind)]


class FaultParameters(Strict):
    """What a fault may be told beside its kind; each kind has its own (`tailrace adapters --faults`)."""

    duration_s: float | None = Field(default=None, ge=0, description="How long it lasts before it is healed.")
    cpus: float | None = Field(default=None, gt=0, description="`slow_node`: CPUs that are left to the node.")
    memory_mb: float | None = Field(default=None, ge=16, description="`memory_limit`: MiB that are left to the node.")
    round_trip_ms: float | None = Field(default=None, gt=0, description="`latency`: added to every round trip.")
    share: float | None = Field(
        default=None, gt=0, le=1, description="`packet_loss`: share of what is sent that stalls."
    )
    stall_ms: float | None = Field(default=None, gt=0, description="`packet_loss`: how long it stalls.")

    def parameters(self, kind: str) -> dict[str, float]:
        """All parameters of a kind: those that were given, and the defaults of the others."""
        given = {name: getattr(self, name) for name in FAULT_KINDS[kind].defaults}
        return {**FAULT_KINDS[kind].defaults, **{name: value for name, value in given.items() if value is not None}}

    def foreign(self, kinds: Iterable[str]) -> list[str]:
        """The parameters that were given and belong to none of these kinds."""
        own = {name for kind in kinds for name in FAULT_KINDS[kind].defaults}
        return [name for name in FaultParameters.model_fields if getattr(self, name) is not None and name not in own]


class FaultChoice(FaultParameters):
    """One fault on the trace clock."""

    kind: FaultName = Field(description="What happens: one of the kinds below.")
    at_s: float | None = Field(
        default=None,
        ge=0,
        description="When, in seconds of the trace. Left out: where the trace suggests it, else two thirds through.",
    )
    target: Literal["random"] | Annotated[int, Field(ge=0)] = Field(
        default="random",
        description="Which replica (oldest first), node, or model (most popular first): `random` (by the trial's seed) or its "
        "index from 0.",
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> FaultChoice:
        if foreign := self.foreign([self.kind]):
            own = ", ".join(FAULT_KINDS[self.kind].defaults) or "none"
            raise ValueError(f"{self.kind} has no {' and no '.join(foreign)}; its parameters: {own}")
        if FAULT_KINDS[self.kind].scope == "cluster" and self.target != "random":
            raise ValueError(f"{self.kind} comes to every node in turn: leave `target` out")
        return self


class FaultSchedule(FaultParameters):
    """Faults at random instants of the trace, a Poisson process by the trial's seed."""

    rate: str = Field(pattern=r"^\d+(\.\d+)?/(s|min|h)$", description="How many in the mean: `2/min`, `0.1/s`, `6/h`.")
    kinds: tuple[FaultName, ...] = Field(min_length=1, description="Each fault is one of these, drawn evenly.")

    @model_validator(mode="after")
    def _fits_its_kinds(self) -> FaultSchedule:
        if foreign := self.foreign(self.kinds):
            raise ValueError(f"none of {', '.join(self.kinds)} has {' or '.join(foreign)}")
        return self

    @property
    def per_s(self) -> float:
        """The rate in faults per second."""
        count, _, unit = self.rate.partition("/")
        return float(count) / {"s": 1, "min": 60, "h": 3600}[unit]


Faults = Annotated[
    Annotated[tuple[FaultChoice, ...], Tag("listed")] | Annotated[FaultSchedule, Tag("scheduled")],
    Discriminator(lambda value: "scheduled" if isinstance(value, dict | FaultSchedule) else "listed"),
]
