"""How a server stands when it is asked: whether it lives, what its health says, and whether it answers."""

from __future__ import annotations

from collections.abc import Mapping

Probe = Mapping[str, bool]
"""``process_alive``, ``claims_ready``, ``answers``, and ``busy`` where its own counters went on while it was asked: it works
through a backlog that nobody wants any more, and the probe waits behind it."""


def is_wedged(probe: Probe) -> bool:
    """Whether the process lives, and its health and its answers contradict each other with no backlog to excuse it."""
    return probe["process_alive"] and probe["claims_ready"] != probe["answers"] and not probe.get("busy", False)


def contradiction(probe: Probe) -> str:
    """In words, what a wedged server does."""
    if probe["claims_ready"]:
        return "health answers but inference does not"
    return "inference answers but health does not"
