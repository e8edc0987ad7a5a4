"""Coordinated omission, measured: a closed-loop client and tailrace's replay beside the known truth of a stalling server.

`python benchmarks/coordinated_omission.py`: the null server stands still for 500 ms in every 5 s and costs nothing else.
Ten ordinary Locust users and an open-loop replay send to it at the same rate, one after the other. The users wait for
their answers, so that a stall delays ten requests of hundreds; who comes at a time of their own is delayed all the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ending import leave
from served import served
from tailrace.harness.analysis.metrics import measured, percentile
from tailrace.harness.contract.adapter import Deployment, ServerEnvironment
from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.schedule import build_schedule
from tailrace.harness.records.schema import REQUEST_SCHEMA
from tailrace.harness.records.tables import read_table
from tailrace.harness.replay.driver import LoadGenerator
from tailrace.harness.run.prepare import prepare
from tailrace.harness.run.registry import get_adapter

MODEL = "emulated"
STALL_MS, EVERY_S = 500.0, 5.0
USERS = 10
RATE = 500
"""Requests per second. A closed-loop p99 sees the stall only when more than one request in a hundred is one of those that
the users are stuck with: at less than 222/s here."""
_LEAD_S = 0.5
_TIMEOUT_S = 10.0
_PATIENCE_S = 60.0
_LOCUSTFILE = """\
from pathlib import Path

from locust import FastHttpUser, constant_throughput, task

BODY = Path({body!r}).read_bytes()


class Client(FastHttpUser):
    wait_time = constant_throughput({per_user!r})

    @task
    def infer(self):
        self.client.post({path!r}, data=BODY)
"""


@dataclass(frozen=True)
class Seen:
    """What one ruler says."""

    ruler: str
    requests: int
    rate_rps: float
    p50_ms: float
    p99_ms: float


def truth_ms(q: float) -> float:
    """The response time that a share ``q`` of all arrivals at random instants does not exceed, on a server that costs
    nothing: a share of stall ÷ period waits for what is left of the stall, any length of it as likely as another."""
    return max(0.0, STALL_MS - (1 - q) * EVERY_S * 1e3)


def closed_loop(deployment: Deployment, workload: PreparedWorkload, seconds: int, folder: Path) -> Seen:
    """Locust as people run it; its own percentiles, which have whole milliseconds. Raises :class:`TailraceError`."""
    endpoint = deployment.endpoint
    head, _, body = endpoint.codec.encode(MODEL, workload.payloads[0]).data.partition(b"\r\n\r\n")
    (folder / "body").write_bytes(body)
    path = head.split(b" ", 2)[1].decode()
    script = _LOCUSTFILE.format(body=str(folder / "body"), per_user=RATE / USERS, path=path)
    (folder / "locustfile.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--locustfile", "locustfile.py"]
    command += ["--host", f"http://{endpoint.host}:{endpoint.port}", "--csv", "seen", "--run-time", f"{seconds}s"]
    command += ["--users", str(USERS), "--spawn-rate", str(USERS), "--exit-code-on-error", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds + _PATIENCE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise TailraceError(f"Locust failed: {error}", detail=getattr(error, "stderr", None)) from error
    with (folder / "seen_stats.csv").open(encoding="utf-8", newline="") as lines:
        total = next(row for row in csv.DictReader(lines) if row["Name"] == "Aggregated")
    return Seen(
        f"{USERS} Locust users, closed loop",
        int(total["Request Count"]),
        float(total["Requests/s"]),
        float(total["50%"]),
        float(total["99%"]),
    )


def open_loop(deployment: Deployment, workload: PreparedWorkload, seconds: int, folder: Path) -> Seen:
    """A replay of Poisson arrivals at the same rate. Raises :class:`TailraceError`."""
    endpoint = deployment.endpoint
    rng = np.random.default_rng(7)
    at_s = np.sort(rng.uniform(0, seconds, rng.poisson(RATE * seconds)))
    schedule = build_schedule(
        (at_s * 1e9).astype(np.int64),
        models=(MODEL,),
        payload_count=len(workload.payloads),
        warmup_s=0,
        warmup_rate=0,
        seed=7,
    )
    with LoadGenerator(
        schedule=schedule,
        requests={
            (0, number): endpoint.codec.encode(MODEL, payload) for number, payload in enumerate(workload.payloads)
        },
        protocol=endpoint.protocol,
        host=endpoint.host,
        port=endpoint.port,
        timeout_s=_TIMEOUT_S,
        max_connections=4096,
        records=folder / "requests",
        log=folder / "load.log",
    ) as load:
        load.start()
        load.go(time.monotonic_ns() + round(_LEAD_S * 1e9))
        load.wait()
    table = read_table(folder / "requests", REQUEST_SCHEMA)
    if table is None:
        raise TailraceError("the replay left no records")
    response_ms = measured(table).response_ms()
    return Seen(
        "tailrace, open loop",
        len(response_ms),
        len(response_ms) / seconds,
        percentile(response_ms, 0.5),
        percentile(response_ms, 0.99),
    )


def print_table(seen: list[Seen]) -> None:
    """Each ruler beside the truth, and by what factor its p99 is wrong."""
    table = Table("", "requests", "rate (1/s)", "p50 (ms)", "p99 (ms)", "the p99 is")
    truth = truth_ms(0.99)
    table.add_row("truth", "", "", f"{truth_ms(0.5):.1f}", f"{truth:.1f}", "")
    for ruler in seen:
        wrong = f"{truth / ruler.p99_ms:.0f} times too small" if ruler.p99_ms < truth / 2 else ""
        verdict = wrong or f"off by {ruler.p99_ms / truth - 1:+.1%}"
        numbers = (f"{ruler.requests}", f"{ruler.rate_rps:.0f}", f"{ruler.p50_ms:.1f}", f"{ruler.p99_ms:.1f}")
        table.add_row(ruler.ruler, *numbers, verdict)
    Console().print(table)


def main() -> int:
    """Measure both ways and print what each says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="how long each sends; whole periods of 5 s are best")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    adapter = get_adapter("null")
    environment = ServerEnvironment(Path(sys.executable), "current")
    workload = prepare(MODEL, models=[MODEL], device="emulated", seed=7, options={}, environment_kind="current")
    script = {"stall_every_s": EVERY_S, "stall_ms": STALL_MS}
    with (
        tempfile.TemporaryDirectory(prefix="tailrace-omission-") as folder,
        served(adapter, environment, workload, options=script) as deployment,
    ):
        seen = [measure(deployment, workload, arguments.seconds, Path(folder)) for measure in (closed_loop, open_loop)]
    if arguments.format == "json":
        print(
            json.dumps({"truth": {"p50_ms": truth_ms(0.5), "p99_ms": truth_ms(0.99)}, "seen": list(map(asdict, seen))})
        )
    else:
        print_table(seen)
    return 0


if __name__ == "__main__":
    leave(main)
