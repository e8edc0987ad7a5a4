"""How long, and in how much memory, the figures of one large trial are made: `python benchmarks/analysis.py [ARRIVALS]`.

A synthetic run folder is written in batches to a temporary folder and removed afterwards. Two child processes analyse
it, so that the peak resident set that the kernel reports for each is that of the analysis alone: one as a steady trial,
one as a trial with a fault in its middle (which adds the recovery), and a third makes the whole report.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tailrace.harness.plan.cells import interleave
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.records.facts import Fault
from tailrace.harness.records.schema import OUTCOME_NAMES, REQUEST_SCHEMA, SAMPLE_SCHEMA, Outcome
from tailrace.harness.records.store import RunFolder, write_json

RATE = 2000
"""Arrivals per second; the trace is as long as the arrivals need."""
SERVICE_S = 0.0004
BATCH = 250_000
WARMUP = 20_000
FAIL = 0.005

_ANALYSE = """
import sys
from pathlib import Path
from tailrace.harness.records.store import RunFolder
from tailrace.harness.analysis.summary import write_summary
write_summary(RunFolder.open(Path(sys.argv[1])))
"""
_REPORT = """
import sys
from pathlib import Path
from tailrace.harness.records.store import RunFolder
from tailrace.reports.report import write
write([RunFolder.open(Path(sys.argv[1]))], Path(sys.argv[1]) / "report.html")
"""


def main() -> None:
    """Write, analyse, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arrivals", nargs="?", type=int, default=10_000_000)
    arrivals = parser.parse_args().arrivals
    with tempfile.TemporaryDirectory(prefix="tailrace-analysis-") as folder:
        run = make_run(Path(folder) / "run", arrivals)
        (trial,) = run.trials
        size = (trial.folder / "requests.parquet").stat().st_size
        print(f"{arrivals:,} arrivals, {size / 2**20:.0f} MiB of Parquet")
        measure("summary, steady", _ANALYSE, run)
        half_s = trial.facts.span_s / 2
        trial.facts.faults = [Fault(kind="kill_replica", at_s=half_s, injected_s=half_s)]
        trial.facts.planned_faults = 1
        trial.write(trial.facts)
        measure("summary, with a fault", _ANALYSE, run)
        measure("report", _REPORT, run)


def measure(what: str, program: str, run: RunFolder) -> None:
    """Run a program over the folder in a process of its own; print seconds and the peak resident set so far.

    The kernel keeps the largest resident set of all children that ended, so later lines never show less.
    """
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", program, str(run.folder)], check=True)
    seconds = time.monotonic() - begin
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # Linux counts KiB
    print(f"{what}: {seconds:.1f} s, peak {peak_gib:.2f} GiB", flush=True)


def make_run(folder: Path, arrivals: int) -> RunFolder:
    """A run with one trial of so many Poisson arrivals at a server of one unit (M/D/1, 80 % busy); some requests fail."""
    experiment = Experiment.model_validate({"name": "analysis", "adapters": ["null"], "trace": {"name": "steady"}})
    (plan,) = interleave(experiment)
    planned = {"id": plan.id, "cell": plan.cell.id, "adapter": "null", "scenario": plan.cell.scenario.name, "number": 1}
    run = RunFolder.create(folder, {"experiment": experiment.model_dump(mode="json"), "trials": [planned]})
    trial = run.trial(plan.id)
    (trial.server / "config").mkdir(parents=True)
    span_s = float(np.ceil(arrivals / RATE))
    facts = {
        **planned,
        "state": "done",
        "workload": "emulated",
        "trace": "steady",
        "transient": False,
        "device": "emulated",
        "devices": 1,
        "protocol": "http",
        "slo_ms": 5.0,
        "span_s": span_s,
        "cpu_count": 2,
        "seed": plan.seed,
        "epoch_mono_ns": 0,
        "faults": [],
    }
    write_json(trial.facts_path, facts)
    (trial.folder / "events.jsonl").touch()
    rng = np.random.default_rng(7)
    with pq.ParquetWriter(trial.folder / "requests.parquet", REQUEST_SCHEMA, compression="zstd") as writer:
        free_s = last_s = -2 * WARMUP / RATE
        for batch, count in enumerate([WARMUP, *np.diff([*range(0, arrivals, BATCH), arrivals])]):
            at = (0.0 if batch == 1 else last_s) + np.cumsum(rng.exponential(1 / RATE, int(count)))
            # Lindley: whoever comes is served after all before, or at once.
            served = np.arange(1, len(at) + 1) * SERVICE_S
            done = served + np.maximum.accumulate(np.maximum(at - served + SERVICE_S, free_s))
            free_s, last_s = float(done[-1]), float(at[-1])
            at = np.minimum(at, span_s - 1e-9)
            writer.write_batch(requests(rng, at, done, batch))
    samples = [pa.array(np.arange(3) * 10**9), *(pa.array(["host"] * 3) for _ in range(2))]
    samples += [pa.array(["cpu_busy"] * 3), pa.array([0.5] * 3), pa.array(["1"] * 3)]
    pq.write_table(pa.Table.from_arrays(samples, schema=SAMPLE_SCHEMA), trial.folder / "samples.parquet")
    return RunFolder.open(folder)


def requests(
    rng: np.random.Generator, at_s: NDArray[np.floating], done_s: NDArray[np.floating], batch: int
) -> pa.RecordBatch:
    """Records of one batch; batch 0 is the warm-up."""
    n = len(at_s)
    intended, done = (at_s * 1e9).astype(np.int64), (done_s * 1e9).astype(np.int64)
    failed = rng.random(n) < FAIL
    outcome = np.where(failed, Outcome.SHED, Outcome.OK)
    values = {
        "arrival_id": np.arange(n) + batch * BATCH,
        "intended_ns": intended,
        "sent_ns": intended + 20_000,
        "first_byte_ns": done - 1_000,
        "done_ns": done,
        "outcome": pa.array(np.array(OUTCOME_NAMES)[outcome]),
        "status": np.where(failed, 503, 200),
        "error": pa.array(np.where(failed, "queue full", ""), mask=~failed),
        "model": pa.array(np.full(n, "emulated")),
        "payload_id": rng.integers(0, 64, n),
        "bytes_sent": np.full(n, 310),
        "bytes_received": np.full(n, 180),
        "worker": np.zeros(n),
        "phase": pa.array(np.full(n, "measure" if batch else "warmup")),
    }
    columns = [pa.array(values[field.name]).cast(field.type) for field in REQUEST_SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=REQUEST_SCHEMA)


if __name__ == "__main__":
    main()
