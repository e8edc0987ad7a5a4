"""Traces drawn from a seed: a surge, steady and bursty traffic, and days in minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from tailrace.traces.statistics import NS_PER_S
from tailrace.traces.trace import MAX_ARRIVALS, Trace, random_source


class GeneratorParameters(BaseModel):
    """What every generator takes; times in seconds, rates in arrivals per second."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    duration_s: float = Field(default=30.0, ge=0.001, le=3.2e8, description="length of the trace in seconds")
    fault_at_s: float | None = Field(default=None, ge=0, description="where the trace suggests a fault, in seconds")

    @property
    def peak_rate(self) -> float:
        """The highest rate that the generator aims at, in arrivals per second."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _possible(self) -> GeneratorParameters:
        if self.fault_at_s is not None and self.fault_at_s >= self.duration_s:
            raise ValueError(
                f"fault_at_s ({self.fault_at_s:g}) lies outside the trace: duration_s is {self.duration_s:g}; "
                "set fault_at_s to an earlier moment, or to null"
            )
        if self.peak_rate * self.duration_s > MAX_ARRIVALS:
            raise ValueError(
                f"{self.peak_rate:g} arrivals/s for {self.duration_s:g} s are more than {MAX_ARRIVALS:,} arrivals"
            )
        return self


class SurgeParameters(GeneratorParameters):
    """``rate(t) = base_rate + surge_rate · max(0, 1 − |t − peak_at_s| / half_width_s)``."""

    base_rate: float = Field(default=40.0, gt=0, description="rate outside the surge, arrivals/s")
    surge_rate: float = Field(default=600.0, ge=0, description="what the surge adds to it at its peak, arrivals/s")
    peak_at_s: float = Field(default=15.0, ge=0, description="moment of the peak, seconds")
    half_width_s: float = Field(default=9.0, gt=0, description="time from the foot of the surge to its peak, seconds")
    fault_at_s: float | None = Field(default=20.0, ge=0, description="where the trace suggests a fault, in seconds")

    @property
    def peak_rate(self) -> float:
        return self.base_rate + self.surge_rate


class SteadyParameters(GeneratorParameters):
    """A Poisson process of constant rate."""

    rate: float = Field(default=100.0, gt=0, description="arrivals/s")

    @property
    def peak_rate(self) -> float:
        return self.rate


class BurstyParameters(GeneratorParameters):
    """A renewal process whose gaps are Gamma distributed with mean ``1 / rate`` and a chosen CV."""

    rate: float = Field(default=100.0, gt=0, description="mean rate, arrivals/s")
    cv: float = Field(
        default=3.0,
        ge=0.01,
        le=50,
        description="coefficient of variation of the gaps: 1 is Poisson, more is burstier, less is more regular",
    )

    @property
    def peak_rate(self) -> float:
        return self.rate


class DiurnalParameters(GeneratorParameters):
    """``rate(t) = mean_rate · (1 − amplitude · cos(2π t / day_s))``: starts in the night, peaks at noon."""

    duration_s: float = Field(default=120.0, ge=0.001, le=3.2e8, description="length of the trace in seconds")
    mean_rate: float = Field(default=100.0, gt=0, description="mean over whole days, arrivals/s")
    amplitude: float = Field(default=0.8, ge=0, le=1, description="swing around the mean; 1 makes the night silent")
    day_s: float = Field(default=60.0, gt=0, description="seconds of the trace into which one day is compressed")

    @property
    def peak_rate(self) -> float:
        return self.mean_rate * (1 + self.amplitude)


def surge(parameters: SurgeParameters, *, seed: int) -> Trace:
    """A flash crowd: a triangle of load on top of a steady base; inhomogeneous Poisson, transient."""

    def rate(t: NDArray[np.float64]) -> NDArray[np.float64]:
        foot = 1 - np.abs(t - parameters.peak_at_s) / parameters.half_width_s
        return parameters.base_rate + parameters.surge_rate * np.maximum(0, foot)

    return _trace("surge", parameters, seed, _poisson(rate, parameters, seed, "surge"), transient=True)


def steady(parameters: SteadyParameters, *, seed: int) -> Trace:
    """Poisson arrivals at a constant rate."""
    random = random_source(seed, "steady")
    size = random.poisson(parameters.rate * parameters.duration_s)
    return _trace("steady", parameters, seed, np.sort(random.integers(0, _span_ns(parameters), size, dtype=np.int64)))


def bursty(parameters: BurstyParameters, *, seed: int) -> Trace:
    """Gamma gaps of a chosen CV, in equilibrium from the first instant, so that the mean rate holds from there on.

    The time to the first arrival of a renewal process in equilibrium is a uniform part of a length-biased gap
    (Cox, Renewal Theory, 1962, ch. 5), and a length-biased Gamma(k, θ) is a Gamma(k + 1, θ).
    """
    random = random_source(seed, "bursty")
    shape, scale = parameters.cv**-2, parameters.cv**2 / parameters.rate
    instants = [np.array([random.random() * random.gamma(shape + 1, scale)])]
    chunk = int(parameters.rate * parameters.duration_s) + 1
    while instants[-1][-1] < parameters.duration_s:
        instants.append(instants[-1][-1] + np.cumsum(random.gamma(shape, scale, size=chunk)))
    nanoseconds = np.concatenate(instants) * NS_PER_S
    span_ns = _span_ns(parameters)
    return _trace("bursty", parameters, seed, nanoseconds[nanoseconds < span_ns].astype(np.int64))


def diurnal(parameters: DiurnalParameters, *, seed: int) -> Trace:
    """Days compressed to minutes; inhomogeneous Poisson, transient because its rate is meant to change."""

    def rate(t: NDArray[np.float64]) -> NDArray[np.float64]:
        swing: NDArray[np.float64] = parameters.amplitude * np.cos(2 * np.pi * t / parameters.day_s)
        return parameters.mean_rate * (1 - swing)

    return _trace("diurnal", parameters, seed, _poisson(rate, parameters, seed, "diurnal"), transient=True)


@dataclass(frozen=True)
class Generator:
    """A generator and the model of its parameters; ``draw(parameters, seed=…)`` returns a :class:`Trace`."""

    parameters: type[GeneratorParameters]
    draw: Callable[..., Trace]


GENERATORS: dict[str, Generator] = {
    "surge": Generator(SurgeParameters, surge),
    "steady": Generator(SteadyParameters, steady),
    "bursty": Generator(BurstyParameters, bursty),
    "diurnal": Generator(DiurnalParameters, diurnal),
}
"""By the name that a catalogue entry calls them."""


def _span_ns(parameters: GeneratorParameters) -> int:
    return round(parameters.duration_s * NS_PER_S)


def _poisson(
    rate: Callable[[NDArray[np.float64]], NDArray[np.float64]], parameters: GeneratorParameters, seed: int, purpose: str
) -> NDArray[np.int64]:
    """Inhomogeneous Poisson arrivals by thinning a homogeneous process (Lewis and Shedler, 1979)."""
    random = random_source(seed, purpose)
    size = random.poisson(parameters.peak_rate * parameters.duration_s)
    candidates = np.sort(random.integers(0, _span_ns(parameters), size, dtype=np.int64))
    keep = random.random(size) * parameters.peak_rate < rate(candidates / NS_PER_S)
    return candidates[keep]


def _trace(
    name: str, parameters: GeneratorParameters, seed: int, arrivals: NDArray[np.int64], *, transient: bool = False
) -> Trace:
    values: dict[str, Any] = parameters.model_dump(mode="json")
    provenance: dict[str, JsonValue] = {
        "kind": "generator",
        "generator": name,
        "parameters": values,
        "seed": seed,
        "transformations": [],
    }
    return Trace(
        name=name,
        arrivals_ns=arrivals,
        span_ns=_span_ns(parameters),
        transient=transient,
        fault_at_s=parameters.fault_at_s,
        provenance=provenance,
    )
