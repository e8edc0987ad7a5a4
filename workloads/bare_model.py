"""Runs a workload's model with no server around it, as fast as it goes, in the workload's own interpreter.

A script of the standard library and numpy, started with one argument, a JSON file: ``model_file``, ``artifact``, ``name``,
``device``, ``payloads`` (an .npz with the payloads as axis 0), ``batch``, ``duration_s``, and three paths. Once it is warm
it writes the file ``ready``; when the file ``go`` is there it calls ``predict`` over and over for ``duration_s`` seconds,
and writes ``result``: how many calls, in how many seconds, and their durations' p50 and p99 in milliseconds.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from itertools import cycle
from pathlib import Path

import numpy as np

_WARM_CALLS = 5
_WARM_S = 1.0
_POLL_S = 0.002


def main(job_file: str) -> None:
    """Do the job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("tailrace_model", job["model_file"])
    if spec is None or spec.loader is None:
        raise ImportError(f"{job['model_file']} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    model = module.Model(job["artifact"], job["name"], job["device"])

    with np.load(job["payloads"], allow_pickle=False) as archive:
        payloads = {name: archive[name] for name in archive.files}
    count = len(next(iter(payloads.values())))
    # Every batch begins elsewhere among the payloads, so that the same rows do not come again and again.
    rows = [(start + np.arange(job["batch"])) % count for start in range(min(count, 8))]
    batches = cycle([{name: array[chosen] for name, array in payloads.items()} for chosen in rows])

    warm_until = time.monotonic() + _WARM_S
    calls = 0
    while calls < _WARM_CALLS or time.monotonic() < warm_until:
        model.predict(next(batches))
        calls += 1
    Path(job["ready"]).touch()
    while not Path(job["go"]).exists():
        time.sleep(_POLL_S)

    durations = []
    began = now = time.perf_counter()
    while now - began < job["duration_s"]:
        before = now
        model.predict(next(batches))
        now = time.perf_counter()
        durations.append(now - before)
    p50, p99 = np.percentile(durations, [50, 99], method="inverted_cdf") * 1e3
    result = {"calls": len(durations), "seconds": now - began, "p50_ms": p50, "p99_ms": p99}
    staged = Path(job["result"]).with_suffix(".tmp")
    staged.write_text(json.dumps(result), encoding="utf-8")
    staged.replace(job["result"])


if __name__ == "__main__":
    main(sys.argv[1])
