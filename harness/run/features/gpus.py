"""GPUs: read through NVML from before the servers are there, and through NVIDIA's DCGM exporter where one answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tailrace.harness.errors import DeployError
from tailrace.harness.gpus import Gpu
from tailrace.harness.plan.resolved import ResolvedCell
from tailrace.harness.processes import descendants
from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.store import EventLog
from tailrace.harness.run.collectors import Collector
from tailrace.harness.run.gpu_collectors import DCGM_PORT, DcgmExporter, NvidiaGpus
from tailrace.harness.servers.cluster import Cluster


@contextlib.contextmanager
def nvml_opened(cell: ResolvedCell, gpus: Sequence[Gpu], events: EventLog) -> Iterator[NvidiaGpus | None]:
    """NVML on the cell's GPUs; ``None`` on other devices. Raises :class:`DeployError` when some are gone."""
    if cell.device != "cuda":
        yield None
        return
    if len(gpus) < cell.devices:
        raise DeployError(
            f"{cell.devices} GPUs are asked for, and NVML tells of {len(gpus)} by now",
            remedy="tailrace doctor --gpu; look for «Xid» in dmesg",
        )
    with contextlib.closing(NvidiaGpus(gpus, events.write)) as nvidia:
        yield nvidia


def gpu_collectors(
    nvidia: NvidiaGpus | None, cell: ResolvedCell, gpus: Sequence[Gpu], cluster: Cluster, facts: TrialFacts
) -> list[Collector]:
    """Who reads the GPUs; a DCGM exporter that was asked for and does not answer becomes a warning."""
    if nvidia is None:
        return []
    nvidia.serve(lambda: [ref.pid for root in cluster.trees() for ref, _ in descendants(root)])
    exporter = DcgmExporter(cell.dcgm_exporter or f"127.0.0.1:{DCGM_PORT}", gpus)
    if exporter.answers():
        return [nvidia, exporter]
    if cell.dcgm_exporter is not None:
        facts.warnings.append(f"no DCGM exporter answers at {cell.dcgm_exporter}")
    return [nvidia]
