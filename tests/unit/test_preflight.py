"""What each framework is given of a tuning, scenario by scenario, settled before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tailrace.harness.contract.adapter import ServerEnvironment, Tuning, WireProtocol
from tailrace.harness.errors import InputError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.run.preflight import check
from tailrace.harness.run.registry import all_adapters, get_adapter
from tailrace.harness.run.setup import set_up
from tests.fake_nvml import FakeGpu, install


def experiment(**changes: Any) -> Experiment:
    basis = {
        "name": "x",
        "adapters": ["triton", "kserve"],
        "trace": {"name": "steady", "params": {"rate": 20, "duration_s": 5}},
        "tuning": {"max_batch": 8, "replicas": 2},
        "when_refused": "leave_out",
        "scenarios": [
            {"name": "tuned"},
            {"name": "own", "tuning": "defaults"},
            {"name": "one", "tuning": {"replicas": 1}},
        ],
    }
    return Experiment.model_validate({**basis, **changes})


def test_every_cell_has_the_tuning_that_its_framework_can_express() -> None:
    checked = check(experiment())
    given_to = {
        (cell.adapter, cell.scenario.name): (cell.tuning.chosen(), set(cell.left_out))
        for cell in checked.cells.values()
    }
    assert given_to == {
        ("triton", "tuned"): ({"max_batch": 8, "replicas": 2}, set()),
        ("triton", "own"): ({}, set()),
        ("triton", "one"): ({"replicas": 1}, set()),
        ("kserve", "tuned"): ({"replicas": 2}, {"max_batch"}),
        ("kserve", "own"): ({}, set()),
        ("kserve", "one"): ({"replicas": 1}, set()),
    }


def test_unless_told_otherwise_a_knob_without_a_place_stops_the_experiment() -> None:
    with pytest.raises(InputError, match="kserve has no place for `max_batch`") as refused:
        check(experiment(when_refused="stop"))
    assert "when_refused: leave_out" in str(refused.value)
    check(experiment(when_refused="stop", adapters=["triton"]))


def test_what_a_protocol_rules_out_is_known_before_the_start() -> None:
    with pytest.raises(InputError, match="over gRPC"):
        check(experiment(adapters=["kserve"], when_refused="stop", tuning={"replicas": 2}, client={"protocol": "grpc"}))


def test_replicas_of_a_scenario_are_weighed_too() -> None:
    with pytest.raises(InputError, match="replicas take at least"):
        check(experiment(scenarios=[{"name": "many", "tuning": {"replicas": 1_000_000}}]))
    fault = [{"kind": "kill_replica", "at_s": 2, "target": 1}]
    with pytest.raises(InputError, match="target 1 does not exist"):
        check(experiment(scenarios=[{"name": "one", "tuning": {"replicas": 1}, "faults": fault}]))
    check(experiment(scenarios=[{"name": "two", "faults": fault}]))


tunings = st.builds(
    Tuning,
    max_batch=st.none() | st.integers(1, 64),
    batch_window_ms=st.none() | st.floats(0, 100),
    replicas=st.none() | st.integers(1, 4),
    queue_limit=st.none() | st.integers(1, 1000),
    server_timeout_s=st.none() | st.floats(0.1, 60),
)


@given(tunings, st.sampled_from(sorted(all_adapters())), st.sampled_from(["http", "grpc"]))
def test_what_is_expressible_is_refused_no_more_and_nothing_is_invented(
    tuning: Tuning, name: str, protocol: WireProtocol
) -> None:
    adapter = get_adapter(name)
    options: BaseModel = adapter.Options()
    expressed, left_out = adapter.expressible(tuning, options, protocol)
    assert adapter.refusals(expressed, options, protocol) == {}
    assert {**expressed.chosen(), **{knob: getattr(tuning, knob) for knob in left_out}} == tuning.chosen()
    assert not set(expressed.chosen()) & set(left_out)
    assert adapter.expressible(expressed, options, protocol) == (expressed, {})
    for knob, reason in left_out.items():
        assert f"`{knob}" in reason


def on_gpus(**changes: Any) -> Experiment:
    return experiment(workload="minilm", device="cuda", scenarios=[{"name": "one"}], **changes)


def test_gpus_that_are_not_there_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu())
    check(on_gpus())
    with pytest.raises(InputError, match="2 GPUs are asked for, this machine has 1"):
        check(on_gpus(devices=2))
    install(monkeypatch)
    with pytest.raises(InputError, match="doctor --gpu"):
        check(on_gpus())


def test_several_gpus_are_for_frameworks_that_deal_them_out_or_for_several_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    check(on_gpus(devices=2, adapters=["triton", "ray_serve", "torchserve"]))
    with pytest.raises(InputError, match=r"kserve puts all of its replicas on one GPU.*\n.*`nodes: 2`"):
        check(on_gpus(devices=2))
    check(on_gpus(devices=2, nodes=2))


def test_a_process_has_one_mig_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu("GPU-a", mig=[FakeGpu("MIG-x", instance=1), FakeGpu("MIG-y", instance=2)]))
    with pytest.raises(InputError, match="one MIG instance"):
        check(on_gpus(devices=2, adapters=["triton"]))
    check(on_gpus(devices=2, nodes=2, adapters=["triton"]))


def test_what_reads_gpus_as_numbers_is_not_given_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu("GPU-a", mig=[FakeGpu("MIG-x", instance=1)]), FakeGpu("GPU-b"))
    with pytest.raises(InputError, match=r"torchserve cannot run on MIG instances: .*numbers of GPUs.*UUID"):
        check(on_gpus(adapters=["triton", "torchserve"]))
    check(on_gpus(adapters=["triton", "ray_serve"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    check(on_gpus(adapters=["triton", "torchserve"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"artifact": "onnx"}, "`artifact`: the workload emulated has no export to onnx"),
        ({"precision": "bf16"}, "workload emulated does not offer bf16; it offers no choice of precision"),
        ({"precision": "fp32"}, "it offers no choice"),
        ({"compile": True}, "`compile`: the workload emulated does not offer to be compiled"),
    ],
)
def test_a_workload_without_such_a_choice_refuses_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(experiment(**changes))


def test_the_torch_workloads_offer_precisions_and_compilation() -> None:
    for workload in ("minilm", "resnet50"):
        for precision in ("fp32", "bf16", "fp16"):
            check(experiment(workload=workload, precision=precision, compile=True))


def exported(**changes: Any) -> Experiment:
    return experiment(workload="minilm", device="cpu", artifact="onnx", scenarios=[{"name": "one"}], **changes)


def test_who_runs_python_alone_serves_the_python_model_or_the_experiment_stops() -> None:
    served = {cell.adapter: cell for cell in check(exported()).cells.values()}
    assert {name: cell.artifact for name, cell in served.items()} == {"triton": "onnx", "kserve": "python"}
    assert "artifact" not in served["triton"].left_out
    assert served["kserve"].left_out["artifact"].startswith("kserve has no place for `artifact: onnx`")
    with pytest.raises(InputError, match="kserve has no place for `artifact: onnx`") as refused:
        check(exported(when_refused="stop", tuning={"replicas": 2}))
    assert "leave_out` to run it without, by its Python code" in str(refused.value)
    for name, adapter in all_adapters().items():
        assert (adapter.artifacts == ("python",)) == (name != "triton")


def test_replicas_of_an_export_are_no_processes_to_be_hit() -> None:
    faults = {"scenarios": [{"name": "kill", "faults": [{"kind": "kill_replica", "at_s": 2}]}]}
    basis = {"workload": "minilm", "device": "cpu", "adapters": ["triton"]}
    with pytest.raises(InputError, match="kill_replica cannot be done to triton: replicas of `artifact: torchscript`"):
        check(experiment(**basis, **faults, artifact="torchscript"))
    check(experiment(**basis, **faults))
    node = {"scenarios": [{"name": "kill", "faults": [{"kind": "kill_node", "at_s": 2}]}]}
    check(experiment(**basis, **node, artifact="torchscript"))


def test_a_server_without_the_backend_is_refused_before_anything_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = get_adapter("triton")
    built: list[list[Path]] = []

    def environment(_experiment: Any, _adapter: Any, requirements: list[Path], _progress: Any) -> ServerEnvironment:
        built.append(requirements)
        return ServerEnvironment(Path("/e/bin/python"), "venv")

    def asked(artifact: str, environment: ServerEnvironment | None = None) -> str | None:
        return None if environment is None else f"nothing in {environment.python} runs {artifact}"

    monkeypatch.setattr("tailrace.harness.run.setup._environment", environment)
    monkeypatch.setattr(
        "tailrace.harness.run.setup.prepare", lambda *_, **__: pytest.fail("an export that nobody can run")
    )
    monkeypatch.setattr(adapter, "artifact_refusal", asked)
    with pytest.raises(InputError, match="nothing in /e/bin/python runs onnx") as refused:
        set_up(check(exported()), lambda _: None)
    assert "environment: docker" in str(refused.value)
    assert built == [[adapter.requirements]], "what the Python model needs is not needed by who runs the export"
