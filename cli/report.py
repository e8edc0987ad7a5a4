"""What is typed: ``tailrace report``, ``index`` and ``summary``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tailrace.cli.show import show
from tailrace.harness.errors import InputError


class SummaryFormat(StrEnum):
    """Forms of `tailrace summary`."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class ReportFormat(StrEnum):
    """Forms of `tailrace report`."""

    HTML = "html"
    MARKDOWN = "md"
    CSV = "csv"
    PARQUET = "parquet"
    JSON = "json"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are put side by side.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; HTML: default RUN/report.html; else left out: printed."),
    ] = None,
    form: Annotated[
        ReportFormat,
        typer.Option("--format", help="html; md, for a CI job's summary; csv, parquet, json: the figures."),
    ] = ReportFormat.HTML,
) -> None:
    """Make the summary and the report of runs again, from their records alone.

    csv and parquet have one line per trial, with the run's folder in front; parquet needs --output.
    """
    from tailrace.harness.analysis.summary import write_summary
    from tailrace.harness.records.store import RunFolder
    from tailrace.reports.page import write_page
    from tailrace.reports.report import write
    from tailrace.reports.tables import figures_csv, figures_json, write_parquet

    opened = [RunFolder.open(folder) for folder in runs]
    if output is None and form is ReportFormat.HTML and len(runs) > 1:
        raise InputError("several runs make one report", remedy="say where it goes: -o FILE")
    if output is None and form is ReportFormat.PARQUET:
        raise InputError("Parquet is no text to be printed", remedy="say where it goes: -o FILE")
    summaries = {str(run.folder): write_summary(run) for run in opened}
    if form is ReportFormat.HTML:
        typer.echo(write(opened, output or runs[0] / "report.html").resolve())
        return
    if form is ReportFormat.PARQUET and output is not None:
        write_parquet(summaries, output)
        typer.echo(output.resolve())
        return
    if form is ReportFormat.MARKDOWN:
        from tailrace.reports.markdown import markdown

        text = markdown(opened)
    else:
        text = figures_csv(summaries) if form is ReportFormat.CSV else figures_json(summaries)
    if output is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(write_page(text, output).resolve())


def index(
    folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("results"),
) -> None:
    """Write index.html over a folder of runs: what each asked and found, how far it can be trusted, and its report."""
    from tailrace.reports.index import write_index

    typer.echo(write_index(folder).resolve())


def summary(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    form: Annotated[SummaryFormat, typer.Option("--format", help="table, json or csv (one line per trial).")] = (
        SummaryFormat.TABLE
    ),
) -> None:
    """Print the figures of a run, recomputed from its records."""
    from tailrace.cli.console import summary_parts
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.records.store import RunFolder
    from tailrace.reports.tables import figures_csv

    content = summarise(RunFolder.open(run_folder))
    if form is SummaryFormat.CSV:
        typer.echo(figures_csv({"": content}), nl=False)
    else:
        show(form, content, summary_parts(content))
