"""The bare model's ceiling, on the emulated accelerator, whose limit is known; and shares of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tailrace.cli.ceiling import parts
from tailrace.cli.main import app
from tailrace.cli.show import read
from tailrace.harness.errors import InputError, TailraceError
from tailrace.harness.records.summary import CellSummary, RunSummary
from tailrace.harness.run.ceiling import BareModel, Ceiling, Reached, best_cells, settings, told
from tests.fake_nvml import FakeGpu, install
from tests.records import cell_summary, trial_summary


def _cell(adapter: str, goodput_rps: float, tuning: dict[str, Any], **more: Any) -> CellSummary:
    told = {"cell": f"{adapter}--{goodput_rps:g}", "adapter": adapter, "goodput_rps": goodput_rps, "tuning": tuning}
    return cell_summary(**{**told, **more})


def _silent(_: str) -> None:
    return None


def test_the_emulated_device_answers_as_fast_as_it_is_declared() -> None:
    """A batch of 4 takes at least 12 + 4·3 ms, and copies on one device take turns."""
    bare = BareModel("emulated", environment="current", on_progress=_silent)
    one = bare.measure(4, 1, 0.5)
    assert one.p50_ms >= 24 and one.items_per_s <= 4 / 0.024 * 1.02
    both = bare.measure(4, 2, 0.5)
    assert both.items_per_s <= 4 / 0.024 * 1.1, "a call that began before the end is counted with its whole time"
    assert both.p50_ms > 40


def test_copies_are_dealt_out_over_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    bare = BareModel("emulated", environment="current", on_progress=_silent)
    bare.workload = replace(bare.workload, device="cuda")
    bare._devices = 2
    assert [bare.job(tmp_path, 1, number, 1.0)["device"] for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(InputError, match="1 GPUs are asked for, this machine has 0"):
        BareModel("minilm", device="cuda", on_progress=_silent)


def test_a_model_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    bare = BareModel("emulated", environment="current", on_progress=_silent)
    broken = tmp_path / "model.py"
    broken.write_text("class Model:\n    def __init__(self, *_): raise MemoryError('out of device memory')\n")
    bare.workload = replace(bare.workload, model_file=broken)
    with pytest.raises(TailraceError) as raised:
        bare.measure(1, 1, 0.1)
    assert "out of device memory" in str(raised.value.detail)


def test_the_best_cell_of_each_setting_is_compared_at_the_same_batch() -> None:
    batched = {"max_batch": 8, "replicas": 2}
    cells = [
        _cell("triton", 50, batched),
        _cell("triton", 70, batched),
        _cell("triton", 90, batched, verdict="INVALID"),
        _cell("triton", 80, batched, cell="triton--killed"),
        _cell("kserve", 9, {}),
        _cell("ray_serve", 60, {"max_batch": 8, "replicas": 1}, nodes=2),
    ]
    trials = [trial_summary(cell="triton--killed", faults=[{"kind": "kill_replica", "recovery": None}])]
    summary = RunSummary.model_construct(cells=cells, trials=trials)
    reached = best_cells({"run": summary})
    assert [(one.cell, one.batch, one.instances) for one in reached] == [
        ("kserve--9", 1, 1),
        ("ray_serve--60", 8, 2),
        ("triton--70", 8, 2),
    ]
    ceilings = [Ceiling(1, 1, 10.0, 1, 1), Ceiling(8, 2, 100.0, 1, 1)]
    assert [cell["of_ceiling"] for cell in told(ceilings, reached)["cells"]] == [0.9, 0.6, 0.7]
    assert told([], [Reached("r", "c", 1.0, 4, 4)])["cells"] == [], "nothing is compared with another batch"


def test_an_autoscaled_cell_counts_its_most_replicas() -> None:
    assert settings(_cell("a", 1, {"autoscale": {"min": 1, "max": 3}, "max_batch": 4}, nodes=2)) == (4, 6)


@pytest.mark.parametrize(("goodput", "doubted"), [(110.0, True), (99.0, False)])
def test_a_share_above_the_limit_is_doubted(goodput: float, doubted: bool) -> None:
    content = told([Ceiling(8, 2, 100.0, 1, 1)], [Reached("run", "triton--one", goodput, 8, 2)])
    console = Console(record=True, width=150)
    what = {"workload": "minilm", "device": "cpu", "precision": "bf16", "compiled": False}
    read(console, *parts({**what, **content}))
    printed = console.export_text()
    assert f"{goodput:.0f}%" in printed and "minilm with no server, on cpu in bf16" in printed
    assert ("measure again" in printed) == doubted


def test_the_command_prints_figures_or_says_what_is_missing() -> None:
    runner = CliRunner()
    asked = ["ceiling", "emulated", "--batch", "2", "--duration", "0.2", "--environment", "current", "--format", "json"]
    done = runner.invoke(app, asked)
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["device"] == "emulated" and content["ceilings"][0]["batch"] == 2 and content["cells"] == []
    for arguments, message in (([], "Missing argument WORKLOAD"), (["emulated", "--batch", "0"], "from 1 to")):
        failed = runner.invoke(app, ["ceiling", *arguments])
        assert message in str(failed.exception)
