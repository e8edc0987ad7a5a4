"""Workloads: a model with its inputs, outputs, SLO and proof of sameness, declared in ``workloads/NAME/workload.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Tensors = dict[str, NDArray[np.generic]]
"""Named tensors. For one payload without a batch axis; for a batch with the batch as axis 0."""

Device = Literal["emulated", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]


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
    payloads: int = Field(default=64, ge=1)
    """How many distinct payloads a run uses; arrivals draw from them with the run's seed."""
    cost: dict[str, float] = {}
    """Parameters of the model that an experiment may override (``workload_options``); the emulated accelerator's times, say."""


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
    precision: Precision = "fp32"
    compiled: bool = False

    @property
    def tolerance(self) -> Tolerance:
        """How far answers in its precision may lie from the references."""
        return self.spec.tolerance if self.precision == "fp32" else self.spec.lower_precisions[self.precision]


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
