"""Nodes: told of when they die and come back, and started again where that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tailrace.harness.contract.adapter import Endpoint
from tailrace.harness.records.store import EventLog
from tailrace.harness.servers.cluster import Cluster


@contextlib.contextmanager
def nodes_watched(cluster: Cluster, events: EventLog, probe: Callable[[Endpoint], bool]) -> Iterator[None]:
    """``probe`` says whether a server that was started again answers rightly. At the end nothing is started any more."""
    try:
        cluster.watch(events, probe)
        yield
    finally:
        cluster.stop_watching()
