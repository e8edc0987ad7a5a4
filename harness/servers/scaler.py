"""A queue-depth scaler of the harness's own, for frameworks that have none: the same policy for all, through their own
management interfaces.

It is no part of any framework, and every report that it had a hand in says so.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from tailrace.harness.errors import TailraceError
from tailrace.harness.plan.experiment import ScalerChoice
from tailrace.harness.records.store import EventLog
from tailrace.harness.servers.cluster import Cluster

LABEL = (
    "{unit} were scaled by the harness's own queue-depth scaler ({minimum} to {maximum}, one more above {up:g} requests for "
    "each, one fewer below {down:g}, every {period:g} s), not by the framework"
)


def label(policy: ScalerChoice) -> str:
    """What a report says of it."""
    return LABEL.format(
        unit=policy.of,
        minimum=policy.min,
        maximum=policy.max,
        up=policy.up_above,
        down=policy.down_below,
        period=policy.period_s,
    )


def decide(policy: ScalerChoice, active: int, requests: float) -> int:
    """How many there should be: as many as bring the requests for each down to the upper threshold when they exceed it,
    one fewer when they fall below the lower one; within the limits."""
    each = requests / max(active, 1)
    wanted = active
    if each > policy.up_above:
        wanted = max(active + 1, math.ceil(requests / policy.up_above))
    elif each < policy.down_below:
        wanted = active - 1
    return min(policy.max, max(policy.min, wanted))


class Scaler(threading.Thread):
    """Applies a policy to one deployment until it is stopped; what it decides, and how long that took, becomes an event."""

    def __init__(self, policy: ScalerChoice, cluster: Cluster, events: EventLog) -> None:
        super().__init__(name="scaler", daemon=True)
        self._policy = policy
        self._cluster = cluster
        self._events = events
        self._active = policy.min
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._policy.period_s):
            try:
                requests = self._requests()
            except OSError:
                continue  # who cannot be asked is left as it is
            wanted = decide(self._policy, self._active, requests)
            if wanted != self._active:
                self._change(wanted, requests)

    def stop(self) -> None:
        """Change nothing more; returns when a change under way is over."""
        self._stopped.set()
        if self.is_alive():
            self.join()

    def _requests(self) -> float:
        """Requests that wait, by the servers' own metric; of nodes, those under way, which the balancer counts."""
        if self._policy.of == "replicas":
            return sum(sample.value for sample in self._cluster.scrape() if sample.metric == "queue_depth")
        return sum(state.in_flight for state in self._cluster.balancer_states().values())

    def _change(self, wanted: int, requests: float) -> None:
        began_s = time.monotonic()
        told: dict[str, Any] = {"of": self._policy.of, "before": self._active, "wanted": wanted, "requests": requests}
        self._events.write("scale", **told)
        try:
            if self._policy.of == "replicas":
                self._cluster.scale(wanted)
            else:
                self._cluster.set_active(wanted)
        except (TailraceError, OSError) as error:  # what the server would not do is a result
            self._events.write("scale-failed", **told, reason=str(error))
            return
        self._active = wanted
        self._events.write("scaled", **told, took_s=time.monotonic() - began_s)
