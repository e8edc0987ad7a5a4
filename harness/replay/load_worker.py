"""A standing load worker for runs on other machines: serves one replay after the other until it is interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

PAUSE_S = 1.0
"""Between two replays, so that a worker that cannot start does not spin."""


def serve(master: str, note: Callable[[str], None]) -> None:
    """Connect to the master at HOST:PORT, send what it says, and begin anew with a fresh process.

    Between two trials there is no master; the process then waits for the next one. Returns on ``KeyboardInterrupt``.
    """
    command = [sys.executable, "-P", "-m", "tailrace.harness.replay.worker", master]
    environment = {**os.environ, "LOCUST_SKIP_MONKEY_PATCH": "1"}
    note(f"sends for the master at {master}, whenever there is one; Ctrl-C ends it")
    while True:
        # Its stdin is a pipe that nobody writes to: it closes when this process ends, and then the worker does.
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment) as worker:
            try:
                code = worker.wait()
            except KeyboardInterrupt:
                return
        if code == 0:
            note("one replay done")
        time.sleep(PAUSE_S)
