"""The model of the contract suite: what it does to a batch is in the payload, and where it ran is in the answer.

``x`` is [value, sleep in ms, 1 to fail, spare]. ``y`` is the answer that must be right: twice ``x`` plus a number that
the model's name gives. ``seen`` tells what no reference can know: batch size, pid, and this server's marker.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np


class Model:
    """Loads slowly, or not at all, when the artifact says so."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        script: dict[str, Any] = json.loads(Path(artifact).read_text())
        time.sleep(script["load_s"])
        if name in script["broken"]:
            raise RuntimeError("the weights of " + name + " are not there")
        self._offset = sum(name.encode())

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        x = inputs["x"]
        if (x[:, 2] == 1).any():
            raise ValueError("asked to fail")
        time.sleep(float(x[:, 1].max()) / 1e3)
        seen = [len(x), os.getpid(), int(os.environ["CONTRACT_MARKER"])]
        return {
            "y": x.astype(np.int64) * 2 + self._offset,
            "seen": np.tile(np.array(seen, dtype=np.int64), (len(x), 1)),
        }
