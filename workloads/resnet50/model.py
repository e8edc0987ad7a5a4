"""An image classifier: ResNet-50, images in, logits out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray


class Model:
    """The traced network ``model.pt`` of the artifact; ``name`` makes no difference to its answers."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        # One thread per replica: replicas share the cores, and threads that wait for each other swing tenfold.
        torch.set_num_threads(1)
        self._device = torch.device(device)
        self._network = torch.jit.load(Path(artifact) / "model.pt", map_location=self._device)

    def predict(self, inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """``image`` float32[n, 3, 224, 224] → ``logits`` float32[n, 1000]."""
        with torch.inference_mode():
            image = torch.as_tensor(np.array(inputs["image"]), device=self._device)
            return {"logits": self._network(image)[0].cpu().numpy()}
