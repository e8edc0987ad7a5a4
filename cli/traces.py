"""What is typed: ``tailrace traces``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.show import facts, read, sheet, stdout

traces_app = typer.Typer(help="Traffic: list, show and add traces.", no_args_is_help=True)


@traces_app.command("list")
def traces_list() -> None:
    """List all traces by name."""
    from tailrace.traces import catalogue

    columns = {
        "name": lambda entry: entry.name,
        "title": lambda entry: entry.title,
        "kind": lambda entry: entry.kind,
    }
    read(stdout(), sheet(map(catalogue.entry, catalogue.names()), columns, words=3))


@traces_app.command("show")
def traces_show(
    name: Annotated[str, typer.Argument(help="A trace's name.")],
    seed: Annotated[int, typer.Option(help="The seed of a generated trace.")] = 7,
) -> None:
    """Describe one trace: its parameters, its figures, where it comes from."""
    from tailrace.traces import catalogue
    from tailrace.traces.trace import describe

    entry = catalogue.entry(name)
    trace = catalogue.load(name, seed=seed)
    content = {**entry.params, "fault_at_s": trace.fault_at_s, "transient": trace.transient}
    figures = facts({**content, **describe(trace).as_dict()}, ".6g")
    read(stdout(), Text(f"{entry.name}: {entry.title}", style="bold"), entry.description.strip(), figures)


@traces_app.command("add")
def traces_add(
    file: Annotated[Path, typer.Argument(help="The file to import; it is copied.")],
    name: Annotated[str | None, typer.Option(help="The trace's name; default: the file's stem.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="csv, jsonl, counts, azure_llm_2023, mooncake or worldcup98.")
    ] = "csv",
    column: Annotated[str | None, typer.Option(help="The column of times; default: timestamp.")] = None,
    unit: Annotated[str | None, typer.Option(help="s, ms, us, ns or datetime; default: s.")] = None,
    count_column: Annotated[str | None, typer.Option(help="counts: the column of counts per interval.")] = None,
    interval_s: Annotated[float | None, typer.Option(help="counts: the length of an interval in seconds.")] = None,
    model_column: Annotated[
        str | None, typer.Option(help="The column that names each arrival's model or tenant.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="counts, worldcup98: import from here, written like a stamp.")
    ] = None,
    end: Annotated[
        str | None, typer.Option(help="counts, worldcup98: import up to here, written like a stamp.")
    ] = None,
    transient: Annotated[bool, typer.Option("--transient", help="A surge or flash crowd: never steady.")] = False,
    fault_at_s: Annotated[float | None, typer.Option(help="Where the trace suggests a fault.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a trace of that name.")] = False,
) -> None:
    """Check, describe and register a trace, so that `--trace NAME` works."""
    from tailrace.traces import catalogue

    given = {
        "format": form,
        "column": column,
        "unit": unit,
        "count_column": count_column,
        "interval_s": interval_s,
        "model_column": model_column,
        "start": start,
        "end": end,
    }
    options: Any = {key: value for key, value in given.items() if value is not None}
    trace, description = catalogue.add(
        file, name=name, replace=replace, transient=transient, fault_at_s=fault_at_s, **options
    )
    content = {"name": trace.name, "transient": trace.transient, **description.as_dict()}
    read(stdout(), facts(content, ".6g"), f"added: use it with --trace {trace.name}")
