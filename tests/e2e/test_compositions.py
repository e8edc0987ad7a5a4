"""Pipelines on real servers, composed by each framework in its own way: answers, counts, knobs, errors, a wrong stage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tailrace.harness.contract.adapter import Deployment, DeployRequest, Tuning
from tailrace.harness.contract.exchange import check_answer, exchange
from tailrace.harness.contract.pipeline import StageCounts, pipeline_environment, read_clocks
from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.run import prepare as preparation
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.servers import environments
from tailrace.harness.servers.emulated_device import device_environment
from tailrace.harness.servers.guardian import Guardian
from tailrace.workloads import catalogue
from tests.conftest import tailrace, wait_until

pytestmark = pytest.mark.e2e

COMPOSING = ["triton", "ray_serve", "reference", "torchserve"]
FOLDER = Path(catalogue.__file__).parent
MODEL = "pipe"
TUNING = Tuning(max_batch=4, batch_window_ms=5, replicas=1)


@dataclass(frozen=True)
class Served:
    """A composed pipeline that is ready."""

    deployment: Deployment
    workload: PreparedWorkload
    clocks: Path

    def ask(self, payload_id: int) -> str | None:
        """``None`` for the right answer, else what is wrong with it; a refusal begins with «refused»."""
        endpoint = self.deployment.endpoint
        answer = exchange(endpoint, endpoint.codec.encode(MODEL, self.workload.payloads[payload_id]), 60)
        if not answer.ok:
            return f"refused: {answer.text}"
        return check_answer(endpoint, self.workload, MODEL, payload_id, answer.headers, answer.body)

    def computed(self) -> dict[str, StageCounts]:
        return {stage: counts for (stage, kind), counts in read_clocks(self.clocks).items() if kind == "computed"}


@contextlib.contextmanager
def served(name: str, workload: PreparedWorkload, folder: Path, *, composed: bool = True) -> Iterator[Served]:
    adapter = get_adapter(name)
    environment = environments.build("venv", [adapter.requirements], name=name)
    for part in ("devices", "scratch", "work"):
        (folder / part).mkdir(parents=True)
    with Guardian() as guardian:
        request = DeployRequest(
            workload=workload,
            models=(MODEL,),
            tuning=TUNING,
            options=adapter.Options(),
            protocol="http",
            environment=environment,
            workdir=folder / "work",
            scratch=folder / "scratch",
            server_env={
                **device_environment(folder / "devices", 1),
                **pipeline_environment(workload, folder / "stages"),
            },
            stages=workload.spec.pipeline if composed else (),
        )
        deployment = adapter.start(request, guardian)
        try:
            deployment.wait_for(deployment.claims_ready, "be ready", adapter.start_timeout_s)
            yield Served(deployment, workload, folder / "stages")
        finally:
            deployment.stop()


def prepare(folder: str, device: Any) -> PreparedWorkload:
    options = (
        {"base_ms": 2, "per_item_ms": 0.5, "refine_base_ms": 1, "refine_per_item_ms": 0.5}
        if device == "emulated"
        else {}
    )
    return preparation.prepare(
        folder, models=[MODEL], device=device, seed=7, options=options, environment_kind="current"
    )


@pytest.mark.parametrize("name", COMPOSING)
def test_a_composed_pipeline_with_a_rule_answers_as_the_reference_does(name: str, tmp_path: Path) -> None:
    workload = prepare("emulated_pipeline", "emulated")
    count = len(workload.payloads)
    with served(name, workload, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(server.ask, range(count))) == [None] * count
        refined = sum(int(reference["best"][0]) >= 4 for reference in workload.references[MODEL])
        items = {stage: counts.items for stage, counts in server.computed().items()}
        if name == "torchserve":  # where a node's answer is lost, the frontend asks again
            assert items["refine"] >= refined
            assert min(items[stage] for stage in ("prepare", "classify", "decide", "finish")) >= count
        else:
            assert items == {"prepare": count, "classify": count, "decide": count, "refine": refined, "finish": count}
        assert server.computed()["classify"].events < items["classify"], "stages on the device gather batches"
        assert server.computed()["prepare"].events == items["prepare"], "others take one at a time"

        assert server.deployment.applied() == {
            **server.deployment.applied(),
            "max_batch": 4,
            "batch_window_ms": 5,
            "replicas": 1,
        }
        alive = " ".join(replica.name for replica in server.deployment.replicas())
        assert all(stage in alive for stage in items), alive
        if name == "ray_serve":
            answered = {
                stage: counts.events
                for (stage, kind), counts in read_clocks(server.clocks).items()
                if kind == "answered"
            }
            assert answered == items
        else:
            told = {(s.metric, s.scope): s.value for s in server.deployment.scrape()}
            assert told["stage_answers_total", "decide"] >= count
            assert told["stage_answer_s_total", "classify"] >= count * 0.0025, (
                "a batch of one takes 2.5 ms, and nobody is faster"
            )
        wait_until(lambda: _ok(server.deployment) >= count, "the server has counted every answer", timeout_s=30)
        assert _ok(server.deployment) <= count + 2, "requests are counted, not what they ask of stages"


@pytest.mark.parametrize("name", COMPOSING)
def test_stages_are_scaled_and_loaded_together(name: str, tmp_path: Path) -> None:
    workload = prepare("emulated_pipeline", "emulated")
    stages = [stage.name for stage in workload.spec.pipeline]
    with served(name, workload, tmp_path) as server:
        server.deployment.scale(2)
        wait_until(
            lambda: all(_copies(server.deployment, stage) == 2 for stage in stages), "there are two of every stage", 60
        )
        assert server.deployment.applied()["replicas"] == 2
        wait_until(lambda: server.ask(0) is None, "it answers with two of each", 30)
        server.deployment.unload_model(MODEL)
        if name != "ray_serve":  # whose replicas drain for half a minute behind HAProxy
            assert str(server.ask(1)).startswith("refused")
        server.deployment.load_model(MODEL)
        wait_until(lambda: server.ask(1) is None, "it answers again", 60)


def _copies(deployment: Deployment, stage: str) -> int:
    return sum(f"-{stage}-" in f"-{replica.name}-".replace("_", "-") for replica in deployment.replicas())


def _ok(deployment: Deployment) -> float:
    return sum(sample.value for sample in deployment.scrape() if sample.metric == "requests_ok_total")


LINEAR = {
    "name": "linear",
    "title": "Linear",
    "description": "Two stages and no rule.",
    "devices": ["cpu"],
    "inputs": [{"name": "x", "dtype": "float32", "shape": [3]}],
    "outputs": [{"name": "z", "dtype": "float32", "shape": [1]}],
    "pipeline": [
        {
            "name": "double",
            "class_name": "Double",
            "inputs": ["x"],
            "outputs": [{"name": "y", "dtype": "float32", "shape": [3]}],
        },
        {
            "name": "add",
            "class_name": "Add",
            "on_device": True,
            "inputs": ["x", "y"],
            "outputs": [{"name": "z", "dtype": "float32", "shape": [1]}],
        },
    ],
    "slo": {"latency_ms": 50},
    "payloads": 8,
}
LINEAR_BUILD = """
import numpy as np

