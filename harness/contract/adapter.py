"""What an adapter must do to let a serving framework race, and what it may add.

An adapter is a folder ``adapters/NAME`` (or a package that declares an entry point in the group
``tailrace.adapters``) whose ``adapter.py`` holds an instance of a subclass of :class:`Adapter` as ``ADAPTER``. It must render
the neutral tuning into the framework's native configuration, deploy it, give an endpoint, and stop. Whatever else a
framework can do is a capability: a method that the adapter overrides.

All that an adapter's author needs can be imported from here; it stands in ``deployment``, ``process_host``, ``tuning`` and
``environment`` beside this module.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from tailrace.harness.contract.codecs import WireProtocol
from tailrace.harness.contract.deployment import (
    CAPABILITIES,
    NODE_NAME,
    CapabilityMissingError,
    Deployment,
    DeployRequest,
    Endpoint,
    HealthCheck,
    MetricSample,
    Node,
    Replica,
)
from tailrace.harness.contract.environment import ServerEnvironment
from tailrace.harness.contract.multiplexing import MemoryPlan, Policy
from tailrace.harness.contract.process_host import Containers, ProcessHost
from tailrace.harness.contract.tuning import Autoscale, NoOptions, Tuning
from tailrace.harness.contract.workload import ArtifactKind

__all__ = [
    "AXES",
    "CAPABILITIES",
    "NEEDS",
    "NODE_NAME",
    "Adapter",
    "Autoscale",
    "CapabilityMissingError",
    "Containers",
    "DeployRequest",
    "Deployment",
    "Endpoint",
    "HealthCheck",
    "MetricSample",
    "NoOptions",
    "Node",
    "ProcessHost",
    "Replica",
    "ServerEnvironment",
    "Tuning",
    "WireProtocol",
]

AXES = {
    "batching": "how it batches",
    "scaling": "what it scales on",
    "models": "models per device",
    "pipelines": "how it composes stages",
    "kubernetes": "Kubernetes depth",
}
"""The axes on which people compare serving frameworks, in words."""


NEEDS: Mapping[str, str] = {
    "hosted": "somebody else runs the servers",
    "scale-to-zero": "no replica, and no cost, while nobody asks; on Kubernetes",
    "canary": "a new version gets a share of the traffic first; on Kubernetes",
    "python-pipeline": "several models and business rules, composed in Python",
    "one-model": "one optimised model, as much throughput for each device as can be had",
}
"""What may decide for a framework before any figure does."""


class Adapter(ABC):
    """One serving framework."""

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    protocols: ClassVar[tuple[WireProtocol, ...]]
    """The first one is the default."""
    port_names: ClassVar[tuple[str, ...]]
    """What each of its ports is for, in the order of ``DeployRequest.ports``."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    """The adapter's own options (``options: {NAME: …}`` in an experiment), every field with a description."""
    deployment_type: ClassVar[type[Deployment]]
    knobs: ClassVar[Mapping[str, str]]
    """Neutral knob → the native key that it lands in."""
    refused: ClassVar[Mapping[str, str]]
    """Neutral knob → why this framework has no place for it. Every knob is in exactly one of the two."""
    traits: ClassVar[Mapping[str, str]] = {}
    """Where the framework stands on each of :data:`AXES`, a sentence each. A claim: what a machine shows stands beside it
    (:mod:`tailrace.harness.contract.observations`)."""
    serves_needs: ClassVar[Mapping[str, str]] = {}
    """Of :data:`NEEDS`, those for which the framework is the usual choice, and why: what `tailrace recommend` goes by."""
    composes: ClassVar[bool] = False
    """Whether ``deploy`` heeds ``request.stages``; where it does not, the trait ``pipelines`` says why."""
    residency: ClassVar[Mapping[Policy, str]] = {}
    """Policies by which the framework itself says which of many models are in memory → the native key. Empty: it has none, and
    the harness's controller loads and unloads through its management interface."""
    artifacts: ClassVar[tuple[ArtifactKind, ...]] = ("python",)
    """What ``deploy`` heeds as ``request.artifact``. An export is run by the server itself: ``replicas`` finds no process that
    could be hit alone."""
    no_mig: ClassVar[str] = ""
    """Why a server cannot be given a MIG instance, which has a UUID and no number; empty: it can."""
    approximate: ClassVar[Mapping[str, str]] = {}
    """Canonical metric → why this server's figure is not exact."""
    exposes: ClassVar[str] = ""
    """What of this server listens beyond loopback and cannot be told not to; printed, and kept with the run."""
    baseline: ClassVar[bool] = False
    """Whether it is what the frameworks are measured against, and none itself."""
    deals_out_gpus: ClassVar[bool] = False
    """Whether one of its servers spreads its replicas over all GPUs that it sees (``DeployRequest.devices``)."""
    own_cluster: ClassVar[bool] = False
    """Whether several nodes are a cluster of the framework's own, with a way in of its own, rather than servers behind
    the harness's load balancer. ``deploy`` then heeds ``request.nodes``, and ``nodes`` and ``restart_node`` are there."""
    start_timeout_s: ClassVar[float] = 120.0
    """How long a start may take before it counts as failed."""

    @property
    def folder(self) -> Path:
        """The adapter's own folder."""
        return Path(inspect.getfile(type(self))).parent

    @property
    def requirements(self) -> Path:
        """The lock file of the server's environment."""
        return self.folder / "requirements.txt"

    @property
    def dockerfile(self) -> Path:
        """What the image of ``environment: docker`` is made by; without this file there is none."""
        return self.folder / "Dockerfile"

    def refusals(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> dict[str, str]:
        """Why this framework cannot express that tuning: knob → a sentence; empty when it can."""
        return {
            knob: f"{self.name} has no place for `{knob}`: {self.refused[knob]}"
            for knob in tuning.chosen()
            if knob in self.refused
        }

    def composition_refusal(self) -> str | None:
        """Why this framework cannot compose the stages of a pipeline; ``None`` when it can."""
        if self.composes:
            return None
        reason = self.traits.get("pipelines", "its adapter does not say how it would")
        return f"{self.name} cannot compose the stages of a pipeline: {reason}"

    def multiplexing_refusal(self, plan: MemoryPlan, tuning: Tuning, protocol: WireProtocol) -> str | None:
        """Why this framework cannot serve many models from a memory that does not hold them all; ``None`` when it can."""
        if tuning.autoscale is not None or (tuning.replicas or 1) > 1:
            return f"each model of {self.name} in memory has one replica: set `tuning.replicas: 1`, and no `autoscale`"
        if self.residency:
            known = ", ".join(self.residency)
            return None if plan.policy in self.residency else f"{self.name} knows only the policy {known}"
        if missing := [name for name in ("load_model", "unload_model") if name not in self.capabilities()]:
            return f"{self.name} has no policy of its own, and its adapter not the capability `{'`, `'.join(missing)}`"
        if protocol != "http":
            return (
                f"{self.name} has no policy of its own, and the harness's controller speaks HTTP: leave `protocol` out"
            )
        return None

    def artifact_refusal(self, artifact: ArtifactKind, environment: ServerEnvironment | None = None) -> str | None:
        """Why this framework, or its server in that very environment, cannot serve an export; ``None`` when it can."""
        if artifact in self.artifacts:
            return None
        return f"{self.name} has no place for `artifact: {artifact}`: it serves a model by its Python code alone"

    def expressible(self, tuning: Tuning, options: BaseModel, protocol: WireProtocol) -> tuple[Tuning, dict[str, str]]:
        """As much of a tuning as this framework can express, and why the rest was left out, by knob."""
        left_out: dict[str, str] = {}
        # A knob may have a place only beside another one: what is left is asked about again.
        while refusals := self.refusals(tuning, options, protocol):
            left_out |= refusals
            tuning = tuning.model_copy(update=dict.fromkeys(refusals))
        return tuning, left_out

    def described(self) -> dict[str, object]:
        """What it claims, for manifests and listings: JSON."""
        return {
            "title": self.title,
            "homepage": self.homepage,
            "protocols": list(self.protocols),
            "knobs": dict(self.knobs),
            "refused": dict(self.refused),
            "capabilities": self.capabilities(),
            "traits": dict(self.traits),
            "composes": self.composes,
            "residency": dict(self.residency),
            "approximate": dict(self.approximate),
            "exposes": self.exposes,
            "baseline": self.baseline,
        }

    def capabilities(self) -> list[str]:
        """The capabilities that this adapter's deployments override, in the order of :data:`CAPABILITIES`."""
        return [name for name in CAPABILITIES if getattr(self.deployment_type, name) is not getattr(Deployment, name)]

    @abstractmethod
    def render(self, request: DeployRequest) -> dict[str, str]:
        """The native configuration as files: path below ``workdir/config`` → text. Pure: nothing is started or written."""

    @abstractmethod
    def deploy(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Start the server and return at once; readiness is polled by the caller. ``render``'s files are already in place."""

    def start(self, request: DeployRequest, host: ProcessHost) -> Deployment:
        """Write the rendered configuration below ``workdir/config``, and deploy. Raises :class:`StorageError` when it cannot
        be written, and what ``deploy`` raises."""
        request.write_config(self.render(request))
        return self.deploy(request, host)

    def health_check(self, protocol: WireProtocol) -> HealthCheck | None:
        """How a load balancer asks a node whether it may get requests, while that protocol is served; ``None``: none can."""
        return None

    def fault_refusals(self, tuning: Tuning) -> dict[str, str]:
        """Which faults cannot be done to this framework although it has the capabilities for them: kind → why."""
        return {}
