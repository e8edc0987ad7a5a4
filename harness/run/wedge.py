"""Notices a server that is wedged while a trial runs: its health says one thing, and inference shows another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tailrace.harness.records.probe import Probe
from tailrace.harness.replay.driver import Progress

SILENCE_S = 60.0
"""So long without one success, while requests fail, before a server is asked. An overloaded server recovers sooner, or
is told apart by answering one more request within the probe's patience."""
_POLL_S = 1.0


class WedgeWatch(threading.Thread):
    """Follows the progress of a replay, and calls ``on_wedged`` once when the server has stopped answering for good. A context
    manager: it watches within.

    ``probe`` asks the server; ``excused`` says whether an injected fault explains its silence.
    """

    def __init__(
        self,
        probe: Callable[[], Probe],
        *,
        excused: Callable[[], bool],
        on_wedged: Callable[[], None],
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(name="wedge-watch", daemon=True)
        self._probe = probe
        self._excused = excused
        self._on_wedged = on_wedged
        self._silence_s = silence_s
        self._answered_ns = time.monotonic_ns()
        self._ok = 0
        self._failed_before = 0
        self._failed = 0
        self._stopped = threading.Event()
        self.found: Probe | None = None
        """The probe that showed the server wedged; ``None`` while it is not."""

    def __enter__(self) -> WedgeWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def follow(self, progress: Progress) -> None:
        """Take note of how the replay stands."""
        if progress.ok > self._ok:
            self._ok = progress.ok
            self._begin_anew(progress.failed)
        self._failed = progress.failed

    def run(self) -> None:
        while not self._stopped.wait(min(_POLL_S, self._silence_s / 4)):
            silent_s = (time.monotonic_ns() - self._answered_ns) / 1e9
            if silent_s < self._silence_s or self._failed == self._failed_before or self._excused():
                continue
            probe = self._probe()
            if probe.wedged and not self._stopped.is_set():
                self.found = probe
                self._on_wedged()
                return
            self._begin_anew(self._failed)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _begin_anew(self, failed: int) -> None:
        self._answered_ns = time.monotonic_ns()
        self._failed_before = failed
