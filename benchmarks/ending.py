"""How every benchmark ends: its exit code, or one message."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tailrace.harness.errors import TailraceError


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark, and end with its exit code; what it cannot do is told in one message, with that error's code."""
    try:
        sys.exit(main())
    except TailraceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
