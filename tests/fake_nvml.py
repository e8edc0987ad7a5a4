"""A fake of the module ``pynvml``: devices whose every answer a test scripts, put in its place for one test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

NVMLError = pynvml.NVMLError
UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
LOST = pynvml.NVML_ERROR_GPU_IS_LOST


@dataclass
class FakeGpu:
    """One card. ``refuses`` maps the name of a query (without ``nvmlDeviceGet``) to the code it fails with; ``processes``
    maps pids to memory in bytes (``None``: not told) and ``busy`` to SM utilization in percent."""

    uuid: str = "GPU-0"
    name: str = "Fake H100"
    memory_bytes: int = 80 << 30
    used_bytes: int = 3 << 30
    utilization: int = 50
    power_mw: int = 300_000
    energy_mj: int = 1_000_000
    clock_mhz: int = 1_980
    temperature_c: int = 55
    reasons: int = 0
    ecc: int = 0
    persistence: int = 1
    processes: dict[int, int | None] = field(default_factory=dict)
    busy: dict[int, int] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)
    mig: list[FakeGpu] | None = None
    instance: int | None = None
    lost: bool = False


class FakeNvml:
    """What tests script (``gpus``, ``driver``) and what code under test sees of ``pynvml``. Constants are the real ones."""

    NVMLError = pynvml.NVMLError

    def __init__(self, gpus: list[FakeGpu]) -> None:
        self.gpus = gpus
        self.has_driver = True
        self.initialised = 0
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlDeviceGet"):
            return self._query(name.removeprefix("nvmlDeviceGet"))
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:  # noqa: N802 - the name is NVML's
        if not self.has_driver:
            raise NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.initialised += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.initialised -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.00"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 12080

    def _everything(self) -> list[FakeGpu]:
        return [*self.gpus, *(part for gpu in self.gpus for part in gpu.mig or ())]

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        return next(gpu for gpu in self._everything() if gpu.uuid == uuid)

    def _query(self, name: str) -> Callable[..., Any]:
        answer = _ANSWERS[name]

        def ask(gpu: FakeGpu, *arguments: Any) -> Any:
            assert self.initialised > 0, "asked without nvmlInit"
            self.asked.append(name)
            if gpu.lost:
                raise NVMLError(LOST)
            if name in gpu.refuses:
                raise NVMLError(gpu.refuses[name])
            return answer(gpu, *arguments)

        return ask


def _mig_mode(gpu: FakeGpu) -> list[int]:
    if gpu.mig is None:
        raise NVMLError(UNSUPPORTED)
    return [1, 1]


def _mig_handle(gpu: FakeGpu, number: int) -> FakeGpu:
    if number >= len(gpu.mig or ()):
        raise NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return (gpu.mig or [])[number]


def _by_process(gpu: FakeGpu, since_us: int) -> list[SimpleNamespace]:
    if not gpu.busy:
        raise NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return [SimpleNamespace(pid=pid, smUtil=share, timeStamp=since_us + 1) for pid, share in gpu.busy.items()]


def _processes(gpu: FakeGpu) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in gpu.processes.items()]


_ANSWERS: dict[str, Callable[..., Any]] = {
    "Name": lambda gpu: gpu.name,
    "UUID": lambda gpu: gpu.uuid,
    "MemoryInfo": lambda gpu: SimpleNamespace(total=gpu.memory_bytes, used=gpu.used_bytes),
    "UtilizationRates": lambda gpu: SimpleNamespace(gpu=gpu.utilization),
    "PowerUsage": lambda gpu: gpu.power_mw,
    "TotalEnergyConsumption": lambda gpu: gpu.energy_mj,
    "ClockInfo": lambda gpu, kind: gpu.clock_mhz + kind,
    "MaxClockInfo": lambda gpu, kind: 1_980,
    "Temperature": lambda gpu, sensor: gpu.temperature_c,
    "CurrentClocksThrottleReasons": lambda gpu: gpu.reasons,
    "TotalEccErrors": lambda gpu, kind, counter: gpu.ecc + kind,
    "ComputeRunningProcesses": _processes,
    "ProcessUtilization": _by_process,
    "PersistenceMode": lambda gpu: gpu.persistence,
    "MigMode": _mig_mode,
    "MaxMigDeviceCount": lambda gpu: 7,
    "MigDeviceHandleByIndex": _mig_handle,
    "GpuInstanceId": lambda gpu: gpu.instance,
}


def install(monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu) -> FakeNvml:
    """Put a fake with these cards in the place of ``pynvml`` until the end of the test."""
    fake = FakeNvml(list(gpus))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake
