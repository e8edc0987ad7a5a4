"""The ruler against a known truth: what a replay measures of a scripted server, beside the closed form of its latency and
the log that the script itself keeps.

The seeds of a distribution are blocks of one replay: each has arrivals and delays that no other block has. A statistic
*misses* when its 95 % interval leaves the truth out; of all of them together, no more may miss than one time in a
thousand would by chance. A machine that hiccups delays the script as well as the ruler, and then the closed form is not
what happened: a miss is forgiven where the script's own log misses in the same way. What delays the ruler alone is not
forgiven, but measured again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from tailrace.harness.analysis.metrics import Floats, Ints, claim_percentile, percentile
from tailrace.harness.contract.adapter import WireProtocol
from tests.conftest import measured_again
from tests.null_server import Replayed, scripted_server

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

SEEDS = 20
ARRIVALS = 400
"""In each block, of each seed: 368 are needed for both ends of a p99's interval."""
RATE = 1000.0
STALL_EVERY_S, STALL_MS, PERIODS = 5.0, 500.0, 4
Interval = tuple[float, float]


def one_after_another() -> tuple[Ints, list[Ints]]:
    """Poisson arrivals of all seeds, block after block, and the indices that belong to each."""
    gaps_s = [np.random.default_rng(seed).exponential(1 / RATE, ARRIVALS) for seed in range(SEEDS)]
    intended_ns = (np.cumsum(np.concatenate(gaps_s)) * 1e9).astype(np.int64)
    return intended_ns, list(np.arange(SEEDS * ARRIVALS).reshape(SEEDS, ARRIVALS))


def side_by_side() -> tuple[Ints, list[Ints]]:
    """Arrivals of all seeds, each spread over all periods of the stall; of a fixed number, so uniform."""
    span_s = PERIODS * STALL_EVERY_S
    at_s = np.concatenate([np.random.default_rng(seed).uniform(0, span_s, ARRIVALS) for seed in range(SEEDS)])
    order = np.argsort(at_s)
    seed_of = np.repeat(np.arange(SEEDS), ARRIVALS)[order]
    return (at_s[order] * 1e9).astype(np.int64), [np.flatnonzero(seed_of == seed) for seed in range(SEEDS)]


@dataclass(frozen=True)
class Truth:
    """A distribution in closed form: its quantiles (ms), and the share of answers within ``slo_ms``."""

    quantile_ms: Callable[[float], float]
    slo_ms: float
    good_share: float


EXPONENTIAL = Truth(lambda q: -20 * math.log(1 - q), 60, 1 - math.exp(-3))
PARETO = Truth(lambda q: 5 * (1 - q) ** (-1 / 1.5), 25, 1 - 5**-1.5)
STALL = Truth(
    lambda q: max(0.0, STALL_MS - (1 - q) * STALL_EVERY_S * 1e3), 200, 1 - (STALL_MS - 200) / (STALL_EVERY_S * 1e3)
)


@dataclass(frozen=True)
class Floor:
    """What a replay costs where the server costs nothing (ms)."""

    median_ms: float
    logged_ms: float
    """The part of the median that the server's log sees: until it writes the answer."""
    jitter_ms: float
    """The p99 on top of the median; at least half a millisecond, for what an arrival costs depends on how busy the
    processors are."""
    burst_ms: float
    """The last answer of a burst as large as the end of a stall lets go."""


def measured_floor(folder: Path, protocol: WireProtocol = "http") -> Floor:
    steady_ns, _ = one_after_another()
    steady_ns = steady_ns[: 5 * ARRIVALS]
    burst_ns = steady_ns[-1] + 10**9 + np.arange(round(SEEDS * ARRIVALS / PERIODS * STALL_MS / STALL_EVERY_S / 1e3))
    with scripted_server(folder, {}, protocol=protocol) as server:
        replayed = server.replay(np.concatenate([steady_ns, burst_ns]))
    response_ms = replayed.client.response_ms()
    steady_ms = response_ms[: len(steady_ns)]
    logged_ms = (replayed.written_ns - replayed.client.intended_ns)[: len(steady_ns)] / 1e6
    median_ms = percentile(steady_ms, 0.5)
    return Floor(
        median_ms=median_ms,
        logged_ms=percentile(logged_ms, 0.5),
        jitter_ms=max(0.5, percentile(steady_ms, 0.99) - median_ms),
        burst_ms=float(response_ms[len(steady_ns) :].max()),
    )


