"""What is typed: ``tailrace pareto``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailrace.cli.interrupt import keeping
from tailrace.cli.options import Workload
from tailrace.cli.show import read, sheet, stderr, stdout
from tailrace.harness.errors import EXIT_INVALID
from tailrace.harness.quantities import figure

if TYPE_CHECKING:
    from tailrace.tuner.objective import Objective
    from tailrace.tuner.pareto import Measured, Outcome


def pareto(
    adapter: Annotated[
        list[str] | None, typer.Option(help="A framework; may be given again. Left out: triton and ray_serve.")
    ] = None,
    workload: Workload = "emulated",
    devices: Annotated[int, typer.Option(min=1, help="Devices; up to one replica on each.")] = 3,
    slo: Annotated[str, typer.Option(metavar="DURATION", help="The objective of one request.")] = "120ms",
    trials: Annotated[int, typer.Option(min=1, max=100, help="Trials of every cell.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Everything random follows from it.")] = 7,
    out: Annotated[Path | None, typer.Option(help="The folder of both runs; one that was cut off goes on.")] = None,
) -> None:
    """Draw the frontier of goodput per device against the tail: a short surge at several loads and settings.

    One trial of each framework calibrates the simulator, which picks the cells worth measuring (max batch, window, replicas,
    queue limit, load); those and the frameworks' defaults are run, interleaved. The last line is the report's path.
    """
    from tailrace.cli.console import ConsoleObserver, summary_parts
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.records.store import default_folder
    from tailrace.reports.report import write
    from tailrace.tuner.objective import parse_objective
    from tailrace.tuner.pareto import CALM, SHORT_SURGE, measure

    names = list(dict.fromkeys(adapter or ["triton", "ray_serve"]))
    objective = parse_objective([f"p99={slo}"])
    folder = out or default_folder("pareto")
    base = {"workload": workload, "devices": devices, "seed": seed, "trace": SHORT_SURGE, "warmup": CALM}
    with (
        keeping(lambda: f"what was measured is in {folder}; go on with the same command and --out {folder}"),
        ConsoleObserver(stderr()) as observer,
    ):
        outcome = measure(names, base, objective, trials, folder, observer)
    columns: dict[str, Callable[[Measured], str]] = {
        "adapter": lambda cell: cell.adapter,
        "cell": lambda cell: cell.scenario,
        "p99 predicted": lambda cell: figure(cell.predicted and cell.predicted["p99_ms"], ".1f"),
        "p99 ms": lambda cell: figure(cell.cell.p99_ms, ".1f"),
        "goodput predicted": lambda cell: figure(cell.predicted and cell.predicted["goodput_rps"] / devices, ".1f"),
        "goodput/s/device": lambda cell: figure(cell.cell.goodput_rps_per_device, ".1f"),
    }
    report = write([outcome.run], outcome.run.folder / "report.html")
    measured = sheet(outcome.cells, columns, words=2)
    best = (_best(outcome, name, objective) for name in names)
    read(stdout(), *summary_parts(summarise(outcome.run)), measured, *best, str(report.resolve()))
    if any(cell.cell.verdict == "INVALID" for cell in outcome.cells):
        raise typer.Exit(EXIT_INVALID)


def _best(outcome: Outcome, name: str, objective: Objective) -> str:
    best = outcome.best(name, objective)
    if best is None:
        return f"{name}: of no cell does the whole interval keep {objective.words}."
    return (
        f"{name}: most goodput with the whole interval within {objective.words}: {best.scenario}, "
        f"{figure(best.cell.goodput_rps_per_device, '.1f')}/s per device."
    )
