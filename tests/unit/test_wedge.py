"""A wedged server is told apart from a slow one, a busy one, and one that a fault has hit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tailrace.harness.records.probe import Probe
from tailrace.harness.replay.driver import Progress
from tailrace.harness.run.wedge import WedgeWatch
from tests.conftest import wait_until

HUNG = Probe(process_alive=True, claims_ready=True, answers=False)
MUTE = Probe(process_alive=True, claims_ready=False, answers=True)
WELL = Probe(process_alive=True, claims_ready=True, answers=True)
DOWN = Probe(process_alive=True, claims_ready=False, answers=False)
BUSY = Probe(process_alive=True, claims_ready=True, answers=False, busy=True)
DEAD = Probe(process_alive=False, claims_ready=False, answers=False)


def progress(ok: int, failed: int) -> Progress:
    done = ok + failed
    return Progress(t_s=1, intended=done, sent=done, done=done, ok=ok, failed=failed, rate_rps=0, p99_ms=None)


@pytest.mark.parametrize(
    ("probe", "wedged"), [(HUNG, True), (MUTE, True), (WELL, False), (DOWN, False), (BUSY, False), (DEAD, False)]
)
def test_wedged_is_a_contradiction_of_a_living_server(probe: Probe, wedged: bool) -> None:
    assert probe.wedged is wedged
    if wedged:
        assert "does not" in probe.contradiction


class Watched:
    """A watch with a short patience, and what it did."""

    def __init__(self, probe: Probe, excused: bool = False) -> None:
        self.asked = 0
        self.ended = threading.Event()
        self.probe = probe
        self.watch = WedgeWatch(self._ask, excused=lambda: excused, on_wedged=self.ended.set, silence_s=0.2)
        self.watch.start()

    def _ask(self) -> Probe:
        self.asked += 1
        return self.probe

    def run(self, states: Callable[[int], Progress], seconds: float) -> None:
        """Follow a replay for a while."""
        begun = time.monotonic()
        step = 0
        while time.monotonic() - begun < seconds and not self.ended.is_set():
            self.watch.follow(states(step))
            step += 1
            time.sleep(0.02)


def test_silence_with_failures_is_looked_into_and_ends_a_wedged_server() -> None:
    watched = Watched(HUNG)
    watched.run(lambda step: progress(10, step), 20)
    assert watched.ended.is_set()
    assert watched.watch.found == HUNG


def test_successes_keep_the_watch_quiet() -> None:
    watched = Watched(HUNG)
    watched.run(lambda step: progress(step, step), 1)
    assert watched.asked == 0
    watched.watch.stop()


def test_a_quiet_trace_is_no_silence() -> None:
    watched = Watched(HUNG)
    watched.run(lambda step: progress(10, 3), 0.1)
    watched.watch.follow(progress(11, 3))
    watched.run(lambda step: progress(11, 3), 1)
    assert watched.asked == 0, "nothing has failed since the last success"
    watched.watch.stop()


def test_a_fault_excuses_silence() -> None:
    watched = Watched(HUNG, excused=True)
    watched.run(lambda step: progress(10, step), 1)
    assert not watched.ended.is_set()
    assert watched.asked == 0
    watched.watch.stop()


@pytest.mark.parametrize("probe", [WELL, DOWN, BUSY, DEAD])
def test_a_slow_or_dead_server_is_not_called_wedged(probe: Probe) -> None:
    watched = Watched(probe)
    begun = time.monotonic()
    while watched.asked < 2:
        watched.run(lambda step: progress(10, watched.asked * 1000 + step), 0.5)
        assert time.monotonic() - begun < 30
    assert not watched.ended.is_set()
    assert watched.watch.found is None
    watched.watch.stop()
    wait_until(lambda: not watched.watch.is_alive(), "the watch has ended")
