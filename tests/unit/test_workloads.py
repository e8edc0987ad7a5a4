"""The catalogue of workloads: declarations, options, preparing, caching, and what it says about mistakes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.errors import EnvironmentBuildError, InputError, StorageError, TailraceError
from tailrace.harness.run.prepare import prepare
from tailrace.workloads import catalogue

BUILT_IN = ["emulated", "emulated_pipeline", "minilm", "resnet50"]

WORKLOAD = {
    "name": "toy",
    "title": "Toy",
    "description": "Adds a number.",
    "devices": ["cpu"],
    "inputs": [{"name": "file", "dtype": "float32", "shape": [3]}],  # a name that numpy.savez keeps for itself
    "outputs": [{"name": "sum", "dtype": "float32", "shape": []}],
    "slo": {"latency_ms": 50},
    "payloads": 5,
    "cost": {"added": 1.5, "times": 1},
}
BUILD = """
import json
import numpy as np

def build_artifact(folder, options, seed):
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").write_text(json.dumps({"options": options, "seed": seed}))

def make_payloads(count, seed):
    return [{"file": row} for row in np.random.default_rng(seed).random((count, 3), dtype=np.float32)]
"""
MODEL = """
import json, pathlib
import numpy as np

class Model:
    def __init__(self, artifact, name, device):
        config = json.loads((pathlib.Path(artifact) / "deep" / "config.json").read_text())
        self.added = config["options"]["added"] + len(name)
        assert device == "cpu"

    def predict(self, inputs):
        assert inputs["file"].shape == (1, 3)
        return {"sum": (inputs["file"].sum(1) + self.added).astype(np.float32)}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workload folder of a user's, and a cache of our own."""
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "workload.yaml").write_text(yaml.safe_dump(WORKLOAD))
    (folder / "build.py").write_text(BUILD)
    (folder / "model.py").write_text(MODEL)
    return folder


def _prepare(
    folder: Path | str,
    *,
    models: Sequence[str] = ("m",),
    options: Mapping[str, float] | None = None,
    messages: list[str] | None = None,
    **other: Any,
) -> PreparedWorkload:
    chosen = {"device": "cpu", "seed": 7, "environment_kind": "current", **other}
    sink = messages if messages is not None else []
    return prepare(str(folder), models=models, options=options or {}, on_progress=sink.append, **chosen)


def test_the_built_in_workloads_are_complete() -> None:
    assert catalogue.names() == BUILT_IN
    for name in BUILT_IN:
        spec = catalogue.load_spec(name)
        folder = Path(catalogue.__file__).parent / name
        assert spec.name == name
        assert (folder / "model.py").is_file()
        assert (folder / "build.py").is_file()
        assert spec.slo.latency_ms > 0
        for requirements in folder.glob("*requirements.txt"):
            for line in requirements.read_text().splitlines():
                assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line), "direct and exact pins only"
    cost = {"base_ms": 12, "per_item_ms": 3, "load_ms": 50, "load_gb_per_s": 1}
    assert catalogue.load_spec("emulated").cost == cost
    assert "emulated" in catalogue.load_spec("emulated").description.lower()


def test_what_the_server_and_the_build_share_is_pinned_alike() -> None:
    for name in BUILT_IN:
        folder = Path(catalogue.__file__).parent / name
        if (folder / "requirements.txt").exists():
            served = set((folder / "requirements.txt").read_text().splitlines())
            assert served <= set((folder / "build-requirements.txt").read_text().splitlines())


def test_a_prepared_workload_is_whole(toy: Path) -> None:
    prepared = _prepare(toy, models=("m", "other"))
    assert prepared.spec.name == "toy"
    assert prepared.model_file == toy / "model.py"
    assert prepared.requirements is None
    assert (prepared.artifact / "deep" / "config.json").is_file()
    assert re.fullmatch("[0-9a-f]{64}", prepared.artifact_sha256)
    assert len(prepared.payloads) == 5
    assert list(prepared.references) == ["m", "other"]
    for model, answers in prepared.references.items():
        for payload, answer in zip(prepared.payloads, answers, strict=True):
            assert payload["file"].shape == (3,)
            assert answer["sum"].shape == ()
            assert answer["sum"] == pytest.approx(payload["file"].sum() + 1.5 + len(model), rel=1e-6)


@pytest.mark.parametrize("alike", [("m", "n"), ("one", "other", "two")])
def test_models_that_answer_alike_are_refused(toy: Path, alike: tuple[str, ...]) -> None:
    with pytest.raises(
        InputError, match=f"the models {alike[0]} and {alike[-1]} give the same answers to all 5 payloads"
    ):
        _prepare(toy, models=alike)
    assert _left(toy.parent / "cache") == []


