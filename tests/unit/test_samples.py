"""Counts from samples: what the summary says of counters over all scopes, and of copies that answered for the first time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tailrace.harness.analysis.samples import Samples
from tailrace.harness.analysis.summary import cold_copies
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.run.collectors import EmulatedDevices
from tailrace.harness.servers.emulated_device import read_counters


def samples(*rows: tuple[float, str, str, str, float]) -> Samples:
    """Of time (s), source, scope, metric and value."""
    return Samples(
        pa.Table.from_pylist(
            [
                {
                    "t_ns": int(t_s * 1e9),
                    "source": source,
                    "scope": scope,
                    "metric": metric,
                    "value": value,
                    "unit": "1",
                }
                for t_s, source, scope, metric, value in rows
            ],
            schema=SAMPLE_SCHEMA,
        )
    )


def test_a_counter_grows_from_its_first_reading_to_its_last_in_every_scope() -> None:
    told = samples(
        (-4, "device", "device-0", "items_total", 10),
        (5, "device", "device-0", "items_total", 40),
        (-4, "device", "device-1", "items_total", 7),
        (5, "device", "device-1", "items_total", 9),
        (5, "device", "device-1", "batches_total", 900),
    )
    assert told.grown("device", "items_total") == 32
    assert told.grown("server", "items_total") is None


def test_copies_that_answer_first_within_the_trace_are_cold() -> None:
    rows = [(t_s, "device", "copies", "copies_used", used) for t_s, used in ((-3, 0), (-1, 2), (2, 2), (8, 3), (12, 5))]
    assert cold_copies(samples(*rows), span_s=10) == 1, "what comes after the trace is none of its"
    assert cold_copies(samples(*rows[:3]), span_s=10) == 0
    assert cold_copies(samples(rows[3]), span_s=10) == 3, "without warm-up all were cold"
    assert cold_copies(samples(), span_s=10) is None


def write_counters(folder: Path, device: int, pid: int, busy_ns: int, batches: int, items: int) -> None:
    folder.mkdir(exist_ok=True)
    np.array([busy_ns, batches, items], dtype="<u8").tofile(folder / f"device-{device}.{pid}.{pid:08x}.busy")


def test_devices_of_several_nodes_are_counted_on_and_copies_summed(tmp_path: Path) -> None:
    first, second = tmp_path / "0", tmp_path / "1"
    write_counters(first, 0, 11, 2_000_000_000, 3, 30)
    write_counters(first, 0, 12, 1_000_000_000, 1, 4)  # took a dead copy's place
    write_counters(second, 1, 13, 500_000_000, 2, 5)
    write_counters(second, 0, 14, 0, 0, 0)  # has loaded, and answered nothing yet
    assert len(read_counters(first)) == 2
    readings = {(r.scope, r.metric): r.value for r in EmulatedDevices([first, second], 2).read()}
    assert readings["device-0", "items_total"] == 34
    assert readings["device-0", "busy_s_total"] == 3
    assert readings["device-1", "items_total"] == readings["device-2", "items_total"] == 0
    assert readings["device-3", "items_total"] == 5
    assert readings["copies", "copies_used"] == 3
