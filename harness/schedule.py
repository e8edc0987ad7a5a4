"""The schedule: every arrival of a trial as pure data, drawn from a seed before the first byte is sent."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Phase(IntEnum):
    """The part of a trial that an arrival belongs to."""

    WARMUP = 0
    MEASURE = 1
    DRAIN = 2


@dataclass(frozen=True)
class Schedule:
    """Arrivals in order of their intended start; all arrays have one entry per arrival.

    ``intended_ns`` (int64) counts from the trial's epoch, the first instant of the trace: warm-up lies before
    it and is negative. ``model`` (uint16) indexes ``models``; ``payload_id`` (int32) indexes the workload's
    payloads; ``phase`` (uint8) holds :class:`Phase` values.
    """

    intended_ns: NDArray[np.int64]
    model: NDArray[np.uint16]
    payload_id: NDArray[np.int32]
    phase: NDArray[np.uint8]
    models: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.intended_ns)
