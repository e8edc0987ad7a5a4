"""What is read of GPUs while a trial runs: NVML twelve times a second, and NVIDIA's DCGM exporter where there is one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tailrace.harness.contract.control import ControlConnection
from tailrace.harness.errors import TailraceError
from tailrace.harness.gpus import Gpu, handle_of, nvml
from tailrace.harness.run.collectors import Reading

_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Its inode (the kernel's ``PROC_PID_INIT_INO``). In any other namespace pids are not those that NVML tells."""

Values = list[tuple[str, float, str]]
Query = Callable[[Any, Any], Values]
"""From the module ``pynvml`` and a handle to metrics, values and units."""


def _utilization(pynvml: Any, handle: Any) -> Values:
    return [("utilization", pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100, "1")]


def _memory(pynvml: Any, handle: Any) -> Values:
    return [("memory_bytes", pynvml.nvmlDeviceGetMemoryInfo(handle).used, "B")]


def _power(pynvml: Any, handle: Any) -> Values:
    return [("power_w", pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3, "W")]


def _energy(pynvml: Any, handle: Any) -> Values:
    return [("energy_j_total", pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "J")]


def _sm_clock(pynvml: Any, handle: Any) -> Values:
    return [("sm_clock_mhz", pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM), "MHz")]


def _memory_clock(pynvml: Any, handle: Any) -> Values:
    return [("memory_clock_mhz", pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM), "MHz")]


def _temperature(pynvml: Any, handle: Any) -> Values:
    return [("temperature_c", pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU), "°C")]


def _throttled(pynvml: Any, handle: Any) -> Values:
    """Why the clocks are lower than they could be, as far as that is not idleness or somebody's wish."""
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    kinds = {
        "thermal": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "power": pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        "hardware": pynvml.nvmlClocksThrottleReasonHwSlowdown,
    }
    told: Values = [(f"throttled_{kind}", float(bool(reasons & mask)), "1") for kind, mask in kinds.items()]
    return [("throttled", max(value for _, value, _ in told), "1"), *told]


def _ecc(pynvml: Any, handle: Any) -> Values:
    kinds = {
        "corrected": pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        "uncorrected": pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    }
    return [
        (f"ecc_{name}_total", pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, pynvml.NVML_VOLATILE_ECC), "1")
        for name, kind in kinds.items()
    ]


_OFTEN: dict[str, Query] = {
    "utilization": _utilization,
    "memory": _memory,
    "power": _power,
    "energy": _energy,
    "SM clock": _sm_clock,
    "memory clock": _memory_clock,
    "temperature": _temperature,
    "throttle reasons": _throttled,
}
"""Read every time; each takes NVML well under a millisecond."""


