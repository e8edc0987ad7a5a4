"""Pipelines: what a declaration may say, how stages are chained, what every framework is told of them, and what is made of it."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tailrace.adapters.reference.server.pipeline import Pipeline
from tailrace.adapters.torchserve.config import carried
from tailrace.harness.analysis.summary import Samples, stage_figures
from tailrace.harness.contract.adapter import Adapter, DeployRequest, ServerEnvironment, Tuning
from tailrace.harness.contract.pipeline import StageCounts, pipeline_environment, read_clocks
from tailrace.harness.contract.workload import PreparedWorkload, WorkloadSpec
from tailrace.harness.errors import InputError, TailraceError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.store import RunFolder
from tailrace.harness.records.summary import StageFigures
from tailrace.harness.run.preflight import check
from tailrace.harness.run.prepare import prepare
from tailrace.harness.run.registry import get_adapter
from tailrace.reports.evidence import CellView, view
from tailrace.reports.markdown import markdown
from tailrace.reports.pipelines import PRICE_HEADINGS, pipelines
from tailrace.reports.report import build
from tailrace.reports.text import markdown_table
from tailrace.workloads import catalogue
from tests.synthetic import make_run

FOLDER = Path(catalogue.__file__).parent
DECLARED = yaml.safe_load((FOLDER / "emulated_pipeline" / "workload.yaml").read_text(encoding="utf-8"))
TUNING = Tuning(max_batch=8, batch_window_ms=5, replicas=2)
Change = Callable[[dict[str, Any]], None]


def declared() -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(DECLARED))
    return copy


def stage_of(content: Mapping[str, Any], name: str) -> Any:
    return next(stage for stage in content["pipeline"] if stage["name"] == name)


def linear() -> dict[str, Any]:
    """Without the rule: prepare → classify → finish."""
    content = declared()
    content["pipeline"] = [stage_of(content, name) for name in ("prepare", "classify", "finish")]
    stage_of(content, "finish")["inputs"] = ["scores"]
    return content


# ---------------------------------------------------------------- what may be declared


def test_the_built_in_one_is_a_pipeline() -> None:
    spec = catalogue.load_spec("emulated_pipeline")
    assert [stage.name for stage in spec.pipeline] == ["prepare", "classify", "decide", "refine", "finish"]
    assert [stage.name for stage in spec.pipeline if stage.on_device] == ["classify", "refine"]
    assert "emulated" in spec.description.lower()
    assert set(spec.tensors) == {"x", "features", "scores", "unsure", "best", "margin"}


def _set(stage: str, key: str, value: Any) -> Change:
    return lambda content: stage_of(content, stage).update({key: value})


def _swap(first: int, second: int) -> Change:
    def change(content: dict[str, Any]) -> None:
        stages = content["pipeline"]
        stages[first], stages[second] = stages[second], stages[first]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _set("classify", "inputs", ["feature"]),
            "stage 'classify' takes 'feature', which nobody gives; did you mean 'features'?",
        ),
        (_set("prepare", "inputs", ["x", "unsure"]), "a cycle: prepare needs decide needs classify needs prepare"),
        (_set("refine", "when", "sure"), "stage 'refine' takes 'sure', which nobody gives; did you mean 'unsure'?"),
        (_swap(1, 2), "stage 'decide' takes 'scores' of 'classify', which is listed below it"),
        (_set("decide", "name", "prepare"), "two stages are called 'prepare'"),
        (_set("refine", "when", None), "gives 'scores', which is there already"),
        (
            _set("refine", "when", "features"),
            "the rule of stage 'refine', 'features', is int32[16]; it must be one integer",
        ),
        (
            _set("refine", "outputs", [{"name": "scores", "dtype": "float32", "shape": [4]}]),
            "stage 'refine' replaces 'scores' int64[4] by 'scores' float32[4]",
        ),
        (
            _set("refine", "outputs", [{"name": "finer", "dtype": "int64", "shape": [4]}]),
            "gives 'finer' only to the items that 'unsure' chooses",
        ),
        (
            lambda content: content["outputs"].append({"name": "score", "dtype": "int64", "shape": [4]}),
            "no stage gives the output 'score'; did you mean 'scores'?",
        ),
        (
            lambda content: content["outputs"][0].update({"shape": [2]}),
            "the output 'best' int32[2] comes out of the stages as 'best' int32[1]",
        ),
    ],
)
def test_what_does_not_flow_is_refused_with_the_stage_and_the_tensor(change: Change, said: str) -> None:
    content = declared()
    change(content)
    with pytest.raises(ValidationError) as refused:
        WorkloadSpec.model_validate(content)
    assert said in str(refused.value)


def test_a_folder_says_so_in_one_message(tmp_path: Path) -> None:
    content = declared()
    stage_of(content, "classify")["inputs"] = ["feature"]
    _write(tmp_path, content, "", "")
    with pytest.raises(InputError, match=r"workload\.yaml.*stage 'classify' takes 'feature'"):
        catalogue.load_spec(str(tmp_path))


def _write(folder: Path, content: Mapping[str, Any], model: str, build_file: str) -> None:
    (folder / "workload.yaml").write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
    (folder / "model.py").write_text(model, encoding="utf-8")
    (folder / "build.py").write_text(build_file, encoding="utf-8")


# ---------------------------------------------------------------- how stages are chained


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedWorkload:
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path / "cache"))
    return _prepare("emulated_pipeline", "emulated")


def _prepare(folder: str, device: Any) -> PreparedWorkload:
    return prepare(folder, models=["m"], device=device, seed=7, options={}, environment_kind="current")


def _module(workload: PreparedWorkload) -> Any:
    """What a server process imports, each time anew."""
    spec = importlib.util.spec_from_file_location("served", workload.model_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_references_are_those_of_the_stages_by_hand(prepared: PreparedWorkload) -> None:
    spec = importlib.util.spec_from_file_location("stages", prepared.own_file or "")
    assert spec is not None
    assert spec.loader is not None
    stages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stages)
    made = {name: getattr(stages, name)(str(prepared.artifact), "m", "cpu") for name in _CLASSES}
    refined = 0
    for payload, reference in zip(prepared.payloads, prepared.references["m"], strict=True):
        tensors = {"x": payload["x"][np.newaxis]}
        for name in ("Prepare", "Classify", "Decide"):
            tensors |= made[name].predict(tensors)
        first = tensors["scores"]
        if tensors["unsure"][0, 0]:
            tensors |= made["Refine"].predict(tensors)
            assert (tensors["scores"] != first).any(), "the second model is another one"
            refined += 1
        tensors |= made["Finish"].predict(tensors)
        assert all((tensors[name][0] == reference[name]).all() for name in ("best", "margin"))
    assert 0.1 < refined / len(prepared.payloads) < 0.5


_CLASSES = ("Prepare", "Classify", "Decide", "Refine", "Finish")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=16, max_size=16), min_size=1, max_size=9))
def test_an_answer_does_not_depend_on_its_batch(
    prepared: PreparedWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]
) -> None:
    for name, value in pipeline_environment(prepared, tmp_path / "stages").items():
        monkeypatch.setenv(name, value)
    model = _module(prepared).Model(str(prepared.artifact), "m", "cpu")
    x = np.array(rows, dtype=np.int32)
    whole = model.predict({"x": x})
    for index in range(len(x)):
        alone = model.predict({"x": x[index : index + 1]})
        assert all((whole[name][index] == alone[name][0]).all() for name in ("best", "margin"))


def test_stages_count_what_goes_through_them(
    prepared: PreparedWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stages"
    for name, value in pipeline_environment(prepared, folder).items():
        monkeypatch.setenv(name, value)
    module = _module(prepared)
    model = module.Model(str(prepared.artifact), "m", "cpu")
    model.predict({"x": np.stack([payload["x"] for payload in prepared.payloads])})
    module.Stage(str(prepared.artifact), "m", "cpu", "prepare").predict({"x": prepared.payloads[0]["x"][np.newaxis]})
    module.Clock("decide", "answered").count(2_000_000_000, 1)
    counted = read_clocks(folder)
    refined = sum(int(reference["best"][0]) >= 4 for reference in prepared.references["m"])
    assert {key: (counts.events, counts.items) for key, counts in counted.items()} == {
        ("prepare", "computed"): (2, 65),
        ("classify", "computed"): (1, 64),
        ("decide", "computed"): (1, 64),
        ("refine", "computed"): (1, refined),
        ("finish", "computed"): (1, 64),
        ("decide", "answered"): (1, 1),
    }
    assert counted["decide", "answered"] == StageCounts(2.0, 1, 1)
    assert counted["classify", "computed"].seconds > 0


TOY = {
    "name": "toy",
    "title": "Toy",
    "description": "Two stages.",
    "devices": ["cpu"],
    "inputs": [{"name": "x", "dtype": "float32", "shape": [3]}],
    "outputs": [{"name": "z", "dtype": "float32", "shape": [1]}],
    "pipeline": [
        {
            "name": "one",
            "class_name": "One",
            "inputs": ["x"],
            "outputs": [{"name": "y", "dtype": "float32", "shape": [3]}],
        },
        {
            "name": "two",
            "class_name": "Two",
            "inputs": ["y"],
            "outputs": [{"name": "z", "dtype": "float32", "shape": [1]}],
        },
    ],
    "slo": {"latency_ms": 50},
    "payloads": 3,
}
TOY_BUILD = """
import numpy as np

