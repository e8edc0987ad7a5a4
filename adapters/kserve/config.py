"""The neutral tuning as arguments of KServe's model server."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field

from tailrace.harness.contract.adapter import DeployRequest


class Options(BaseModel):
    """The adapter's own options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    request_logs: bool | None = Field(
        default=None,
        description="whether KServe writes its log lines for every request, four of them over HTTP, which take about a "
        "quarter of a worker's time for one; left out: no, but as KServe does (yes) under `tuning: defaults`",
    )


def files(request: DeployRequest) -> dict[str, str]:
    """``kserve.args``, options of KServe's own; ``models.json``, what the shim is to load."""
    workload = request.workload
    models = {
        "names": list(request.models),
        "arguments": {
            "model_file": str(workload.model_file),
            "artifact": str(workload.artifact),
            "device": workload.device,
        },
    }
    return {"kserve.args": "\n".join(flags(request)) + "\n", "models.json": json.dumps(models, indent=1) + "\n"}


def flags(request: DeployRequest) -> list[str]:
    """The server's options, without the ports, which differ from start to start."""
    # KServe's gRPC server lives in the main process: when it is not measured, it needs no port and no model.
    chosen = [f"--enable_grpc={'true' if request.protocol == 'grpc' else 'false'}"]
    if request.tuning.replicas is not None:
        chosen.append(f"--workers={request.tuning.replicas}")
    if not _logs_requests(request):
        chosen.append("--enable_latency_logging=false")
    return chosen


def _logs_requests(request: DeployRequest) -> bool:
    if not isinstance(request.options, Options) or request.options.request_logs is None:
        return not request.tuning.chosen()
    return request.options.request_logs
