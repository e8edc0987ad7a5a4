"""The command line. Exit codes: 0 all trials valid, 1 failure, 2 bad usage or input, 3 some trial INVALID, 130 interrupted;
of the gate also 4 regression, 5 inconclusive."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tailrace import __version__
from tailrace.cli.adapters import adapters
from tailrace.cli.baseline import baseline_app
from tailrace.cli.ceiling import ceiling
from tailrace.cli.coldstart import coldstart
from tailrace.cli.gate import compare, gate
from tailrace.cli.interrupt import heed_interrupts
from tailrace.cli.loadgen import load_worker, loadgen
from tailrace.cli.machine import clean, doctor
from tailrace.cli.pareto import pareto
from tailrace.cli.plan import plan_app
from tailrace.cli.recommend import recommend
from tailrace.cli.report import index, report, summary
from tailrace.cli.run import run
from tailrace.cli.saturate import saturate
from tailrace.cli.simulate import calibrate, fit, simulate, validate_sim
from tailrace.cli.traces import traces_app
from tailrace.cli.tune import tune
from tailrace.harness.errors import TailraceError

app = typer.Typer(
    name="tailrace",
    help="Races model-serving frameworks on the same model, hardware and traffic, and tells the truth about the tail.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (
    *(run, report, index, summary, compare, gate),
    *(tune, pareto, saturate, recommend, simulate, fit, validate_sim),
    *(coldstart, ceiling, loadgen, load_worker, adapters, doctor, clean),
):
    app.command(name=command.__name__.replace("_", "-"))(command)
app.command(name="calibrate", hidden=True)(calibrate)
for name, group in (("traces", traces_app), ("plan", plan_app), ("baseline", baseline_app)):
    app.add_typer(group, name=name)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tailrace {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: interrupts heeded in order, errors as one clear message and the documented exit code."""
    heed_interrupts()
    try:
        app()
    except TailraceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
