"""Collectors read the server, the host and the devices while a trial runs, each at its own pace, into ``samples``."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import pyarrow as pa

from tailrace.harness.contract.adapter import Deployment, Replica
from tailrace.harness.contract.pipeline import read_clocks
from tailrace.harness.errors import StorageError, TailraceError
from tailrace.harness.processes import ProcessRef, descendants
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.store import EventLog
from tailrace.harness.records.tables import TableWriter
from tailrace.harness.servers.cluster import Cluster
from tailrace.harness.servers.device_memory import LOADS, read_rooms
from tailrace.harness.servers.emulated_device import read_counters

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
    """CPU time and memory of all nodes' process trees.

    CPU time is a counter that never falls: what processes used before they ended stays counted. Memory is the
    proportional set size (shared pages divided among those who share them), read less often, for it is dear.
    """

    source = "server-process"
    interval_s = 0.5
    _MEMORY_EVERY = 6

    def __init__(self, roots: Callable[[], Iterable[ProcessRef]]) -> None:
        """``roots`` are the process trees that serve now."""
        self._roots = roots
        self._cpu_s: dict[ProcessRef, float] = {}
        self._reads = 0

    def read(self) -> list[Reading]:
        processes = 0
        memory_bytes = 0
        with_memory = self._reads % self._MEMORY_EVERY == 0
        self._reads += 1
        for ref, process in (found for root in self._roots() for found in descendants(root)):
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


class OwnProcesses:
    """CPU time of processes of the harness itself, so that their load is not taken for someone else's.

    With ``descend`` the children count too (several load workers below their master).
    """

    interval_s = 0.5

    def __init__(self, source: str, pid: int, *, descend: bool = True) -> None:
        self.source = source
        self._process = psutil.Process(pid)
        self._descend = descend
        self._cpu_s: dict[int, float] = {}

    def read(self) -> list[Reading]:
        try:
            family = [self._process, *(self._process.children() if self._descend else ())]
            for process in family:
                times = process.cpu_times()
                self._cpu_s[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            return []
        return [Reading("process", "cpu_s_total", sum(self._cpu_s.values()), "s")]


class Host:
    """Load of the whole machine, and what the hypervisor took away, as shares in 0..1 since the last reading; how fast
    its CPUs run, and how often they were throttled for heat, where the kernel tells."""

    source = "host"
    interval_s = 0.5

    def __init__(self) -> None:
        self._last = psutil.cpu_times()
        self._clock = CpuClock(Path("/sys/devices/system/cpu"), Path("/proc/cpuinfo"))

    def read(self) -> list[Reading]:
        return [*self._load(), *self._clock.read()]

    def _load(self) -> list[Reading]:
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


class CpuClock:
    """Mean frequency of the CPUs, and the throttlings of their cores since boot.

    From ``cpufreq`` where there is a driver, else from ``cpuinfo``, where virtual machines often report one nominal
    frequency for ever; nothing where neither tells. Of large machines, CPUs evenly spread over all: a reading must cost
    less than a millisecond.
    """

    _MOST = 16

    def __init__(self, cpus: Path, cpuinfo: Path) -> None:
        """``cpus`` is the kernel's folder of CPUs, ``cpuinfo`` its file about them."""
        self._frequencies = _spread(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"), self._MOST)
        self._throttlings = _spread(cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"), self._MOST)
        self._cpuinfo = cpuinfo

    def read(self) -> list[Reading]:
        """The readings of now."""
        readings = []
        if mhz := [khz / 1000 for khz in map(_number, self._frequencies) if khz] or self._from_cpuinfo():
            readings.append(Reading("host", "frequency_mhz", sum(mhz) / len(mhz), "MHz"))
        counts = [count for count in map(_number, self._throttlings) if count is not None]
        if counts:
            readings.append(Reading("host", "throttled_total", sum(counts), "1"))
        return readings

    def _from_cpuinfo(self) -> list[float]:
        try:
            lines = self._cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
            return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        except (OSError, ValueError):
            return []


def _spread(paths: Iterable[Path], most: int) -> list[Path]:
    """At most so many of the paths, evenly spread over all of them in their order."""
    ordered = sorted(paths)
    return ordered[:: -(-len(ordered) // most)] if ordered else []


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class ContainerStatistics:
    """What the engine counts of each container: CPU time, for how long its limit held it back, memory without the page
    cache that could be given back, and processes."""

    source = "container"
    interval_s = 1.0

    def __init__(self, statistics: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
        """``statistics`` are those of the containers that run, by name, as the engine tells them."""
        self._statistics = statistics

    def read(self) -> list[Reading]:
        readings = []
        for name, told in self._statistics().items():
            cpu, memory = told.get("cpu_stats", {}), told.get("memory_stats", {})
            if "usage" not in memory:
                continue  # it has just ended
            # The name in control groups of version 1 and of version 2.
            details = memory.get("stats", {})
            cache = details.get("total_inactive_file", details.get("inactive_file", 0))
            readings += [
                Reading(name, "cpu_s_total", cpu["cpu_usage"]["total_usage"] / 1e9, "s"),
                Reading(name, "throttled_s_total", cpu.get("throttling_data", {}).get("throttled_time", 0) / 1e9, "s"),
                Reading(name, "memory_bytes", memory["usage"] - cache, "B"),
                Reading(name, "processes", told.get("pids_stats", {}).get("current", 0), "1"),
            ]
        return readings


class Publishers:
    """CPU time of what hands connections on from this machine to containers: a cost of publishing their ports, and nobody
    else's load."""

    source = "port-publisher"
    interval_s = 1.0

    def __init__(self, publishers: Callable[[], Iterable[ProcessRef]]) -> None:
        self._publishers = publishers
        self._cpu_s: dict[ProcessRef, float] = {}

    def read(self) -> list[Reading]:
        for ref in self._publishers():
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(ref.pid).cpu_times()
                self._cpu_s[ref] = times.user + times.system
        return [Reading("process", "cpu_s_total", sum(self._cpu_s.values()), "s")]


class EmulatedDevices:
    """Busy time of the emulated accelerators, summed over all copies of the model that ever held one, and how many of
    these copies have answered."""

    source = "device"
    interval_s = 0.2

    def __init__(self, folders: Sequence[Path], devices: int) -> None:
        """One folder for each node, of ``devices`` devices each."""
        self._folders = folders
        self._devices = devices

    def read(self) -> list[Reading]:
        busy = dict.fromkeys(range(len(self._folders) * self._devices), 0.0)
        batches, items = dict(busy), dict(busy)
        copies_used = 0
        for node, folder in enumerate(self._folders):
            for counters in read_counters(folder):
                device = node * self._devices + counters.device
                busy[device] = busy.get(device, 0.0) + counters.busy_ns / 1e9
                batches[device] = batches.get(device, 0.0) + counters.batches
                items[device] = items.get(device, 0.0) + counters.items
                copies_used += counters.batches > 0
        readings = []
        for device in busy:
            scope = f"device-{device}"
            readings += [
                Reading(scope, "busy_s_total", busy[device], "s"),
                Reading(scope, "batches_total", batches[device], "1"),
                Reading(scope, "items_total", items[device], "1"),
            ]
        return [*readings, Reading("copies", "copies_used", copies_used, "1")]


class SharedMemory:
    """The memory that models share, and, as events, which models come and go: ``models-resident`` at first, ``model-begun``,
    ``model-loaded``, ``model-failed``, ``model-refused`` by the models' own clock, ``model-gone`` when it is seen."""

    source = "memory"
    interval_s = 0.05

    def __init__(self, folder: Path, budget_bytes: int, events: EventLog) -> None:
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._events = events
        self._told_bytes = 0
        self._rooms: dict[str, tuple[str, int]] | None = None

    def read(self) -> list[Reading]:
        self._tell_loads()
        rooms = read_rooms(self._folder)
        if self._rooms is None:
            self._events.write("models-resident", models=sorted({model for model, _ in rooms.values()}))
        for name, (model, _) in (self._rooms or {}).items():
            if name not in rooms:
                self._events.write("model-gone", model=model)
        self._rooms = rooms
        used = sum(size for _, size in rooms.values())
        return [
            Reading("device-0", "memory_used_bytes", used, "B"),
            Reading("device-0", "memory_free_bytes", self._budget_bytes - used, "B"),
            Reading("device-0", "models_resident", len(rooms), "1"),
        ]

    def _tell_loads(self) -> None:
        with (self._folder / LOADS).open(encoding="utf-8") as log:
            log.seek(self._told_bytes)
            for line in log:
                if not line.endswith("\n"):
                    break
                self._told_bytes += len(line.encode())
                told = json.loads(line)
                self._events.write(f"model-{told.pop('what')}", **told)


class StageClocks:
    """What the stages of a pipeline have computed, and what whoever calls them has got of them, by stage, all copies together."""

    source = "stages"
    interval_s = 0.5

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> list[Reading]:
        readings = []
        for (stage, kind), counts in read_clocks(self._folder).items():
            if kind == "computed":
                readings += [
                    Reading(stage, "busy_s_total", counts.seconds, "s"),
                    Reading(stage, "batches_total", counts.events, "1"),
                    Reading(stage, "items_total", counts.items, "1"),
                ]
            else:
                readings += [
                    Reading(stage, "stage_answer_s_total", counts.seconds, "s"),
                    Reading(stage, "stage_answers_total", counts.events, "1"),
                ]
        return readings


class ServerMetrics:
    """The server's own metrics, under the canonical names of :class:`MetricSample`."""

    source = "server"
    interval_s = 1.0

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def read(self) -> list[Reading]:
        return [Reading(s.scope, s.metric, s.value, s.unit) for s in self._deployment.scrape()]


class Nodes:
    """How many nodes live, and what the load balancer says of each: whether it gives it requests (1 or 0), and how many it
    has there."""

    source = "nodes"
    interval_s = 0.5

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def read(self) -> list[Reading]:
        readings = [Reading("cluster", "nodes_alive", len(self._cluster.living()), "1")]
        for name, state in self._cluster.balancer_states().items():
            readings += [
                Reading(name, "in_rotation", float(state.up), "1"),
                Reading(name, "in_flight", state.in_flight, "1"),
            ]
        return readings


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
        last = False  # the counters of the very end belong to the trial: one reading comes after it
        while not last:
            last = self._stopped.is_set()
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
