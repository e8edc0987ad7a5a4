"""Runs a workload's ``build.py`` and ``model.py`` in the workload's own interpreter: artifact, payloads, references.

A script of the standard library and numpy, started with one argument, a JSON file: ``folder`` (the workload's), ``out``
(an empty folder), ``options`` and ``reference_options``, ``seed``, ``payloads`` (how many), ``models`` (names), and of a
pipeline ``pipeline``, what ``TAILRACE_PIPELINE`` names: its references are computed by its stages one after the other. With
``export`` (``kind``, ``file`` below the artifact, names of ``inputs`` and ``outputs``) it exports the model too, and writes what
that answers to the payloads one by one and in one batch, ``out/exported-alone.npz`` and ``out/exported-batch.npz``. It
writes ``out/artifact/``, ``out/payloads.npz`` and for the i-th model ``out/references-i.npz``; arrays have the payloads as
axis 0. Its lines on stdout that begin with ``progress: `` are for the user.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"workload_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _progress(message: str) -> None:
    sys.stdout.write(f"progress: {message}\n")
    sys.stdout.flush()


Batch = dict[str, NDArray[np.generic]]


def _stacked(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _save(path: Path, arrays: Batch) -> None:
    # Written by hand because np.savez pickles what it does not know, and takes some names for its own parameters.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _pipeline(description: dict[str, Any], out: Path) -> Any:
    """The class that runs all stages, after which the workload's own ``model.py`` is imported."""
    told = out / "pipeline.json"
    told.write_text(json.dumps(description), encoding="utf-8")
    os.environ["TAILRACE_PIPELINE"] = str(told)
    return _module(Path(__file__).with_name("pipeline.py")).Model


def main(job_file: str) -> None:
    """Do the job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    folder, out = Path(job["folder"]), Path(job["out"])
    build = _module(folder / "build.py")

    _progress("building the artifact")
    artifact = out / "artifact"
    artifact.mkdir()
    build.build_artifact(artifact, job["options"], job["seed"])
    with tempfile.TemporaryDirectory(dir=out.parent) as other:
        # In the precision, and by the code, that nobody doubts: what is served in another is held to the same answers.
        reference = artifact
        if job["reference_options"] != job["options"]:
            _progress("building the artifact of the references")
            reference = Path(other)
            build.build_artifact(reference, job["reference_options"], job["seed"])
        payloads = build.make_payloads(job["payloads"], job["seed"])
        _save(out / "payloads.npz", _stacked(payloads))
        _answer(job, payloads, str(reference), out)
    if job["export"]:
        _export(job, build, payloads, out)


def _answer(job: dict[str, Any], payloads: list[Batch], artifact: str, out: Path) -> None:

    own = Path(job["folder"]) / "model.py"
    model_class = _pipeline(job["pipeline"], out) if job["pipeline"] else _module(own).Model
    for index, name in enumerate(job["models"]):
        _progress(f"computing the reference answers of {name}")
        model = model_class(artifact, name, "cpu")
        # One payload at a time: a reference must not depend on what else is in its batch.
        answers = [model.predict({key: value[np.newaxis] for key, value in row.items()}) for row in payloads]
        _save(
            out / f"references-{index}.npz",
            _stacked([{key: value[0] for key, value in row.items()} for row in answers]),
        )


def _export(job: dict[str, Any], build: Any, payloads: list[Batch], out: Path) -> None:
    told = job["export"]
    _progress(f"exporting it to {told['kind']}")
    file = out / "artifact" / told["file"]
    file.parent.mkdir()
    build.export(told["kind"], file, job["options"], job["seed"])
    _progress(f"asking the {told['kind']} for its answers")
    run = {"onnx": _onnx, "torchscript": _torchscript}[told["kind"]](file, told["inputs"], told["outputs"])
    answers = [run({name: value[np.newaxis] for name, value in row.items()}) for row in payloads]
    _save(out / "exported-alone.npz", _stacked([{name: value[0] for name, value in row.items()} for row in answers]))
    _save(out / "exported-batch.npz", run(_stacked(payloads)))


def _onnx(file: Path, inputs: list[str], outputs: list[str]) -> Callable[[Batch], Batch]:
    """Runs an ONNX model, which has the names and types of its tensors in it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for role, declared, found in (
        ("inputs", inputs, [tensor.name for tensor in session.get_inputs()]),
        ("outputs", outputs, [tensor.name for tensor in session.get_outputs()]),
    ):
        if sorted(declared) != sorted(found):
            raise ValueError(f"the exported model has the {role} {found}, workload.yaml declares {declared}")
    return lambda batch: dict(zip(outputs, session.run(outputs, batch), strict=True))


def _torchscript(file: Path, inputs: list[str], outputs: list[str]) -> Callable[[Batch], Batch]:
    """Runs a TorchScript module, which takes and gives tensors in the order in which workload.yaml declares them."""
    import torch

    torch.set_num_threads(1)
    module = torch.jit.load(file, map_location="cpu")

    def run(batch: Batch) -> Batch:
        with torch.inference_mode():
            answer = module(*(torch.as_tensor(np.array(batch[name])) for name in inputs))
        tensors = [answer] if isinstance(answer, torch.Tensor) else list(answer)
        return {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}

    return run


if __name__ == "__main__":
    main(sys.argv[1])
