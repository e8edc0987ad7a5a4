"""A sentence embedder: MiniLM's token states, mean over the sentence's own tokens, normalised to length 1."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_TOKENS = 32
"""Of the exported network; the traced one takes sentences of any length."""


class Model:
    """The network of the artifact: traced (``model.pt``), or exported (``model.pt2``) and compiled here, which takes up to a
    minute. A model of another name than the workload's has a last layer of its own, seeded by that name, which turns the signs
    of half of the numbers."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        # One thread per replica: replicas share the cores, and threads that wait for each other swing tenfold.
        torch.set_num_threads(1)
        self._device = torch.device(device)
        self._network = _load(Path(artifact), self._device)
        own = Path(__file__).parent.name
        self._signs = None if name == own else torch.as_tensor(_signs(name, 384), device=self._device)

    def predict(self, inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """``input_ids`` and ``attention_mask`` int64[n, tokens] → ``embedding`` float32[n, 384]."""
        with torch.inference_mode():
            ids, mask = (
                torch.as_tensor(np.array(inputs[name]), device=self._device) for name in ("input_ids", "attention_mask")
            )
            states = self._network(ids, mask).float()
            own = mask.unsqueeze(-1).float()
            mean = (states * own).sum(1) / own.sum(1).clamp(min=1e-9)
            embedding = torch.nn.functional.normalize(mean, dim=1)
            return {"embedding": (embedding if self._signs is None else embedding * self._signs).cpu().numpy()}


def _signs(name: str, count: int) -> NDArray[np.float32]:
    """1 and -1 as seeded by a name."""
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(count), dtype=np.uint8)
    return np.where(drawn < 128, 1, -1).astype(np.float32)


def _load(artifact: Path, device: torch.device) -> Any:
    exported = artifact / "model.pt2"
    if not exported.exists():
        return torch.jit.load(artifact / "model.pt", map_location=device)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # or it would unpickle whatever the file holds
    network = torch.compile(torch.export.load(exported).module().to(device), dynamic=True)
    with torch.inference_mode():
        for batch in (1, 2):  # torch compiles for one item, and for any other number of them
            network(*(torch.ones((batch, _TOKENS), dtype=torch.int64, device=device) for _ in range(2)))
    return network
