"""The null server's answers, laid beside it before it starts: the reference of every payload, in the wire's bytes."""

from __future__ import annotations

from pathlib import Path

from tailrace.adapters.null.server import key
from tailrace.harness.contract.adapter import DeployRequest
from tailrace.harness.contract.codecs import raw_bytes


def path(model: str, index: int) -> str:
    """Where the answer to a payload lies, below the server's working folder."""
    return f"answers/{model}-{index}.bin"


def place(request: DeployRequest, folder: Path) -> dict[str, str]:
    """Write the answer to every payload of every model below the server's working folder; returns :func:`path` by
    :func:`key`."""
    spec = request.workload.spec
    placed = {}
    for model in request.models:
        references = request.workload.references.get(model, ())
        for index, (payload, reference) in enumerate(zip(request.workload.payloads, references, strict=True)):
            target = folder / path(model, index)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(raw_bytes(spec.outputs, reference))
            placed[key(model, raw_bytes(spec.inputs, payload))] = path(model, index)
    return placed
