"""A scripted null server for tests, open-loop replays against it, and the record that the script itself keeps of them."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailrace.adapters.null.adapter import ADAPTER, NullOptions
from tailrace.harness.analysis.metrics import Ints, Measured, measured
from tailrace.harness.contract.adapter import Deployment, DeployRequest, ServerEnvironment, Tuning, WireProtocol
from tailrace.harness.contract.codecs import raw_bytes
from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.plan.schedule import Phase, Schedule
from tailrace.harness.records.schema import REQUEST_SCHEMA
from tailrace.harness.records.tables import read_table
from tailrace.harness.replay.driver import LoadGenerator, ReplayResult
from tailrace.harness.run.prepare import prepare
from tailrace.harness.servers.emulated_device import device_environment
from tailrace.harness.servers.guardian import Guardian

MODEL = "emulated"
_LEAD_S = 0.5


@dataclass(frozen=True)
class Replayed:
    """One replay as both sides saw it; one entry per arrival, in order. The server's times count from the same epoch."""

    result: ReplayResult
    client: Measured
    read_ns: Ints
    due_ns: Ints
    written_ns: Ints

    def span(self, first: int, last: int) -> Replayed:
        """The arrivals from ``first`` to before ``last``."""
        return self.those(np.arange(first, last))

    def those(self, chosen: Ints) -> Replayed:
        """The arrivals with these indices."""
        return Replayed(
            self.result, self.client.those(chosen), self.read_ns[chosen], self.due_ns[chosen], self.written_ns[chosen]
        )


@dataclass(frozen=True)
class ScriptedServer:
    """A running null server that logs what it does."""

    deployment: Deployment
    workload: PreparedWorkload
    folder: Path

    def replay(self, intended_ns: Ints) -> Replayed:
        """Replay arrivals at these instants (sorted, no two the same), every one of which must be answered with success."""
        payloads = self.workload.payloads
        payload_id = (np.arange(len(intended_ns)) % len(payloads)).astype(np.int32)
        schedule = Schedule(
            intended_ns=intended_ns,
            model=np.zeros(len(intended_ns), np.uint16),
            payload_id=payload_id,
            phase=np.full(len(intended_ns), Phase.MEASURE, np.uint8),
            models=(MODEL,),
        )
        endpoint = self.deployment.endpoint
        records = self.folder / f"replay-{time.monotonic_ns()}"
        with LoadGenerator(
            schedule=schedule,
            requests={(0, number): endpoint.codec.encode(MODEL, payload) for number, payload in enumerate(payloads)},
            protocol=endpoint.protocol,
            host=endpoint.host,
            port=endpoint.port,
            timeout_s=10.0,
            max_connections=4096,
            records=records,
            log=self.folder / "load.log",
        ) as load:
            load.start()
            epoch_ns = time.monotonic_ns() + round(_LEAD_S * 1e9)
            load.go(epoch_ns)
            result = load.wait()
        table = read_table(records, REQUEST_SCHEMA)
        assert table is not None
        client = measured(table)
        assert len(client) == len(intended_ns)
        assert client.ok.all(), set(table["error"].to_pylist())
        return self._joined(result, client, payload_id.astype(np.int64), epoch_ns)

    def _joined(self, result: ReplayResult, client: Measured, payload_id: Ints, epoch_ns: int) -> Replayed:
        """The script's rows beside the client's: the n-th sent with a payload is the n-th read with it."""
        logs = [np.loadtxt(log, np.int64, delimiter=",", skiprows=1, ndmin=2) for log in self._logs()]
        rows = np.concatenate(logs)
        rows = rows[rows[:, 1] >= epoch_ns]
        rows = rows[np.argsort(rows[:, 1])]
        assert len(rows) == len(client)
        sent_first = np.argsort(client.sent_ns, kind="stable")
        joined = np.empty((len(client), 3), np.int64)
        for number, payload in enumerate(self.workload.payloads):
            mine = sent_first[payload_id[sent_first] == number]
            joined[mine] = rows[rows[:, 0] == zlib.crc32(raw_bytes(self.workload.spec.inputs, payload)), 1:4]
        return Replayed(result, client, *(joined - epoch_ns).T)

    def _logs(self) -> list[Path]:
        return sorted((self.folder / "server" / "logs").glob("requests-*.csv"))


@contextmanager
def scripted_server(
    folder: Path, script: Mapping[str, float], *, protocol: WireProtocol = "http", replicas: int = 1
) -> Iterator[ScriptedServer]:
    """A null server that follows a script (the options of :class:`NullOptions`) and logs it, once it claims to be ready;
    all its files go to ``folder``."""
    workload = prepare(MODEL, models=(MODEL,), device="emulated", seed=1, options={}, environment_kind="current")
    for name in ("devices", "scratch", "server/config"):
        (folder / name).mkdir(parents=True)
    request = DeployRequest(
        workload=workload,
        models=(MODEL,),
        tuning=Tuning(replicas=replicas),
        options=NullOptions.model_validate({**script, "log": True}),
        protocol=protocol,
        environment=ServerEnvironment(Path(sys.executable), "current"),
        workdir=folder / "server",
        scratch=folder / "scratch",
        server_env=device_environment(folder / "devices", 1),
    )
    for name, text in ADAPTER.render(request).items():
        (folder / "server" / "config" / name).write_text(text, encoding="utf-8")
    with Guardian() as guardian:
        deployment = ADAPTER.deploy(request, guardian)
        try:
            deployment.wait_for(deployment.claims_ready, "get ready", ADAPTER.start_timeout_s)
            yield ScriptedServer(deployment, workload, folder)
        finally:
            deployment.stop()
