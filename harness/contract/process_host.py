"""Who owns the processes of a run, as adapters see it: they start, signal and end servers through it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tailrace.harness.processes import ProcessRef


class ProcessHost(Protocol):
    """Who owns the processes of a run (the guardian): adapters start and signal servers through it alone."""

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        ports: Sequence[int] = (),
    ) -> ProcessRef:
        """Start a process in a session of its own, stdout and stderr to ``log``. ``env`` is its whole environment. Where it
        runs in a container, ``ports`` are those that are published: all that the harness asks it on."""

    def signal(self, process: ProcessRef, signal_number: int) -> bool:
        """Send a signal to this very process; False when it has gone already."""

    def stop_tree(self, process: ProcessRef, grace_s: float) -> None:
        """End a process and all that it started: SIGTERM, ``grace_s`` of patience, then SIGKILL; returns when none is left."""

    def kill_tree(self, process: ProcessRef) -> bool:
        """SIGKILL a spawned process and all that it started, at once; returns when none is left, False when there was
        nothing."""

    def signal_tree(self, process: ProcessRef, signal_number: int) -> int:
        """Send a signal to a spawned process and all that it started; returns how many got it."""

    def limit_cpus(self, process: ProcessRef, cpus: float | None) -> None:
        """Let a spawned process and all that it started have so many CPUs together; ``None``: as many as there are.

        Raises :class:`TailraceError` where control groups cannot be used.
        """

    def remove_later(self, path: Path | str) -> None:
        """Remove this file, folder or glob pattern when the run ends, however it ends. A folder that exists is one that
        processes spawned from now on use beside those of the request."""

    def ending(self, process: ProcessRef) -> str | None:
        """How a spawned process ended, in words, as far as that is known."""


class Containers(ProcessHost, Protocol):
    """A process host whose processes run in containers, one for each that was spawned."""

    def limit_memory(self, process: ProcessRef, memory_bytes: int | None) -> None:
        """Let a container have so much memory; ``None``: as much as before. Raises :class:`TailraceError`."""

    def disconnect(self, process: ProcessRef) -> None:
        """Take a container off its network. Raises :class:`TailraceError`."""

    def reconnect(self, process: ProcessRef) -> None:
        """Put it back, with the ports that it had. Raises :class:`TailraceError`."""
