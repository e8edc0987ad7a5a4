"""Workloads: a model with its inputs, outputs, SLO and proof of sameness, declared in ``workloads/NAME/workload.yaml``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Tensors = dict[str, NDArray[np.generic]]
"""Named tensors. For one payload without a batch axis; for a batch with the batch as axis 0."""

Device = Literal["emulated", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]
ArtifactKind = Literal["python", "onnx", "torchscript"]
"""What of a model a server runs: its ``model.py``, or an export of the whole of it, without Python."""


class TensorSpec(BaseModel):
    """One input or output of a model: ``shape`` is that of a single item, without the batch axis."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str
    dtype: Literal["int32", "int64", "uint8", "float32", "float16"]
    shape: tuple[int, ...]


class Slo(BaseModel):
    """The service-level objective of one request: an answer later than ``latency_ms`` after its intended start is a miss."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    latency_ms: float = Field(gt=0)


class Tolerance(BaseModel):
    """How far an output may lie from the reference: ``|x − ref| ≤ atol + rtol·|ref|``, element by element."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    atol: float = 0.0
    rtol: float = 0.0


class StageSpec(BaseModel):
    """One stage of a pipeline. Tensors have names of their own within the pipeline: a stage takes some of those that are
    there, of the request or of the stages above it, and its outputs are there from then on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    class_name: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """The class of ``model.py``, of the interface that a ``Model`` has."""
    on_device: bool = False
    """Whether it computes on the workload's device, and so batches as the tuning says; else it computes on the CPU, one
    item at a time."""
    inputs: tuple[str, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    when: str | None = None
    """A business rule: the integer tensor, one number an item, that says which items go through this stage (not 0). Its
    outputs replace those of an earlier stage, which the other items keep."""


Composition = Literal["framework", "one-process"]
"""Who joins the stages of a pipeline: the framework, in its own way, or the model's process, one after the other."""


class WorkloadSpec(BaseModel):
    """The contents of ``workload.yaml``; the field documentation is in docs/extend.md, «add a workload»."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str
    description: str
    devices: tuple[Device, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slo: Slo
    tolerance: Tolerance = Tolerance()
    lower_precisions: dict[Literal["bf16", "fp16"], Tolerance] = {}
    """Precisions that it offers beside fp32, each with its tolerance in place of the one above; references stay fp32."""
    compiles: bool = False
    """Whether it offers to be compiled (``torch.compile``)."""
    exports: dict[Literal["onnx", "torchscript"], tuple[Precision, ...]] = {}
    """What it can be exported to beside its ``model.py``, each with the precisions in which it can."""
    payloads: int = Field(default=64, ge=1)
    """How many distinct payloads a run uses; arrivals draw from them with the run's seed."""
    cost: dict[str, float] = {}
    """Parameters of the model that an experiment may override (``workload_options``); the emulated accelerator's times, say."""
    pipeline: tuple[StageSpec, ...] = ()
    """The stages, in the order in which an item goes through them; empty: the workload is one model."""

    @model_validator(mode="after")
    def _flows(self) -> WorkloadSpec:
        if self.pipeline:
            _check_flow(self)
        return self

    @model_validator(mode="after")
    def _exportable(self) -> WorkloadSpec:
        if self.pipeline and self.exports:
            raise ValueError("exports: a pipeline is several models and cannot be exported as one")
        for kind, precisions in self.exports.items():
            if unknown := [one for one in precisions if one != "fp32" and one not in self.lower_precisions]:
                raise ValueError(f"exports: {kind} is offered in {unknown[0]}, which is not among `lower_precisions`")
        return self

    def tolerance_in(self, precision: Precision) -> Tolerance:
        """How far answers in a precision may lie from the references."""
        return self.tolerance if precision == "fp32" else self.lower_precisions[precision]

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of a pipeline by its name: the workload's inputs, and what its stages give."""
        return {t.name: t for t in (*self.inputs, *(t for stage in self.pipeline for t in stage.outputs))}


def _check_flow(spec: WorkloadSpec) -> None:
    """Whether every stage of a pipeline gets what it takes. Raises ``ValueError`` with the stage, the tensor, and a remedy."""
    names = [stage.name for stage in spec.pipeline]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"pipeline: two stages are called {twice[0]!r}")
    there = {tensor.name: tensor for tensor in spec.inputs}
    for stage in spec.pipeline:
        for name in (*stage.inputs, *([stage.when] if stage.when else [])):
            if name not in there:
                raise ValueError(_missing(spec, stage, name))
        if stage.when and (there[stage.when].shape != (1,) or not there[stage.when].dtype.startswith(("int", "uint"))):
            told = f"{there[stage.when].dtype}{list(there[stage.when].shape)}"
            raise ValueError(
                f"pipeline: the rule of stage {stage.name!r}, {stage.when!r}, is {told}; it must be one integer an item: "
                "int32[1], for one"
            )
        for tensor in stage.outputs:
            before = there.get(tensor.name)
            if before is None and stage.when:
                raise ValueError(
                    f"pipeline: stage {stage.name!r} gives {tensor.name!r} only to the items that {stage.when!r} chooses; the "
                    "others need one too: let an earlier stage give it"
                )
            if before is not None and not stage.when:
                raise ValueError(
                    f"pipeline: stage {stage.name!r} gives {tensor.name!r}, which is there already; give it another name (only "
                    "a stage with `when` replaces what is there)"
                )
            if before is not None and before != tensor:
                raise ValueError(f"pipeline: stage {stage.name!r} replaces {_told(before)} by {_told(tensor)}")
            there[tensor.name] = tensor
    for tensor in spec.outputs:
        if tensor.name not in there:
            raise ValueError(f"pipeline: no stage gives the output {tensor.name!r}{_near(tensor.name, there)}")
        if there[tensor.name] != tensor:
            raise ValueError(
                f"pipeline: the output {_told(tensor)} comes out of the stages as {_told(there[tensor.name])}"
            )


