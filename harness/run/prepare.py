"""Prepares workloads for a run: artifact, payloads and references, cached by what they depend on."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailrace.harness.contract.adapter import ServerEnvironment
from tailrace.harness.contract.pipeline import description
from tailrace.harness.contract.workload import (
    ArtifactKind,
    Device,
    Precision,
    PreparedWorkload,
    Tensors,
    TensorSpec,
    Tolerance,
    WorkloadSpec,
    mismatch,
)
from tailrace.harness.errors import InputError, StorageError, TailraceError
from tailrace.harness.folders import cache_folder
from tailrace.harness.servers import environments
from tailrace.harness.servers.environments import Progress
from tailrace.multiplexing import resident
from tailrace.workloads import pipeline, prepare_artifact
from tailrace.workloads.catalogue import check_arithmetic, check_export, folder_of, load_spec

_RUNNER = Path(prepare_artifact.__file__)
_PIPELINE = Path(pipeline.__file__)
"""What runs the stages of a pipeline, here and in servers."""
_RESIDENT = Path(resident.__file__)
"""What gives models that share a memory their room in it."""
_SEAL = "prepared.json"
_EXPORTED: Mapping[ArtifactKind, str] = {"onnx": "exported/model.onnx", "torchscript": "exported/model.pt"}
"""Where an export lies in the artifact, by its kind."""


def prepare(
    name_or_folder: str,
    *,
    models: Sequence[str],
    device: Device,
    seed: int,
    options: Mapping[str, float],
    environment_kind: environments.Kind,
    precision: Precision | None = None,
    compiled: bool = False,
    artifact: ArtifactKind = "python",
    on_progress: Progress | None = None,
) -> PreparedWorkload:
    """Make a workload concrete: build its artifact, payloads and references, or take them from the cache.

    They are built in the workload's own environment (``build-requirements.txt`` in its folder; without that file the
    harness's interpreter does it), never inside this process. The artifact's SHA-256 is checked whenever it comes from
    the cache; a damaged one is built again. Whatever the ``precision``, references are those of fp32, not compiled.

    An ``artifact`` other than ``python`` is exported beside what ``model.py`` loads, in an environment that has what
    ``ARTIFACT-requirements.txt`` names besides, and run on every payload, alone and all in one batch: unless its answers are
    the references within the tolerance of the precision, it is refused and nothing is kept.

    Raises :class:`InputError` for a workload, device, option or export that cannot be used,
    :class:`EnvironmentBuildError` when its environment cannot be built, and
    :class:`TailraceError` when its ``build.py`` or ``model.py`` fails.
    """
    progress = on_progress or environments.silent
    folder = folder_of(name_or_folder)
    spec = load_spec(str(folder))
    if device not in spec.devices:
        raise InputError(
            f"the workload {spec.name} does not run on `device: {device}`",
            remedy=f"choose one of: {', '.join(spec.devices)}",
        )
    check_arithmetic(spec, precision, compiled)
    check_export(spec, artifact, precision, compiled)
    job = _job(spec, folder, models, seed, options, precision, compiled, artifact)
    requirements = _build_requirements(folder, artifact)
    kind: environments.Kind = environment_kind if requirements else "current"
    environment_fingerprint = environments.fingerprint(kind, requirements, name=spec.name, on_progress=on_progress)
    key = _key(job, spec, folder, device, environment_fingerprint)
    target = cache_folder() / "artifacts" / f"{spec.name}-{key}"

    made = _Made(device, precision or "fp32", compiled, artifact, folder, progress)
    if ready := _load(target, spec, models, made):
        return ready
    try:
        lock = target.with_name(f"{target.name}.lock")
        with environments.exclusive(lock, lambda: progress(f"waiting for another preparation of {spec.name}")):
            if ready := _load(target, spec, models, made):
                return ready
            environment = environments.build(
                kind, requirements, name=f"{spec.name}-build", on_progress=on_progress, compile_bytecode=False
            )
            with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as staging:
                out = Path(staging) / "out"
                out.mkdir()
                _run_build(environment, {**job, "folder": str(folder), "out": str(out)}, spec, progress)
                _check(out, spec, models, spec.tolerance_in(precision or "fp32"))
                if artifact != "python":
                    _check_answers(out, spec, models, artifact, precision or "fp32")
                (out / _SEAL).write_text(json.dumps({"artifact_sha256": _sha256(out / "artifact")}))
                shutil.rmtree(target, ignore_errors=True)
                out.rename(target)
    except OSError as error:
        raise StorageError(
            f"the workload {spec.name} could not be written to {target.parent}: {error.strerror or error}",
            remedy="free some space there, or set TAILRACE_CACHE to another folder",
        ) from error
    ready = _load(target, spec, models, made)
    if ready is None:
        raise StorageError(
            f"the workload {spec.name} cannot be read back from {target}",
            remedy="check that disk, or set TAILRACE_CACHE to a folder on another one",
        )
    return ready


def _job(
    spec: WorkloadSpec,
    folder: Path,
    models: Sequence[str],
    seed: int,
    options: Mapping[str, float],
    precision: Precision | None,
    compiled: bool,
    artifact: ArtifactKind,
) -> dict[str, object]:
    """What the runner is told; everything that it makes follows from this and the workload's own files."""
    chosen = _checked_options(spec, options)
    return {
        "options": {**chosen, **_arithmetic(spec, precision or "fp32", compiled)},
        "reference_options": {**chosen, **_arithmetic(spec, "fp32", compiled=False)},
        "seed": seed,
        "payloads": spec.payloads,
        "models": list(models),
        "pipeline": description(spec, folder / "model.py", None) if spec.pipeline else None,
        "export": None
        if artifact == "python"
        else {
            "kind": artifact,
            "file": _EXPORTED[artifact],
            "inputs": [tensor.name for tensor in spec.inputs],
            "outputs": [tensor.name for tensor in spec.outputs],
        },
    }


