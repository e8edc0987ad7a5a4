"""No module is above 500 lines and no function above 80, unless its docstring says why in a sentence that begins with
«Long because»."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tailrace"
MODULE_LINES, FUNCTION_LINES = 500, 80
_EXCUSE = re.compile(r"\bLong because \w")


def too_long(text: str) -> Iterator[str]:
    """What of a module is above its limit and has no excuse: ``name: lines``."""
    module = ast.parse(text)
    lines = len(text.splitlines())
    if lines > MODULE_LINES and not excused(module):
        yield f"the module: {lines}"
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES and not excused(node):
                yield f"{node.name}: {lines}"


def excused(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return _EXCUSE.search(ast.get_docstring(node) or "") is not None


def test_what_is_long_says_why() -> None:
    files = [file for room in PACKAGE.iterdir() if room.is_dir() for file in room.rglob("*.py")]
    assert len(files) > 100
    found = [f"{file.relative_to(PACKAGE)}, {told}" for file in sorted(files) for told in too_long(file.read_text())]
    assert found == []


@pytest.mark.parametrize("excuse", ["", "Long because one can read it from top to bottom."])
def test_lengths_are_counted_and_excuses_heeded(excuse: str) -> None:
    def found(module_lines: int, function_lines: int) -> list[str]:
        body = ["    pass"] * (function_lines - 2)
        text = [f'"""A module. {excuse}"""', "def f():", f'    """A function. {excuse}"""', *body]
        return list(too_long("\n".join([*text, *["pass"] * (module_lines - len(text))])))

    assert found(MODULE_LINES, FUNCTION_LINES) == []
    assert found(MODULE_LINES + 1, FUNCTION_LINES) == ([] if excuse else ["the module: 501"])
    assert found(MODULE_LINES, FUNCTION_LINES + 1) == ([] if excuse else ["f: 81"])