def build_artifact(folder, options, seed):
    pass

def make_payloads(count, seed):
    return [{"x": np.full(3, number, dtype=np.float32)} for number in range(count)]
"""
LINEAR_MODEL = """
class Double:
    def __init__(self, artifact, name, device):
        pass

    def predict(self, inputs):
        return {"y": inputs["x"] * 2}


class Add:
    def __init__(self, artifact, name, device):
        pass

    def predict(self, inputs):
        if device_has_no_answer(inputs["x"]):
            raise ValueError("no answer to five")
        return {"z": (inputs["x"] + inputs["y"]).sum(1, keepdims=True)}


def device_has_no_answer(x):
    return SERVED and (x == 5).any()


SERVED = False
"""


@pytest.mark.parametrize("name", COMPOSING)
def test_what_a_stage_raises_is_no_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rule, and so Triton's is an ensemble; a stage that fails fails the request, and no later one."""
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path / "cache" / "artifacts-alone"))
    workload = _tampered(prepare(str(_linear(tmp_path)), "cpu"), tmp_path, "SERVED = False", "SERVED = True")
    monkeypatch.undo()
    with served(name, workload, tmp_path / "server") as server:
        said = [server.ask(payload_id) for payload_id in range(8)]
        assert said[:5] == [None] * 5
        assert str(said[5]).startswith("refused"), said[5]
        assert said[6:] == [None] * 2


