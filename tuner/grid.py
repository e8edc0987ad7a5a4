"""The settings that are searched, and what the simulator says of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

from tailrace.harness.contract.adapter import Adapter, Tuning, WireProtocol
from tailrace.simulator.system import Batching, System, TargetTracking

Settings = dict[str, Any]

MAX_BATCH = (1, 2, 4, 8, 16, 32)
WINDOW_MS = (0, 1, 2, 5, 10, 20)
QUEUE_LIMIT = (None, 16, 64, 256)
TARGET_ONGOING = (4, 8, 16, 32)
"""Requests for each replica that a framework which scales itself is to keep."""
PACE = {"averaged_over_s": 2.0, "up_after_s": 1.0, "down_after_s": 5.0}
"""How quickly it is to react. With its own defaults (Ray Serve: half a minute) it would sleep through a short surge."""
CALIBRATED_ON: Settings = {"max_batch": 16, "batch_window_ms": 5}
"""What the simulator is fitted on before it is asked about the others; with one replica for each device."""


def knobs(adapter: Adapter, options: BaseModel, protocol: WireProtocol, devices: int) -> dict[str, tuple[Any, ...]]:
    """The values of every neutral knob for which an adapter has a place; replicas up to one for each device."""
    wanted = {
        "max_batch": MAX_BATCH,
        "batch_window_ms": WINDOW_MS,
        "replicas": tuple(range(1, devices + 1)),
        "queue_limit": QUEUE_LIMIT,
    }

    def has_a_place(knob: str, value: Any) -> bool:
        # Beside batches, for some knobs have a place only there.
        asked = Tuning.model_validate({"max_batch": 8, **({} if value is None else {knob: value})})
        return knob not in adapter.expressible(asked, options, protocol)[1]

    found = {knob: tuple(value for value in values if has_a_place(knob, value)) for knob, values in wanted.items()}
    return {knob: values for knob, values in found.items() if any(value is not None for value in values)}


def targets(adapter: Adapter, options: BaseModel, protocol: WireProtocol, devices: int) -> tuple[int, ...]:
    """The values of ``target_ongoing`` for a framework that scales itself; none for one that does not, or has nowhere to go."""
    asked = Tuning.model_validate({"autoscale": _autoscale(TARGET_ONGOING[0], devices)})
    return TARGET_ONGOING if devices > 1 and not adapter.expressible(asked, options, protocol)[1] else ()


def _autoscale(target_ongoing: float, devices: int) -> dict[str, float]:
    return {"min": 1, "max": devices, "target_ongoing": target_ongoing, **PACE}


def tuning(settings: Settings, devices: int) -> dict[str, Any]:
    """Settings as the ``tuning`` of an experiment: what is ``None`` is left out, and a ``target_ongoing`` becomes the knob
    ``autoscale``, between one replica and one for each device."""
    given = {name: value for name, value in settings.items() if value is not None}
    target_ongoing = given.pop("target_ongoing", None)
    return given if target_ongoing is None else {**given, "autoscale": _autoscale(target_ongoing, devices)}


def combinations(values: Mapping[str, tuple[Any, ...]]) -> Iterator[Settings]:
    """Every choice of one value for each knob that is :func:`sensible`."""
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        if settings == sensible(settings, values):
            yield settings


def sensible(settings: Settings, values: Mapping[str, tuple[Any, ...]]) -> Settings:
    """The same settings without what makes no difference: batches of one wait for nobody, so the shortest of the windows
    stands for all."""
    alone = settings.get("max_batch") == 1 and "batch_window_ms" in values
    return {**settings, "batch_window_ms": min(values["batch_window_ms"])} if alone else dict(settings)


def applied(system: System, settings: Settings, replica_start_s: float = 0.0) -> System:
    """A fitted system with these settings in place of those that it was fitted with. ``target_ongoing`` makes it scale
    itself, from one replica to those that it has; ``replica_start_s`` is what each further one takes then."""
    batching = system.batching
    tracking = None
    if (target_ongoing := settings.get("target_ongoing")) is not None:
        limits = {"target_ongoing": target_ongoing, "max": system.replicas, "cold_start_s": replica_start_s}
        tracking = TargetTracking.model_validate({**limits, **PACE})
    return system.model_copy(
        update={
            "batching": Batching(
                max_batch=settings.get("max_batch", batching.max_batch),
                window_ms=settings.get("batch_window_ms", batching.window_ms),
                window_opens=batching.window_opens,
            ),
            "replicas": 1 if tracking else settings.get("replicas", system.replicas),
            "tracking": tracking,
            "queue_limit": settings.get("queue_limit"),
        }
    )


def best_by(scores: list[float], count: int) -> list[int]:
    """The positions of the ``count`` largest, best first; the earlier of equal ones first."""
    return [int(position) for position in np.argsort(-np.asarray(scores), kind="stable")[:count]]