def build_artifact(folder, options, seed):
    pass

def make_payloads(count, seed):
    return [{"x": np.full(3, number, dtype=np.float32)} for number in range(count)]
"""
TOY_MODEL = """
class One:
    def __init__(self, artifact, name, device):
        pass

    def predict(self, inputs):
        return {"y": inputs["x"] * 2}


class TWO:
    def __init__(self, artifact, name, device):
        pass

    def predict(self, inputs):
        return {"z": inputs["y"].sum(1, keepdims=True)GIVEN}
"""


@pytest.mark.parametrize(
    ("replaced", "by", "said"),
    [
        ("TWO", "Two", ""),
        ("TWO", "Too", "stage two: .*model.py has no class Two"),
        ("GIVEN", ".astype('float64')", "stage two gives z as float64"),
        ("GIVEN", ".repeat(2, axis=1)", r"stage two gives z as float32\[1, 2\] and not as float32\[1, 1\]"),
        ('"z"', '"zz"', "stage two gives z as nothing"),
    ],
)
def test_a_stage_is_held_to_its_declaration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: str, by: str, said: str
) -> None:
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "toy"
    folder.mkdir()
    model = TOY_MODEL.replace(replaced, by).replace("TWO", "Two").replace("GIVEN", "")
    _write(folder, TOY, model, TOY_BUILD)
    if not said:
        assert [float(answer["z"][0]) for answer in _prepare(str(folder), "cpu").references["m"]] == [0, 6, 12]
        return
    with pytest.raises(TailraceError, match="could not be prepared") as failed:
        _prepare(str(folder), "cpu")
    assert re.search(said, str(failed.value.detail)), failed.value.detail


# ---------------------------------------------------------------- what a framework is told


def request(
    adapter: Adapter, content: Mapping[str, Any], tuning: Tuning = TUNING, device: Any = "emulated"
) -> DeployRequest:
    spec = WorkloadSpec.model_validate(content)
    here = Path("/w")
    workload = PreparedWorkload(
        spec, device, here / "pipeline.py", here / "artifact", "", None, (), {}, own_file=here / "model.py"
    )
    return DeployRequest(
        workload=workload,
        models=("m",),
        tuning=tuning,
        options=adapter.Options(),
        protocol=adapter.protocols[0],
        environment=ServerEnvironment(Path("/e/bin/python"), "venv"),
        workdir=here,
        scratch=here,
        server_env={},
        stages=spec.pipeline,
    )


def test_triton_composes_a_chain_by_an_ensemble() -> None:
    files = get_adapter("triton").render(request(get_adapter("triton"), linear()))
    assert sorted(files) == [
        "models/m-classify/1/model.py",
        "models/m-classify/config.pbtxt",
        "models/m-finish/1/model.py",
        "models/m-finish/config.pbtxt",
        "models/m-prepare/1/model.py",
        "models/m-prepare/config.pbtxt",
        "models/m/1/README",
        "models/m/config.pbtxt",
        "tritonserver.args",
    ]
    ensemble = files["models/m/config.pbtxt"]
    assert 'platform: "ensemble"\nmax_batch_size: 8\n' in ensemble
    assert (
        '  step { model_name: "m-classify" model_version: -1 input_map { key: "features" value: "features" } '
        'output_map { key: "scores" value: "scores" } }\n' in ensemble
    )
    assert "instance_group" not in ensemble
    assert "max_queue_delay_microseconds: 5000" in files["models/m-classify/config.pbtxt"]
    assert "dynamic_batching" not in files["models/m-prepare/config.pbtxt"], "only the device gathers batches"
    assert 'key: "stage" value { string_value: "classify" }' in files["models/m-classify/config.pbtxt"]
    assert files["tritonserver.args"].count("--load-model=") == 4


def test_triton_composes_a_rule_by_a_script() -> None:
    files = get_adapter("triton").render(request(get_adapter("triton"), declared()))
    script = files["models/m/config.pbtxt"]
    assert 'backend: "python"\nmax_batch_size: 8\n' in script
    assert "instance_group { kind: KIND_CPU count: 10 }" in script, "one for each replica of each stage"
    assert "async_exec" in files["models/m/1/model.py"]
    assert '\\"model\\": \\"m-refine\\"' in script
    assert '\\"when\\": \\"unsure\\"' in script


def test_only_stages_on_the_device_get_a_gpu() -> None:
    files = get_adapter("triton").render(request(get_adapter("triton"), declared(), device="cuda"))
    kinds = {name: "KIND_GPU" in text for name, text in files.items() if name.endswith("config.pbtxt")}
    assert {name for name, gpu in kinds.items() if gpu} == {
        f"models/m-{stage}/config.pbtxt" for stage in ("classify", "refine")
    }


def test_ray_serve_makes_a_deployment_of_every_stage() -> None:
    files = get_adapter("ray_serve").render(request(get_adapter("ray_serve"), declared()))
    (application,) = json.loads(files["serve.json"])["applications"]
    deployments = {deployment["name"]: deployment for deployment in application["deployments"]}
    assert list(deployments) == ["Model", "prepare", "classify", "decide", "refine", "finish"]
    assert deployments["classify"]["user_config"] == {"max_batch_size": 8, "batch_wait_timeout_s": 0.005}
    assert "user_config" not in deployments["prepare"]
    assert {deployment["num_replicas"] for deployment in deployments.values()} == {2}
    assert deployments["Model"]["max_ongoing_requests"] >= 5 * deployments["classify"]["max_ongoing_requests"]
    assert [stage["name"] for stage in application["args"]["stages"]] == list(deployments)[1:]


def test_the_reference_server_gets_a_dispatcher_for_every_stage() -> None:
    files = get_adapter("reference").render(request(get_adapter("reference"), declared()))
    config = json.loads(files["server.json"])
    assert list(config["stages"]) == ["prepare", "classify", "decide", "refine", "finish"]
    assert config["input_sizes"] == [["x", 64]]
    refine, prepare = config["stages"]["refine"], config["stages"]["prepare"]
    assert (refine["when"], refine["output_sizes"], refine["output_bytes"]) == ("unsure", [["scores", 32]], 32)
    assert refine["system"]["batching"]["max_batch"] == 8
    assert prepare["system"]["batching"] == {"max_batch": 1, "window_ms": 0.0, "window_opens": "arrival"}
    assert refine["system"]["replicas"] == prepare["system"]["replicas"] == 2


def test_torchserve_gets_a_chain_that_carries_what_is_wanted_later() -> None:
    adapter = get_adapter("torchserve")
    asked = request(adapter, declared())
    files = adapter.render(asked)
    workflow = yaml.safe_load(files["workflows/m.yaml"])
    assert workflow["dag"] == {
        "prepare": ["classify"],
        "classify": ["decide"],
        "decide": ["refine"],
        "refine": ["finish"],
        "finish": [],
    }
    assert workflow["models"]["classify"] == {
        "url": "m-classify",
        "min-workers": 2,
        "max-workers": 2,
        "batch-size": 8,
        "max-batch-delay": 5,
    }
    assert workflow["models"]["prepare"]["batch-size"] == 1
    assert "load_models" not in files["config.properties"]
    told = [[tensor.name for tensor in carried(asked.workload.spec, index)] for index in range(6)]
    assert told == [
        ["x"],
        ["features"],
        ["features", "scores"],
        ["features", "scores", "unsure"],
        ["scores", "unsure"],
        ["best", "margin"],
    ]
    node = yaml.safe_load(files["models/m-refine/model-config.yaml"])["tailrace"]
    assert (node["name"], node["stage"]) == ("m", "refine")
    assert [tensor["name"] for tensor in node["inputs"]] == told[3]
    assert [tensor["name"] for tensor in node["outputs"]] == told[4]


def _in_the_reference_server(
    folder: Path, act: Callable[[Pipeline, Callable[..., Any]], None], **tuning: int
) -> list[int]:
    """What happens to requests in a server none of whose replicas has loaded; the statuses that were answered, in order."""
    adapter = get_adapter("reference")
    files = adapter.render(request(adapter, declared(), Tuning(**tuning)))
    (folder / "server.json").write_text(files["server.json"], encoding="utf-8")
    statuses: list[int] = []

    async def run() -> None:
        pipeline = Pipeline("m", str(folder / "server.json"), json.loads(files["server.json"]))
        act(pipeline, lambda: pipeline.infer(b"\0" * 64, lambda status, said, retry_after_s: statuses.append(status)))

    asyncio.run(run())
    return statuses


def test_a_withdrawn_request_is_in_no_stage(tmp_path: Path) -> None:
    def act(pipeline: Pipeline, ask: Callable[..., Any]) -> None:
        journey = ask()
        assert (pipeline.figures()["queue_depth"], pipeline.figures()["in_flight"]) == (1, 1)
        pipeline.withdraw(journey)
        pipeline.withdraw(journey)
        told = pipeline.figures()
        assert (told["queue_depth"], told["in_flight"], told["requests_failed_total"]) == (0, 0, 1)

    assert _in_the_reference_server(tmp_path, act) == [0]


def test_what_a_stage_sheds_the_whole_sheds(tmp_path: Path) -> None:
    def act(pipeline: Pipeline, ask: Callable[..., Any]) -> None:
        assert ask() is not None
        assert ask() is None
        told = pipeline.figures()
        assert (told["in_flight"], told["requests_shed_total"], told["requests_failed_total"]) == (1, 1, 0)
        assert set(pipeline.parts) == {"m", "m/prepare", "m/classify", "m/decide", "m/refine", "m/finish"}

    assert _in_the_reference_server(tmp_path, act, queue_limit=1) == [503]


@pytest.mark.parametrize("name", ["triton", "ray_serve", "torchserve", "reference"])
def test_in_one_process_a_pipeline_is_a_model_like_any_other(name: str) -> None:
    adapter = get_adapter(name)
    asked = dataclasses.replace(request(adapter, declared()), stages=())
    text = "".join(adapter.render(asked).values())
    assert "/w/pipeline.py" in text
    assert "classify" not in text


# ---------------------------------------------------------------- before the run


def experiment(**changes: Any) -> Experiment:
    content = {
        "name": "e",
        "adapters": ["triton"],
        "workload": "emulated_pipeline",
        "trace": {"name": "steady", "params": {"rate": 5, "duration_s": 2}},
    }
    return Experiment.model_validate({**content, **changes})


def _compositions(checked: Any) -> dict[str, str | None]:
    return {cell.id: cell.composition for cell in checked.cells.values()}


def test_a_scenario_says_who_composes() -> None:
    scenarios = [{"name": "a"}, {"name": "b", "composition": "one-process"}]
    assert _compositions(check(experiment(scenarios=scenarios))) == {
        "triton--a": "framework",
        "triton--b": "one-process",
    }
    assert _compositions(check(experiment(workload="emulated"))) == {"triton--no-fault": None}


def test_a_framework_that_cannot_compose_says_so_before_the_run() -> None:
    with pytest.raises(InputError, match=r"kserve cannot compose the stages of a pipeline: .*InferenceGraph"):
        check(experiment(adapters=["kserve"]))
    checked = check(experiment(adapters=["kserve", "triton"], when_refused="leave_out"))
    assert _compositions(checked) == {"kserve--no-fault": "one-process", "triton--no-fault": "framework"}
    left_out = {cell.adapter: cell.left_out for cell in checked.cells.values()}
    assert list(left_out["kserve"]) == ["composition"]
    assert left_out["triton"] == {}
    assert _compositions(check(experiment(adapters=["kserve"], composition="one-process"))) == {
        "kserve--no-fault": "one-process"
    }


def test_nothing_is_composed_of_one_model() -> None:
    with pytest.raises(InputError, match="emulated is no pipeline"):
        check(experiment(workload="emulated", scenarios=[{"name": "a", "composition": "framework"}]))


# ---------------------------------------------------------------- what is made of it


def samples(rows: Sequence[tuple[float, str, str, str, float]]) -> Samples:
    content = [
        {"t_ns": int(t_s * 1e9), "source": source, "scope": scope, "metric": metric, "value": value, "unit": "1"}
        for t_s, source, scope, metric, value in rows
    ]
    return Samples(pa.Table.from_pylist(content, schema=SAMPLE_SCHEMA))


def _growing(source: str, metric: str, per_s: float, stage: str = "s") -> list[tuple[float, str, str, str, float]]:
    return [(float(t_s), source, stage, metric, per_s * t_s) for t_s in range(11)]


def test_figures_of_a_stage() -> None:
    computed = [
        *_growing("stages", "busy_s_total", 0.5),
        *_growing("stages", "batches_total", 20),
        *_growing("stages", "items_total", 60),
    ]
    own = [*_growing("stages", "stage_answers_total", 60), *_growing("stages", "stage_answer_s_total", 3)]
    servers = [*_growing("server", "stage_answers_total", 60), *_growing("server", "stage_answer_s_total", 6)]
    known = {"stage": "s", "items_rps": 60, "batch_size_mean": 3, "predict_ms": 25}
    assert stage_figures("s", samples(computed), 10).dump() == pytest.approx({**known, "answer_ms": None})
    assert stage_figures("s", samples([*computed, *own]), 10).answer_ms == pytest.approx(50)
    assert stage_figures("s", samples([*computed, *own, *servers]), 10).answer_ms == pytest.approx(100), (
        "the server's own"
    )
    assert stage_figures("other", samples(computed), 10).items_rps is None


def _cells(folder: Path, *, cannot: str | None = None) -> list[CellView]:
    """Two scenarios of one run as if they were the same pipeline, composed (a third slower) and in one process."""
    (run,) = view([make_run(folder, adapters=("triton",), scenarios=("no-fault", "defaults"), trials=3)])
    composed, alone = run.cells
    stage = StageFigures(stage="classify", items_rps=60.0, batch_size_mean=2.0, predict_ms=20.0, answer_ms=36.0)
    told: list[CellView] = []
    for cell, composition, factor in ((composed, "framework", 4 / 3), (alone, "one-process", 1.0)):
        figures = {"p50_ms": 30.0 * factor, "server_cpu_cores": 0.2 * factor}
        trials = tuple(trial.model_copy(update=figures) for trial in alone.trials)
        composed_here = composition == "framework"
        summary = alone.summary.model_copy(
            update={
                "composition": composition,
                "p50_ms": 30.0 * factor,
                "stages": [stage if composed_here else stage.model_copy(update={"answer_ms": None})],
                "left_out": {"composition": cannot} if cannot and not composed_here else {},
            }
        )
        told.append(dataclasses.replace(cell, summary=summary, trials=trials, conditions=alone.conditions))
    return told


def _plain(row: Sequence[str]) -> tuple[str, ...]:
    """With common blanks in place of narrow and unbreakable ones."""
    return tuple(" ".join(re.split(r"\s", text)) for text in row)


def test_a_report_tells_the_price_of_composition(tmp_path: Path) -> None:
    told = pipelines(_cells(tmp_path / "run"))
    assert told is not None
    (price,) = told.prices
    price = _plain(price)
    assert price[1:4] == ("40.0 ms", "30.0 ms", "1.33× [1.33, 1.33]")
    assert price[-1] == "1.33× [1.33, 1.33]"
    assert [_plain(row)[2:] for row in told.stages] == [
        ("60.0 req/s", "2.00", "20.0 ms", "36.0 ms", "16.0 ms"),
        ("60.0 req/s", "2.00", "20.0 ms", "–", "–"),
    ]
    assert told.sentence == ""


def test_a_report_names_who_cannot_compose(tmp_path: Path) -> None:
    told = pipelines(_cells(tmp_path / "run", cannot="it has none"))
    assert told is not None
    assert told.sentence == "Triton ran its stages in one process, whatever was asked for: it has none."


def test_markdown_has_the_prices_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = pipelines(_cells(tmp_path / "run", cannot="it has none"))
    assert told is not None
    monkeypatch.setattr("tailrace.reports.markdown.pipelines", lambda _: told)
    text = markdown([RunFolder.open(tmp_path / "run")])
    assert "**The price of composition**: Triton ran its stages in one process" in text
    (price,) = told.prices
    assert markdown_table(PRICE_HEADINGS, [price])[-1] in text
    assert "1.33×" in price[3]


def test_other_runs_have_no_such_section(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",))
    assert pipelines(view([run])[0].cells) is None
    assert "price of composition" not in build([run])
    assert "price of composition" not in markdown([run])