def by_the_ruler(replayed: Replayed, floor: Floor) -> Floats:
    """Response times as the replay measured them, less the floor."""
    return replayed.client.response_ms() - floor.median_ms


def by_the_log(replayed: Replayed, floor: Floor) -> Floats:
    """The same by the schedule and the server's log alone, without an instant that the replay took: from the intended start
    until the answer was written."""
    logged_ms: Floats = (replayed.written_ns - replayed.client.intended_ns) / 1e6
    return logged_ms - floor.logged_ms


def claimed(values_ms: Floats, q: float) -> Interval:
    claim = claim_percentile(values_ms, q)
    assert claim.low is not None
    assert claim.high is not None
    return claim.low, claim.high


def good_share(values_ms: Floats, slo_ms: float) -> Interval:
    """The exact (Clopper–Pearson) 95 % interval of the share within the SLO: goodput ÷ offered load."""
    interval = binomtest(int(np.count_nonzero(values_ms <= slo_ms)), len(values_ms)).proportion_ci(0.95)
    return interval.low, interval.high


def covers(interval: Interval, truth: float, slack: float = 0.0) -> bool:
    return interval[0] - slack <= truth <= interval[1] + slack


def statistics(values_ms: Floats, truth: Truth, qs: tuple[float, ...]) -> Iterator[tuple[Interval, float]]:
    """Every statistic's interval beside its truth."""
    for q in qs:
        yield claimed(values_ms, q), truth.quantile_ms(q)
    yield good_share(values_ms, truth.slo_ms), truth.good_share


def misses(
    blocks: list[Replayed], floor: Floor, truth: Truth, qs: tuple[float, ...], *, scale: float = 1.0
) -> list[bool]:
    """Of every statistic of every seed, whether it misses the closed form though the script's log does not. A ``scale``
    makes a ruler that is wrong by this factor."""
    return [
        not covers(*measured) and covers(*logged)
        for block in blocks
        for measured, logged in zip(
            statistics(scale * by_the_ruler(block, floor), truth, qs),
            statistics(by_the_log(block, floor), truth, qs),
            strict=True,
        )
    ]


def by_chance(missed: list[bool]) -> bool:
    """Whether so many of these 95 % intervals may miss by chance, but for one time in a thousand."""
    return sum(missed) <= int(binom.ppf(0.999, len(missed), 0.05))


def agrees_with_the_log(replayed: Replayed, floor: Floor, qs: tuple[float, ...], slack_ms: float) -> None:
    """The same percentiles by both sides, within their intervals and what the floor itself varies by."""
    logged_ms = by_the_log(replayed, floor)
    for q in qs:
        interval, truth_ms = claimed(by_the_ruler(replayed, floor), q), percentile(logged_ms, q)
        assert covers(interval, truth_ms, slack_ms), (q, interval, truth_ms, floor)


def replayed_blocks(
    folder: Path, script: Mapping[str, float], plan: tuple[Ints, list[Ints]], protocol: WireProtocol = "http"
) -> tuple[Replayed, list[Replayed]]:
    """One replay against this script, whole and by seed. Each arrival's instants are in their order by both sides, on a
    busy machine too, and so a second measurement would excuse nothing."""
    intended_ns, members = plan
    with scripted_server(folder / "server", script, protocol=protocol) as server:
        whole = server.replay(intended_ns)
    order = [whole.client.sent_ns, whole.read_ns, whole.due_ns, whole.written_ns, whole.client.done_ns]
    if not all((earlier <= later).all() for earlier, later in pairwise(order)):
        pytest.fail("an instant comes before the one that it follows")
    return whole, [whole.those(chosen) for chosen in members]


@measured_again
def test_a_constant(tmp_path: Path) -> None:
    """All quantiles are one number: the median must be it, and the tail, which is the machine's, the log's."""
    floor = measured_floor(tmp_path / "floor")
    whole, blocks = replayed_blocks(tmp_path, {"latency_ms": 20}, one_after_another())
    for block in blocks:
        agrees_with_the_log(block, floor, (0.5, 0.99), floor.jitter_ms)
        assert percentile(by_the_ruler(block, floor), 0.5) == pytest.approx(20, abs=max(1.0, floor.jitter_ms))
    agrees_with_the_log(whole, floor, (0.5, 0.99, 0.999), floor.jitter_ms)
    late = np.count_nonzero(by_the_log(whole, floor) > 50)
    good = np.count_nonzero(by_the_ruler(whole, floor) <= 50)
    assert len(whole.client) - good == pytest.approx(late, abs=max(3, 0.001 * len(whole.client)))


