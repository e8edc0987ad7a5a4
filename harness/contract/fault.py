"""What a kind of fault must say and do to be injected, and what it may do to those who serve.

A kind is a module of the package ``faults`` (or one that a package of somebody else's declares as an entry point in the group
``tailrace.faults``) that holds a subclass of :class:`Fault` as ``FAULT``. Its fields are the parameters that users give in
an experiment; it says why it cannot be done somewhere, is applied, and is undone. When it comes, whom the lot falls on, and what
is told of it is seen to elsewhere.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from tailrace.harness.contract.adapter import Adapter
from tailrace.harness.contract.deployment import Deployment
from tailrace.harness.contract.process_host import Containers, ProcessHost
from tailrace.harness.contract.tuning import Tuning
from tailrace.harness.processes import ProcessRef

Scope = Literal["replica", "node", "link", "cluster", "model"]


CONTAINERS_ALONE = "it is done to containers alone: it needs `environment: docker`"
NOTHING_LOADED = "models are loaded while the trace runs only where they share a memory: it needs `multiplexing`"


class MissedError(Exception):
    """There was nothing to hit."""


class Connections(Protocol):
    """The connections to nodes. Effects add up and last until they are cleared. Each method returns how many connections it
    found open, and raises :class:`TailraceError` when it cannot be done."""

    def latency(self, name: str, round_trip_ms: float) -> int:
        """Make every round trip take so much longer."""

    def stalls(self, name: str, share: float, stall_ms: float, seed: int) -> int:
        """Hold a share (0..1) of what is sent, and what follows it in its direction, for ``stall_ms`` each."""

    def partition(self, name: str) -> int:
        """Let nothing pass; connections stay open."""

    def reset(self, name: str, *, once: bool) -> int:
        """Reset all open connections, and without ``once`` new ones too until it is cleared."""

    def clear(self, name: str, effect: str | None = None) -> int:
        """End one effect (``latency``, ``stalls``, ``partition`` or ``reset``), or all; what was held passes on."""


class Nodes(Protocol):
    """The nodes of a trial, as faults may treat them."""

    node_count: int
    models: list[str]
    """Those that are loaded at the start."""

    @property
    def host(self) -> ProcessHost:
        """Sends signals to processes and limits them."""

    @property
    def containers(self) -> Containers:
        """The same, where nodes are containers."""

    @property
    def links(self) -> Connections:
        """The connections to nodes. There are some where a fault of scope ``link`` may come."""

    def member(self, index: int) -> Deployment:
        """The deployment that a node belongs to: its own, or the whole of a framework's own cluster."""

    def part_name(self, index: int) -> str:
        """What is meant when something is done to that deployment."""

    def restart(self, index: int, *, stopped: threading.Event) -> None:
        """End a node in order, start it again, and wait until it may get requests, or until ``stopped``. Raises what its
        start raises."""

    def loading(self) -> list[tuple[str, ProcessRef]]:
        """The models that are being loaded at this moment into a memory that all share, and who loads them."""

    def fail_loads(self, model: str, *, failing: bool) -> None:
        """Let every load of a model into that memory fail from now on, or succeed again."""


@dataclass(frozen=True)
class Circumstances:
    """To whom a fault is to be done, as far as it is known before the run."""

    adapter: Adapter
    tuning: Tuning
    nodes: int
    containers: bool = False
    """Whether nodes are containers, or else processes of this machine."""
    multiplexed: bool = False
    """Whether models share a memory that does not hold them all."""


@dataclass(frozen=True)
class Hit:
    """What one fault is done to."""

    nodes: Nodes
    name: str
    """Of the replica, the node, the link or the model; what is told."""
    ref: ProcessRef | None = None
    """Of a replica its process, of a node the root of its processes."""
    index: int = 0
    """Of a node."""
    by_lot: bool = True
    """Whether the lot fell on it; else a user has named it."""
    seed: int = 0
    """For what a fault draws itself."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the trace has ended."""

    @property
    def process(self) -> ProcessRef:
        """Of what has one: a replica or a node."""
        assert self.ref is not None  # noqa: S101 - only faults of other scopes are given none
        return self.ref


def lasting(default_s: float) -> Any:
    """The field ``duration_s`` of a fault that is undone after that time, or at the end of the trace."""
    return Field(default=default_s, ge=0, description="How long it lasts before it is healed.")


class Fault(BaseModel, ABC):
    """One kind of fault. Its fields are its parameters: numbers, each with a default and a description that names the unit.
    With a field ``duration_s`` (:func:`lasting`) it is undone after that time."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: ClassVar[str]
    """Its name in experiments and records."""
    does: ClassVar[str]
    """What it does, in words."""
    scope: ClassVar[Scope]
    """What it hits: a replica, a node, the connections to a node, all nodes one after the other, or the loading of a model into
    a memory that all models share."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Capabilities of the adapter without which it cannot be done."""
    order: ClassVar[int] = 1000
    """Where it stands among all kinds in lists and matrices; of equal ones their names decide."""
    errand: ClassVar[bool] = False
    """Whether :meth:`apply` takes as long as it takes while other faults come; then the fault is over when it returns."""
    waits: ClassVar[str] = ""
    """Of a fault that waits for its moment, which :meth:`aim` sees, while other faults come: what is told when it never came."""

    @classmethod
    def parameters(cls) -> dict[str, float]:
        """Its parameters with their defaults."""
        return {name: field.default for name, field in cls.model_fields.items()}

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """Why it cannot be done there although the adapter has what it needs; ``None`` when it can."""
        return None

    def aim(self, hit: Hit) -> Sequence[Hit]:
        """What is really hit in place of what was drawn; of several the first that lets itself be hit. Nothing: not yet."""
        return [hit]

    @abstractmethod
    def apply(self, hit: Hit) -> None:
        """Do it. Of two that overlap in one place, the earlier is done once more when the later has ended.

        Raises :class:`MissedError` when there is nothing to hit any more, and whatever else keeps it from being done.
        """

    def undo(self, hit: Hit) -> None:
        """Heal it. What has gone by itself meanwhile is healed. Raises :class:`TailraceError` when it cannot be."""
