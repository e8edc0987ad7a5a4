"""Collectors read the server, the host and the devices while a trial runs, each at its own pace, into ``samples``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import pyarrow as pa

from harness.adapter import Deployment, Replica
from harness.emulated_device import read_counters
from harness.errors import StorageError, TailraceError
from harness.processes import ProcessRef, descendants
from harness.records import SAMPLE_SCHEMA
from harness.store import EventLog
from harness.tables import TableWriter

_FLUSH_S = 1.0
_JOIN_S = 20.0


@dataclass(frozen=True)
class Reading:
    """One value: what it is about (``scope``: a device, a process tree, a model), its metric and its unit."""

    scope: str
    metric: str
    value: float
    unit: str


class Collector(Protocol):
    """Something that can be read again and again; ``source`` names it in the samples."""

    source: str
    interval_s: float

    def read(self) -> list[Reading]:
        """The values now. An ``OSError`` means that there is nothing to read at the moment."""


class ServerProcesses:
    """CPU time and memory of the server's process tree.

    CPU time is a counter that never falls: what processes used before they ended stays counted. Memory is the
    proportional set size (shared pages divided among those who share them), read less often, for it is dear.
    """

    source = "server-process"
    interval_s = 0.5
    _MEMORY_EVERY = 6

    def __init__(self, root: ProcessRef) -> None:
        self._root = root
        self._cpu_s: dict[ProcessRef, float] = {}
        self._reads = 0

    def read(self) -> list[Reading]:
        processes = 0
        memory_bytes = 0
        with_memory = self._reads % self._MEMORY_EVERY == 0
        self._reads += 1
        for ref, process in descendants(self._root):
            try:
                times = process.cpu_times()
                self._cpu_s[ref] = times.user + times.system
                processes += 1
                if with_memory:
                    memory_bytes += _proportional_set_bytes(ref.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        readings = [
            Reading("tree", "cpu_s_total", sum(self._cpu_s.values()), "s"),
            Reading("tree", "processes", processes, "1"),
        ]
        if with_memory and processes:
            readings.append(Reading("tree", "memory_bytes", memory_bytes, "B"))
        return readings


def _proportional_set_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class OwnProcess:
    """CPU time of a process of the harness itself, so that its load is not taken for someone else's."""

    interval_s = 0.5

    def __init__(self, source: str, pid: int) -> None:
        self.source = source
        self._process = psutil.Process(pid)

    def read(self) -> list[Reading]:
        try:
            times = self._process.cpu_times()
        except psutil.NoSuchProcess:
            return []
        return [Reading("process", "cpu_s_total", times.user + times.system, "s")]


class Host:
    """Load of the whole machine, and what the hypervisor took away; shares in 0..1 since the last reading."""

    source = "host"
    interval_s = 0.5

    def __init__(self) -> None:
        self._last = psutil.cpu_times()

    def read(self) -> list[Reading]:
        now = psutil.cpu_times()
        spent = {name: getattr(now, name) - getattr(self._last, name) for name in now._fields}
        self._last = now
        # Guest time is already part of user time; steal is time that this machine wanted and did not get.
        total = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
        if total <= 0:
            return []
        steal = max(0.0, spent.get("steal", 0.0))
        idle = spent["idle"] + spent.get("iowait", 0.0)
        return [
            Reading("host", "cpu_busy", min(1.0, max(0.0, (total - idle - steal) / total)), "1"),
            Reading("host", "steal", min(1.0, steal / total), "1"),
            Reading("host", "memory_available_bytes", psutil.virtual_memory().available, "B"),
        ]


class EmulatedDevices:
    """Busy time of the emulated accelerators, summed over all replicas that ever held one."""

    source = "device"
    interval_s = 0.2

    def __init__(self, folder: Path, devices: int) -> None:
        self._folder = folder
        self._devices = devices

    def read(self) -> list[Reading]:
        busy = dict.fromkeys(range(self._devices), 0.0)
        batches, items = dict(busy), dict(busy)
        for counters in read_counters(self._folder):
            busy[counters.device] = busy.get(counters.device, 0.0) + counters.busy_ns / 1e9
            batches[counters.device] = batches.get(counters.device, 0.0) + counters.batches
            items[counters.device] = items.get(counters.device, 0.0) + counters.items
        readings = []
        for device in busy:
            scope = f"device-{device}"
            readings += [
                Reading(scope, "busy_s_total", busy[device], "s"),
                Reading(scope, "batches_total", batches[device], "1"),
                Reading(scope, "items_total", items[device], "1"),
            ]
        return readings


