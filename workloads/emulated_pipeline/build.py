"""Makes the artifact and the payloads of the emulated pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def build_artifact(folder: Path, options: Mapping[str, float], seed: int) -> None:
    """The times of both models in milliseconds, the share of items that the second one sees, and the seed, as JSON."""
    (folder / "config.json").write_text(json.dumps({**options, "seed": seed}, indent=1))


def make_payloads(count: int, seed: int) -> list[dict[str, NDArray[np.generic]]]:
    """Vectors ``x`` of 16 integers from the whole range of int32."""
    limits = np.iinfo(np.int32)
    x = np.random.default_rng(seed).integers(limits.min, limits.max, size=(count, 16), dtype=np.int32, endpoint=True)
    return [{"x": row} for row in x]