def _key(job: Mapping[str, object], spec: WorkloadSpec, folder: Path, device: Device, environment: str) -> str:
    """The name of what follows from all this in the cache."""
    facts = {
        **job,
        "pipeline": hashlib.sha256(_PIPELINE.read_bytes()).hexdigest() if spec.pipeline else None,
        "device": device,
        "told_apart": True,  # what was kept before models had to answer differently is made again, and checked
        "files": [(name, digest.hex()) for name, digest in _digests(folder)],
        "runner": hashlib.sha256(_RUNNER.read_bytes()).hexdigest(),
        "environment": environment,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _build_requirements(folder: Path, artifact: ArtifactKind) -> list[Path]:
    """What building a workload needs beside the harness's own interpreter; none: nothing."""
    wanted = ["build-requirements.txt", *([] if artifact == "python" else [f"{artifact}-requirements.txt"])]
    return [folder / name for name in wanted if (folder / name).is_file()]


def sharing_memory(workload: PreparedWorkload) -> PreparedWorkload:
    """A workload, which is no pipeline, as it is served where its models share a memory that does not hold them all."""
    return dataclasses.replace(workload, model_file=_RESIDENT, own_file=workload.model_file)


def _arithmetic(spec: WorkloadSpec, precision: Precision, compiled: bool) -> dict[str, object]:
    """What build.py is told of what the workload lets choose."""
    return {
        **({"precision": precision} if spec.lower_precisions else {}),
        **({"compile": compiled} if spec.compiles else {}),
    }


def _checked_options(spec: WorkloadSpec, options: Mapping[str, float]) -> dict[str, float]:
    for name, value in options.items():
        if name not in spec.cost:
            near = difflib.get_close_matches(name, spec.cost, n=1)
            known = f"its options are: {', '.join(spec.cost)}" if spec.cost else "it has no options"
            raise InputError(
                f"workload_options: the workload {spec.name} has no option `{name}`"
                + (f"; did you mean `{near[0]}`?" if near else ""),
                remedy=known,
            )
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"workload_options: `{name}` is {value}; it must be a number, zero or more")
    return {**spec.cost, **options}