def test_models_that_differ_in_one_answer_are_told_apart(toy: Path) -> None:
    text = (toy / "model.py").read_text().replace("+ self.added", "+ (inputs['file'][0, 0] > 0.5) * self.added")
    (toy / "model.py").write_text(text)
    prepared = _prepare(toy, models=("m", "other"))
    answers = [np.stack([row["sum"] for row in prepared.references[model]]) for model in ("m", "other")]
    assert 0 < np.count_nonzero(answers[0] != answers[1]) < 5


def test_the_emulated_workload_is_prepared_without_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path))
    monkeypatch.delenv("TAILRACE_DEVICE_DIR", raising=False)
    prepared = _prepare("emulated", models=("a", "b"), device="emulated", environment_kind="venv")
    answers = np.stack([row["y"] for model in ("a", "b") for row in prepared.references[model]])
    assert answers.shape == (128, 4)
    assert len(np.unique(answers, axis=0)) == 128, "a swapped answer or model would go unseen"
    assert not (tmp_path / "envs").exists(), "it needs no environment of its own"


def test_the_second_time_comes_from_the_cache(toy: Path) -> None:
    messages: list[str] = []
    first = _prepare(toy, messages=messages)
    assert any("building the artifact" in message for message in messages)
    messages.clear()
    second = _prepare(toy, messages=messages)
    assert messages == []
    assert second.artifact == first.artifact
    assert second.artifact_sha256 == first.artifact_sha256
    assert all((a["file"] == b["file"]).all() for a, b in zip(first.payloads, second.payloads, strict=True))


