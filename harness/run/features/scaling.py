"""The harness's own scaler, where a scenario has one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tailrace.harness.plan.experiment import ScalerChoice
from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.store import EventLog
from tailrace.harness.servers.cluster import Cluster
from tailrace.harness.servers.scaler import Scaler, label


@contextlib.contextmanager
def servers_scaled(
    policy: ScalerChoice | None, cluster: Cluster, events: EventLog, facts: TrialFacts
) -> Iterator[None]:
    """Replicas or nodes follow the load, and a warning says that it was not the framework."""
    if policy is None:
        yield
        return
    facts.warnings.append(label(policy))
    scaler = Scaler(policy, cluster, events)
    scaler.start()
    try:
        yield
    finally:
        scaler.stop()
