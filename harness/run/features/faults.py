"""Faults: injected into the servers on the trace's clock, and healed at the end at the latest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tailrace.harness.records.facts import Fault, TrialFacts
from tailrace.harness.records.store import EventLog
from tailrace.harness.run.nemesis import Nemesis
from tailrace.harness.run.setup import TrialSetup
from tailrace.harness.servers.cluster import Cluster


@contextlib.contextmanager
def faults_injected(
    setup: TrialSetup, cluster: Cluster, events: EventLog, epoch_ns: int, facts: TrialFacts
) -> Iterator[Nemesis]:
    """What came to its time, and how many nodes died meanwhile, is in the facts afterwards."""
    nemesis = Nemesis(setup.faults, cluster, events, epoch_ns=epoch_ns, seed=setup.plan.seed)
    nemesis.start()
    try:
        yield nemesis
    finally:
        nemesis.stop()
        facts.faults = [Fault.model_validate(fault) for fault in nemesis.done]
        facts.node_deaths = cluster.deaths
