"""`tailrace doctor --gpu`, on cards that a fake of NVML plays, and here, where there may be none."""

from __future__ import annotations

import os

import pynvml
import pytest
from typer.testing import CliRunner

from tailrace.cli import gpu_doctor
from tailrace.cli.doctor import Finding
from tailrace.cli.main import app
from tests.fake_nvml import UNSUPPORTED, FakeGpu, install


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes long, where it is there."""
    monkeypatch.setattr(gpu_doctor, "_TORCH", "print('torch, as it were')")


def examined() -> dict[str, Finding]:
    findings = gpu_doctor.examine_gpus()
    assert all(finding.found and (finding.ok or finding.remedy) for finding in findings)
    return {finding.what: finding for finding in findings}


def test_a_card_that_is_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu())
    found = examined()
    assert "570.00, for CUDA up to 12.8" in found["NVIDIA driver"].found
    assert "Fake H100, 80 GiB" in found["GPUs that may be used"].found
    # Everything but the exporter, which nothing here plays.
    assert [what for what, finding in found.items() if not finding.ok] in (
        [],
        ["DCGM exporter (for SM and tensor activity)"],
    )
    result = CliRunner().invoke(app, ["doctor", "--gpu"])
    assert result.exit_code == 0, result.output


def test_what_disturbs_is_told_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
    gpu = FakeGpu(
        persistence=0, reasons=reasons, processes={4711: 3 << 30}, refuses={"TotalEnergyConsumption": UNSUPPORTED}
    )
    install(monkeypatch, gpu)
    found = examined()
    assert (
        found["gpu-0: persistence mode"].remedy == "nvidia-smi -i 0 -pm 1" and not found["gpu-0: persistence mode"].ok
    )
    assert "held down by heat and its power limit" in found["gpu-0: clocks"].found
    assert "pid 4711 (3072 MiB)" in found["gpu-0: nobody else on it"].found
    assert found["all that NVML tells"].found == "not told: gpu-0: energy"
    assert found["gpu-0: MIG off"].ok


def test_mig_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu("GPU-a", mig=[FakeGpu("MIG-x", instance=3)]))
    mig = examined()["gpu-0-mig-3: MIG off"]
    assert not mig.ok and mig.remedy == "nvidia-smi -i 0 -mig 0"


def test_gpus_that_are_hidden_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    visible = examined()["GPUs that may be used"]
    assert not visible.ok and visible.needed and visible.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_torch_is_asked_in_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu())
    monkeypatch.setattr(gpu_doctor, "_TORCH", "import os; print(os.getpid()); raise SystemExit(1)")
    (torch,) = [finding for what, finding in examined().items() if what.startswith("torch")]
    assert not torch.ok and torch.found.isdigit() and torch.found != str(os.getpid())


def test_without_a_gpu_it_says_so_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch).has_driver = False
    result = CliRunner().invoke(app, ["doctor", "--gpu"])
    assert result.exit_code == 1
    assert "this machine has no NVIDIA GPU, or no driver" in " ".join(result.output.split())
