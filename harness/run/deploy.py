"""A server from its spawn to its end: what is made for it, and what ends it whatever happens. Trials and cold starts share it."""

from __future__ import annotations

import contextlib
import glob
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tailrace.harness.contract.adapter import DeployRequest, ProcessHost
from tailrace.harness.contract.pipeline import pipeline_environment
from tailrace.harness.errors import StorageError, TailraceError
from tailrace.harness.gpus import Gpu
from tailrace.harness.run.setup import ServerSetup
from tailrace.harness.servers.cluster import Cluster, Layout
from tailrace.harness.servers.device_memory import limit_memory
from tailrace.harness.servers.devices import device_environment
from tailrace.harness.servers.guardian import Guardian

_STOP_GRACE_S = 10.0


def device_folder(scratch: Path, node: int) -> Path:
    """Where the emulated devices of a node keep their locks and counters."""
    return scratch / "devices" / str(node)


def clock_folder(scratch: Path) -> Path:
    """Where the stages of a pipeline, on all nodes, keep their clocks."""
    return scratch / "stages"


@contextlib.contextmanager
def scratch_folder(guardian: Guardian) -> Iterator[Path]:
    """A short path for sockets and temporary files, which is gone afterwards even if the harness is killed."""
    scratch = Path(tempfile.mkdtemp(prefix="tailrace-"))
    guardian.remove_later(glob.escape(str(scratch)))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def deploy_request(setup: ServerSetup, scratch: Path, workdir: Path, gpus: Sequence[Gpu]) -> DeployRequest:
    """What the adapter is asked for; makes the folders that the servers will look for. ``gpus`` are those of the cell.

    Raises :class:`StorageError` when the disk refuses.
    """
    cell, workload = setup.cell, setup.workload
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        node_envs = tuple(_device_environment(setup, scratch, node, gpus) for node in range(cell.nodes))
        pipeline = pipeline_environment(workload, clock_folder(scratch))
    except OSError as error:
        raise StorageError.of(Path(error.filename or scratch), error) from error
    return DeployRequest(
        workload=workload,
        models=cell.models_at_start,
        memory=cell.memory,
        tuning=cell.tuning,
        options=cell.options,
        protocol=cell.protocol,
        environment=setup.environment,
        workdir=workdir,
        scratch=scratch,
        server_env={**node_envs[0], **pipeline},
        host=cell.server_host,
        devices=cell.devices_per_node,
        stages=workload.spec.pipeline if cell.composition == "framework" else (),
        artifact=cell.artifact,
        node_envs=node_envs,
    )


def _device_environment(setup: ServerSetup, scratch: Path, node: int, gpus: Sequence[Gpu]) -> dict[str, str]:
    """What a node's processes must know of the devices that are its own."""
    each, folder = setup.cell.devices_per_node, device_folder(scratch, node)
    folder.mkdir(parents=True)
    if setup.cell.memory is not None:
        limit_memory(folder, setup.cell.memory, setup.workload.own_model_file)
    return device_environment(setup.cell.device, folder, gpus[node * each : (node + 1) * each], each)


@contextlib.contextmanager
def deployed(
    setup: ServerSetup,
    request: DeployRequest,
    host: ProcessHost,
    companions: ProcessHost,
    *,
    tell: Callable[[Literal["stop", "stopped"]], None] = lambda _: None,
) -> Iterator[Cluster]:
    """The cell's servers on ``host``, started; ended in order at the end, whatever happens meanwhile.

    ``companions`` runs what stands between client and servers. A Ctrl-C on its way is not replaced by the failure of a
    server to stop.
    """
    cluster = Cluster(setup.adapter, request, host, companions, _layout(setup))
    try:
        yield cluster
    finally:
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        try:
            tell("stop")
        finally:
            with contextlib.suppress(TailraceError) if interrupted else contextlib.nullcontext():
                cluster.stop(_STOP_GRACE_S)
                tell("stopped")


def _layout(setup: ServerSetup) -> Layout:
    """How the nodes stand at the start."""
    cell = setup.cell
    layout = Layout(
        nodes=cell.nodes,
        links=cell.links,
        restart=cell.supervision == "restart",
        backoff_s=cell.restart_backoff_s,
        balancer_environment=setup.balancer_environment,
    )
    scaler = cell.scenario.scaler
    if scaler is None or scaler.of != "nodes":
        return layout
    return replace(layout, active=scaler.min, warm=scaler.warm_pool, cold_start=scaler.cold_start)
