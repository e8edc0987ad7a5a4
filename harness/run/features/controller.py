"""The harness's controller of models, for frameworks that do not say themselves which of many are in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tailrace.harness.contract.adapter import Adapter
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.servers.cluster import Cluster


@contextlib.contextmanager
def models_controlled(cell: ResolvedCell, adapter: Adapter, cluster: Cluster) -> Iterator[None]:
    """Requests go through the controller from now on, where the cell is one that needs it."""
    if cell.memory is None or not cell.controlled:
        yield
        return
    from tailrace.harness.servers.model_controller import ModelController

    controller = ModelController(cluster, cell.memory, adapter.capabilities())
    controller.start()
    cluster.endpoint = controller.endpoint
    try:
        yield
    finally:
        controller.stop()
