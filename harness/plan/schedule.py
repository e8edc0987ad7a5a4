"""The schedule: every arrival of a trial as pure data, drawn from a seed before the first byte is sent."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.contract.popularity import Popularity, draw


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


_ALL_ALIKE = Popularity(exponent=0)
WARMUP_GAP_S = 1.0
"""Silence between the last warm-up arrival and the trace, so that warm-up leaves no queue behind."""


def build_schedule(
    arrivals_ns: NDArray[np.int64],
    *,
    models: tuple[str, ...],
    popularity: Popularity = _ALL_ALIKE,
    trace_models: NDArray[np.int64] | None = None,
    payload_count: int,
    warmup_s: float,
    warmup_rate: float,
    seed: int,
) -> Schedule:
    """Warm-up and trace as one schedule; payloads are drawn uniformly, ``models`` by their popularity.

    ``arrivals_ns`` (sorted, from 0) are the trace; warm-up is Poisson with ``warmup_rate`` arrivals/s over ``warmup_s``
    seconds, at least one arrival when it is not empty, and ends ``WARMUP_GAP_S`` before the trace begins. ``trace_models``
    are the models that the trace itself names, for popularity by trace; warm-up then asks for each of them as often as it
    does. Raises what :func:`draw` raises.
    """
    streams = np.random.SeedSequence(seed).spawn(3)
    warm_rng, payload_rng, model_rng = (np.random.default_rng(stream) for stream in streams)
    warm = np.empty(0, dtype=np.int64)
    if warmup_s > 0:
        count = max(1, int(warm_rng.poisson(warmup_rate * warmup_s)))
        offsets = np.sort(warm_rng.uniform(0, warmup_s, count))
        warm = ((offsets - warmup_s - WARMUP_GAP_S) * 1e9).astype(np.int64)
    intended = np.concatenate([warm, arrivals_ns.astype(np.int64)])
    own = draw(popularity, len(models), arrivals_ns, trace_models, model_rng)
    if popularity.kind == "trace":
        warm_models = model_rng.choice(own, size=len(warm) if len(own) else 0)
    else:
        warm_models = draw(popularity, len(models), warm, None, model_rng)
    phase = np.full(len(intended), Phase.MEASURE, dtype=np.uint8)
    phase[: len(warm)] = Phase.WARMUP
    return Schedule(
        intended_ns=intended,
        model=np.concatenate([warm_models, own]),
        payload_id=payload_rng.integers(0, payload_count, len(intended), dtype=np.int32),
        phase=phase,
        models=models,
    )


def most_at_once(arrivals_ns: NDArray[np.int64], window_s: float) -> int:
    """The largest number of arrivals within any window of that length: what waits at once if nothing is answered."""
    if len(arrivals_ns) == 0:
        return 0
    ends = np.searchsorted(arrivals_ns, arrivals_ns + int(window_s * 1e9), side="right")
    return int((ends - np.arange(len(arrivals_ns))).max())


def offered_rates(arrivals_ns: NDArray[np.int64], span_s: float) -> tuple[float, float]:
    """Mean arrivals/s over the trace, and the most within any one second (at least the mean)."""
    mean = len(arrivals_ns) / span_s
    return mean, max(mean, float(most_at_once(arrivals_ns, 1.0)))