class NvidiaGpus:
    """Utilisation, memory and power of the first ``devices`` NVIDIA GPUs, through NVML."""

    source = "gpu"
    interval_s = 0.2

    def __init__(self, devices: int) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        count = min(devices, pynvml.nvmlDeviceGetCount())
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def read(self) -> list[Reading]:
        readings = []
        for index, handle in enumerate(self._handles):
            scope = f"gpu-{index}"
            try:
                share = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle).used
                readings.append(Reading(scope, "utilization", share, "1"))
                readings.append(Reading(scope, "memory_bytes", memory, "B"))
                readings.append(Reading(scope, "power_w", self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000, "W"))
            except self._nvml.NVMLError:
                continue  # a reading that this GPU or driver does not offer
        return readings


class ServerMetrics:
    """The server's own metrics, under the canonical names of :class:`harness.adapter.MetricSample`."""

    source = "server"
    interval_s = 1.0

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def read(self) -> list[Reading]:
        return [Reading(s.scope, s.metric, s.value, s.unit) for s in self._deployment.scrape()]


class Replicas:
    """Watches which replicas live, and writes their births and deaths to the events."""

    source = "replicas"
    interval_s = 0.5

    def __init__(self, deployment: Deployment, events: EventLog) -> None:
        self._deployment = deployment
        self._events = events
        self._known: dict[ProcessRef, Replica] | None = None

    def read(self) -> list[Reading]:
        alive = {replica.process: replica for replica in self._deployment.replicas()}
        if self._known is not None:
            for ref, replica in alive.items():
                if ref not in self._known:
                    self._events.write("replica-born", replica=replica.name, pid=ref.pid)
            for ref, replica in self._known.items():
                if ref not in alive:
                    self._events.write("replica-died", replica=replica.name, pid=ref.pid)
        self._known = alive
        return [Reading("server", "replicas_alive", len(alive), "1")]


class Sampler:
    """Runs collectors, each in a thread of its own so that a slow one delays no other, and writes what they read."""

    def __init__(
        self,
        collectors: Sequence[Collector],
        stem: Path,
        *,
        epoch_ns: int,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._writer = TableWriter(stem, SAMPLE_SCHEMA)
        self._epoch_ns = epoch_ns
        self._on_error = on_error
        self._lock = threading.Lock()
        self._pending: list[tuple[int, str, Reading]] = []
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._collect, args=(collector,), name=f"collect-{collector.source}", daemon=True)
            for collector in collectors
        ]
        self._threads.append(threading.Thread(target=self._flush_regularly, name="samples", daemon=True))

    def start(self) -> None:
        """Begin to collect."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop collecting, and write what is pending."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_JOIN_S)
            if thread.is_alive():  # a daemon thread: it ends with the harness
                self._on_error(TailraceError(f"{thread.name} did not come back within {_JOIN_S:.0f} s"))
        try:
            self._flush()
        except StorageError as error:
            self._on_error(error)
        self._writer.close()

    def _collect(self, collector: Collector) -> None:
        next_ns = time.monotonic_ns()
        while not self._stopped.is_set():
            now = time.monotonic_ns()
            try:
                readings = collector.read()
            except OSError:
                readings = []  # a server that is down or busy has nothing to tell; the gap in the series says so
            except Exception as error:  # a collector that fails must not go unnoticed, nor stop the trial
                self._on_error(error)
                return
            with self._lock:
                self._pending += [(now, collector.source, reading) for reading in readings]
            # On the grid, without catching up: a reading that took too long is followed by the next grid point.
            step = int(collector.interval_s * 1e9)
            next_ns += step * max(1, -(-(time.monotonic_ns() - next_ns) // step))
            self._stopped.wait(max(0.0, (next_ns - time.monotonic_ns()) / 1e9))

    def _flush_regularly(self) -> None:
        while not self._stopped.wait(_FLUSH_S):
            try:
                self._flush()
            except StorageError as error:
                self._on_error(error)
                return

    def _flush(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        if not pending:
            return
        columns = [
            [t_ns - self._epoch_ns for t_ns, _, _ in pending],
            [source for _, source, _ in pending],
            [reading.scope for _, _, reading in pending],
            [reading.metric for _, _, reading in pending],
            [float(reading.value) for _, _, reading in pending],
            [reading.unit for _, _, reading in pending],
        ]
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SAMPLE_SCHEMA, strict=True)]
        self._writer.append(pa.RecordBatch.from_arrays(arrays, schema=SAMPLE_SCHEMA))
