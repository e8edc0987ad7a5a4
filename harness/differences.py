"""What two records of conditions differ in, fact by fact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_SAME_MEMORY = 0.01
"""What the kernel keeps for itself changes a little from boot to boot: to this share, memory counts as the same."""


def differences(name: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every fact that is not the same in both, as its path (``hardware cpu_count``) and both values. Mappings are compared
    key by key; a key that one lacks is ``None`` there."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            yield from differences(f"{name} {key}".strip(), first.get(key), second.get(key))
    elif first != second and not (name == "hardware memory_bytes" and _close(first, second)):
        yield name, first, second


def _close(first: Any, second: Any) -> bool:
    return None not in (first, second) and math.isclose(first, second, rel_tol=_SAME_MEMORY)
