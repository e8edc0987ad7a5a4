"""What is typed: ``tailrace run``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailrace.cli.interrupt import keeping
from tailrace.cli.options import Assignments
from tailrace.cli.show import TableOrJson, read, sheet, stderr, stdout
from tailrace.harness.errors import EXIT_INVALID, InputError, TailraceError
from tailrace.harness.quantities import figure

if TYPE_CHECKING:
    from tailrace.harness.plan.experiment import Experiment
    from tailrace.harness.records.summary import RunSummary
    from tailrace.harness.run.observer import Observer


def run(
    experiment: Annotated[
        str | None, typer.Argument(help="A built-in experiment (default, smoke, compare, faults) or a YAML file.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Race this adapter; may be given again.")] = None,
    workload: Annotated[str | None, typer.Option(help="A workload's name, or the path of its folder.")] = None,
    trace: Annotated[str | None, typer.Option(help="A trace's name.")] = None,
    trials: Annotated[int | None, typer.Option(help="Repetitions of every cell.")] = None,
    workers: Annotated[int | None, typer.Option(help="Load workers on this machine (client.workers).")] = None,
    assignments: Assignments = None,
    out: Annotated[Path | None, typer.Option(help="The run folder itself; default results/NAME-TIME.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with this run, which was cut off; takes no experiment.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 for UNKNOWN trials too.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the experiment, print its cells and how long it is, and stop.")
    ] = False,
) -> None:
    """Run an experiment: bring the servers up, race them, analyse, and write the report.

    A run that was killed, interrupted or cut off goes on with --resume RUN, and keeps what it has measured.
    """
    from tailrace.harness.plan.loading import load_experiment
    from tailrace.harness.records.store import default_folder
    from tailrace.harness.run.runner import resume_run, run_experiment

    replaced = {"adapters": adapter or None, "workload": workload, "trials": trials}
    overrides = {key: value for key, value in replaced.items() if value is not None}
    given = list(assignments or ())
    if workers is not None:
        given.append(f"client.workers={workers}")
    if resume is not None:
        if experiment is not None or overrides or trace is not None or given or out is not None or dry_run:
            raise InputError(
                "--resume goes on with the experiment of that run: it takes no experiment, and no --adapter, --workload, "
                "--trace, --trials, --workers, --set, --out or --dry-run",
                remedy=f"tailrace run --resume {resume}; or start a new run, without --resume",
            )
        _carry_out(functools.partial(resume_run, resume), resume, strict)
        return
    if experiment is None:
        raise InputError(
            "Missing argument EXPERIMENT",
            remedy="name an experiment (tailrace run smoke), or go on with a run that was cut off (--resume RUN)",
        )
    chosen = load_experiment(experiment, overrides=overrides, trace=trace, assignments=given)
    folder = out or default_folder(chosen.name)
    if dry_run:
        _show_cells(chosen)
    elif chosen.load is not None:
        from tailrace.cli.saturate import search

        search(chosen, folder, TableOrJson.TABLE, strict=strict)
    else:
        _carry_out(functools.partial(run_experiment, chosen, folder), folder, strict)


def _carry_out(measure: Callable[[Observer], RunSummary], folder: Path, strict: bool) -> None:
    from tailrace.cli.console import summary_parts
    from tailrace.harness.records.store import RunFolder
    from tailrace.reports.report import write

    summary = measured(measure, folder)
    read(stdout(), *summary_parts(summary), str(write([RunFolder.open(folder)], folder / "report.html").resolve()))
    if summary.verdict in (("INVALID", "UNKNOWN") if strict else ("INVALID",)):
        raise typer.Exit(EXIT_INVALID)


def measured(measure: Callable[[Observer], RunSummary], folder: Path) -> RunSummary:
    """What a run in ``folder`` comes to, shown while it goes on. One that is interrupted or fails leaves a report of what was
    measured."""
    from tailrace.cli.console import ConsoleObserver

    def keep() -> str:
        _report(folder)
        return f"what was measured is in {folder}; go on with: tailrace run --resume {folder}"

    try:
        with keeping(keep), ConsoleObserver(stderr()) as observer:
            return measure(observer)
    except InputError:
        raise
    except TailraceError:
        _report(folder)
        raise


def _report(folder: Path) -> None:
    """After a run that did not end well: a report of what there is, without hiding why it ended."""
    from tailrace.harness.records.store import RunFolder
    from tailrace.reports.report import write

    if not folder.exists():
        return  # it ended before anything was written
    try:
        run_folder = RunFolder.open(folder)
        if run_folder.trials:
            read(stderr(), f"report of what was measured: {write([run_folder], folder / 'report.html')}")
    except TailraceError as error:
        read(stderr(), f"no report could be written: {error.message}")


def _show_cells(experiment: Experiment) -> None:
    """What `tailrace run --dry-run` says."""
    from tailrace.harness.run.preflight import check
    from tailrace.harness.run.runner import size_in_words

    checked = check(experiment)
    first_of = {plan.cell.id: plan for plan in reversed(checked.plans)}
    rows = [(cell, checked.trace_of(first_of[cell.id])) for cell in checked.cells.values()]
    cells = sheet(
        rows,
        {
            "adapter": lambda row: row[0].adapter,
            "scenario": lambda row: row[0].scenario.name,
            "knobs": lambda row: (
                ", ".join(f"{name} {value}" for name, value in row[0].tuning.chosen().items()) or "defaults"
            ),
            "offered/s": lambda row: figure(row[1].mean_rate, ".1f"),
            "seconds": lambda row: figure(row[1].span_s, "g"),
        },
        words=3,
    )
    read(stdout(), cells, size_in_words(checked))
    if experiment.load is not None:
        read(
            stdout(),
            f"so many times for each rate that is tried, from {experiment.load.start:g}/s on, until each cell is saturated",
        )
