"""Containers: who runs the servers, and what the engine counts of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tailrace.harness.records.facts import ContainerEnd, TrialFacts
from tailrace.harness.run.collectors import Collector, ContainerStatistics, Publishers
from tailrace.harness.run.setup import ServerSetup
from tailrace.harness.servers.guardian import Guardian

if TYPE_CHECKING:
    from tailrace.harness.servers.containers import ContainerHost


@dataclass(frozen=True)
class Servers:
    """Who runs the servers, and who reads of him what they take."""

    host: Guardian | ContainerHost
    collectors: tuple[Collector, ...] = ()


@contextlib.contextmanager
def server_host(
    setup: ServerSetup, guardian: Guardian, scratch: Path, workdir: Path, facts: TrialFacts
) -> Iterator[Servers]:
    """The guardian itself, or containers of its own; of these, how each ended goes into the facts."""
    if not setup.environment.image:
        yield Servers(guardian)
        return
    from tailrace.harness.servers.containers import ContainerHost, Limits
    from tailrace.harness.servers.engine import Engine

    cell, workload = setup.cell, setup.workload
    memory_mb = cell.containers.memory_mb
    host = ContainerHost(
        guardian,
        Engine.connect(),
        setup.environment.image,
        reads=[setup.adapter.folder, *workload.code_folders, workload.artifact],
        writes=[workdir.absolute(), scratch],
        limits=Limits(cell.containers.cpus, None if memory_mb is None else memory_mb << 20),
        address=cell.server_host,
        gpus=cell.device == "cuda",
        one_network=setup.adapter.own_cluster and cell.nodes > 1,
    )
    try:
        yield Servers(host, (ContainerStatistics(host.statistics), Publishers(host.publishers)))
    finally:
        facts.containers_ended = [ContainerEnd.model_validate(told) for told in host.endings()]
