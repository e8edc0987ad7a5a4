"""What a command shows: what was asked for on standard output, in one of its forms; word of progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.text import Text

from tailrace.harness.quantities import figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = TypeVar("Row")
EMULATED = Text("emulated accelerator: not a real device", style="yellow")


class TableOrJson(StrEnum):
    """Forms of most of what is shown."""

    TABLE = "table"
    JSON = "json"


Form = Annotated[TableOrJson, typer.Option("--format", help="table or json.")]


@dataclass(frozen=True)
class Sheet:
    """A table: words in the first columns, figures to the right of them."""

    headings: Sequence[str]
    """Left empty where the first column says what each line is."""
    rows: Sequence[Sequence[str | Text]]
    words: int = 1
    """So many columns are words."""
    width: int = 0
    """On a terminal that is narrower, every line becomes a block of its own."""


@dataclass(frozen=True)
class Points:
    """Sentences, each a point of a list."""

    lines: Sequence[str]


Part = str | Text | Sheet | Points


def sheet(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str | Text]], **layout: int) -> Sheet:
    """A table with a line for each row, of headings and what stands below each; ``layout`` as in :class:`Sheet`."""
    return Sheet(list(columns), [[told(row) for told in columns.values()] for row in rows], **layout)


def facts(content: Mapping[str, object], shape: str = "") -> Sheet:
    """Names and their values, one below the other."""
    return Sheet((), [[name.replace("_", " "), figure(value, shape)] for name, value in content.items()])


def show(form: str, content: object, parts: Iterable[Part]) -> None:
    """Print what was asked for: as ``json`` the content, as ``table`` or ``md`` the parts, which say the same to readers and
    are made only for them."""
    if form == "json":
        from tailrace.harness.analysis.summary import jsonable

        typer.echo(json.dumps(jsonable(content), indent=1, allow_nan=False))
    elif form == "md":
        typer.echo("\n\n".join(filter(None, map(_markdown, parts))))
    else:
        read(stdout(), *parts)


def read(console: Console, *parts: Part) -> None:
    """Print parts for reading."""
    for part in parts:
        if isinstance(part, Sheet):
            for table in _blocks(part) if console.width < part.width else [part]:
                console.print(_table(table))
        else:
            lines = [f"- {line}" for line in part.lines] if isinstance(part, Points) else [part]
            for line in lines:
                console.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)


def _blocks(part: Sheet) -> Iterator[Sheet]:
    return (Sheet((), list(zip(part.headings, row, strict=True))) for row in part.rows)


def _table(part: Sheet) -> Table:
    from rich.table import Table

    table = Table(show_header=bool(part.headings))
    for number, heading in enumerate(part.headings):
        table.add_column(heading, justify="left" if number < part.words else "right", overflow="fold")
    for row in part.rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def _markdown(part: Part) -> str:
    from tailrace.reports.text import markdown_safe, markdown_table

    if isinstance(part, Sheet):
        return "\n".join(markdown_table(part.headings, [[str(cell) for cell in row] for row in part.rows]))
    if isinstance(part, Points):
        return "\n".join(f"- {markdown_safe(line)}" for line in part.lines)
    return f"### {markdown_safe(str(part))}"


def stdout() -> Console:
    """For what was asked for; of a fixed width where nobody looks."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def stderr() -> Console:
    """For progress and warnings."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A word of progress."""
    read(stderr(), Text(text, style="dim"))
