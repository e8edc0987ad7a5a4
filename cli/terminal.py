"""Where commands print: what was asked for on standard output, word of progress on standard error."""

from __future__ import annotations

import sys
from enum import StrEnum

from rich.console import Console


class TableOrJson(StrEnum):
    """Forms of what is printed."""

    TABLE = "table"
    JSON = "json"


def stdout() -> Console:
    """For what was asked for; of a fixed width where nobody looks."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def stderr() -> Console:
    """For progress and warnings."""
    return Console(stderr=True, highlight=False)
