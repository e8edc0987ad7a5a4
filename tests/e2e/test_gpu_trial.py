"""A whole trial on `device: cuda`: a real server, whose GPU is played by a fake of NVML, in a harness of its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tailrace.harness.records.store import RunFolder

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]

# The second card of two is the one that may be used; its power limit holds its clocks down, somebody else has 2 GiB of it,
# it has no ECC, and its counter of energy goes by 300 W.
HARNESS = """
import sys, time
import pynvml
from tests import fake_nvml
fake_nvml._ANSWERS["TotalEnergyConsumption"] = lambda gpu: int(time.monotonic() * gpu.power_mw)
others = {1: 2 << 30}
fit = fake_nvml.FakeGpu("GPU-fit", refuses={"TotalEccErrors": fake_nvml.UNSUPPORTED})
bad = fake_nvml.FakeGpu("GPU-bad", refuses=fit.refuses, processes=others, reasons=pynvml.nvmlClocksThrottleReasonSwPowerCap)
sys.modules["pynvml"] = fake_nvml.FakeNvml([fit, bad])
from tailrace.cli.main import main
main()
"""
# Answers as on any device that is not emulated, but only where the server sees the very GPU that it was given.
MODEL = """
import os
if "TAILRACE_DEVICE_DIR" in os.environ:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == EXPECTED, os.environ["CUDA_VISIBLE_DEVICES"]
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
"""


@pytest.fixture(scope="module", params=["0", "1"], ids=["fit", "throttled and shared"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunFolder]:
    folder = tmp_path_factory.mktemp("gpu")
    model = folder / "toy"
    shutil.copytree(ROOT / "workloads" / "emulated", model, ignore=shutil.ignore_patterns("__pycache__"))
    declared = yaml.safe_load((model / "workload.yaml").read_text())
    (model / "workload.yaml").write_text(yaml.safe_dump({**declared, "name": "toy", "devices": ["cuda"]}))
    checks = MODEL.replace("EXPECTED", repr(request.param))
    (model / "model.py").write_text((model / "model.py").read_text() + checks)
    arguments = ["run", "smoke", "--adapter", "null", "--workload", str(model), "--out", str(folder / "run")]
    arguments += ["--set=devices=1", "--set=trace.params={rate: 80, duration_s: 8}", "--set=device_price_per_hour=2"]
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": request.param},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, RunFolder.open(folder / "run")


def trial_of(run: RunFolder) -> dict[str, Any]:
    (trial,) = json.loads((run.folder / "summary.json").read_text())["trials"]
    return dict(trial)


def test_the_gpus_figures_are_those_of_the_one_in_use(run: tuple[str, RunFolder]) -> None:
    number, folder = run
    trial = trial_of(folder)
    (gpu,) = trial["gpus"]
    assert gpu["gpu"] == f"gpu-{number}"
    assert (gpu["utilization"], gpu["temperature_c"], gpu["power_w"]) == (0.5, 55, 300)
    assert gpu["energy_from"] == "counter"
    assert gpu["energy_j"] == pytest.approx(300 * trial["span_s"], rel=0.01)
    assert trial["goodput_per_joule"] == pytest.approx(trial["goodput_rps"] / 300, rel=0.01)
    assert trial["goodput_per_dollar"] == pytest.approx(trial["goodput_rps"] * 1800)
    assert trial["utilization"] == 0.5
    assert gpu["ecc_corrected"] is None
    left_out = [event for event in folder.trials[0].events if event["event"] == "gpu-query-left-out"]
    assert [event["query"] for event in left_out] == ["ECC errors"]


def test_only_the_one_that_is_held_down_and_shared_is_suspect(run: tuple[str, RunFolder]) -> None:
    number, folder = run
    codes = {reason["code"] for reason in trial_of(folder)["reasons"] if reason["code"].startswith("gpu-")}
    assert codes == (set() if number == "0" else {"gpu-throttled", "gpu-shared"})


def test_the_report_tells_of_it(run: tuple[str, RunFolder]) -> None:
    number, folder = run
    page = (folder.folder / "report.html").read_text(encoding="utf-8")
    assert ("gpu-throttled" in page) == (number == "1")
    assert "Fake H100" in page
