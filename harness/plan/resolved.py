"""A cell with nothing left to choose: what an experiment, its adapter's own limits and this machine come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from tailrace.harness.contract.adapter import Tuning, WireProtocol
from tailrace.harness.contract.multiplexing import MemoryPlan
from tailrace.harness.contract.popularity import Popularity
from tailrace.harness.contract.workload import ArtifactKind, Composition, Device
from tailrace.harness.plan.experiment import Client, ContainerChoice, Scenario, Warmup


class ResolvedCell(BaseModel):
    """One adapter under one scenario, as all trials of this cell run it.

    Plain data, settled before anything starts: it goes through a trial as it is, and into the trial's record whole. What a
    cold start has no use for has a default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: str
    scenario: Scenario = Scenario(name="no-fault")
    workload: str
    models: tuple[str, ...]
    """What is served, the most popular first."""
    popularity: Popularity = Popularity()
    stages: tuple[str, ...] = ()
    """Of a workload that is a pipeline."""
    device: Device
    devices: int = 1
    """How many goodput is divided by: all of a machine's CPUs are one."""
    device_price_per_hour: float | None = None
    dcgm_exporter: str | None = None
    nodes: int = 1
    links: bool = False
    """Whether a proxy stands before every node, for faults that are done to connections."""
    supervision: Literal["none", "restart"] = "none"
    restart_backoff_s: float = 1.0
    environment: Literal["venv", "current", "docker"] = "venv"
    containers: ContainerChoice = ContainerChoice()
    server_host: str = "127.0.0.1"
    protocol: WireProtocol
    options: SerializeAsAny[BaseModel]
    """The adapter's own."""
    tuning: Tuning
    left_out: Mapping[str, str] = {}
    """Knobs that were asked for and that this framework has no place for, each with the reason."""
    artifact: ArtifactKind = "python"
    """What of the model its servers run."""
    composition: Composition | None = None
    """How a pipeline is served; ``None`` for other workloads."""
    memory: MemoryPlan | None = None
    """What the models share; ``None`` where all are loaded."""
    controlled: bool = False
    """Whether the harness says which models are in that memory, for the framework does not."""
    slo_ms: float
    client: Client = Client()
    warmup: Warmup = Warmup()

    @property
    def id(self) -> str:
        """Unique within a run, and fit for a folder's name."""
        return f"{self.adapter}--{self.scenario.name}"

    @property
    def devices_per_node(self) -> int:
        """Each node's share of the devices; the CPUs are everybody's."""
        return 1 if self.device == "cpu" else self.devices // self.nodes

    @property
    def models_at_start(self) -> tuple[str, ...]:
        """What the servers are told to load first, where the harness brings the others."""
        return self.memory.at_start if self.memory is not None and self.controlled else self.models
