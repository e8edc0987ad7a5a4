"""The NVIDIA GPUs of this machine as NVML tells them: which there are, and which of them a run may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """One device that CUDA can compute on: a whole GPU, or one MIG instance of a GPU that is cut into such."""

    index: int
    """NVML's, in the order of the PCI bus; of a MIG instance that of its card."""
    name: str
    uuid: str
    """The GPU's own, ``GPU-…``, or the MIG instance's, ``MIG-…``."""
    memory_bytes: int
    card_uuid: str
    """``uuid``, but of a MIG instance that of its card."""
    instance: int | None = None
    """The GPU instance of a MIG device; ``None``: a whole GPU."""

    @property
    def scope(self) -> str:
        """What it is called in the samples."""
        return f"gpu-{self.index}" if self.instance is None else f"gpu-{self.index}-mig-{self.instance}"

    @property
    def cuda_id(self) -> str:
        """What ``CUDA_VISIBLE_DEVICES`` calls it, given ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.

        Of whole GPUs the index and not the UUID, for TorchServe reads the variable too and knows only numbers.
        """
        return str(self.index) if self.instance is None else self.uuid


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """The module ``pynvml``, initialised for the time of the context. Raises its ``NVMLError`` without a driver."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def handle_of(pynvml: Any, gpu: Gpu) -> Any:
    """NVML's handle of a device, for as long as NVML is initialised."""
    return pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)


def gpus() -> list[Gpu]:
    """The devices that this process may use, in the order in which it may: all, or those that ``CUDA_VISIBLE_DEVICES``
    names by index or (the beginning of) UUID; empty without a driver.

    As CUDA has it, an entry that names nothing hides itself and all that come after it.
    """
    import pynvml

    try:
        with nvml() as module:
            found = [gpu for index in range(module.nvmlDeviceGetCount()) for gpu in _devices_of(module, index)]
    except pynvml.NVMLError:
        return []
    if (chosen := os.environ.get(VISIBLE)) is None:
        return found
    visible: list[Gpu] = []
    for name in (part.strip() for part in chosen.split(",")):
        named = [gpu for gpu in found if name == gpu.cuda_id or (name and gpu.uuid.startswith(name))]
        if len(named) != 1 or named[0] in visible:
            break
        visible += named
    return visible


def _devices_of(pynvml: Any, index: int) -> list[Gpu]:
    """A GPU, or in MIG mode its instances, for then CUDA does not see the GPU itself."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = _text(pynvml.nvmlDeviceGetName(handle)), _text(pynvml.nvmlDeviceGetUUID(handle))
    if not mig_enabled(pynvml, handle):
        return [Gpu(index, name, uuid, pynvml.nvmlDeviceGetMemoryInfo(handle).total, uuid)]
    instances = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError:  # numbers may have gaps
            continue
        instances.append(
            Gpu(
                index,
                _text(pynvml.nvmlDeviceGetName(mig)),
                _text(pynvml.nvmlDeviceGetUUID(mig)),
                pynvml.nvmlDeviceGetMemoryInfo(mig).total,
                uuid,
                pynvml.nvmlDeviceGetGpuInstanceId(mig),
            )
        )
    return instances


def mig_enabled(pynvml: Any, handle: Any) -> bool:
    """Whether a GPU is cut into MIG instances."""
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:  # a card without MIG
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()