def _run_build(
    environment: ServerEnvironment, job: Mapping[str, object], spec: WorkloadSpec, progress: Progress
) -> None:
    """Run the runner with the workload's interpreter."""
    job_file = Path(str(job["out"])).with_name("job.json")
    job_file.write_text(json.dumps(job), encoding="utf-8")
    # Weights come from packages; a hub that cannot be reached must not be asked.
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if environment.kind == "venv":
        variables.pop("PYTHONPATH", None)
        variables.pop("PYTHONHOME", None)
    told = "progress: "
    code, said = environments.run_streamed(
        [str(environment.python), "-P", str(_RUNNER), str(job_file)],
        cwd=job_file.parent,
        env=variables,
        on_line=lambda line: progress(f"{spec.name}: {line[len(told) :]}") if line.startswith(told) else None,
    )
    if code != 0:
        raise TailraceError(
            f"the workload {spec.name} could not be prepared: its build.py or model.py failed",
            remedy=f"mend the file that the traceback names (it ran in {environment.python})",
            detail=said,
        )


def _check(out: Path, spec: WorkloadSpec, models: Sequence[str], tolerance: Tolerance) -> None:
    """Payloads and references must be what workload.yaml declares; servers are configured from that."""
    _check_arrays(out / "payloads.npz", spec.inputs, spec, "make_payloads() of build.py", "input")
    for index in range(len(models)):
        _check_arrays(out / f"references-{index}.npz", spec.outputs, spec, "predict() of model.py", "output")
    _check_apart(out, spec, models, tolerance)


def _check_apart(out: Path, spec: WorkloadSpec, models: Sequence[str], tolerance: Tolerance) -> None:
    """No two models may answer alike within the tolerance of what is served: a request that reached the wrong one would be
    taken for answered."""
    answers = [_rows(out / f"references-{index}.npz") for index in range(len(models))]
    # By the first payload at once, for there may be a thousand models; whoever is alike there is looked at whole.
    first = np.stack([np.concatenate([np.ravel(x).astype(np.float64) for x in rows[0].values()]) for rows in answers])
    for index, own in enumerate(first):
        apart = np.abs(first[:index] - own)
        near = apart <= tolerance.atol + tolerance.rtol * np.maximum(np.abs(first[:index]), np.abs(own))
        for other in np.flatnonzero(near.all(axis=1)).tolist():
            if _alike(answers[other], answers[index], tolerance) or _alike(answers[index], answers[other], tolerance):
                raise InputError(
                    f"workload {spec.name}: the models {models[other]} and {models[index]} give the same answers to all "
                    f"{spec.payloads} payloads: a request that reached the wrong one would be taken for answered",
                    remedy="let `Model` of model.py draw weights by its `name`, or use `models: 1`",
                )


def _alike(got: Sequence[Tensors], expected: Sequence[Tensors], tolerance: Tolerance) -> bool:
    return all(mismatch(*pair, tolerance) is None for pair in zip(got, expected, strict=True))


def _check_arrays(path: Path, declared: Sequence[TensorSpec], spec: WorkloadSpec, source: str, role: str) -> None:
    arrays = _arrays(path)
    for tensor in declared:
        array = arrays.pop(tensor.name, None)
        expected = f"{tensor.dtype}{list(tensor.shape)}"
        if array is None:
            raise InputError(
                f"workload {spec.name}: {source} gives no {role} `{tensor.name}`, which workload.yaml declares"
            )
        if array.dtype != np.dtype(tensor.dtype) or array.shape != (spec.payloads, *tensor.shape):
            raise InputError(
                f"workload {spec.name}: {source} gives {len(array)} of the {role} `{tensor.name}` as "
                f"{array.dtype}{list(array.shape[1:])}; workload.yaml declares {spec.payloads} of {expected}"
            )
    for name in arrays:
        raise InputError(
            f"workload {spec.name}: {source} gives the {role} `{name}`, which workload.yaml does not declare"
        )


