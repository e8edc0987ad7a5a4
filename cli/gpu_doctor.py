"""What this machine has and lacks for `device: cuda`, each with the command that mends it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from tailrace.cli.doctor import Finding
from tailrace.harness.gpus import VISIBLE, Gpu, gpus, handle_of, mig_enabled, nvml
from tailrace.harness.run.gpu_collectors import DCGM_PORT, DcgmExporter, NvidiaGpus

_TORCH_TIMEOUT_S = 120.0
_TORCH = """
import torch
names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
print(torch.__version__, "CUDA", torch.version.cuda, names or "sees no device")
raise SystemExit(0 if names else 1)
"""


def examine_gpus() -> list[Finding]:
    """Look at driver, GPUs and what reads them; changes nothing. Without a driver that is all there is to say."""
    import pynvml

    try:
        with nvml() as module:
            version = module.nvmlSystemGetDriverVersion()
            cuda = module.nvmlSystemGetCudaDriverVersion()
            driver = Finding("NVIDIA driver", True, f"{version}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}", "")
            found = gpus()
            return [
                driver,
                _visible(found, module.nvmlDeviceGetCount()),
                *(finding for gpu in found for finding in _one(module, gpu)),
                *([_queries(found)] if found else []),
                _torch(),
                _exporter(),
            ]
    except pynvml.NVMLError as error:
        return [
            Finding(
                "NVIDIA driver",
                False,
                f"none: this machine has no NVIDIA GPU, or no driver for it ({error})",
                "nvidia-smi must list a GPU: install NVIDIA's driver, or give the container its GPUs "
                "(docker run --gpus all)",
            )
        ]


def _visible(found: list[Gpu], count: int) -> Finding:
    limited = f" of {count}, by {VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else ""
    names = "; ".join(f"{gpu.scope}: {gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in found)
    return Finding(
        "GPUs that may be used", bool(found), f"{len(found)}{limited}: {names or 'none'}", f"unset {VISIBLE}"
    )


def _one(pynvml: Any, gpu: Gpu) -> list[Finding]:
    """What concerns one device; a question that its card does not answer is left out."""
    card = pynvml.nvmlDeviceGetHandleByUUID(gpu.card_uuid)
    findings = []
    for look in (_mig, _persistence, _clocks, _others):
        try:
            findings.append(look(pynvml, gpu, handle_of(pynvml, gpu) if look is _others else card))
        except pynvml.NVMLError:
            continue
    return findings


def _mig(pynvml: Any, gpu: Gpu, card: Any) -> Finding:
    on = mig_enabled(pynvml, card)
    found = "on: power, clocks and energy are the whole card's, and its other instances share them" if on else "off"
    return Finding(f"{gpu.scope}: MIG off", not on, found, f"nvidia-smi -i {gpu.index} -mig 0", needed=False)


def _persistence(pynvml: Any, gpu: Gpu, card: Any) -> Finding:
    on = bool(pynvml.nvmlDeviceGetPersistenceMode(card))
    return Finding(
        f"{gpu.scope}: persistence mode",
        on,
        "on" if on else "off: the driver starts anew with every first process, which cold starts would count",
        f"nvidia-smi -i {gpu.index} -pm 1",
        needed=False,
    )


def _clocks(pynvml: Any, gpu: Gpu, card: Any) -> Finding:
    now, most = (
        ask(card, pynvml.NVML_CLOCK_SM) for ask in (pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetMaxClockInfo)
    )
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
    slow = {
        "heat": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "its power limit": pynvml.nvmlClocksThrottleReasonSwPowerCap
        | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        "hardware": pynvml.nvmlClocksThrottleReasonHwSlowdown,
    }
    held = [name for name, mask in slow.items() if reasons & mask]
    return Finding(
        f"{gpu.scope}: clocks",
        not held,
        f"{now} of {most} MHz" + (f", held down by {' and '.join(held)}" if held else ""),
        f"nvidia-smi -i {gpu.index} -lgc MHZ (a clock that it can hold); see nvidia-smi -q -d PERFORMANCE",
        needed=False,
    )


def _others(pynvml: Any, gpu: Gpu, handle: Any) -> Finding:
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    listed = ", ".join(
        f"pid {process.pid}" + ("" if process.usedGpuMemory is None else f" ({process.usedGpuMemory / 2**20:.0f} MiB)")
        for process in processes
    )
    remedy = "end them: nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"
    return Finding(f"{gpu.scope}: nobody else on it", not processes, listed or "nobody", remedy, needed=False)


def _queries(found: list[Gpu]) -> Finding:
    """One reading of the collector, which tells what it has to leave out."""
    left_out: list[str] = []
    collector = NvidiaGpus(
        found, lambda _, **details: left_out.append(f"{details['gpu']}: {details.get('query', 'lost')}")
    )
    try:
        collector.read()
    finally:
        collector.close()
    told = "; ".join(left_out)
    return Finding(
        "all that NVML tells", not left_out, f"not told: {told}" if told else "all", "a newer driver", needed=False
    )


def _torch() -> Finding:
    """Of this interpreter, which serves under `environment: current`; in other environments servers find out themselves."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=False
        )
        ok, said = done.returncode == 0, (done.stdout or done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        ok, said = False, [f"it did not answer within {_TORCH_TIMEOUT_S:.0f} s"]
    return Finding(
        "torch with CUDA in this interpreter (for `environment: current`)",
        ok,
        said[-1] if said else "nothing",
        "pip install torch, a build for a CUDA that the driver supports; `environment: venv` installs its own",
        needed=False,
    )


def _exporter() -> Finding:
    address = f"127.0.0.1:{DCGM_PORT}"
    answers = DcgmExporter(address, ()).answers()
    return Finding(
        "DCGM exporter (for SM and tensor activity)",
        answers,
        f"at {address}" if answers else f"none at {address}",
        f"docker run -d --gpus all --cap-add SYS_ADMIN -p {address}:{DCGM_PORT} nvcr.io/nvidia/k8s/dcgm-exporter",
        needed=False,
    )
