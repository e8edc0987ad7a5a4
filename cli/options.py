"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DeviceChoice(StrEnum):
    """Devices of `tailrace ceiling` and `tailrace coldstart`."""

    EMULATED = "emulated"
    CPU = "cpu"
    CUDA = "cuda"


class PrecisionChoice(StrEnum):
    """Precisions of `tailrace ceiling` and `tailrace coldstart`."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class EnvironmentKind(StrEnum):
    """Environments of `tailrace ceiling` and `tailrace coldstart`."""

    VENV = "venv"
    CURRENT = "current"


Device = Annotated[DeviceChoice | None, typer.Option(help="cpu, cuda or emulated; default: the workload's first.")]
Precision = Annotated[PrecisionChoice | None, typer.Option(help="Of those that the workload offers.")]
Environment = Annotated[EnvironmentKind, typer.Option(help="venv, or current: this interpreter.")]
Workload = Annotated[str, typer.Option(help="A workload's name, or the path of its folder.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the experiment, in YAML.")
]
Baselines = Annotated[Path, typer.Option("--folder", help="Where baselines are saved.")]
BASELINES = Path("baselines")
