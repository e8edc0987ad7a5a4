"""The stages of the emulated pipeline: prepare → classify → decide → refine (some items) → finish.

Both models compute on one emulated accelerator, that of ``workloads/emulated``; the other stages are a little arithmetic on
the CPU. All answers are integers, and a stage that is left out, swapped or given another item's tensors changes them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.generic]]
_INPUTS, _CLASSES = 16, 4
_LEVELS = 1 << 16


class Prepare:
    """``x`` int32[n, 16] → ``features`` int32[n, 16]: every item counts from its own smallest number, in 65,536 levels."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        """Nothing to load: it computes the same whatever the artifact."""

    def predict(self, inputs: Tensors) -> Tensors:
        x = inputs["x"].astype(np.int64)
        return {"features": ((x - x.min(axis=1, keepdims=True)) % _LEVELS).astype(np.int32)}


class Classify:
    """``features`` → ``scores`` int64[n, 4] by the first model."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        self._matrix = _Matrix(artifact, f"{name}/classify", "", device)

    def predict(self, inputs: Tensors) -> Tensors:
        return {"scores": self._matrix.times(inputs["features"])}


class Decide:
    """``scores`` → ``unsure`` int32[n, 1]: 1 for about the share of items that the artifact names, by their scores alone."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        self._share = _config(artifact)["refined_share"]

    def predict(self, inputs: Tensors) -> Tensors:
        spread = (inputs["scores"].astype(np.int64).sum(axis=1, keepdims=True) >> 7) % 1000
        return {"unsure": (spread < 1000 * self._share).astype(np.int32)}


class Refine:
    """``features`` → ``scores`` by the second model, which is another one and takes less of the device's time."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        self._matrix = _Matrix(artifact, f"{name}/refine", "refine_", device)

    def predict(self, inputs: Tensors) -> Tensors:
        return {"scores": self._matrix.times(inputs["features"])}


class Finish:
    """``scores``, ``unsure`` → ``best`` int32[n, 1], the class of the highest score, and ``margin`` int64[n, 1] over the next."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        """Nothing to load: it computes the same whatever the artifact."""

    def predict(self, inputs: Tensors) -> Tensors:
        scores = inputs["scores"].astype(np.int64)
        ordered = np.sort(scores, axis=1)
        best = scores.argmax(axis=1).astype(np.int32)[:, np.newaxis] + _CLASSES * inputs["unsure"].astype(np.int32)
        return {"best": best, "margin": ordered[:, -1:] - ordered[:, -2:-1]}


class _Matrix:
    """x·W over integers, W drawn from the artifact's seed and a name, at the device's price."""

    def __init__(self, artifact: str, name: str, cost: str, device: str) -> None:
        config = _config(artifact)
        self._base_ns, self._per_item_ns = config[f"{cost}base_ms"] * 1e6, config[f"{cost}per_item_ms"] * 1e6
        drawn = hashlib.shake_256(f"{config['seed']}/{name}".encode()).digest(8 * _INPUTS * _CLASSES)
        # 32 bits of weight times 16 bits of input, summed over 16 inputs, stay within 64 bits.
        self._weights = np.frombuffer(drawn, dtype="<i8").reshape(_INPUTS, _CLASSES) >> 32
        self._emulated = device == "emulated"
        if self._emulated:
            _device(os.getpid())

    def times(self, x: NDArray[np.generic]) -> NDArray[np.generic]:
        if self._emulated:
            _device(os.getpid()).occupy(round(self._base_ns + self._per_item_ns * len(x)), len(x))
        answer: NDArray[np.generic] = x.astype(np.int64) @ self._weights
        return answer


@functools.cache
def _device(pid: int) -> Any:
    """The process's seat at a device, one for all models in it; a process that was forked takes its own."""
    spec = importlib.util.spec_from_file_location(
        "emulated_device", Path(__file__).resolve().parents[1] / "emulated" / "model.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError("workloads/emulated, whose device this pipeline shares, is not beside it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Device()


def _config(artifact: str) -> dict[str, float]:
    config: dict[str, float] = json.loads((Path(artifact) / "config.json").read_text(encoding="utf-8"))
    return config
