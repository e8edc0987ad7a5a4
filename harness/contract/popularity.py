"""Several models of one workload, and how requests are dealt out to them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from tailrace.harness.errors import InputError

MAX_MODELS = 1_000
_GOLDEN = (5**0.5 - 1) / 2
"""The fractional parts of its multiples are spread as evenly as can be, however many there are."""


class Popularity(BaseModel):
    """Which model each request is for."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Literal["zipf", "drift", "trace"] = Field(
        default="zipf",
        description="`zipf`: the n-th model gets a share in proportion to n^-exponent; `drift`: the same, and every `every_s` "
        "the most popular one becomes the least, and each other one moves up; `trace`: as the trace's own models, the one "
        "with the most arrivals first.",
    )
    exponent: float = Field(default=1.0, ge=0, le=10, description="Of `zipf` and `drift`; 0: all alike.")
    every_s: float | None = Field(default=None, gt=0, description="Of `drift`: seconds of the trace.")

    @model_validator(mode="after")
    def _fits(self) -> Popularity:
        if self.kind == "drift" and self.every_s is None:
            raise ValueError("`kind: drift` needs `every_s`, the seconds after which the ranking moves on")
        if self.kind != "drift" and self.every_s is not None:
            raise ValueError(f"`every_s` is of `kind: drift`, and this is `kind: {self.kind}`")
        return self


class Models(BaseModel):
    """How many models of a workload are served, each with weights, answers and requests of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    count: int = Field(ge=1, le=MAX_MODELS, description="How many.")
    popularity: Popularity = Field(default=Popularity(), description="Which model each request is for (keys below).")

    size_mb: tuple[PositiveFloat, PositiveFloat] | PositiveFloat = Field(
        default=400.0,
        description="What each takes of the device's memory, MiB, where `multiplexing` limits it: one number, or smallest and "
        "largest, between which sizes are spread whatever the popularity.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_count(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) and not isinstance(value, bool) else value

    def names(self, workload: str) -> tuple[str, ...]:
        """``emulated-00`` …, by popularity at the trace's beginning; a single one bears the workload's name."""
        width = max(2, len(str(self.count - 1)))
        return (workload,) if self.count == 1 else tuple(f"{workload}-{i:0{width}d}" for i in range(self.count))

    def sizes_mb(self) -> tuple[float, ...]:
        """What each takes, in the order of :meth:`names`: evenly spread, and neighbours in popularity far apart in size."""
        if not isinstance(self.size_mb, tuple):
            return (self.size_mb,) * self.count
        smallest, largest = self.size_mb
        return tuple(smallest + (largest - smallest) * (_GOLDEN * index % 1.0) for index in range(self.count))


def ranked(model_index: NDArray[np.int64]) -> NDArray[np.int64]:
    """A trace's models by popularity: for every arrival the rank of its model, 0 for the one with the most arrivals (of equal
    ones that which came first)."""
    found, first, inverse, counts = np.unique(model_index, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty(len(found), dtype=np.int64)
    rank[order] = np.arange(len(found))
    return rank[inverse]


def draw(
    popularity: Popularity,
    count: int,
    times_ns: NDArray[np.int64],
    trace_models: NDArray[np.int64] | None,
    rng: np.random.Generator,
) -> NDArray[np.uint16]:
    """The model, of ``count``, of each arrival at ``times_ns`` (from the trace's beginning).

    ``trace_models`` are the trace's own, one entry per arrival; ``None`` where it has none. Raises :class:`InputError`
    where the trace cannot say what is asked of it.
    """
    if popularity.kind == "trace":
        if trace_models is None:
            raise InputError(
                "`models.popularity`: the trace does not say which model its arrivals are for",
                remedy="choose `kind: zipf`, or import the trace with `--model-column`",
            )
        ranks = ranked(trace_models)
        if len(ranks) and ranks.max() >= count:
            raise InputError(
                f"`models.count` is {count}, but the trace has arrivals for {ranks.max() + 1} models",
                remedy=f"set models.count to {ranks.max() + 1} or more, or replay another window",
            )
        return ranks.astype(np.uint16)
    shares = np.arange(1, count + 1, dtype=np.float64) ** -popularity.exponent
    ranks = rng.choice(count, size=len(times_ns), p=shares / shares.sum())
    if popularity.every_s is not None:
        # Warm-up comes before the trace, and belongs to its first period.
        ranks = ranks + np.maximum(times_ns, 0) // round(popularity.every_s * 1e9)
    return (ranks % count).astype(np.uint16)
