"""How many arrivals a minute the simulator takes on one core: `python benchmarks/simulated_arrivals.py [ARRIVALS]`."""

from __future__ import annotations

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from ending import leave
from tailrace.simulator.engine import NS_PER_S, simulate
from tailrace.simulator.system import Autoscaler, Failure, Router, System


def fleet(replicas: int, router: Router = "shared") -> System:
    """So many replicas of the default system."""
    return System(replicas=replicas, router=router)


CASES: dict[str, tuple[float, System]] = {
    "3 replicas, 500/s": (500, fleet(3)),
    "3 replicas, 500/s, a queue for each": (500, fleet(3, "round_robin")),
    "2 to 8 replicas, scaled, one dies": (
        500,
        System(replicas=2, autoscaler=Autoscaler(max=8, warm_pool=1), failures=(Failure(at_s=20),)),
    ),
    "1,000 replicas, 100,000/s": (100_000, fleet(1000)),
    "1,000 replicas, 100,000/s, shorter of two queues": (100_000, fleet(1000, "power_of_two")),
    "1,000 replicas, 100,000/s, shortest queue": (100_000, fleet(1000, "shortest_queue")),
}


def main() -> int:
    """Simulate every case once, after one that is left out for it compiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arrivals", nargs="?", type=int, default=2_000_000)
    n = parser.parse_args().arrivals
    table = Table()
    for heading in ("system", "arrivals", "seconds", "arrivals/min"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    simulate(System(), np.arange(10) * NS_PER_S, span_ns=10 * NS_PER_S)
    for name, (rate, system) in CASES.items():
        gaps_s = np.random.default_rng(7).exponential(1 / rate, n)
        arrivals_ns = (np.cumsum(gaps_s) * NS_PER_S).astype(np.int64)
        began = time.perf_counter()
        simulate(system, arrivals_ns, span_ns=int(arrivals_ns[-1]) + 1)
        took_s = time.perf_counter() - began
        table.add_row(name, f"{n:,}", f"{took_s:.2f}", f"{n / took_s * 60:.2e}")
    Console(highlight=False, width=110).print(table)
    return 0


if __name__ == "__main__":
    leave(main)
