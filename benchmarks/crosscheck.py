"""Three rulers on one server: tailrace, wrk and perf_analyzer measure the same real Triton at the same low rate.

`python benchmarks/crosscheck.py`: they take turns, block after block, each sending the same payload at evenly spaced
instants. Exit code 0: every median lies within 5 % of tailrace's, or the server's own clock explains the difference;
1: some median does neither, or there is no other tool. One that is not here is told, with how to get it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import generators
from ending import leave
from generators import Run
from served import served
from tailrace.harness.analysis.comparison import t_interval
from tailrace.harness.analysis.metrics import Floats, measured, percentile
from tailrace.harness.contract.adapter import Deployment, ServerEnvironment, Tuning
from tailrace.harness.contract.codecs import PreparedRequest
from tailrace.harness.contract.control import ControlConnection
from tailrace.harness.contract.exchange import exchange
from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.schedule import build_schedule
from tailrace.harness.records.schema import REQUEST_SCHEMA
from tailrace.harness.records.tables import read_table
from tailrace.harness.replay.driver import LoadGenerator
from tailrace.harness.run.prepare import prepare
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.servers import environments

MODEL = "emulated"
BASE_MS = 5
RATE = 40
"""Requests per second: the server is idle for four fifths of the time, so that nothing ever waits in it."""
BLOCKS = 5
AGREEMENT = 0.05
_LEAD_S = 0.5
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Block:
    """One turn of one tool, and what the server counted meanwhile by its own clock."""

    run: Run
    server_requests: int
    server_s: float


class Bench:
    """The server under all rulers, and each ruler as a method that measures it for so many seconds."""

    def __init__(self, deployment: Deployment, workload: PreparedWorkload, folder: Path) -> None:
        self.deployment = deployment
        self.folder = folder
        self._payload = workload.payloads[0]
        self._request: PreparedRequest = deployment.endpoint.codec.encode(MODEL, self._payload)
        endpoint = deployment.endpoint
        self._control = ControlConnection("triton", endpoint.host, endpoint.port, deployment.log)
        self.from_intended_ms: list[Floats] = []
        """tailrace's response times, block by block; what is compared are its service times."""

    def warm_up(self) -> None:
        """Two seconds' worth of requests that nobody counts."""
        for _ in range(2 * RATE):
            exchange(self.deployment.endpoint, self._request, _TIMEOUT_S)

    def tailrace(self, seconds: int) -> Run:
        """Open loop, in a load process as in every trial; service time, from the send."""
        schedule = build_schedule(
            np.arange(RATE * seconds) * (1_000_000_000 // RATE),
            models=(MODEL,),
            payload_count=1,
            warmup_s=0,
            warmup_rate=0,
            seed=0,
        )
        stem = self.folder / f"requests-{len(self.from_intended_ms)}"
        endpoint = self.deployment.endpoint
        with LoadGenerator(
            schedule=schedule,
            requests={(0, 0): self._request},
            protocol=endpoint.protocol,
            host=endpoint.host,
            port=endpoint.port,
            timeout_s=_TIMEOUT_S,
            max_connections=RATE * seconds,
            records=stem,
            log=self.folder / "load-generator.log",
        ) as load:
            load.start()
            load.go(time.monotonic_ns() + int(_LEAD_S * 1e9))
            result = load.wait()
        table = read_table(stem, REQUEST_SCHEMA)
        if table is None or result.failure is not None:
            raise TailraceError(f"tailrace's load generator ended early: {result.failure}")
        arrivals = measured(table)
        self.from_intended_ms.append(arrivals.response_ms())
        service_ms = arrivals.service_ms()
        return Run(service_ms, len(arrivals) - len(service_ms), seconds, result.cpu_s)

    def wrk(self, seconds: int) -> Run:
        """Closed loop on one connection, pausing so long between answer and request that the rate is about the same."""
        return generators.wrk(
            self.deployment.endpoint,
            self._request.data,
            connections=1,
            seconds=seconds,
            pause_ms=round(1e3 / RATE - BASE_MS),
        )

    def perf_analyzer(self, program: Path, libraries: Path, seconds: int) -> Run:
        """Threads that wake at constant intervals.

        It counts around a call of its client library, which builds the request and takes the answer apart. What failed it
        does not list.
        """
        payload, export = self.folder / "payload.json", self.folder / "profile.json"
        inputs = {name: {"content": x.ravel().tolist(), "shape": [1, *x.shape]} for name, x in self._payload.items()}
        payload.write_text(json.dumps({"data": [inputs]}))
        endpoint = self.deployment.endpoint
        before_s = generators.children_cpu_s()
        generators.output_of(
            [
                *generators.precedence(),
                *(str(program), "-m", MODEL, "-i", "http", "-u", f"{endpoint.host}:{endpoint.port}"),
                *("--request-rate-range", str(RATE), "--request-distribution", "constant"),
                *("--request-count", str(RATE * seconds), "--input-data", str(payload)),
                *("--profile-export-file", str(export)),
            ],
            seconds=seconds,
            env={"LD_LIBRARY_PATH": str(libraries)},  # and no proxy's address, which it would use
        )
        cpu_s = generators.children_cpu_s() - before_s
        requests = json.loads(export.read_text())["experiments"][0]["requests"]
        export.unlink()  # it refuses to write over one
        answered = [(r["timestamp"], r["response_timestamps"][-1]) for r in requests if r["response_timestamps"]]
        times_ns = np.array(answered, dtype=np.int64)
        span_s = float(np.ptp(times_ns[:, 0])) / 1e9 + 1 / RATE
        return Run((times_ns[:, 1] - times_ns[:, 0]) / 1e6, max(0, RATE * seconds - len(answered)), span_s, cpu_s)

    def take_turn(self, tool: Callable[[int], Run], seconds: int) -> Block:
        """Have one tool measure, between two looks at the server's statistics."""
        count, spent_ns = self._server_statistics()
        run = tool(seconds)
        count_after, spent_after_ns = self._server_statistics()
        return Block(run, count_after - count, (spent_after_ns - spent_ns) / 1e9)

    def _server_statistics(self) -> tuple[int, int]:
        """How many requests Triton has answered with success, and how many nanoseconds they were inside it."""
        success = self._control.json(f"/v2/models/{MODEL}/stats")["model_stats"][0]["inference_stats"]["success"]
        return int(success["count"]), int(success["ns"])


def find_perf_analyzer(server: ServerEnvironment, folder: Path) -> tuple[Path, Path]:
    """The program, and a folder of the libraries that it needs. Raises :class:`TailraceError` where it cannot be had.

    An old client's wheel carries the program without libb64 and CUDA's runtime; the server's wheel carries both, under
    names of its own. No GPU is needed.
    """
    environment = environments.build("venv", [Path(__file__).with_name("perf_analyzer.txt")], name="perf_analyzer")
    libraries = folder / "libraries"
    libraries.mkdir()
    bundled = server.bin.parent.glob("lib/python3*/site-packages/nvidia_pytriton.libs/*")
    for path in bundled:
        for name in ("libb64.so.0d", "libcudart.so.12"):
            stem, _, version = name.partition(".")
            if path.name.startswith(f"{stem}-") and f".{version}" in path.name:
                (libraries / name).symlink_to(path)
    program = environment.bin / "perf_analyzer"
    generators.output_of([str(program), "--version"], seconds=0, env={"LD_LIBRARY_PATH": str(libraries)})
    return program, libraries


def _milliseconds(values: Floats) -> list[str]:
    return [f"{percentile(values, q):.3f}" for q in (0.5, 0.9, 0.99)] + [f"{values.mean():.3f}"]


def _pooled(blocks: list[Block]) -> Floats:
    return np.concatenate([block.run.latencies_ms for block in blocks])


def _in_server_ms(blocks: list[Block]) -> float:
    return sum(b.server_s for b in blocks) * 1e3 / sum(b.server_requests for b in blocks)


def _medians(blocks: list[Block]) -> Floats:
    return np.array([percentile(block.run.latencies_ms, 0.5) for block in blocks])


def print_table(blocks: Mapping[str, list[Block]], from_intended_ms: list[Floats]) -> None:
    """Every tool's figures over all of its blocks."""
    table = Table(title=f"the same Triton ({BASE_MS} ms emulated, one replica, no batching), about {RATE} requests/s")
    for heading in ("tool", "requests", "counted by the server", "rate/s", "p50 ms", "p90 ms", "p99 ms", "mean ms"):
        table.add_column(heading, justify="left" if heading == "tool" else "right")
    table.add_column("mean in the server ms", justify="right")
    for name, turns in blocks.items():
        pooled = _pooled(turns)
        rate = len(pooled) / sum(turn.run.seconds for turn in turns)
        counted = sum(turn.server_requests for turn in turns)
        figures = _milliseconds(pooled)
        table.add_row(name, str(len(pooled)), str(counted), f"{rate:.1f}", *figures, f"{_in_server_ms(turns):.3f}")
    intended_ms = np.concatenate(from_intended_ms)
    table.add_row("tailrace, from the intended start", str(len(intended_ms)), "", "", *_milliseconds(intended_ms), "")
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table)


