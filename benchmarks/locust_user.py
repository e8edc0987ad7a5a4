"""What `loadgen_peers.py` has Locust run: users who post one body over and over, and a line of JSON at the end.

Counted from when all users are there until they are told to stop, so that starting Locust costs nobody anything.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, constant_throughput, events, task

PATH = os.environ["TAILRACE_PATH"]
BODY: Any = Path(os.environ["TAILRACE_BODY"]).read_bytes()  # bytes will do, whatever Locust declares
RATE_PER_USER = float(os.environ["TAILRACE_RATE_PER_USER"])
"""0: as fast as it can."""
HEADERS = {"Content-Type": "application/octet-stream"}


class Poster(FastHttpUser):
    """One connection; waits for each answer."""

    wait_time = constant_throughput(RATE_PER_USER) if RATE_PER_USER else constant(0)

    @task
    def post(self) -> None:
        self.client.post(PATH, data=BODY, headers=HEADERS)


def _look(environment: Any) -> dict[str, float]:
    total = environment.stats.total
    return {
        "requests": total.num_requests,
        "failed": total.num_failures,
        "seconds": time.monotonic(),
        "cpu_s": time.process_time(),
    }


def _listen(environment: Any, **_: Any) -> None:
    begun: dict[str, float] = {}

    def begin(**_: Any) -> None:
        begun.update(_look(environment))

    def end(**_: Any) -> None:
        now = _look(environment)
        print(json.dumps({name: now[name] - begun[name] for name in now}), flush=True)

    environment.events.spawning_complete.add_listener(begin)
    environment.events.test_stopping.add_listener(end)


_events: Any = events  # Locust declares no types for listeners
_events.init.add_listener(_listen)
