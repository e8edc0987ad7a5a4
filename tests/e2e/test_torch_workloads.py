"""The torch workloads as servers meet them: built in one environment, served from another, in batches of any size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.run.prepare import prepare
from tailrace.harness.servers import environments
from tailrace.harness.servers.environments import ServerEnvironment
from tailrace.workloads import catalogue

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.torch,
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="the CPU build of torch 2.13.0 is for Python 3.11"),
]

# Runs a workload's model.py as a server would: argv are model.py, artifact, payloads and an output file. Batches of
# each size walk over the payloads; the rows of every size are saved under it.
SERVE = r"""
import importlib.util, pathlib, re, sys
import numpy as np
import torch

# The devices that are written into a trace, which it does not leave whatever it is loaded on.
def baked(artifact):
    trace = pathlib.Path(artifact) / "model.pt"
    graph = str(torch.jit.load(trace).inlined_graph) if trace.exists() else ""
    return re.findall(r'Device = prim::Constant\[value="([^"]+)"\]', graph)

spec = importlib.util.spec_from_file_location("model", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.Model(sys.argv[2], sys.argv[5], "cpu")
assert not any(device == "cpu" for device in baked(sys.argv[2])), "would compute there on a GPU, too"
with np.load(sys.argv[3], allow_pickle=False) as archive:
    inputs = {name: archive[name] for name in archive.files}
for array in inputs.values():
    array.setflags(write=False)  # tensors that arrive over a wire are often read-only
count = len(next(iter(inputs.values())))
answers = {}
for size in (1, 3, 16):
    rows = [
        model.predict({name: array[start:start + size] for name, array in inputs.items()})
        for start in range(0, count, size)
    ]
    for name in rows[0]:
        answers[f"{name}-{size}"] = np.concatenate([row[name] for row in rows])
assert torch.get_num_threads() == 1
assert "transformers" not in sys.modules
np.savez(sys.argv[4], numpy_version=np.array(np.__version__), **answers)
"""


@pytest.fixture(scope="module", params=["minilm", "resnet50"])
def prepared(request: pytest.FixtureRequest) -> PreparedWorkload:
    return _prepared(request.param)


@pytest.fixture(scope="module")
def server(prepared: PreparedWorkload, tmp_path_factory: pytest.TempPathFactory) -> ServerEnvironment:
    """What a server of an old numpy with this workload's requirements has, and nothing of what built the artifact."""
    lock = tmp_path_factory.mktemp("lock") / "requirements.txt"
    lock.write_text("numpy<2\n")
    assert prepared.requirements is not None
    return environments.build("venv", [lock, prepared.requirements], name="torch-test", compile_bytecode=False)


def _served(prepared: PreparedWorkload, python: Path, out: Path) -> dict[str, np.ndarray]:
    payloads = prepared.artifact.parent / "payloads.npz"
    command = [python, "-P", "-c", SERVE, prepared.model_file, prepared.artifact, payloads, out, prepared.spec.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_in_lower_precision_answers_are_held_to_those_in_fp32(server: ServerEnvironment, tmp_path: Path) -> None:
    """In bf16, which CPUs compute too: near the same references, and not equal to them."""
    ordinary, lower = (_prepared("minilm", precision=precision) for precision in ("fp32", "bf16"))
    np.testing.assert_array_equal(_references(ordinary), _references(lower))
    served = _served(lower, server.python, tmp_path / "answers.npz")
    served.pop("numpy_version")
    for answers in served.values():
        assert answers.dtype == np.float32
        apart = np.abs(answers - _references(lower)).max()
        assert ordinary.tolerance.atol < apart < lower.tolerance.atol
    assert lower.tolerance.atol < np.abs(_references(lower)[0] - _references(lower)[1]).max() / 5


def test_a_compiled_model_answers_alike(server: ServerEnvironment, tmp_path: Path) -> None:
    prepared = _prepared("minilm", compiled=True)
    assert [path.name for path in prepared.artifact.iterdir()] == ["model.pt2"]
    served = _served(prepared, server.python, tmp_path / "answers.npz")
    served.pop("numpy_version")
    for answers in served.values():
        np.testing.assert_allclose(answers, _references(prepared), atol=prepared.tolerance.atol)


def _prepared(name: str, **arithmetic: Any) -> PreparedWorkload:
    return prepare(name, models=(name,), device="cpu", seed=7, options={}, environment_kind="venv", **arithmetic)


def _references(prepared: PreparedWorkload) -> np.ndarray:
    (output,) = prepared.spec.outputs
    return np.stack([row[output.name] for row in prepared.references[prepared.spec.name]])


def test_any_batch_gives_the_reference(prepared: PreparedWorkload, server: ServerEnvironment, tmp_path: Path) -> None:
    served = _served(prepared, server.python, tmp_path / "answers.npz")
    assert str(served.pop("numpy_version")).startswith("1.26")
    assert "transformers" not in server.packages
    references = _references(prepared)
    assert len(served) == 3
    for name, answers in served.items():
        assert answers.dtype == references.dtype
        np.testing.assert_allclose(
            answers, references, atol=prepared.spec.tolerance.atol, rtol=prepared.spec.tolerance.rtol, err_msg=name
        )


def test_the_tolerance_tells_wrong_answers_apart(prepared: PreparedWorkload) -> None:
    """Any other payload's answer lies at least thirty tolerances away, and so does nothing at all."""
    references = _references(prepared)
    tolerance = prepared.spec.tolerance
    assert tolerance.rtol == 0
    assert len(references) == prepared.spec.payloads
    for index, reference in enumerate(references):
        others = np.delete(references, index, axis=0)
        assert np.abs(others - reference).max(axis=1).min() > 30 * tolerance.atol
        assert np.abs(reference).max() > 30 * tolerance.atol


def test_nothing_in_the_artifact_runs_on_loading(prepared: PreparedWorkload) -> None:
    """TorchScript: an archive of code that its own interpreter runs, never Python's pickle; nor that of an exported one."""
    assert [path.name for path in prepared.artifact.iterdir()] == ["model.pt"]
    source = prepared.model_file.read_text()
    assert "torch.jit.load" in source
    assert "torch.load(" not in source
    assert source.index('"TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"') < source.index("torch.export.load(")


def test_minilm_is_the_published_model(tmp_path: Path) -> None:
    """Our embeddings are those of sentence-transformers itself, at any padded length."""
    prepared = _prepared("minilm")
    folder = prepared.model_file.parent
    builder = environments.build(
        "venv", [folder / "build-requirements.txt"], name="minilm-build", compile_bytecode=False
    )
    code = f"""
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, {str(folder)!r})
import numpy as np
from sentence_transformers import SentenceTransformer
import build, model
published = SentenceTransformer(str(build._package()), device="cpu").encode(build.SENTENCES, normalize_embeddings=True)
tokenizer = build.AutoTokenizer.from_pretrained(build._package())
longest = max(len(tokenizer(sentence)["input_ids"]) for sentence in build.SENTENCES)
assert longest <= build.TOKENS, f"a sentence of {{longest}} tokens would be cut"
ours = model.Model({str(prepared.artifact)!r}, "minilm", "cpu")
for length in (longest, build.TOKENS, 64):
    tokens = tokenizer(build.SENTENCES, padding="max_length", max_length=length, return_tensors="np")
    answer = ours.predict({{name: tokens[name] for name in ("input_ids", "attention_mask")}})["embedding"]
    np.testing.assert_allclose(answer, published, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-5)
"""
    command = [builder.python, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# Of an export, run by what is no part of tailrace: the names of its tensors, and for TorchScript the devices in it.
LOOK = r"""
import json, re, sys
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    told = {"inputs": [[t.name, t.shape[0]] for t in session.get_inputs()], "outputs": [t.name for t in session.get_outputs()]}
else:
    import torch
    module = torch.jit.load(sys.argv[1])
    names = [argument.name for argument in module.forward.schema.arguments][1:]
    found = re.findall(r'Device = prim::Constant\[value="([^"]+)"\]', str(module.inlined_graph))
    told = {"inputs": names, "devices": found}
print(json.dumps(told))
"""


@pytest.mark.parametrize(
    ("name", "artifact", "precision"),
    [
        ("minilm", "onnx", "fp32"),
        ("minilm", "torchscript", "bf16"),
        ("resnet50", "onnx", "fp32"),
        ("resnet50", "torchscript", "bf16"),
    ],
)
def test_an_export_answers_as_the_python_model_does(name: str, artifact: Any, precision: Any) -> None:
    """Which is checked when it is made, alone and in one batch of all payloads; so this asks how near it came."""
    prepared = _prepared(name, artifact=artifact, precision=precision)
    (output,) = prepared.spec.outputs
    for how in ("alone", "batch"):
        with np.load(prepared.artifact.parent / f"exported-{how}.npz", allow_pickle=False) as archive:
            apart = np.abs(archive[output.name] - _references(prepared)).max()
        assert apart < prepared.tolerance.atol / (10 if precision == "fp32" else 1)
        if precision == "bf16":
            assert apart > 1e-4, "it computes in bf16, and not in what the references were made in"

    assert prepared.exported is not None
    environment = environments.build("venv", _build_requirements(name, artifact), name=f"{name}-build")
    looked = subprocess.run(
        [environment.python, "-I", "-c", LOOK, prepared.exported],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    told = json.loads(looked.stdout)
    inputs = [tensor.name for tensor in prepared.spec.inputs]
    if artifact == "onnx":
        assert told == {"inputs": [[one, "batch"] for one in inputs], "outputs": [output.name]}
    else:
        assert told["inputs"] == inputs
        assert "cpu" not in told["devices"], "would compute there on a GPU, too"


def _build_requirements(name: str, artifact: str) -> list[Path]:
    folder = Path(catalogue.__file__).parent / name
    more = folder / f"{artifact}-requirements.txt"
    return [folder / "build-requirements.txt", *([more] if more.is_file() else [])]
