"""What a device costs in an hour: the experiment's own figure, or that of a user's own price file. Nothing is assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from tailrace.harness.contract.workload import Device
from tailrace.harness.errors import InputError, nearest
from tailrace.harness.gpus import Gpu
from tailrace.harness.plan.experiment import Experiment


def price_per_hour(experiment: Experiment, device: Device, gpus: Sequence[Gpu]) -> float | None:
    """US dollars for one device and hour; ``None`` where the experiment names no price.

    By a price file, a GPU costs what stands there under the name that NVML gives it, other devices under ``cpu`` and
    ``emulated``; of different GPUs it is the mean. Raises :class:`InputError` for a file that cannot be used.
    """
    if experiment.device_prices is None:
        return experiment.device_price_per_hour
    path = Path(experiment.device_prices)
    prices = _read(path)
    names = [gpu.name for gpu in gpus] if device == "cuda" else [device]
    for name in names:
        if name not in prices:
            near = nearest(name, prices)
            raise InputError(
                f"{path}: there is no price of {name!r}" + (f"; did you mean {near!r}?" if near else ""),
                remedy=f"add a line: {name}: PRICE (US dollars an hour)",
            )
    return sum(prices[name] for name in names) / len(names) if names else None


def _read(path: Path) -> dict[str, float]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"`device_prices`: {path} cannot be read: {error}", remedy="name a YAML file of lines NAME: PRICE"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: prices are lines of NAME: PRICE, this is a {type(content).__name__}")
    for name, price in content.items():
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not isinstance(name, str) or not number or not math.isfinite(price) or price <= 0:
            raise InputError(f"{path}: `{name}`: {price!r} is no price", remedy="write US dollars for an hour, above 0")
    return {name: float(price) for name, price in content.items()}
