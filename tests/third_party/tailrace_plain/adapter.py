"""Python's ``http.server`` as a contestant: the smallest adapter that keeps the contract."""

from __future__ import annotations

import json
from typing import ClassVar

from tailrace.harness.contract.adapter import (
    AXES,
    Adapter,
    Deployment,
    DeployRequest,
    Endpoint,
    ProcessHost,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.codecs import RawHTTP
from tailrace.harness.contract.control import ControlConnection, choose_ports, process_environment


class PlainDeployment(Deployment):
    """A running server; it has no capability beyond being there."""

    def claims_ready(self) -> bool:
        """``/ready``, which exists once the models are loaded."""
        control = ControlConnection(Plain.name, self.endpoint.host, self.endpoint.port, self.log)
        return bool(control.says_ok("/ready"))


class Plain(Adapter):
    """The adapter."""

    name: ClassVar[str] = "plain"
    title: ClassVar[str] = "http.server"
    homepage: ClassVar[str] = "https://docs.python.org/3/library/http.server.html"
    protocols: ClassVar[tuple[WireProtocol, ...]] = ("http",)
    port_names: ClassVar[tuple[str, ...]] = ("HTTP",)
    deployment_type: ClassVar[type[Deployment]] = PlainDeployment
    knobs: ClassVar[dict[str, str]] = {}
    refused: ClassVar[dict[str, str]] = dict.fromkeys(Tuning.model_fields, "http.server has no settings")
    traits: ClassVar[dict[str, str]] = dict.fromkeys(AXES, "none")
    start_timeout_s: ClassVar[float] = 60.0

    def render(self, request: DeployRequest) -> dict[str, str]:
        """One file with all that the server must know, its port apart."""
        workload = request.workload
        config = {
            "models": list(request.models),
            "model_file": str(workload.model_file),
            "artifact": str(workload.artifact),
            "device": workload.device,
            "inputs": [tensor.model_dump(mode="json") for tensor in workload.spec.inputs],
            "outputs": [tensor.model_dump(mode="json") for tensor in workload.spec.outputs],
        }
        return {"plain.json": json.dumps(config, indent=1) + "\n"}

    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start ``server.py`` in the environment that the lock file describes."""
        (port,) = choose_ports(self, request)
        log = request.workdir / "logs" / "plain.log"
        config = request.workdir / "config" / "plain.json"
        process = host.spawn(
            self.name,
            [str(request.environment.python), str(self.folder / "server.py"), str(config), request.host, str(port)],
            env=process_environment(request),
            cwd=request.scratch,
            log=log,
        )
        codec = RawHTTP(
            request.host, port, "/models/{model}", request.workload.spec.inputs, request.workload.spec.outputs
        )
        return PlainDeployment(host, process, Endpoint("http", request.host, port, codec), log)


ADAPTER = Plain()
