"""A trace is when requests arrive; here are the type and the pure functions that cut, rescale and extend one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tailrace.harness.errors import InputError
from tailrace.traces.statistics import NS_PER_S, gap_cv, index_of_dispersion, peak_to_mean

MAX_ARRIVALS = 100_000_000
"""More than this is refused before memory is taken for it: 10⁸ arrivals are 0.8 GB, and hours of load."""

MAX_NS = 2**63 - 1
"""The largest time that fits: 292 years in nanoseconds."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Arrivals in order of time, and what is known about them.

    ``arrivals_ns`` (int64, one entry per arrival) is sorted, each with ``0 <= t < span_ns``; equal stamps are legal.
    ``transient`` is declared, never guessed: a surge or a flash crowd, exempt from checks for a steady state.
    ``fault_at_s`` is where the trace suggests a fault. ``model_index`` (int64, one entry per arrival) names the model
    or tenant of each arrival, as an index into ``provenance["models"]`` where the source named them.
    ``resolution_s`` is that of the source's stamps: below it the spacing was invented by the importer (0: exact).
    ``provenance`` is JSON: where the arrivals come from and, under ``transformations``, all that was done to them.
    The arrays are kept as read-only views. Raises :class:`InputError` where any of this does not hold.
    """

    name: str
    arrivals_ns: NDArray[np.int64]
    span_ns: int
    transient: bool = False
    fault_at_s: float | None = None
    model_index: NDArray[np.int64] | None = None
    provenance: dict[str, JsonValue] = field(default_factory=dict)
    resolution_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("A trace needs a name.")
        arrivals = self._column("arrivals_ns", self.arrivals_ns)
        if not 0 < self.span_ns <= MAX_NS:
            raise InputError(f"Trace {self.name!r}: span_ns is {self.span_ns}, not between 1 and {MAX_NS}.")
        if len(arrivals) > 0:
            if bool(np.any(arrivals[1:] < arrivals[:-1])):
                raise InputError(f"Trace {self.name!r}: arrivals_ns is not sorted.")
            if arrivals[0] < 0 or arrivals[-1] >= self.span_ns:
                raise InputError(f"Trace {self.name!r}: arrivals_ns leaves the span, 0 <= t < {self.span_ns} ns.")
        if self.model_index is not None:
            models = self._column("model_index", self.model_index)
            if len(models) != len(arrivals):
                raise InputError(f"Trace {self.name!r}: model_index has {len(models)} entries, not {len(arrivals)}.")
            if len(models) > 0 and models.min() < 0:
                raise InputError(f"Trace {self.name!r}: model_index holds a negative index.")
        if self.fault_at_s is not None and not 0 <= self.fault_at_s < self.span_s:
            raise InputError(
                f"Trace {self.name!r}: fault_at_s is {self.fault_at_s:g}, outside its {self.span_s:g} s.",
                remedy="choose a moment inside the trace, or none",
            )
        if not (math.isfinite(self.resolution_s) and self.resolution_s >= 0):
            raise InputError(f"Trace {self.name!r}: resolution_s is {self.resolution_s}, not a time of 0 or more.")

    def _column(self, name: str, values: NDArray[np.int64]) -> NDArray[np.int64]:
        if values.dtype != np.int64 or values.ndim != 1:
            raise InputError(f"Trace {self.name!r}: {name} is {values.dtype}{list(values.shape)}, not int64[n].")
        view = values.view()
        view.flags.writeable = False
        object.__setattr__(self, name, view)
        return view

    def __len__(self) -> int:
        """Number of arrivals."""
        return len(self.arrivals_ns)

    @property
    def span_s(self) -> float:
        """Length in seconds."""
        return self.span_ns / NS_PER_S

    @property
    def mean_rate(self) -> float:
        """Arrivals per second over the whole span."""
        return len(self) / self.span_s


@dataclass(frozen=True)
class TraceDescription:
    """The figures of one trace; rates in arrivals per second, the others without unit.

    ``None`` means that the figure does not exist: too few arrivals, a span shorter than the window, or stamps
    coarser than the window (``Trace.resolution_s``), whose finer structure was invented by the importer.
    """

    rows: int
    span_s: float
    mean_rate: float
    peak_to_mean_1s: float | None
    peak_to_mean_60s: float | None
    index_of_dispersion_1s: float | None
    index_of_dispersion_60s: float | None
    cv: float | None

    def as_dict(self) -> dict[str, JsonValue]:
        """The same figures as JSON."""
        return dict(vars(self))


def describe(trace: Trace) -> TraceDescription:
    """Return the figures of ``trace``; takes time and memory in proportion to its arrivals, never to its span."""

    def per_window(window_s: int) -> tuple[float | None, float | None]:
        if trace.resolution_s > window_s:
            return None, None
        window_ns = window_s * NS_PER_S
        return (
            peak_to_mean(trace.arrivals_ns, trace.span_ns, window_ns),
            index_of_dispersion(trace.arrivals_ns, trace.span_ns, window_ns),
        )

    peak_1s, dispersion_1s = per_window(1)
    peak_60s, dispersion_60s = per_window(60)
    gaps_are_real = trace.resolution_s * trace.mean_rate <= 1
    return TraceDescription(
        rows=len(trace),
        span_s=trace.span_s,
        mean_rate=trace.mean_rate,
        peak_to_mean_1s=peak_1s,
        peak_to_mean_60s=peak_60s,
        index_of_dispersion_1s=dispersion_1s,
        index_of_dispersion_60s=dispersion_60s,
        cv=gap_cv(trace.arrivals_ns) if gaps_are_real else None,
    )


def random_source(seed: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose: the same seed gives unrelated draws to, say, a generator and a later thinning."""
    if seed < 0:
        raise InputError(f"The seed is {seed}.", remedy="use a whole number of 0 or more")
    return np.random.default_rng([seed, *purpose.encode()])


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The part with ``start_s <= t < end_s``, its times counted from ``start_s``; may be empty of arrivals.

    A suggested fault outside the window is dropped. Raises :class:`InputError` for a window that is empty or
    reaches beyond the trace.
    """
    if not 0 <= start_s < end_s <= trace.span_s:  # NaN fails too
        raise InputError(
            f"Trace {trace.name!r}: the window {start_s:g} to {end_s:g} s does not lie in its {trace.span_s:g} s.",
            remedy=f"choose 0 <= start < end <= {trace.span_s:g}",
        )
    start_ns, end_ns = round(start_s * NS_PER_S), min(round(end_s * NS_PER_S), trace.span_ns)
    if start_ns == end_ns:
        raise InputError(f"Trace {trace.name!r}: the window at {start_s:g} s is shorter than a nanosecond.")
    first, last = np.searchsorted(trace.arrivals_ns, [start_ns, end_ns], side="left")
    fault_ns = None if trace.fault_at_s is None else round(trace.fault_at_s * NS_PER_S) - start_ns
    return replace(
        trace,
        arrivals_ns=trace.arrivals_ns[first:last] - start_ns,
        span_ns=end_ns - start_ns,
        model_index=None if trace.model_index is None else trace.model_index[first:last],
        fault_at_s=None if fault_ns is None or not 0 <= fault_ns < end_ns - start_ns else fault_ns / NS_PER_S,
        provenance=_extended(trace, {"kind": "window", "start_s": start_s, "end_s": end_s}),
    )


def rescale(trace: Trace, mean_rate: float, seed: int) -> Trace:
    """The same traffic at another mean rate (arrivals per second over the span), which keeps the shape of its rate.

    Up, by gap subdivision: ``N = round(mean_rate · span)`` arrivals are wanted and n are there, so the ``n − 1`` gaps
    take ``N − n`` new ones between them: each gap ``⌊(N − n) / (n − 1)⌋``, and a seeded choice of gaps one more,
    evenly spaced inside the gap. All original instants stay, for every factor, and the rate is met exactly. Coincident
    arrivals get company at the same instant: a burst grows with the rate. A new arrival takes the model of the one
    that opens its gap.

    Down, by seeded independent thinning: each arrival stays with probability ``mean_rate / trace.mean_rate``. The
    index of dispersion D becomes ``1 + p·(D − 1)``, a property of thinning, not an accident of the seed.

    Time is never compressed: that would shift every ratio to fixed clocks (timeouts, keep-alive, autoscalers).
    The burstiness before and after is recorded in the provenance. Raises :class:`InputError` for a rate that is no
    positive number, for a trace without gaps to divide, and beyond :data:`MAX_ARRIVALS`.
    """
    if not (math.isfinite(mean_rate) and mean_rate > 0):
        raise InputError(
            f"Trace {trace.name!r}: cannot be rescaled to {mean_rate} arrivals/s.", remedy="use a rate above 0"
        )
    if len(trace) == 0:
        raise InputError(f"Trace {trace.name!r}: has no arrivals, so it cannot be rescaled.")
    up = mean_rate >= trace.mean_rate
    kept = _subdivided(trace, mean_rate, seed) if up else _thinned(trace, mean_rate / trace.mean_rate, seed)
    return replace(
        kept,
        provenance=_extended(
            trace,
            {
                "kind": "rescale",
                "method": "gap subdivision" if up else "independent thinning",
                "mean_rate": mean_rate,
                "seed": seed,
                "before": describe(trace).as_dict(),
                "after": describe(kept).as_dict(),
            },
        ),
    )


def _subdivided(trace: Trace, mean_rate: float, seed: int) -> Trace:
    wanted = mean_rate * trace.span_s
    if wanted > MAX_ARRIVALS:
        raise InputError(
            f"Trace {trace.name!r}: {mean_rate:g} arrivals/s over {trace.span_s:g} s are {wanted:.3g} arrivals, "
            f"more than {MAX_ARRIVALS:,}.",
            remedy="lower the rate, or choose a window",
        )
    added = max(0, round(wanted) - len(trace))
    if added == 0:
        return trace
    gaps = np.diff(trace.arrivals_ns)
    if len(gaps) == 0:
        raise InputError(
            f"Trace {trace.name!r}: has one arrival and so no gap to divide.", remedy="choose a longer window"
        )
    each, one_more = divmod(added, len(gaps))
    pieces = np.full(len(gaps), each + 1, dtype=np.int64)
    pieces[random_source(seed, "subdivide").choice(len(gaps), size=one_more, replace=False)] += 1

    piece = np.arange(pieces.sum(), dtype=np.int64) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    whole, rest = np.divmod(gaps, pieces)  # gap·piece/pieces in two steps: the product may not fit 64 bits
    offsets = np.repeat(whole, pieces) * piece + np.repeat(rest, pieces) * piece // np.repeat(pieces, pieces)
    openers = np.append(np.repeat(np.arange(len(gaps)), pieces), len(gaps))
    return replace(
        trace,
        arrivals_ns=trace.arrivals_ns[openers] + np.append(offsets, 0),
        model_index=None if trace.model_index is None else trace.model_index[openers],
    )


def _thinned(trace: Trace, probability: float, seed: int) -> Trace:
    keep = random_source(seed, "thin").random(len(trace)) < probability
    return replace(
        trace,
        arrivals_ns=trace.arrivals_ns[keep],
        model_index=None if trace.model_index is None else trace.model_index[keep],
    )


def compress_time(trace: Trace, factor: float) -> Trace:
    """All times divided by ``factor`` (below 1: stretched), for who asks for exactly that.

    Peak-to-mean over a window w becomes what it was over ``factor · w``, and every ratio to a fixed clock changes:
    :func:`rescale` is the way to another rate. Raises :class:`InputError` unless ``factor`` is positive.
    """
    if not (math.isfinite(factor) and factor > 0 and trace.span_ns / factor < MAX_NS):
        raise InputError(
            f"Trace {trace.name!r}: its time cannot be divided by {factor}.", remedy="use a factor above 0"
        )
    span_ns = max(1, math.ceil(trace.span_ns / factor))
    return replace(
        trace,
        arrivals_ns=np.minimum((trace.arrivals_ns / factor).astype(np.int64), span_ns - 1),
        span_ns=span_ns,
        fault_at_s=None if trace.fault_at_s is None else trace.fault_at_s / factor,
        resolution_s=trace.resolution_s / factor,
        provenance=_extended(trace, {"kind": "compress_time", "factor": factor}),
    )


def with_tail(trace: Trace, tail_s: float, seed: int) -> Trace:
    """The trace followed by ``tail_s`` seconds of Poisson arrivals, in which a recovery can be seen.

    Their rate is the mean rate of the trace's last tenth, at least 1/s. Each takes the model of a random arrival of
    that tenth (of the whole trace if that is empty). A tail of 0 s changes nothing. Raises :class:`InputError` for a
    negative one and beyond :data:`MAX_ARRIVALS`.
    """
    if not (math.isfinite(tail_s) and tail_s >= 0):
        raise InputError(f"Trace {trace.name!r}: a tail of {tail_s} s is impossible.", remedy="use 0 or more seconds")
    tail_ns = round(tail_s * NS_PER_S)
    if tail_ns == 0:
        return trace
    tenth_ns = max(1, trace.span_ns // 10)
    last_tenth = int(np.searchsorted(trace.arrivals_ns, trace.span_ns - tenth_ns, side="left"))
    rate = max(1.0, (len(trace) - last_tenth) * NS_PER_S / tenth_ns)
    if len(trace) + rate * tail_s > MAX_ARRIVALS or trace.span_ns + tail_ns > MAX_NS:
        raise InputError(
            f"Trace {trace.name!r}: a tail of {tail_s:g} s at {rate:g} arrivals/s is too much.", remedy="shorten it"
        )
    random = random_source(seed, "tail")
    tail = np.sort(random.integers(0, tail_ns, size=random.poisson(rate * tail_s), dtype=np.int64)) + trace.span_ns
    models = trace.model_index
    if models is not None:
        pool = models[last_tenth:] if last_tenth < len(models) else models
        drawn = random.choice(pool, size=len(tail)) if len(pool) else np.zeros(len(tail), dtype=np.int64)
        models = np.concatenate([models, drawn])
    return replace(
        trace,
        arrivals_ns=np.concatenate([trace.arrivals_ns, tail]),
        span_ns=trace.span_ns + tail_ns,
        model_index=models,
        provenance=_extended(
            trace, {"kind": "tail", "starts_at_s": trace.span_s, "tail_s": tail_s, "rate": rate, "seed": seed}
        ),
    )


def _extended(trace: Trace, transformation: dict[str, JsonValue]) -> dict[str, JsonValue]:
    earlier = trace.provenance.get("transformations", [])
    if not isinstance(earlier, list):
        raise InputError(f"Trace {trace.name!r}: provenance['transformations'] is not a list.")
    return {**trace.provenance, "transformations": [*earlier, transformation]}
