"""The system that is simulated, as its user writes it: router, batcher, replicas, queue limit, autoscaler, failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tailrace.harness.analysis.metrics import Ints
from tailrace.harness.errors import InputError, StorageError
from tailrace.harness.plan.keys import explain
from tailrace.harness.plan.loading import assign

NS_PER_MS = 1_000_000
MAX_BATCH = 4096


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Service(_Part):
    """How long a replica takes for a batch of n: ``base_ms + per_item_ms · n``, or what was measured."""

    base_ms: float = Field(default=12.0, ge=0, description="What every batch takes.")
    per_item_ms: float = Field(default=3.0, ge=0, description="What each item adds.")
    table_ms: dict[int, float] = Field(
        default={},
        description="Measured times by batch size, in place of the two above; a straight line between sizes, and beyond the "
        "largest one.",
    )

    @model_validator(mode="after")
    def _takes_time(self) -> Service:
        if self.table_ms and (min(self.table_ms) < 1 or min(self.table_ms.values()) <= 0):
            raise ValueError("table_ms: batch sizes count from 1, and every time is above 0")
        if not self.table_ms and self.base_ms + self.per_item_ms <= 0:
            raise ValueError("base_ms and per_item_ms are both 0: a batch would take no time")
        return self

    def times_ns(self, max_batch: int) -> Ints:
        """Nanoseconds by batch size, shape (max_batch + 1,); entry 0 is 0."""
        n = np.arange(max_batch + 1, dtype=np.float64)
        if not self.table_ms:
            times_ms = self.base_ms + self.per_item_ms * n
        else:
            sizes = sorted(self.table_ms)
            known = [self.table_ms[size] for size in sizes]
            times_ms = np.interp(n, sizes, known)
            if len(sizes) > 1:
                slope = max(0.0, (known[-1] - known[-2]) / (sizes[-1] - sizes[-2]))
                times_ms = np.where(n > sizes[-1], known[-1] + slope * (n - sizes[-1]), times_ms)
        times_ns = np.maximum(1, np.rint(times_ms * NS_PER_MS)).astype(np.int64)
        times_ns[0] = 0
        return times_ns


WindowOpens = Literal["arrival", "idle"]


class Batching(_Part):
    """When a replica that is idle starts a batch: once it would be full, or its oldest request has waited enough."""

    max_batch: int = Field(default=16, ge=1, le=MAX_BATCH, description="The largest batch.")
    window_ms: float = Field(default=10.0, ge=0, description="How long the oldest request waits for others.")
    window_opens: WindowOpens = Field(
        default="arrival",
        description="The window counts from the oldest request's `arrival`, or anew once a replica is `idle`.",
    )


class Autoscaler(_Part):
    """Looks at the queue for each ready replica every period; one that is added is ready after the cold start."""

    period_s: float = Field(default=0.1, gt=0, description="How often it looks.")
    up_above: float = Field(
        default=10, gt=0, description="One more when more requests wait for each, and none is coming."
    )
    down_below: float = Field(default=3, ge=0, description="One fewer, an idle one, when there are less.")
    min: int = Field(default=1, ge=1, description="The fewest, without the warm pool.")
    max: int = Field(default=64, ge=1, le=10_000, description="The most.")
    warm_pool: int = Field(default=0, ge=0, description="Replicas that are kept ready beyond the fewest.")
    cold_start_s: float = Field(default=0.8, ge=0, description="From the decision until the new one is ready.")

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaler:
        if self.min + self.warm_pool > self.max:
            raise ValueError(f"min ({self.min}) and warm_pool ({self.warm_pool}) together are above max ({self.max})")
        if self.down_below >= self.up_above:
            raise ValueError(f"down_below ({self.down_below:g}) is not below up_above ({self.up_above:g})")
        return self


class TargetTracking(_Part):
    """Keeps about so many requests for each replica, waiting ones and those in hand, as Ray Serve does: what it wants is the
    mean number of requests ÷ the target, rounded up; all that are missing come at once, and idle ones go."""

    target_ongoing: float = Field(gt=0, description="Requests for each replica.")
    min: int = Field(default=1, ge=1, description="The fewest.")
    max: int = Field(default=64, ge=1, le=10_000, description="The most.")
    period_s: float = Field(default=0.1, gt=0, description="How often it looks.")
    averaged_over_s: float = Field(default=30, gt=0, description="Over how long requests are averaged.")
    up_after_s: float = Field(default=30, ge=0, description="How long more must have been wanted.")
    down_after_s: float = Field(default=600, ge=0, description="How long fewer must have been wanted.")
    cold_start_s: float = Field(default=0.8, ge=0, description="From the decision until the new one is ready.")

    @model_validator(mode="after")
    def _ordered(self) -> TargetTracking:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class Failure(_Part):
    """The first ready replica dies, and what it has in hand with it."""

    at_s: float = Field(ge=0, description="When, in seconds of the trace.")
    model: int = Field(default=0, ge=0, description="Of which model, counted from 0.")
    replaced_after_s: float | None = Field(
        default=None,
        ge=0,
        description="When its replacement is ready; left out: nobody replaces it but the autoscaler.",
    )


Router = Literal["shared", "round_robin", "random", "power_of_two", "shortest_queue"]


class System(_Part):
    """A serving system. The defaults are the emulated accelerator's: 12 ms + 3 ms·n, batches of 16, a window of 10 ms."""

    service: Service = Field(default=Service(), description="How long a batch takes (keys below).")
    batching: Batching = Field(default=Batching(), description="When a batch starts (keys below).")
    replicas: int = Field(default=1, ge=1, le=10_000, description="How many are ready at first, for each model.")
    router: Router = Field(
        default="shared",
        description="`shared`: one queue for each model, from which idle replicas help themselves. Else a queue for each "
        "replica, chosen in turn, at random, the shorter of two at random, or the shortest.",
    )
    queue_limit: int | None = Field(
        default=None, ge=1, description="What arrives at a queue with so many waiting is shed; left out: none is."
    )
    devices: int | None = Field(
        default=None,
        ge=1,
        description="Replicas share so many devices, one batch at a time on each; left out: one each.",
    )
    autoscaler: Autoscaler | None = Field(
        default=None, description="Changes the replicas (keys below); left out: none."
    )
    tracking: TargetTracking | None = Field(
        default=None, description="Changes them by another rule, in place of `autoscaler` (keys below)."
    )
    failures: tuple[Failure, ...] = Field(default=(), description="What dies (keys below).")
    overhead_ms: float = Field(
        default=0.0, ge=0, description="What every answer takes beyond queue and batch: network, (de)serialising."
    )
    cycle_ms: float = Field(
        default=0.0, ge=0, description="After each batch, until its replica can start another; its device is free."
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="An answer later than this is a failure; left out: however late, it is an answer.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> System:
        if self.autoscaler and self.tracking:
            raise ValueError("autoscaler and tracking: two would work against each other; give one of them")
        scaler = self.autoscaler or self.tracking
        if scaler and not scaler.min <= self.replicas <= scaler.max:
            raise ValueError(
                f"replicas ({self.replicas}) is not between the scaler's min ({scaler.min}) and max ({scaler.max})"
            )
        return self


def load_system(source: str | None, assignments: Sequence[str] = ()) -> System:
    """The default system, or that of a YAML file, with ``key.sub=value`` texts in place of what it says. Raises
    :class:`InputError` that names file, key and remedy."""
    content: object = {}
    where = source or "the system"
    if source is not None:
        try:
            content = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source}: cannot be read: {error}", remedy="give a YAML file of a system") from error
        except yaml.YAMLError as error:
            raise InputError(f"{source}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: a system is a mapping of keys, this is a {type(content).__name__}")
    for assignment in assignments:
        assign(content, assignment)
    return validated(content, where)


def validated(content: object, where: str) -> System:
    """A system from plain values. Raises :class:`InputError` that names ``where``, the key and what is wrong with it."""
    try:
        return System.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, System, where))) from error


def write_system(system: System, path: Path) -> None:
    """Write a system as the YAML that :func:`load_system` reads. Raises :class:`StorageError`."""
    text = yaml.safe_dump(system.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError.of(path, error) from error
