"""How a server stands when it is asked: whether it lives, what its health says, and whether it answers."""

from __future__ import annotations

from tailrace.harness.records.record import Source


class Probe(Source):
    """One asking."""

    process_alive: bool
    """whether the server's main process lives"""
    claims_ready: bool
    """whether its health says that it is ready"""
    answers: bool
    """whether it answered a request with success"""
    busy: bool = False
    """its own counters went on while it was asked: it works through a backlog that nobody wants any more, and the probe waits
    behind it"""

    @property
    def wedged(self) -> bool:
        """Whether the process lives, and its health and its answers contradict each other with no backlog to excuse it."""
        return self.process_alive and self.claims_ready != self.answers and not self.busy

    @property
    def contradiction(self) -> str:
        """In words, what a wedged server does."""
        if self.claims_ready:
            return "health answers but inference does not"
        return "inference answers but health does not"
