"""One policy for Ctrl-C and SIGTERM, whatever the command: the first one ends it in order, which stops servers and keeps what
was measured; while that goes on, further ones are heard and change nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from tailrace.cli.show import read, stderr
from tailrace.harness.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def heed_interrupts() -> None:
    """From now on the first such signal raises :class:`KeyboardInterrupt`. For a process that begins."""
    for number in SIGNALS:
        signal.signal(number, _first)


def _first(_signal: int, _frame: FrameType | None) -> None:
    for number in SIGNALS:
        signal.signal(number, _further)
    raise KeyboardInterrupt


def _further(_signal: int, _frame: FrameType | None) -> None:
    os.write(2, b"already stopping: servers are being ended\n")  # print may be at work where the signal struck


@contextmanager
def keeping(keep: Callable[[], str]) -> Iterator[None]:
    """Around what measures. An interrupted command calls ``keep``, which puts by what there is and says where it is and how to
    go on; it ends with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        read(stderr(), f"interrupted; {keep()}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