@pytest.mark.parametrize(
    ("script", "truth"),
    [({"jitter_ms": 20}, EXPONENTIAL), ({"pareto_ms": 5, "pareto_alpha": 1.5}, PARETO)],
    ids=["exponential", "Pareto"],
)
@measured_again
def test_a_distribution(tmp_path: Path, script: dict[str, float], truth: Truth) -> None:
    floor = measured_floor(tmp_path / "floor")
    whole, blocks = replayed_blocks(tmp_path, script, one_after_another())
    for block in blocks:
        agrees_with_the_log(block, floor, (0.5, 0.99), floor.jitter_ms)
    agrees_with_the_log(whole, floor, (0.5, 0.99, 0.999), floor.jitter_ms)
    # A p99.9 needs 3,687 arrivals: of two halves of the replay, ten seeds each.
    halves = [whole.span(0, SEEDS // 2 * ARRIVALS), whole.span(SEEDS // 2 * ARRIVALS, SEEDS * ARRIVALS)]
    missed = misses(blocks, floor, truth, (0.5, 0.99)) + misses(halves, floor, truth, (0.999,))
    assert by_chance(missed), missed

    # It can fail: a ruler that is wrong by a fifth, either way.
    for scale in (1 / 1.2, 1.2):
        assert not by_chance(misses(blocks, floor, truth, (0.5, 0.99), scale=scale))
    # And of all arrivals together one whose p99 is wrong by a tenth; of Pareto's tail that takes more arrivals.
    if truth is EXPONENTIAL:
        for scale in (0.9, 1.1):
            assert not covers(claimed(scale * by_the_ruler(whole, floor), 0.99), truth.quantile_ms(0.99))


@measured_again
def test_a_stall(tmp_path: Path) -> None:
    """A tenth of the arrivals waits for the rest of half a second: the tail is that wait, whoever else was on time."""
    floor = measured_floor(tmp_path / "floor")
    script = {"stall_every_s": STALL_EVERY_S, "stall_ms": STALL_MS}
    whole, blocks = replayed_blocks(tmp_path, script, side_by_side())
    for block in blocks:
        agrees_with_the_log(block, floor, (0.5,), floor.jitter_ms)
        agrees_with_the_log(block, floor, (0.99,), floor.burst_ms)
        assert percentile(by_the_ruler(block, floor), 0.5) == pytest.approx(0, abs=max(1.0, floor.jitter_ms))
    agrees_with_the_log(whole, floor, (0.99, 0.999), floor.burst_ms)
    missed = misses(blocks, floor, STALL, (0.99,))
    assert by_chance(missed), missed

    # The end of a stall lets two hundred answers go at once, and the last one is late by as much as a burst is.
    measured_ms = by_the_ruler(whole, floor)
    for q in (0.99, 0.999):
        assert covers(claimed(measured_ms, q), STALL.quantile_ms(q), floor.burst_ms)

    # It can fail: a fifth off, and what a client sees that waits for each answer before it sends the next request.
    for wrong_ms in (0.8 * 450, 1.2 * 450, 0.0):
        assert not covers(claimed(measured_ms, 0.99), wrong_ms, floor.burst_ms)


@measured_again
def test_over_grpc(tmp_path: Path) -> None:
    """Five seeds at half the rate; what gRPC costs is another floor."""
    floor = measured_floor(tmp_path / "floor", "grpc")
    intended_ns, members = one_after_another()
    plan = intended_ns[: 5 * ARRIVALS] * 2, members[:5]
    whole, blocks = replayed_blocks(tmp_path, {"jitter_ms": 20}, plan, "grpc")
    agrees_with_the_log(whole, floor, (0.5, 0.99), floor.jitter_ms)
    missed = misses(blocks, floor, EXPONENTIAL, (0.5, 0.99))
    assert by_chance(missed), missed
