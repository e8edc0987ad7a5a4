"""tailrace's sender beside Locust's and wrk's: what each reaches, and what a request costs it, on the same null server.

`python benchmarks/loadgen_peers.py`: the same POST of 100 bytes to HAProxy on this machine. tailrace is open loop and
says how late it was; Locust's `FastHttpUser` and wrk are closed loops, which are never late because they wait for each
answer: their send lag is not zero but unknown. The row without a rate is as fast as a tool goes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import generators
from ending import leave
from served import served
from tailrace.harness.contract.adapter import Endpoint
from tailrace.harness.contract.codecs import PreparedRequest
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.ruler import NULL_SERVER, plain_workload
from tailrace.harness.servers import environments

BODY_BYTES = 100
CONNECTIONS = 32
"""Of wrk, and users of Locust: more than the server needs to be busy all the time."""
_USER = Path(__file__).with_name("locust_user.py")
_COLUMNS = {
    "tool": "",
    "rate": "g",
    "achieved": ".0f",
    "cpu_us_per_request": ".1f",
    "send_lag_p50_ms": ".3f",
    "send_lag_p99_ms": ".3f",
    "dropped": "d",
    "failed": "d",
}

Row = dict[str, Any]
Tell = Callable[[str], None]


def tailrace(rates: str, seconds: int) -> list[Row]:
    """The rows of `tailrace loadgen`, which brings up a null server of its own."""
    command = [sys.executable, "-m", "tailrace.cli.main", "loadgen", "--rates", rates, "--duration", str(seconds)]
    limit_s = (rates.count(",") + 1) * seconds
    said = generators.output_of([*command, "--body-bytes", str(BODY_BYTES), "--format", "json"], seconds=limit_s)
    return [{"tool": "tailrace", **row} for row in json.loads(said)["rows"]]


def locust(endpoint: Endpoint, request: PreparedRequest, rate: float | None, seconds: int) -> Row:
    """Users of Locust's `FastHttpUser` in one process, each with its share of the rate; without a rate, without a pause."""
    head, _, body = request.data.partition(b"\r\n\r\n")
    with tempfile.NamedTemporaryFile(prefix="tailrace-body-") as file:
        file.write(body)
        file.flush()
        command = [sys.executable, "-P", "-m", "locust", "--locustfile", str(_USER), "--headless", "--only-summary"]
        load = ["--users", str(CONNECTIONS), "--spawn-rate", str(CONNECTIONS), "--run-time", f"{seconds}s"]
        said = generators.output_of(
            [
                *generators.precedence(),
                *command,
                *load,
                "--exit-code-on-error",
                "0",
                "--host",
                f"http://{endpoint.host}:{endpoint.port}",
            ],
            seconds=seconds,
            env={
                **os.environ,
                "TAILRACE_PATH": head.split(b" ")[1].decode(),
                "TAILRACE_BODY": file.name,
                "TAILRACE_RATE_PER_USER": str((rate or 0) / CONNECTIONS),
            },
        )
    seen = json.loads(said.splitlines()[-1])
    return _closed_loop("Locust FastHttpUser", rate, seen["requests"], seen["failed"], seen["seconds"], seen["cpu_s"])


def wrk(endpoint: Endpoint, request: PreparedRequest, seconds: int) -> Row:
    """wrk as fast as it goes, on one thread; it knows no rate."""
    run = generators.wrk(endpoint, request.data, connections=CONNECTIONS, seconds=seconds)
    return _closed_loop("wrk", None, len(run.latencies_ms), run.failed, run.seconds, run.cpu_s)


def _closed_loop(tool: str, rate: float | None, requests: int, failed: int, seconds: float, cpu_s: float) -> Row:
    return {
        "tool": tool,
        "rate": rate,
        "achieved": (requests - failed) / seconds,
        "cpu_us_per_request": cpu_s / requests * 1e6 if requests else None,
        "send_lag_p50_ms": None,
        "send_lag_p99_ms": None,
        "dropped": None,
        "failed": failed,
    }


def peers(rates: list[float], seconds: int, tell: Tell) -> list[Row]:
    """What the others do, one after the other, against one null server."""
    adapter, workload = get_adapter(NULL_SERVER), plain_workload(BODY_BYTES)
    environment = environments.build("venv", [adapter.requirements], name=adapter.name)
    rows = []
    with served(adapter, environment, workload, options={"engine": "haproxy"}) as deployment:
        endpoint = deployment.endpoint
        request = endpoint.codec.encode(NULL_SERVER, workload.payloads[0])
        for rate in [*rates, None]:
            tell(f"Locust: {'as fast as it goes' if rate is None else f'{rate:g}/s'}")
            rows.append(locust(endpoint, request, rate, seconds))
        if generators.WRK:
            tell("wrk: as fast as it goes")
            rows.append(wrk(endpoint, request, seconds))
        else:
            tell(f"wrk: not here; {generators.WRK_REMEDY}")
    return rows


def print_table(rows: list[Row]) -> None:
    """All rows; a dash is what a tool does not know."""
    table = Table(title=f"POST of {BODY_BYTES} bytes to HAProxy on loopback")
    for heading in ("tool", "rate/s", "achieved/s", "cpu µs/request", "lag p50 ms", "lag p99 ms", "dropped", "failed"):
        table.add_column(heading, justify="left" if heading == "tool" else "right")
    for row in rows:
        table.add_row(*("–" if row[key] is None else f"{row[key]:{shape}}" for key, shape in _COLUMNS.items()))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def main() -> int:
    """Measure all, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="500,2000,5000,9000", help="requests/s, separated by commas")
    parser.add_argument("--seconds", type=int, default=5, help="how long at each rate")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, so that nothing is left behind

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    tell(f"tailrace: {asked.rates}/s")
    rows = tailrace(asked.rates, asked.seconds)
    rows += peers([float(rate) for rate in asked.rates.split(",")], asked.seconds, tell)
    if asked.format == "json":
        print(json.dumps({"rows": rows}, indent=1))
    else:
        print_table(rows)
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    leave(main)