def _missing(spec: WorkloadSpec, stage: StageSpec, name: str) -> str:
    """Why a stage does not get a tensor: nobody gives it, or somebody who comes later, which may be a cycle."""
    givers = {tensor.name: other for other in reversed(spec.pipeline) for tensor in other.outputs}
    if name not in givers:
        return f"pipeline: stage {stage.name!r} takes {name!r}, which nobody gives{_near(name, spec.tensors)}"
    path = _way_back(givers, givers[name], stage, [])
    if path is not None:
        return f"pipeline: a cycle: {' needs '.join([stage.name, *path])}"
    return (
        f"pipeline: stage {stage.name!r} takes {name!r} of {givers[name].name!r}, which is listed below it; list stages in the "
        "order in which items go through them"
    )


def _way_back(
    givers: Mapping[str, StageSpec], start: StageSpec, goal: StageSpec, passed: Sequence[str]
) -> list[str] | None:
    """The stages by which one needs another, both included; ``None`` where it does not."""
    if start == goal:
        return [start.name]
    if start.name in passed:
        return None
    for name in (*start.inputs, *([start.when] if start.when else [])):
        if name in givers and (path := _way_back(givers, givers[name], goal, [*passed, start.name])) is not None:
            return [start.name, *path]
    return None


def _told(tensor: TensorSpec) -> str:
    return f"{tensor.name!r} {tensor.dtype}{list(tensor.shape)}"


def _near(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"


@dataclass(frozen=True)
class PreparedWorkload:
    """A workload made concrete for a run: the artifact that every server loads, and what it must answer.

    ``model_file`` is ``workloads/NAME/model.py``, the only file a server imports; it defines ``class Model`` with
    ``__init__(artifact: str, name: str, device: str)`` and ``predict(inputs) -> outputs`` over batches.
    ``requirements`` is what that file needs beside numpy in the server's environment (``None``: nothing).
    ``payloads[i]`` and ``references[model][i]`` belong together.
    """

    spec: WorkloadSpec
    device: Device
    model_file: Path
    artifact: Path
    artifact_sha256: str
    requirements: Path | None
    payloads: tuple[Tensors, ...]
    references: dict[str, tuple[Tensors, ...]]
    own_file: Path | None = None
    """The workload's own ``model.py`` where ``model_file`` is another that imports it: of a pipeline (:mod:`.pipeline`,
    whose ``Model`` is all stages, which are classes of the own file, and ``Stage`` one), or of models that share a memory
    (:mod:`.resident`)."""
    precision: Precision = "fp32"
    compiled: bool = False
    exported: Path | None = None
    """The file of the export, within the artifact, if one was asked for."""

    @property
    def code_folders(self) -> tuple[Path, ...]:
        """The folders that hold what a server imports of the workload."""
        return tuple(dict.fromkeys(file.parent for file in (self.model_file, self.own_model_file)))

    @property
    def own_model_file(self) -> Path:
        """The workload's own ``model.py``, whoever imports it."""
        return self.own_file or self.model_file

    @property
    def tolerance(self) -> Tolerance:
        """How far answers in its precision may lie from the references."""
        return self.spec.tolerance_in(self.precision)


def mismatch(outputs: Tensors, reference: Tensors, tolerance: Tolerance) -> str | None:
    """``None`` when the outputs of one item equal the reference within the tolerance, else one sentence on the first
    difference. A NaN never equals anything."""
    for name, expected in reference.items():
        if name not in outputs:
            return f"the answer has no output `{name}`"
        got = outputs[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"`{name}` is {got.dtype}{list(got.shape)} instead of {expected.dtype}{list(expected.shape)}"
        if np.issubdtype(expected.dtype, np.integer):
            wrong = got != expected
        else:
            wrong = ~np.isclose(got, expected, rtol=tolerance.rtol, atol=tolerance.atol)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            count = int(np.count_nonzero(wrong))
            return f"`{name}`{list(at)} is {got[at]} instead of {expected[at]} ({count} of {expected.size} elements differ)"
    return None
