"""Which devices a server's processes see: the one place that says so, for trials, cold starts and the bare model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tailrace.harness.contract.workload import Device
from tailrace.harness.gpus import VISIBLE, Gpu
from tailrace.harness.servers.emulated_device import device_environment as emulated_environment


def device_environment(device: Device, folder: Path, gpus: Sequence[Gpu] = (), devices: int = 1) -> dict[str, str]:
    """The environment variables by which the processes of one node know its devices.

    ``gpus`` are its own, on ``device: cuda``. On any other device it sees none, for a server that finds a GPU holds memory
    there whether it computes on it or not. ``folder`` exists and is where emulated devices, ``devices`` of them, keep
    locks and counters. CUDA counts GPUs from the fastest on unless it is told to go by the PCI bus, as NVML does.
    """
    return {
        **emulated_environment(folder, devices),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        VISIBLE: ",".join(gpu.cuda_id for gpu in gpus) if device == "cuda" else "",
    }
