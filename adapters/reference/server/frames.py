"""What server and replicas say to each other over a socket pair: a kind, a length, and so many bytes. No pickle."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

HEADER = struct.Struct("<BQ")
BATCH, READY, BEAT, OUTPUTS, FAILED = range(5)
"""To a replica: inputs of a batch, item after item. From it: the model is loaded; it lives; the outputs of the batch,
item after item; the model has failed, and with what words."""


def part_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What both go by: the configuration of a model, or of a stage of it, which is called ``MODEL/STAGE``."""
    stage = name.partition("/")[2]
    return {**config, **(config["stages"][stage] if stage else {})}


def frame(kind: int, body: bytes = b"") -> bytes:
    """The bytes of one message."""
    return HEADER.pack(kind, len(body)) + body
