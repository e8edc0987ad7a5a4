"""Watches the nodes of a cluster while a trial runs, tells what becomes of them, and starts again what has died."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from tailrace.harness.contract.adapter import Deployment, Endpoint, ProcessHost
from tailrace.harness.errors import TailraceError
from tailrace.harness.processes import ProcessRef
from tailrace.harness.records.store import EventLog
from tailrace.harness.servers.balancer import BackendState

WATCH_S = 0.1
"""How often it looks."""
_SOON_S = 10.0
_LONGEST_BACKOFF_S = 60.0


class Watched(Protocol):
    """What is watched: :class:`Cluster` says what each of these does."""

    @property
    def host(self) -> ProcessHost: ...
    @property
    def started(self) -> Collection[int]: ...
    def living(self) -> dict[int, ProcessRef]: ...
    def member(self, index: int) -> Deployment: ...
    def gone(self, index: int) -> None: ...
    def start_again(self, index: int) -> None: ...
    def answers(self, index: int) -> None: ...
    def node_name(self, index: int) -> str: ...
    def node_reachable(self, index: int) -> bool: ...
    def balancer_states(self) -> Mapping[str, BackendState]: ...


class NodeWatch(threading.Thread):
    """Watches the nodes of a cluster and the balancer's opinion of them, writes what changes to the events, and starts
    again what died where that is asked for."""

    def __init__(
        self, cluster: Watched, events: EventLog, probe: Callable[[Endpoint], bool], *, restart: bool, backoff_s: float
    ) -> None:
        super().__init__(name="node-watch", daemon=True)
        self._cluster = cluster
        self._events = events
        self._probe = probe
        self._restart = restart
        self._backoff_s = backoff_s
        self._stopped = threading.Event()
        self._holding: set[int] = set()
        self._alive = cluster.living()
        self._up: set[str] = set()
        self._up = self._believed_up()
        self._due: dict[int, float] = {}
        self._wait_s: dict[int, float] = {}
        self._restarted_s: dict[int, float] = {}
        self._coming: dict[int, _Start] = {}
        self.deaths = 0
        """How many times a node died that nobody was ending in order."""

    def run(self) -> None:
        while not self._stopped.wait(WATCH_S):
            try:
                self._look()
            except Exception as error:  # a watch that fails must be told, and not end the trial
                self._events.write("watch-failed", reason=f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        if self.is_alive():
            self.join()

    @contextlib.contextmanager
    def held(self, index: int) -> Iterator[None]:
        """While somebody else ends and starts a node, leave it alone."""
        self._holding.add(index)
        try:
            yield
        finally:
            self._holding.discard(index)

    def _look(self) -> None:
        now_s, alive = time.monotonic(), self._cluster.living()
        for index in sorted(set(self._alive) | set(alive)):
            before, after = self._alive.get(index), alive.get(index)
            if before is not None and before != after:
                self._cluster.gone(index)
            if before is not None and after is None and index not in self._cluster.started:
                self._events.write("node-stopped", node=self._cluster.node_name(index), pid=before.pid)
                self._coming.pop(index, None)
            elif before is not None and before != after:
                how = self._cluster.host.ending(before)
                self._events.write("node-died", node=self._cluster.node_name(index), pid=before.pid, how=how)
                self._coming.pop(index, None)
                self.deaths += index not in self._holding
                if after is None:  # else somebody has started it again already
                    self._plan_restart(index, now_s)
            if after is not None and before != after:
                self._events.write("node-spawned", node=self._cluster.node_name(index), pid=after.pid)
                self._coming[index] = _Start(now_s)
        self._alive = alive
        up = self._believed_up()
        for name in sorted(self._up - up):
            self._events.write("balancer-down", node=name)
        for name in sorted(up - self._up):
            self._events.write("balancer-up", node=name)
        self._up = up
        for index, due_s in list(self._due.items()):
            if now_s >= due_s and index not in self._holding:
                del self._due[index]
                if index not in alive:
                    self._start(index, now_s)
        for index in list(self._coming):
            self._follow(index)

    def _believed_up(self) -> set[str]:
        try:
            return {name for name, state in self._cluster.balancer_states().items() if state.up}
        except OSError:
            return self._up

    def _plan_restart(self, index: int, now_s: float) -> None:
        if not self._restart or index in self._holding:
            return
        again = index in self._restarted_s and now_s - self._restarted_s[index] < _SOON_S
        self._wait_s[index] = min(_LONGEST_BACKOFF_S, 2 * self._wait_s[index]) if again else self._backoff_s
        self._due[index] = now_s + self._wait_s[index]

    def _start(self, index: int, now_s: float) -> None:
        self._restarted_s[index] = now_s
        try:
            self._cluster.start_again(index)
        except TailraceError as error:
            name = self._cluster.node_name(index)
            self._events.write("node-restart-failed", node=name, reason=error.message)
            self._plan_restart(index, now_s)

    def _follow(self, index: int) -> None:
        """The cold start of a node that was started again, phase by phase."""
        start = self._coming[index]
        name, took_s = self._cluster.node_name(index), time.monotonic() - start.at_s
        if not start.reachable:
            start.reachable = self._cluster.node_reachable(index)
            if start.reachable:
                self._events.write("node-port-open", node=name, took_s=took_s)
        elif not start.ready:
            start.ready = self._cluster.member(index).claims_ready()
            if start.ready:
                self._events.write("node-ready", node=name, took_s=took_s)
        elif self._probe(self._cluster.member(index).endpoint):
            self._events.write("node-first-answer", node=name, took_s=took_s)
            self._cluster.answers(index)
            del self._coming[index]


@dataclass
class _Start:
    at_s: float
    reachable: bool = False
    ready: bool = False
