"""Samples: who reads the machine, the servers and the devices while a trial runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.records.store import EventLog
from tailrace.harness.run.collectors import (
    Collector,
    EmulatedDevices,
    Host,
    Nodes,
    OwnProcesses,
    Replicas,
    Sampler,
    ServerMetrics,
    ServerProcesses,
    SharedMemory,
    StageClocks,
)
from tailrace.harness.run.deploy import clock_folder, device_folder
from tailrace.harness.servers.cluster import Cluster


def process_collectors(cluster: Cluster, generator_pid: int | None) -> list[Collector]:
    """Who reads the machine, the servers' processes and the harness's own."""
    own = {name: process.pid for name, process in cluster.companions().items()}
    if generator_pid is not None:
        own["load-generator"] = generator_pid
    return [
        Host(),
        ServerProcesses(cluster.trees),
        OwnProcesses("harness", os.getpid(), descend=False),
        *(OwnProcesses(name, pid) for name, pid in own.items()),
    ]


def server_collectors(cluster: Cluster, capabilities: Sequence[str], events: EventLog) -> list[Collector]:
    """Who asks the servers themselves, as far as they tell."""
    collectors: list[Collector] = []
    if "scrape" in capabilities:
        collectors.append(ServerMetrics(cluster))
    if cluster.node_count > 1:
        collectors.append(Nodes(cluster))
    if "replicas" in capabilities:
        collectors.append(Replicas(cluster, events))
    return collectors


def model_collectors(cell: ResolvedCell, scratch: Path, events: EventLog) -> list[Collector]:
    """Who reads what the workload's own code keeps: emulated devices, a memory that models share, the stages of a pipeline."""
    collectors: list[Collector] = []
    if cell.device == "emulated":
        folders = [device_folder(scratch, node) for node in range(cell.nodes)]
        collectors.append(EmulatedDevices(folders, cell.devices_per_node))
    if cell.memory is not None:
        collectors.append(SharedMemory(device_folder(scratch, 0), cell.memory.budget_bytes, events))
    if cell.stages:
        collectors.append(StageClocks(clock_folder(scratch)))
    return collectors


@contextlib.contextmanager
def samples_taken(
    collectors: Sequence[Collector], stem: Path, epoch_ns: int, on_error: Callable[[BaseException], None]
) -> Iterator[None]:
    """Every collector reads at its own pace; ``on_error`` is called in the thread of one that fails."""
    sampler = Sampler(collectors, stem, epoch_ns=epoch_ns, on_error=on_error)
    sampler.start()
    try:
        yield
    finally:
        sampler.stop()


@contextlib.contextmanager
def failures_raised() -> Iterator[Callable[[BaseException], None]]:
    """What is told meanwhile stops nothing: the first of it is raised at the end, unless something else is on its way."""
    told: list[BaseException] = []
    yield told.append
    for error in told:
        if isinstance(error, TailraceError):
            raise error
        raise TailraceError(
            f"a collector failed: {type(error).__name__}: {error}", remedy="report this as a bug of tailrace"
        )
