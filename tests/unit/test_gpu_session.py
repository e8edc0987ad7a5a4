"""The session on one GPU: its experiments are possible ones there, its commands are known, and its price is its length."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tailrace.cli.main import app
from tailrace.harness.plan.loading import load_experiment
from tailrace.harness.run.preflight import check
from tests.fake_nvml import FakeGpu, install

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_session.py"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_session  # type: ignore[import-not-found]

    return gpu_session


@pytest.fixture
def session(module: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(**asked: Any) -> Any:
        given = {
            "adapter": ["triton", "kserve"], "device": "cuda", "precision": "bf16", "environment": "current",
            "cold_start": "process", "out": tmp_path / "out", "price": None, "quick": False, **asked,
        }  # fmt: skip
        return module.Session(module.argparse.Namespace(**given))

    return make


@pytest.mark.parametrize("name", ["bench-gpu", "bench-gpu-sweep", "bench-gpu-kill"])
def test_its_experiments_can_be_run_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, FakeGpu())
    for workload in ("resnet50", "minilm"):
        checked = check(load_experiment(name, overrides={"workload": workload}))
        assert checked.device == "cuda"
    assert (
        max(cell.tuning.max_batch or 1 for cell in checked.cells.values())
        == {
            "bench-gpu": 128,
            "bench-gpu-sweep": 128,
            "bench-gpu-kill": 32,
        }[name]
    )


@pytest.mark.parametrize("asked", [{}, {"device": "cpu", "quick": True}], ids=["gpu", "quick on a cpu"])
def test_every_step_is_a_command_that_there_is(session: Callable[..., Any], asked: dict[str, Any]) -> None:
    made = session(**asked)
    steps = [
        made.ceiling("minilm"),
        *made.saturations("minilm", 80.0),
        *made.races("minilm", 60.0),
        made.of_ceiling("minilm"),
    ]
    assert len({step.result for step in steps}) == len(steps)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for step in steps:
        name, *arguments = step.command
        context = commands[name].make_context(name, list(arguments))
        if name in ("run", "saturate"):
            chosen = load_experiment(
                context.params["experiment"],
                assignments=[*(context.params.get("assignments") or context.params["settings"]), "device=cpu"],
            )
            assert (chosen.workload, chosen.precision, chosen.environment) == ("minilm", "bf16", "current")


def test_loads_follow_from_what_the_device_and_the_frameworks_can(session: Callable[..., Any], tmp_path: Path) -> None:
    made = session()

    def rates(steps: Any) -> list[float]:
        told = " ".join(word for step in steps for word in step.command)
        return [float(rate) for rate in re.findall(r"(?:--start|trace\.mean_rate)=([\d.]+)", told)]

    assert rates(made.saturations("resnet50", 100.0)) == [30.0, 30.0]
    assert rates(made.saturations("resnet50", 30_000.0)) == [200.0, 200.0]
    assert rates(made.races("resnet50", 4000.0)) == [2000.0, 800.0], "a possible race, connections included"
    assert made.saturated("resnet50") is None
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "resnet50-saturation-15ms.json").write_text('{"a": {"holds": null}, "b": {"holds": 70.5}}')
    (tmp_path / "out" / "resnet50-saturation-100ms.json").write_text('{"a": {"holds": 110.0}}')
    assert made.saturated("resnet50") == 110.0


def test_it_is_priced_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--price", "6", "--workload", "minilm", "--adapter", "triton"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *steps, total = (float(minutes) for minutes in re.findall(r"^ *([\d.]+) min", done.stdout, re.M))
    assert len(steps) == 7
    assert total == pytest.approx(sum(steps), abs=0.05 * len(steps))
    (dollars,) = re.findall(r"([\d.]+) US\$", done.stdout)
    assert float(dollars) == pytest.approx(total / 10, abs=0.02)
    assert list(tmp_path.iterdir()) == [], "nothing is begun"


def test_what_is_done_is_not_done_again(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    module.carry_out(module.Step("bare model", ["no-such-command"], there, 1.0))
    assert "done already" in capsys.readouterr().out
    missing = module.Step("bare model", ["no-such-command"], tmp_path / "missing.json", 1.0)
    module.carry_out(missing)
    assert "exit code 2" in capsys.readouterr().out and not missing.result.exists()
