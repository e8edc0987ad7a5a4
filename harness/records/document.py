"""The tables of ``docs/record.md``, made of the records' own docstrings.

``python -m tailrace.harness.records.document docs/record.md`` makes them anew. A table stands between
``<!-- table: NAME -->`` and ``<!-- end -->``, and ``NAME`` is that of a record.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from tailrace.harness.records import facts, summary
from tailrace.harness.records.probe import Probe
from tailrace.harness.records.record import Record, Unit

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with its tables as the records say them. Raises :class:`KeyError` for a name that is no record's."""
    return _TABLE.sub(lambda found: found[1] + table(RECORDS[found[2]]) + found[3], text)


def table(model: type[Record]) -> str:
    """The keys of a record in Markdown, those that share a docstring in one row; without those that have none."""
    rows = ["| key | unit | meaning |", "|---|---|---|"]
    for names, meaning in rows_of(model):
        units = [_unit(model, name) for name in names]
        unit = units[0] if len(set(units)) == 1 else ", ".join(units)
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {unit} | {meaning} |")
    return "\n".join(rows) + "\n"


def rows_of(model: type[Record]) -> Iterator[tuple[list[str], str]]:
    """The fields of a record, its bases' first, with what the docstring below says of them."""
    for base in reversed(model.__mro__):
        if not issubclass(base, Record) or base.__module__ == Record.__module__:
            continue
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)  # noqa: S101 - of a class
        names: list[str] = []
        for statement in definition.body:
            match statement:
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.append(name)
                case ast.Expr(value=ast.Constant(value=str(meaning))) if names:
                    yield names, " ".join(meaning.split())
                    names = []


def _unit(model: type[Record], name: str) -> str:
    field = model.model_fields[name]
    return next((told.name for told in (*field.metadata, *_parts(field.annotation)) if isinstance(told, Unit)), "")


def _parts(annotation: Any) -> Iterator[Any]:
    for part in get_args(annotation):
        yield part
        yield from _parts(part)


RECORDS = {
    name: model
    for name, model in {**vars(facts), **vars(summary), "Probe": Probe}.items()
    if inspect.isclass(model) and issubclass(model, Record)
}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
