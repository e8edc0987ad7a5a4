"""Many models share the memory of a device that does not hold them all: what is asked for, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from tailrace.harness.errors import InputError
from tailrace.multiplexing.residency import Policy

__all__ = ["MIB", "MemoryPlan", "Multiplexing", "Policy", "plan_memory"]

MIB = 2**20


class Multiplexing(BaseModel):
    """The memory that all models share, and who goes when one that is not in it is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    memory_mb: float = Field(gt=0, description="What the device has for models, MiB; more is refused.")
    policy: Policy = Field(
        default="lru",
        description="Who goes: `lru`, asked for longest ago; `lfu`, asked for least often; `gdsf`, GreedyDual-Size-Frequency, "
        "which also weighs size and reload time.",
    )
    pinned: int = Field(default=0, ge=0, description="So many of the most popular models never go: the warm pool.")


@dataclass(frozen=True)
class MemoryPlan:
    """What a trial's models have to share."""

    budget_bytes: int
    sizes: Mapping[str, int]
    """Of every model, by popularity at the trace's beginning, in bytes."""
    policy: Policy
    pinned: tuple[str, ...]
    at_start: tuple[str, ...]
    """In memory when the server starts: the pinned ones, and of the others the most popular that there is room for."""


def plan_memory(choice: Multiplexing, names: Sequence[str], sizes_mb: Sequence[float], where: str) -> MemoryPlan:
    """Raises :class:`InputError` that begins with ``where`` and names the sizes when some model could never be loaded."""
    sizes = {name: round(size_mb * MIB) for name, size_mb in zip(names, sizes_mb, strict=True)}
    budget = round(choice.memory_mb * MIB)
    pinned, others = list(names[: choice.pinned]), names[choice.pinned :]
    taken = sum(sizes[name] for name in pinned)
    if len(pinned) < choice.pinned:
        raise InputError(
            f"{where}.pinned: {choice.pinned} models are to be pinned, and there are {len(names)}",
            remedy=f"use {len(names)} or fewer",
        )
    largest = max(others, key=sizes.__getitem__, default=None)
    needed = taken + (0 if largest is None else sizes[largest])
    if needed > budget:
        parts = [f"{taken / MIB:g} MiB of {len(pinned)} pinned models"] if pinned else []
        parts += [f"{sizes[largest] / MIB:g} MiB of the largest one, {largest}"] if largest else []
        raise InputError(
            f"{where}.memory_mb: {choice.memory_mb:g} MiB do not hold {' and '.join(parts)}, which could never be loaded",
            remedy=f"use {needed / MIB:g} or more" + (", or pin fewer models" if pinned else ""),
        )
    at_start = pinned
    for name in others:
        if taken + sizes[name] <= budget:
            at_start, taken = [*at_start, name], taken + sizes[name]
    return MemoryPlan(budget, sizes, choice.policy, tuple(pinned), tuple(at_start))
