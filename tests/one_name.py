"""The suite fails if a module of ours is imported under another name than ``tailrace...``, for then there are two of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {link.name for link in (ROOT / "tailrace").iterdir() if link.is_symlink()}
"""The folders at the top that are imported as ``tailrace.NAME``."""

BY_PATH = {"workload_stages"}
"""What servers, and tests in their stead, load from a workload's folder by its path."""


def other_names(modules: Mapping[str, ModuleType]) -> list[str]:
    """A line for each module that comes from a file of ours and has another name than the file's own."""
    found = []
    for name, module in sorted(modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or not (path := Path(file).resolve()).is_relative_to(ROOT):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        its_own = ".".join(["tailrace", *(parts[:-1] if parts[-1] == "__init__" else parts)])
        if parts[0] in ROOMS and name not in {its_own, *BY_PATH}:
            found.append(f"{its_own} is imported as {name} too")
    return found


@pytest.fixture(autouse=True, scope="session")
def one_name() -> Iterator[None]:
    """When all tests are done, no module has been imported under two names."""
    yield
    assert not (found := other_names(sys.modules)), "\n".join(found)
