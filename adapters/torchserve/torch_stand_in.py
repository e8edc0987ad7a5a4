"""Stands in for torch where the environment has none.

TorchServe's worker imports torch for one question: whether an answer is a tensor. A model that needs none thus runs
without; what it measures is TorchServe less the import of torch, a second or two and some 160 MB of every worker.
"""

from __future__ import annotations

from typing import NoReturn


class Tensor:
    """What no answer is."""


def __getattr__(name: str) -> NoReturn:
    """For a model that needs torch all the same."""
    raise AttributeError(f"No module named 'torch': {__file__} only stands in for it, and has no {name!r}")
