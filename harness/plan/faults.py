"""The faults of an experiment: how a user writes them, one by one or as a random schedule, and when each is to come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from tailrace.harness.contract.fault import Fault
from tailrace.harness.errors import nearest
from tailrace.harness.plan.fault_kinds import fault_kinds
from tailrace.harness.plan.keys import Strict, unknown_keys

_TOLD = ("duration_s", "cpus", "memory_mb", "round_trip_ms", "share", "stall_ms")
"""Parameters that an experiment's dump holds as null where they are not given, as it always has: its hash, and the conditions of
baselines, must not change when a kind of fault is added."""


def _known_kind(kind: str) -> str:
    known = fault_kinds()
    if kind not in known:
        near = nearest(kind, known)
        raise ValueError(f"there is no such fault; {f'did you mean {near!r}?' if near else ', '.join(known)}")
    return kind


FaultName = Annotated[str, AfterValidator(_known_kind)]


class _WithParameters(Strict):
    """Keys, and flat beside them the parameters of kinds of faults (`tailrace adapters --faults`)."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        parameters = dict.fromkeys(name for kind in fault_kinds().values() for name in kind.model_fields)
        if unknown := {key: value for key, value in told.items() if key not in {*parameters, *cls.model_fields}}:
            raise unknown_keys(unknown, [*parameters, *cls.model_fields])
        return {key: value for key, value in told.items() if value is not None or key not in parameters}

    @model_serializer(mode="wrap")
    def _with_null(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {**dict.fromkeys(_TOLD), **dump(self)}

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that were given."""
        return self.model_extra or {}

    def _validate_for(self, kinds: Sequence[type[Fault]]) -> list[str]:
        """Validate what was given by the kinds that have it; returns what none of them has. Raises ``ValidationError``."""
        for kind in kinds:
            fitting = kind(**{name: value for name, value in self.given.items() if name in kind.model_fields})
            self.given.update(fitting.model_dump(exclude_unset=True))
        return [name for name in self.given if not any(name in kind.model_fields for kind in kinds)]

    def parameters(self, kind: str) -> dict[str, float]:
        """All parameters of a kind: those that were given, and the defaults of the others."""
        defaults = fault_kinds()[kind].parameters()
        return {name: self.given.get(name, default) for name, default in defaults.items()}


class FaultChoice(_WithParameters):
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
    def _fits_its_kind(self) -> Self:
        kind = fault_kinds()[self.kind]
        if foreign := self._validate_for([kind]):
            own = ", ".join(kind.model_fields) or "none"
            raise ValueError(f"{self.kind} has no {' and no '.join(foreign)}; its parameters: {own}")
        if kind.scope == "cluster" and self.target != "random":
            raise ValueError(f"{self.kind} comes to every node in turn: leave `target` out")
        return self


class FaultSchedule(_WithParameters):
    """Faults at random instants of the trace, a Poisson process by the trial's seed."""

    rate: str = Field(pattern=r"^\d+(\.\d+)?/(s|min|h)$", description="How many in the mean: `2/min`, `0.1/s`, `6/h`.")
    kinds: tuple[FaultName, ...] = Field(min_length=1, description="Each fault is one of these, drawn evenly.")

    @model_validator(mode="after")
    def _fits_its_kinds(self) -> Self:
        if foreign := self._validate_for([fault_kinds()[kind] for kind in self.kinds]):
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


@dataclass(frozen=True)
class PlannedFault:
    """A fault with its instant on the trace clock, and all its parameters."""

    kind: str
    at_s: float
    target: str | int = "random"
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """How long it lasts; 0: it is over at once."""
        return self.parameters.get("duration_s", 0.0)


def plan_faults(
    choices: Sequence[FaultChoice] | FaultSchedule, *, span_s: float, suggested_at_s: float | None, seed: int
) -> list[PlannedFault]:
    """The faults of a scenario in order of time.

    One without a time gets the trace's suggestion, else 2/3 of the span; those of a schedule are drawn by the seed: as
    many as a Poisson process has within the span, at instants spread evenly, of kinds drawn evenly.
    """
    if isinstance(choices, FaultSchedule):
        rng = np.random.default_rng([seed, 3])
        instants = np.sort(rng.uniform(0, span_s, rng.poisson(choices.per_s * span_s)))
        kinds = [choices.kinds[index] for index in rng.integers(len(choices.kinds), size=len(instants))]
        return [
            PlannedFault(kind, float(at_s), "random", choices.parameters(kind))
            for at_s, kind in zip(instants, kinds, strict=True)
        ]
    default = suggested_at_s if suggested_at_s is not None else span_s * 2 / 3
    planned = [
        PlannedFault(
            choice.kind,
            default if choice.at_s is None else choice.at_s,
            choice.target,
            choice.parameters(choice.kind),
        )
        for choice in choices
    ]
    return sorted(planned, key=lambda fault: fault.at_s)


def link_faults(kinds: Iterable[str]) -> bool:
    """Whether any of these is done to the connections to a node, which then go through a proxy."""
    return any(fault_kinds()[kind].scope == "link" for kind in kinds)
