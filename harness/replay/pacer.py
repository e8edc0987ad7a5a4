"""Fires every arrival on its intended instant: the walk over a shard, and a kernel timer that every loop can watch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from time import monotonic_ns

import numpy as np
from numpy.typing import NDArray

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1

# PyDLL and not CDLL: both calls return at once, and giving up the interpreter lock around them costs more than they do.
_libc = ctypes.PyDLL(None, use_errno=True)

BURST = 16
"""Arrivals fired in a row before answers get a turn, so that a sender that has fallen behind still reads."""


class TimerFd:
    """A Linux ``timerfd`` on the monotonic clock: its file descriptor becomes readable at an absolute instant.

    Event loops have timers of their own, but libev rounds them to a millisecond and asyncio to its clock's resolution.
    Python offers ``os.timerfd_create`` from 3.13 on.
    """

    def __init__(self) -> None:
        fd = int(_libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        if fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._fd = fd
        self._spec = (ctypes.c_long * 4)()  # struct itimerspec: interval (s, ns), then value (s, ns)
        self._pointer = ctypes.byref(self._spec)

    def fileno(self) -> int:
        """The descriptor to watch for reading."""
        return self._fd

    def arm(self, instant_ns: int) -> None:
        """Become readable at ``instant_ns`` (of ``time.monotonic_ns``), at once when that is past.

        Arming also takes back an earlier expiry, so nobody ever has to read the descriptor.
        """
        self._spec[2], self._spec[3] = divmod(instant_ns, 1_000_000_000)
        _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, self._pointer, None)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


class Pacer:
    """Walks over the intended instants and calls ``send(position)`` for each when it is due, whatever has become of
    the others.

    The caller watches ``timer`` for reading and calls :meth:`fire` when it is, and whenever ``due_ns`` has passed while
    it was busy with something else. Instants must be in order; equal ones are fired one after the other.
    """

    NEVER = 2**63 - 1

    def __init__(self, intended_ns: NDArray[np.int64], send: Callable[[int], None]) -> None:
        self._intended = np.ascontiguousarray(intended_ns, dtype=np.int64).data
        self._epoch = 0
        self._send = send
        self.began_ns = np.zeros(len(intended_ns), np.int64).data
        """When each arrival was taken up, on the monotonic clock; a sender that does so only later says when."""
        self._end = len(intended_ns)
        self.timer = TimerFd()
        self.fired = 0
        """How many arrivals have been handed to ``send``."""
        self.due_ns = self.NEVER
        """When the next arrival is due, on the monotonic clock; ``NEVER`` when none is left, and before the start."""

    def begin(self, epoch_ns: int) -> None:
        """Start the clock: ``epoch_ns`` is the instant that intended starts count from."""
        self._epoch = epoch_ns
        self._advance()

    def _advance(self) -> None:
        if self.fired == self._end:
            self.due_ns = self.NEVER
        else:
            self.due_ns = self._epoch + self._intended[self.fired]
            self.timer.arm(self.due_ns)

    def fire(self) -> None:
        """Send what is due, :data:`BURST` arrivals at most, and arm the timer for the next."""
        end = min(self.fired + BURST, self._end)
        while self.fired < end and self._epoch + self._intended[self.fired] <= (now := monotonic_ns()):
            position = self.fired
            self.began_ns[position] = now
            self.fired = position + 1
            self._send(position)
        self._advance()

    def stop(self) -> None:
        """Fire nothing more."""
        self._end = self.fired
        self._advance()

    @property
    def exhausted(self) -> bool:
        """Whether every arrival has been fired."""
        return self.fired == self._end

    def start_lag_ms(self) -> tuple[float, float] | tuple[None, None]:
        """Median and 99th percentile (nearest rank) of the start lag: how long after its intended start each arrival
        was taken up, whatever its connection then cost.

        Over the measured arrivals (intended at or after the epoch), over all when there are none; ``None`` when nothing
        was fired.
        """
        intended = np.asarray(self._intended)[: self.fired]
        lag_ns = np.asarray(self.began_ns)[: self.fired] - self._epoch - intended
        measured = lag_ns[intended >= 0]
        ordered = np.sort(measured if len(measured) else lag_ns)
        if not len(ordered):
            return None, None
        p50, p99 = (float(ordered[-(-len(ordered) * percent // 100) - 1]) / 1e6 for percent in (50, 99))
        return p50, p99

    def close(self) -> None:
        """Give the timer back; stop watching it first."""
        self.timer.close()
