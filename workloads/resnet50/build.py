"""Makes the artifact and the payloads of the image classifier: the architecture is real, the weights are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

_SIDE = 224
_CALIBRATION_IMAGES = 16
_BRANCH_SCALE = 0.1
_LARGEST_BATCH = 1024
_OPSET = 18
"""Of ONNX: one that servers of some years' age know, too."""


def build_artifact(folder: Path, options: Mapping[str, Any], seed: int) -> None:
    """The network: a TorchScript trace, or exported for ``torch.compile``; batches of any size."""
    network, example = _network(options, seed)
    if options["compile"]:
        batch = {0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=(batch,))
        torch.export.save(program, folder / "model.pt2")
        return
    with torch.inference_mode():
        torch.jit.trace(network, example, strict=False).save(folder / "model.pt")


class Whole(torch.nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """The network and all that model.py does before and after it, for servers that run no Python."""

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self._dtype = dtype

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """float32[n, 3, 224, 224] → logits float32[n, 1000]."""
        logits: torch.Tensor = self.network(image.to(self._dtype))[0]
        return logits.float()


def export(kind: str, file: Path, options: Mapping[str, Any], seed: int) -> None:
    """The whole of it, from the image to the logits, as ``onnx`` or ``torchscript``; batches of any size."""
    network, example = _network(options, seed)
    whole, example = Whole(network, example.dtype).eval(), example.float()
    if kind == "torchscript":
        with torch.inference_mode():
            torch.jit.trace(whole, example, strict=False).save(file)
        return
    batch = {0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}
    with torch.no_grad():
        torch.onnx.export(
            whole,
            (example,),
            file,
            input_names=["image"],
            output_names=["logits"],
            opset_version=_OPSET,
            dynamic_shapes=(batch,),
            external_data=False,
            verbose=False,
        )


def _network(options: Mapping[str, Any], seed: int) -> tuple[Any, torch.Tensor]:
    """The network in the precision of the options, and a batch of two images in it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = ResNetForImageClassification(ResNetConfig(num_labels=1000, return_dict=False))
    # With fresh statistics every normalisation is the identity, activations grow from block to block and all images
    # end at nearly the same logits: a wrong answer would go unseen. So the statistics are taken from images, and the
    # classifier is centred and scaled so that every logit is about standard normal over them.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what is seen, instead of a moving one
    # Drawn weights in full would make every block enlarge what rounding has changed, until in bf16 nothing is left of the
    # answer. With branches that add little to what goes past them, as trained networks begin (Goyal et al. 2017, section
    # 5.1, with zero), rounding stays small; the work is the same.
    for module in network.modules():
        if isinstance(module, ResNetBottleNeckLayer):
            torch.nn.init.constant_(module.layer[-1].normalization.weight, _BRANCH_SCALE)
    images = torch.from_numpy(_images(_CALIBRATION_IMAGES, np.random.default_rng([seed, 1])))
    with torch.inference_mode():
        network.train()(images)
        logits = network.eval()(images)[0]
        classifier = network.classifier[-1]
        classifier.weight /= logits.std(0).unsqueeze(1)
        classifier.bias.copy_((classifier.bias - logits.mean(0)) / logits.std(0))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options["precision"]]
    return network.to(dtype), images[:2].to(dtype)


def make_payloads(count: int, seed: int) -> list[dict[str, NDArray[np.generic]]]:
    """Images of coloured patches with a little noise, scaled as networks expect them (about −2 to 2)."""
    return [{"image": image} for image in _images(count, np.random.default_rng(seed))]


def _images(count: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """float32[count, 3, 224, 224]. Of patches, because averaged over an image, pure noise is always the same."""
    images = generator.normal(0, 0.2, (count, 3, _SIDE, _SIDE))
    for patches in (1, 4, 14, 56):
        images += (
            generator.normal(0, 0.6, (count, 3, patches, patches))
            .repeat(_SIDE // patches, 2)
            .repeat(_SIDE // patches, 3)
        )
    return images.astype(np.float32)
