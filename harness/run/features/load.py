"""The load: the generator with the requests of a trial, made before the clock starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tailrace.harness.contract.adapter import Endpoint
from tailrace.harness.plan.experiment import Client
from tailrace.harness.plan.schedule import Schedule
from tailrace.harness.replay.driver import LoadGenerator, Workers
from tailrace.harness.run.setup import TrialSetup


def load_workers(client: Client) -> Workers:
    """Who sends, by an experiment's ``client``."""
    return Workers(local=client.workers, remote=client.remote_workers, listen=client.listen)


def load_generator(setup: TrialSetup, schedule: Schedule, endpoint: Endpoint, folder: Path) -> LoadGenerator:
    """A context manager, with its records and its log in the trial's folder; not started yet."""
    cell = setup.cell
    requests = {
        (index, int(payload_id)): endpoint.codec.encode(model, setup.workload.payloads[payload_id])
        for index, model in enumerate(cell.models)
        for payload_id in np.unique(schedule.payload_id)
    }
    return LoadGenerator(
        schedule=schedule,
        requests=requests,
        protocol=endpoint.protocol,
        host=endpoint.host,
        port=endpoint.port,
        timeout_s=cell.client.timeout_s,
        max_connections=cell.client.max_connections,
        slo_ms=cell.slo_ms,
        records=folder / "requests",
        log=folder / "load-generator.log",
        workers=load_workers(cell.client),
    )