def test_whatever_matters_makes_another_artifact(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = [
        _prepare(toy),
        _prepare(toy, seed=8),
        _prepare(toy, options={"added": 2}),
        _prepare(toy, models=("n",)),
    ]
    (toy / "notes").mkdir()
    (toy / "notes" / "readme.txt").write_text("a new file")
    prepared.append(_prepare(toy))
    monkeypatch.setattr(
        "tailrace.harness.servers.environments.fingerprint", lambda kind, requirements, **_: "another environment"
    )
    prepared.append(_prepare(toy))
    assert len({one.artifact for one in prepared}) == len(prepared)


def test_python_leftovers_do_not_matter(toy: Path) -> None:
    first = _prepare(toy)
    (toy / "__pycache__").mkdir()
    (toy / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"x")
    (toy / ".model.py.swp").write_bytes(b"x")
    assert _prepare(toy).artifact == first.artifact


@pytest.mark.parametrize(
    ("damaged", "damage"),
    [
        ("artifact/deep/config.json", "changed"),
        ("artifact/deep/config.json", "removed"),
        ("payloads.npz", "changed"),
        ("references-0.npz", "cut"),
        ("prepared.json", "cut"),
    ],
)
def test_a_damaged_cache_is_built_again(toy: Path, damaged: str, damage: str) -> None:
    first = _prepare(toy)
    victim = first.artifact.parent / damaged
    whole = victim.read_bytes()
    if damage == "changed":
        middle = len(whole) // 2
        victim.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    elif damage == "cut":
        victim.write_bytes(whole[: len(whole) // 3])
    else:
        victim.unlink()
    messages: list[str] = []
    again = _prepare(toy, messages=messages)
    assert "is damaged" in messages[0]
    assert again.artifact_sha256 == first.artifact_sha256
    assert again.references["m"][0]["sum"] == first.references["m"][0]["sum"]
    messages.clear()
    _prepare(toy, messages=messages)
    assert messages == []


def test_the_hash_of_an_artifact_covers_names_and_contents(toy: Path) -> None:
    first = _prepare(toy)
    renamed = (toy / "build.py").read_text().replace("config.json", "other.json")
    (toy / "build.py").write_text(renamed)
    (toy / "model.py").write_text((toy / "model.py").read_text().replace("config.json", "other.json"))
    assert _prepare(toy).artifact_sha256 != first.artifact_sha256


# In the place of ONNX Runtime: a model is a JSON file that says what it adds, and whether it has a batch axis.
FAKE_RUNTIME = """
import json
from types import SimpleNamespace
import numpy as np

class InferenceSession:
    def __init__(self, path, providers):
        assert providers == ["CPUExecutionProvider"]
        self.told = json.loads(path.read_text())

    def get_inputs(self):
        return [SimpleNamespace(name=name) for name in self.told["inputs"]]

    def get_outputs(self):
        return [SimpleNamespace(name="sum")]

    def run(self, names, inputs):
        assert names == ["sum"]
        sums = (inputs["file"].sum(1) + self.told["added"]).astype(np.float32)
        if len(sums) > 1:
            sums += np.float32(self.told["more_in_batches"])
        return [sums[:self.told["rows"]]]
"""
EXPORT = """
def export(kind, file, options, seed):
    assert kind == "onnx"
    told = {"inputs": ["file"], "added": options["added"] + len("m"), "more_in_batches": 0, "rows": None}
    file.write_text(json.dumps({**told, **CHANGES}))
"""


@pytest.fixture
def exportable(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes of the toy one that can be exported, with those mistakes."""
    runtime = toy.parent / "runtime"
    runtime.mkdir()
    (runtime / "onnxruntime.py").write_text(FAKE_RUNTIME)
    monkeypatch.setenv("PYTHONPATH", str(runtime))
    tolerance = {"atol": 0.001, "rtol": 0}
    spec = {**WORKLOAD, "exports": {"onnx": ["fp32"]}, "tolerance": tolerance, "lower_precisions": {"bf16": tolerance}}
    (toy / "workload.yaml").write_text(yaml.safe_dump({**spec, "compiles": True}))

    def build(**mistakes: Any) -> Path:
        (toy / "build.py").write_text(BUILD + EXPORT.replace("CHANGES", repr(mistakes)))
        return toy

    return build


def test_an_export_lies_in_the_artifact_beside_what_the_python_model_loads(exportable: Callable[..., Path]) -> None:
    toy = exportable()
    messages: list[str] = []
    prepared = _prepare(toy, artifact="onnx", messages=messages)
    assert prepared.exported == prepared.artifact / "exported" / "model.onnx"
    assert prepared.exported.is_file()
    assert (prepared.artifact / "deep" / "config.json").is_file(), "other frameworks serve the Python model"
    assert any("exporting it to onnx" in message for message in messages)
    plain = _prepare(toy)
    assert plain.exported is None
    assert plain.artifact != prepared.artifact
    assert plain.references["m"][0]["sum"] == prepared.references["m"][0]["sum"]
    messages.clear()
    again = _prepare(toy, artifact="onnx", messages=messages)
    assert (messages, again.artifact_sha256) == ([], prepared.artifact_sha256)
    assert again.exported is not None
    again.exported.write_text("{}")
    _prepare(toy, artifact="onnx", messages=messages)
    assert "is damaged" in messages[0]


@pytest.mark.parametrize(
    ("mistakes", "models", "said"),
    [
        ({"added": 3.5}, ("m",), "of m, 5 of 5 payloads, asked one by one, differ by up to 1; allowed are 0.001 and 0"),
        ({"more_in_batches": 0.25}, ("m",), "5 of 5 payloads, asked in one batch, differ by up to 0.25"),
        ({"rows": 1}, ("m",), "gives 1 of the output `sum`"),
        ({}, ("m", "other"), "of other, 5 of 5 payloads, asked one by one, differ by up to 4"),
    ],
)
def test_an_export_that_does_not_agree_is_refused_with_the_numbers_and_not_kept(
    exportable: Callable[..., Path], mistakes: dict[str, Any], models: tuple[str, ...], said: str
) -> None:
    toy = exportable(**mistakes)
    with pytest.raises(InputError, match=re.escape(said)):
        _prepare(toy, artifact="onnx", models=models)
    assert _left(toy.parent / "cache") == []
    assert _prepare(toy, models=models).exported is None


def test_an_export_within_the_tolerance_is_taken(exportable: Callable[..., Path]) -> None:
    assert _prepare(exportable(more_in_batches=0.0009), artifact="onnx").exported is not None


def test_an_export_has_the_names_of_the_declaration(exportable: Callable[..., Path]) -> None:
    toy = exportable(inputs=["x"])
    with pytest.raises(TailraceError) as caught:
        _prepare(toy, artifact="onnx")
    assert "has the inputs ['x'], workload.yaml declares ['file']" in (caught.value.detail or "")
    assert _left(toy.parent / "cache") == []


def test_what_an_export_needs_to_be_made_is_asked_for_only_then(exportable: Callable[..., Path]) -> None:
    toy = exportable()
    (toy / "onnx-requirements.txt").write_text("no-such-package==1\n")
    _prepare(toy)
    with pytest.raises(EnvironmentBuildError, match="toy-build needs: no-such-package"):
        _prepare(toy, artifact="onnx")


def test_an_export_that_is_not_offered_is_refused(exportable: Callable[..., Path]) -> None:
    toy = exportable()
    with pytest.raises(InputError, match="toy has no export to torchscript, only to onnx"):
        _prepare(toy, artifact="torchscript")
    with pytest.raises(InputError, match="toy has no export to onnx in bf16, only in fp32"):
        _prepare(toy, artifact="onnx", precision="bf16")
    with pytest.raises(InputError, match="an export is not compiled by torch"):
        _prepare(toy, artifact="onnx", compiled=True)
    with pytest.raises(InputError, match="emulated has no export to onnx: there is nothing of it but its Python code"):
        _prepare("emulated", device="emulated", artifact="onnx")


def _left(cache: Path) -> list[str]:
    return [path.name for path in (cache / "artifacts").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("build.py", '"deep").mkdir()', '"deep").rmdir()', "FileNotFoundError"),
        ("model.py", "(1, 3)", "(3, 1), 'not what was expected'", "not what was expected"),
        ("model.py", "class Model", "class Modell", "has no attribute 'Model'"),
        ("build.py", "dtype=np.float32)", "dtype=np.float32).astype(object)", "allow_pickle"),
    ],
)
def test_failures_of_the_users_code_are_shown(toy: Path, file: str, old: str, new: str, said: str) -> None:
    source = (toy / file).read_text()
    assert old in source
    (toy / file).write_text(source.replace(old, new))
    with pytest.raises(TailraceError) as caught:
        _prepare(toy)
    assert caught.value.exit_code == 1
    assert said in (caught.value.detail or "")
    assert _left(toy.parent / "cache") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [3]}]}, "gives no input `x`"),
        ({"inputs": [{"name": "file", "dtype": "float32", "shape": [4]}]}, "as float32[3]; workload.yaml declares"),
        ({"outputs": [{"name": "sum", "dtype": "float16", "shape": []}]}, "output `sum` as float32[]"),
        ({"outputs": []}, "gives the output `sum`, which workload.yaml does not declare"),
    ],
)
def test_code_and_declaration_must_agree(toy: Path, change: dict[str, Any], said: str) -> None:
    (toy / "workload.yaml").write_text(yaml.safe_dump({**WORKLOAD, **change}))
    with pytest.raises(InputError, match=re.escape(said)):
        _prepare(toy)
    assert _left(toy.parent / "cache") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "workload.yaml"),
        ("- a list", "the file"),
        (yaml.safe_dump({**WORKLOAD, "payload": 3}), "`payload`.*did you mean `payloads`"),
        (yaml.safe_dump({**WORKLOAD, "slo": {"latency_ms": 0}}), r"`slo\.latency_ms`.*greater than 0"),
        (yaml.safe_dump({**WORKLOAD, "devices": ["tpu"]}), r"`devices\.0`"),
        (yaml.safe_dump({**WORKLOAD, "exports": {"tflite": ["fp32"]}}), r"`exports\.tflite"),
        (yaml.safe_dump({**WORKLOAD, "exports": {"onnx": ["bf16"]}}), "onnx is offered in bf16, which is not among"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_declaration_with_a_mistake_names_the_field(toy: Path, text: str, said: str) -> None:
    (toy / "workload.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        catalogue.load_spec(str(toy))


def test_names_and_options_with_a_mistake_name_the_nearest(toy: Path) -> None:
    with pytest.raises(InputError, match=r"no workload `emulatd`; did you mean `emulated`\?"):
        catalogue.load_spec("emulatd")
    with pytest.raises(InputError, match=r"no option `per_item`; did you mean `per_item_ms`\?"):
        _prepare("emulated", device="emulated", options={"per_item": 1})
    with pytest.raises(InputError, match="`added` is nan"):
        _prepare(toy, options={"added": float("nan")})
    with pytest.raises(InputError, match="`added` is -1"):
        _prepare(toy, options={"added": -1})
    with pytest.raises(InputError, match="does not run on `device: cuda`"):
        _prepare(toy, device="cuda")
    (toy / "model.py").unlink()
    with pytest.raises(InputError, match=r"it has no model\.py"):
        _prepare(toy)


def test_a_workload_may_need_packages_to_be_built(toy: Path) -> None:
    (toy / "build-requirements.txt").write_text("no-such-package==1\n")
    with pytest.raises(EnvironmentBuildError, match="toy-build needs: no-such-package"):
        _prepare(toy)
    (toy / "build-requirements.txt").write_text("numpy\n")
    (toy / "requirements.txt").write_text("numpy\n")
    assert _prepare(toy).requirements == toy / "requirements.txt"


def test_a_cache_that_cannot_be_written_is_one_clear_error(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(toy.parent / "cache", ignore_errors=True)
    (toy.parent / "cache").write_text("a file in the way")
    with pytest.raises(StorageError, match="toy could not be written"):
        _prepare(toy)