def _check_answers(
    out: Path, spec: WorkloadSpec, models: Sequence[str], artifact: ArtifactKind, precision: Precision
) -> None:
    """An export answers as ``model.py`` does, whatever the batch, or it is none."""
    tolerance = spec.tolerance_in(precision)
    for how in ("alone", "batch"):
        answers = out / f"exported-{how}.npz"
        _check_arrays(answers, spec.outputs, spec, f"the export of build.py to {artifact}", "output")
        for index, model in enumerate(models):
            pairs = list(zip(_rows(answers), _rows(out / f"references-{index}.npz"), strict=True))
            if wrong := [said for got, reference in pairs if (said := mismatch(got, reference, tolerance))]:
                apart = max(
                    np.abs(got[name].astype(np.float64) - reference[name].astype(np.float64)).max()
                    for got, reference in pairs
                    for name in reference
                )
                raise InputError(
                    f"workload {spec.name}: its export to {artifact} in {precision} does not answer as model.py does: of "
                    f"{model}, {len(wrong)} of {len(pairs)} payloads, asked "
                    + ("one by one" if how == "alone" else "in one batch")
                    + f", differ by up to {apart:.3g}; allowed are {tolerance.atol:g} and {tolerance.rtol:g} of the answer. "
                    f"The first: {wrong[0]}",
                    remedy="mend `export` of build.py, or use `artifact: python`; nothing of it was kept",
                )


@dataclass(frozen=True)
class _Made:
    """What a prepared workload is told of beside what lies in the cache."""

    device: Device
    precision: Precision
    compiled: bool
    export: ArtifactKind
    folder: Path
    progress: Progress


def _load(target: Path, spec: WorkloadSpec, models: Sequence[str], made: _Made) -> PreparedWorkload | None:
    if not target.is_dir():
        return None
    artifact = target / "artifact"
    try:
        sealed = json.loads((target / _SEAL).read_text())["artifact_sha256"]
        if _sha256(artifact) != sealed:
            raise ValueError("the artifact's SHA-256 differs from the one it was sealed with")
        payloads = _rows(target / "payloads.npz")
        references = {name: _rows(target / f"references-{index}.npz") for index, name in enumerate(models)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        made.progress(f"the prepared workload in {target} is damaged ({error}); preparing it again")
        return None
    requirements = made.folder / "requirements.txt"
    return PreparedWorkload(
        spec=spec,
        device=made.device,
        precision=made.precision,
        compiled=made.compiled,
        model_file=_PIPELINE if spec.pipeline else made.folder / "model.py",
        artifact=artifact,
        artifact_sha256=sealed,
        requirements=requirements if requirements.is_file() else None,
        payloads=payloads,
        references=references,
        own_file=made.folder / "model.py" if spec.pipeline else None,
        exported=None if made.export == "python" else artifact / _EXPORTED[made.export],
    )


def _arrays(path: Path) -> Tensors:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _rows(path: Path) -> tuple[Tensors, ...]:
    arrays = _arrays(path)
    count = len(next(iter(arrays.values())))
    return tuple({name: array[index] for name, array in arrays.items()} for index in range(count))


def _digests(folder: Path) -> list[tuple[str, bytes]]:
    """Relative path and SHA-256 of every file, by path; what Python and editors leave behind does not count."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in relative.parts):
            with path.open("rb") as handle:
                found.append((relative.as_posix(), hashlib.file_digest(handle, "sha256").digest()))
    return sorted(found)


def _sha256(artifact: Path) -> str:
    """One hash over the artifact's sorted relative paths and contents."""
    whole = hashlib.sha256()
    for name, digest in _digests(artifact):
        whole.update(name.encode() + b"\0" + digest)
    return whole.hexdigest()