def _linear(folder: Path) -> Path:
    made = folder / "linear"
    made.mkdir()
    (made / "workload.yaml").write_text(yaml.safe_dump(LINEAR), encoding="utf-8")
    (made / "model.py").write_text(LINEAR_MODEL, encoding="utf-8")
    (made / "build.py").write_text(LINEAR_BUILD, encoding="utf-8")
    return made


def _tampered(workload: PreparedWorkload, folder: Path, old: str, new: str) -> PreparedWorkload:
    """The same artifact and references, with another implementation of a stage on the server."""
    assert workload.own_file is not None
    text = workload.own_file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    other = folder / "emulated_pipeline" / "model.py"
    other.parent.mkdir()
    other.write_text(text.replace(old, new), encoding="utf-8")
    device = folder / "emulated" / "model.py"
    device.parent.mkdir()
    device.write_text((FOLDER / "emulated" / "model.py").read_text(encoding="utf-8"), encoding="utf-8")
    return replace(workload, own_file=other)


@pytest.mark.parametrize("composed", [True, False])
def test_a_wrong_stage_is_found_out(composed: bool, tmp_path: Path) -> None:
    """Its answers are wrong for the items that went through it, and right for the others."""
    workload = _tampered(
        prepare("emulated_pipeline", "emulated"),
        tmp_path,
        'self._matrix = _Matrix(artifact, f"{name}/refine", "refine_", device)',
        'self._matrix = _Matrix(artifact, f"{name}/classify", "refine_", device)',
    )
    with served("reference", workload, tmp_path / "server", composed=composed) as server:
        wrong = [payload_id for payload_id in range(32) if server.ask(payload_id) is not None]
    refined = [i for i, reference in enumerate(workload.references[MODEL][:32]) if int(reference["best"][0]) >= 4]
    assert wrong == refined
    assert refined


def test_one_experiment_shows_the_price(tmp_path: Path) -> None:
    """The built-in experiment, shortened: both ways of serving verified, counted and reported."""
    out = tmp_path / "run"
    shorter = ["--set", "trace.params.duration_s=4", "--set", "trace.params.rate=20", "--set", "warmup.duration_s=1"]
    done = tailrace(
        "run", "pipeline", "--adapter", "reference", "--trials", "1", *shorter, "--out", str(out), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    told = {trial["scenario"]: trial for trial in summary["trials"]}
    assert {name: trial["composition"] for name, trial in told.items()} == {
        "composed": "framework",
        "one-process": "one-process",
    }
    for trial in told.values():
        assert trial["outputs"]["mismatched"] == 0
        assert trial["outputs"]["checked"] > 0
        stages = {stage["stage"]: stage for stage in trial["stages"]}
        assert list(stages) == ["prepare", "classify", "decide", "refine", "finish"]
        assert 0 < stages["refine"]["items_rps"] < stages["classify"]["items_rps"]
    assert told["composed"]["stages"][1]["answer_ms"] > told["composed"]["stages"][0]["answer_ms"]
    assert told["one-process"]["stages"][1]["answer_ms"] is None
    assert "price of composition" in (out / "report.html").read_text(encoding="utf-8")