def judge(name: str, theirs: list[Block], ours: list[Block]) -> tuple[bool, str]:
    """Whether a tool agrees with tailrace, and a sentence that says so with the numbers."""
    if failed := sum(block.run.failed for block in theirs):
        return False, f"{name}: {failed} requests failed; look at the server's log and at the tool's own output"
    interval = t_interval(_medians(theirs) / _medians(ours), log=True)
    if interval is None:
        return False, f"{name}: its medians cannot be compared"
    ratio, low, high = interval
    said = f"{name}: its median is {ratio:.3f} × tailrace's (95 % interval {low:.3f} to {high:.3f}): "
    if abs(ratio - 1) <= AGREEMENT:
        return True, f"{said}within {AGREEMENT:.0%}"
    # Means, for they add up: what a tool saw is what the server spent, by its own clock, and what was spent outside it.
    inside = [_in_server_ms(blocks) for blocks in (theirs, ours)]
    outside = [float(_pooled(blocks).mean()) - server for blocks, server in zip((theirs, ours), inside, strict=True)]
    said += (
        f"beyond {AGREEMENT:.0%}; of its mean {inside[0]:.3f} ms were inside the server by the server's clock and "
        f"{outside[0]:.3f} ms outside, of tailrace's {inside[1]:.3f} and {outside[1]:.3f} ms: "
    )
    if abs(outside[0] - outside[1]) <= AGREEMENT * (inside[1] + outside[1]):
        return True, f"{said}the server differed from turn to turn, the rulers agree"
    return False, f"{said}the rulers differ; look at the load on this machine and at what each counts from"


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="how long each tool measures in each of its turns")
    seconds: int = parser.parse_args().seconds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, so that nothing is left behind
    adapter = get_adapter("triton")
    environment = environments.build("venv", [adapter.requirements], name=adapter.name, on_progress=print)
    workload = prepare(
        "emulated",
        models=[MODEL],
        device="emulated",
        seed=7,
        options={"base_ms": BASE_MS, "per_item_ms": 0},
        environment_kind="venv",
    )
    blocks: dict[str, list[Block]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="tailrace-crosscheck-") as folder,
        served(adapter, environment, workload, tuning=Tuning(replicas=1)) as deployment,
    ):
        bench = Bench(deployment, workload, Path(folder))
        tools: dict[str, Callable[[int], Run]] = {"tailrace": bench.tailrace}
        if generators.WRK:
            tools["wrk"] = bench.wrk
        else:
            print(f"wrk: not here; {generators.WRK_REMEDY}")
        try:
            program, libraries = find_perf_analyzer(environment, Path(folder))
            tools["perf_analyzer"] = lambda seconds: bench.perf_analyzer(program, libraries, seconds)
        except TailraceError as error:
            print(f"perf_analyzer: not here; {error}")
        bench.warm_up()
        for number in range(BLOCKS):
            for name, tool in tools.items():
                print(f"block {number + 1} of {BLOCKS}: {name}", flush=True)
                blocks.setdefault(name, []).append(bench.take_turn(tool, seconds))
        from_intended_ms = bench.from_intended_ms
    print_table(blocks, from_intended_ms)
    judged = [judge(name, turns, blocks["tailrace"]) for name, turns in blocks.items() if name != "tailrace"]
    if not judged:
        print("nothing was compared: there is no other tool here")
    for _, sentence in judged:
        print(sentence)
    return 0 if judged and all(agreed for agreed, _ in judged) else 1


if __name__ == "__main__":
    leave(main)
