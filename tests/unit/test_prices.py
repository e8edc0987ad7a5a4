"""What a device costs: from the experiment or from a user's own file, and into the facts of a trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailrace.harness.contract.adapter import ServerEnvironment
from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.errors import InputError
from tailrace.harness.gpus import gpus
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.prices import price_per_hour
from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.store import TrialFolder
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.preflight import check
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.setup import TrialSetup
from tailrace.harness.run.trial import Trial
from tests.fake_nvml import FakeGpu, install


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(
        {"name": "x", "adapters": ["null"], "workload": "minilm", "trace": "steady", **changes}
    )


def facts(asked: Experiment, folder: Path) -> TrialFacts:
    """Of a trial that has not begun."""
    checked, nowhere = check(asked), folder / "nowhere"
    setup = TrialSetup(
        cell=checked.cells[checked.plans[0].cell],
        plan=checked.plans[0],
        adapter=get_adapter("null"),
        environment=ServerEnvironment(nowhere, "current"),
        environment_s=0.0,
        balancer_environment=None,
        workload=PreparedWorkload(checked.workload, checked.device, nowhere, nowhere, "", None, (), {}),
        trace=checked.trace_of(checked.plans[0]),
        faults=(),
    )
    return Trial(setup, TrialFolder(folder / "trial"), Observer()).facts


def test_the_price_of_the_experiment_stands_in_the_facts_of_its_trials(tmp_path: Path) -> None:
    assert facts(experiment(device="cpu", device_price_per_hour=0.4), tmp_path).device_price_per_hour == 0.4
    assert facts(experiment(device="cpu"), tmp_path).device_price_per_hour is None


def test_a_gpu_costs_what_the_users_own_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, FakeGpu("GPU-a", "NVIDIA H100"), FakeGpu("GPU-b", "NVIDIA L4"))
    prices = tmp_path / "prices.yaml"
    prices.write_text("NVIDIA H100: 3.5\nNVIDIA L4: 0.5\ncpu: 0.1\n")
    one = experiment(device="cuda", device_prices=str(prices))
    told = facts(one, tmp_path)
    assert told.device_price_per_hour == 3.5
    assert [gpu.dump() for gpu in told.gpus] == [{"gpu": "gpu-0", "name": "NVIDIA H100", "uuid": "GPU-a"}]
    assert price_per_hour(one, "cuda", gpus()) == 2.0, "the mean, for figures go by the number of devices"
    assert price_per_hour(one, "cpu", []) == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NVIDIA H10: 3\n", "no price of 'NVIDIA H100'; did you mean 'NVIDIA H10'"),
        ("", "no price of 'NVIDIA H100'"),
        ("- 3\n", "this is a list"),
        ("NVIDIA H100: free\n", "'free' is no price"),
        ("NVIDIA H100: 0\n", "0 is no price"),
        ("NVIDIA H100: true\n", "True is no price"),
        ("NVIDIA H100: .inf\n", "inf is no price"),
        ("a: [\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, message: str
) -> None:
    install(monkeypatch, FakeGpu(name="NVIDIA H100"))
    prices = tmp_path / "prices.yaml"
    if text is not None:
        prices.write_text(text)
    with pytest.raises(InputError) as raised:
        price_per_hour(experiment(device_prices=str(prices)), "cuda", gpus())
    assert message in str(raised.value) and "prices.yaml" in str(raised.value)


def test_one_price_is_enough() -> None:
    with pytest.raises(ValueError, match="both given"):
        experiment(device_prices="p.yaml", device_price_per_hour=1)
