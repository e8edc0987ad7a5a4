"""A sentence embedder: MiniLM's token states, mean over the sentence's own tokens, normalised to length 1."""

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
        """``input_ids`` and ``attention_mask`` int64[n, tokens] → ``embedding`` float32[n, 384]."""
        with torch.inference_mode():
            ids, mask = (
                torch.as_tensor(np.array(inputs[name]), device=self._device) for name in ("input_ids", "attention_mask")
            )
            states = self._network(ids, mask)[0]
            own = mask.unsqueeze(-1).to(states.dtype)
            mean = (states * own).sum(1) / own.sum(1).clamp(min=1e-9)
            return {"embedding": torch.nn.functional.normalize(mean, dim=1).cpu().numpy()}
