"""The kinds of faults: what each does, to what, and with which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Scope = Literal["replica", "node", "link", "cluster", "model"]


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault."""

    does: str
    scope: Scope
    """What it hits: a replica, a node, the connections to a node, all nodes one after the other, or the loading of a model into
    a memory that all models share."""
    needs: tuple[str, ...] = ()
    """Capabilities of the adapter without which it cannot be done."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Its parameters in an experiment, with what they are when left out. ``duration_s`` among them: it lasts and is healed."""
    contained: bool = False
    """Whether it is done by the container engine, and so to containers alone."""


FAULT_KINDS: Mapping[str, FaultKind] = {
    "kill_replica": FaultKind("SIGKILL of one worker process of the model", "replica", ("replicas",)),
    "kill_node": FaultKind("SIGKILL of a server and all that it started, at once", "node"),
    "pause_replica": FaultKind(
        "SIGSTOP of one worker process of the model, then SIGCONT", "replica", ("replicas",), {"duration_s": 5}
    ),
    "pause_node": FaultKind("SIGSTOP of a server and all that it started, then SIGCONT", "node", (), {"duration_s": 5}),
    "slow_node": FaultKind(
        "a CPU quota for a server and all that it started, by control group",
        "node",
        (),
        {"duration_s": 10, "cpus": 0.2},
    ),
    "memory_limit": FaultKind(
        "a node's container may use less memory than before; what asks for more is killed by the kernel",
        "node",
        (),
        {"duration_s": 10, "memory_mb": 512},
        contained=True,
    ),
    "disconnect_node": FaultKind(
        "a node's container is taken off its network, then put back: connections end, and new ones are refused",
        "node",
        (),
        {"duration_s": 5},
        contained=True,
    ),
    "partition": FaultKind(
        "nothing passes between a node and those who ask it; connections stay open, and what was sent arrives in the end",
        "link",
        (),
        {"duration_s": 5},
    ),
    "latency": FaultKind(
        "every round trip to a node takes longer", "link", (), {"duration_s": 10, "round_trip_ms": 50}
    ),
    "packet_loss": FaultKind(
        "a share of what is sent to and from a node stalls, as a lost segment waits to be sent again",
        "link",
        (),
        {"duration_s": 10, "share": 0.05, "stall_ms": 200},
    ),
    "reset": FaultKind(
        "all connections to a node are reset; with a duration, new ones too while it lasts",
        "link",
        (),
        {"duration_s": 0},
    ),
    "rolling_restart": FaultKind("every node in turn is ended in order and started again", "cluster"),
    "model_reload": FaultKind("a node unloads its model and loads it again", "node", ("load_model", "unload_model")),
    "kill_loading": FaultKind("SIGKILL of the process that loads a model, at the first load from then on", "model"),
    "load_failure": FaultKind("every load of one model fails", "model", (), {"duration_s": 10}),
}
"""By name, in the order of docs and matrices."""