class NvidiaGpus:
    """Utilization, memory, power, energy, clocks, temperature, throttling and ECC errors of some GPUs, through NVML.

    Memory and utilization are also told by process, about once a second: the server's own against all others, of those
    that compute. A query that a card does not support, or that this user may not make, is left out from then on, and
    told once; so is a GPU that NVML has lost. ``close`` lets NVML go.
    """

    source = "gpu"
    interval_s = 0.08
    _SELDOM_EVERY = 12

    def __init__(self, gpus: Sequence[Gpu], tell: Callable[..., None]) -> None:
        """``tell(event, **details)`` is called from the collector's thread. To be made before the server is started: in a
        container, only what is there before it can be told from it."""
        import pynvml

        self._exit = contextlib.ExitStack()
        self._tell = tell
        try:
            self._nvml = self._exit.enter_context(nvml())
            self._gpus = {gpu: handle_of(self._nvml, gpu) for gpu in gpus}
        except pynvml.NVMLError as error:
            self._exit.close()
            raise TailraceError(
                f"NVML does not tell of {', '.join(gpu.scope for gpu in gpus)}: {error}", remedy="tailrace doctor --gpu"
            ) from error
        self._left_out: set[tuple[Gpu, str]] = set()
        self._reads = 0
        self._own_pids: Callable[[], Iterable[int]] = tuple
        self._ever_own: set[int] = set()
        self._same_pids = Path("/proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE
        self._before = {gpu: self._pids(handle) for gpu, handle in self._gpus.items()}
        self._told_us = dict.fromkeys(self._gpus, time.time_ns() // 1000)  # the clock of NVML's samples

    def close(self) -> None:
        """Let NVML go."""
        self._exit.close()

    def serve(self, own_pids: Callable[[], Iterable[int]]) -> None:
        """From now on there is a server, whose processes these are."""
        self._own_pids = own_pids

    def read(self) -> list[Reading]:
        seldom = self._reads % self._SELDOM_EVERY == 0
        self._reads += 1
        readings: list[Reading] = []
        for gpu, handle in list(self._gpus.items()):
            queries = dict(_OFTEN)
            if seldom:
                queries |= {
                    "ECC errors": _ecc,
                    "processes": self._processes_of(gpu),
                    "utilization by process": self._utilization_of(gpu),
                }
            readings += self._ask(gpu, handle, queries)
        return readings

    def _ask(self, gpu: Gpu, handle: Any, queries: dict[str, Query]) -> Iterator[Reading]:
        pynvml = self._nvml
        for name, query in queries.items():
            if (gpu, name) in self._left_out:
                continue
            try:
                values = query(pynvml, handle)
            except pynvml.NVMLError as error:
                if error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED):
                    del self._gpus[gpu]
                    self._tell("gpu-lost", gpu=gpu.scope, message=str(error))
                    yield Reading(gpu.scope, "lost", 1.0, "1")
                    return
                if error.value in (
                    pynvml.NVML_ERROR_NOT_SUPPORTED,
                    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                    pynvml.NVML_ERROR_NO_PERMISSION,
                    pynvml.NVML_ERROR_INVALID_ARGUMENT,  # how some drivers refuse it to a MIG instance
                ):
                    self._left_out.add((gpu, name))
                    self._tell("gpu-query-left-out", gpu=gpu.scope, query=name, message=str(error))
                continue  # else it is of the moment: the gap in the series says so
            for metric, value, unit in values:
                yield Reading(gpu.scope, metric, value, unit)

    # -- by process ----------------------------------------------------------------------------------------------

    def _pids(self, handle: Any) -> set[int]:
        try:
            return {process.pid for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        except self._nvml.NVMLError:
            return set()

    def _other(self, gpu: Gpu, pids: set[int]) -> set[int]:
        """Which of these processes on a GPU are none of the server's; to be asked after NVML, for a server's may be new.

        One that was the server's stays so: a process that was killed holds its memory for a moment yet. In a container NVML
        goes on telling the pids of the host: of those, the ones that were there before the server cannot be its own, and of
        others nobody knows better.
        """
        if not self._same_pids:
            return pids & self._before[gpu]
        self._ever_own |= set(self._own_pids())
        return pids - self._ever_own

    def _processes_of(self, gpu: Gpu) -> Query:
        def processes(pynvml: Any, handle: Any) -> Values:
            found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            other = self._other(gpu, {process.pid for process in found})
            others = [process for process in found if process.pid in other]
            own = [process for process in found if process.pid not in other]
            values: Values = [("other_processes", float(len(others)), "1")]
            for name, part in (("server", own), ("other", others)):
                memory = [process.usedGpuMemory for process in part]
                if None not in memory:  # in some containers the driver does not tell
                    values.append((f"{name}_memory_bytes", float(sum(memory)), "B"))
            return values

        return processes

    def _utilization_of(self, gpu: Gpu) -> Query:
        def utilization(pynvml: Any, handle: Any) -> Values:
            try:
                samples = pynvml.nvmlDeviceGetProcessUtilization(handle, self._told_us[gpu])
            except pynvml.NVMLError as error:
                if error.value != pynvml.NVML_ERROR_NOT_FOUND:
                    raise
                samples = []  # nobody has computed since
            other = self._other(gpu, {sample.pid for sample in samples if sample.pid})
            shares: dict[int, list[float]] = {}
            for sample in samples:
                self._told_us[gpu] = max(self._told_us[gpu], sample.timeStamp)
                if sample.pid in other:
                    shares.setdefault(sample.pid, []).append(sample.smUtil / 100)
            total = sum(sum(share) / len(share) for share in shares.values())
            return [("other_utilization", min(1.0, total), "1")]

        return utilization


DCGM_PORT = 9400
"""Where NVIDIA's exporter listens unless it is told otherwise."""
_DCGM_METRICS = {
    "DCGM_FI_PROF_SM_ACTIVE": "sm_active",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "tensor_active",
    "DCGM_FI_PROF_DRAM_ACTIVE": "dram_active",
}


class DcgmExporter:
    """Shares of time in which SMs, tensor cores and memory were active, from NVIDIA's DCGM exporter.

    Its GPUs are matched to those in use by UUID, and MIG instances by their number within the card.
    """

    source = "dcgm"
    interval_s = 1.0

    def __init__(self, address: str, gpus: Sequence[Gpu]) -> None:
        """``address`` is ``HOST:PORT``."""
        host, _, port = address.rpartition(":")
        self._connection = ControlConnection("the DCGM exporter", host, int(port), Path(os.devnull))
        self._scopes = {(gpu.card_uuid, "" if gpu.instance is None else str(gpu.instance)): gpu.scope for gpu in gpus}

    def read(self) -> list[Reading]:
        readings = []
        for family in text_string_to_metric_families(self._connection.page("/metrics")):
            if (metric := _DCGM_METRICS.get(family.name)) is None:
                continue
            for sample in family.samples:
                scope = self._scopes.get((sample.labels.get("UUID", ""), sample.labels.get("GPU_I_ID", "")))
                if scope is not None:
                    readings.append(Reading(scope, metric, sample.value, "1"))
        return readings

    def answers(self) -> bool:
        """Whether there is an exporter at that address."""
        try:
            return "DCGM_FI_" in self._connection.page("/metrics")
        except OSError:
            return False
