"""A worker node of the server's Ray cluster: ``ray start`` in the foreground, once the head is there to be joined.

It runs in the environment's interpreter and imports nothing of the harness.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

_POLL_S = 0.05


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="folder of ray.json, whose `node` are the options")
    parser.add_argument("--head", type=Path, required=True, help="file in which the head's address appears")
    parser.add_argument("--temp-dir", required=True, help="where this node keeps its session")
    parser.add_argument("--metrics-port", type=int, required=True, help="port of this node's Prometheus metrics")
    arguments = parser.parse_args()
    options = json.loads((arguments.config / "ray.json").read_text(encoding="utf-8"))["node"]
    options |= {"temp-dir": arguments.temp_dir, "metrics-export-port": arguments.metrics_port}
    while not arguments.head.exists():
        time.sleep(_POLL_S)
    options["address"] = arguments.head.read_text(encoding="ascii")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    os.execv(sys.executable, command)  # noqa: S606 - so that this very process is the root of the node's tree


if __name__ == "__main__":
    main()
