"""An image classifier: ResNet-50, images in, logits out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Model:
    """The network of the artifact: traced (``model.pt``), or exported (``model.pt2``) and compiled here, which takes up to a
    minute. A model of another name than the workload's has a last layer of its own, seeded by that name, which turns the signs
    of half of the logits."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        # One thread per replica: replicas share the cores, and threads that wait for each other swing tenfold.
        torch.set_num_threads(1)
        self._device = torch.device(device)
        self._network = _load(Path(artifact), self._device)
        self._dtype = next(self._network.parameters()).dtype
        own = Path(__file__).parent.name
        self._signs = None if name == own else torch.as_tensor(_signs(name, 1000), device=self._device)

    def predict(self, inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """``image`` float32[n, 3, 224, 224] → ``logits`` float32[n, 1000]."""
        with torch.inference_mode():
            image = torch.as_tensor(np.array(inputs["image"]), device=self._device).to(self._dtype)
            logits = self._network(image)[0].float()
            return {"logits": (logits if self._signs is None else logits * self._signs).cpu().numpy()}


def _signs(name: str, count: int) -> NDArray[np.float32]:
    """1 and -1 as seeded by a name."""
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(count), dtype=np.uint8)
    return np.where(drawn < 128, 1, -1).astype(np.float32)


def _load(artifact: Path, device: torch.device) -> Any:
    exported = artifact / "model.pt2"
    if not exported.exists():
        return torch.jit.load(artifact / "model.pt", map_location=device)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # or it would unpickle whatever the file holds
    network = torch.export.load(exported).module().to(device)
    dtype = next(network.parameters()).dtype
    compiled = torch.compile(network, dynamic=True)
    with torch.inference_mode():
        for batch in (1, 2):  # torch compiles for one item, and for any other number of them
            compiled(torch.zeros((batch, 3, 224, 224), dtype=dtype, device=device))
    return compiled
