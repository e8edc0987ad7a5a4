"""What is typed: ``tailrace saturate``; and ``tailrace run`` of an experiment with a ``load``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailrace.cli.interrupt import keeping
from tailrace.cli.options import Assignments
from tailrace.cli.show import Form, Part, TableOrJson, sheet, show, stderr
from tailrace.harness.errors import EXIT_INVALID
from tailrace.harness.quantities import figure, percent

if TYPE_CHECKING:
    from tailrace.harness.plan.experiment import Experiment
    from tailrace.tuner.saturation import Load, Saturation, Saturations

DEFAULT_P99_MS = 120.0


def saturate(
    experiment: Annotated[
        str, typer.Argument(help="A built-in experiment or a YAML file; each of its cells is searched.")
    ],
    adapter: Annotated[list[str] | None, typer.Option(help="Of this framework; may be given again.")] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="p99=…|attainment=…", help="The objective; its `load`'s, else p99=120ms."),
    ] = None,
    start: Annotated[
        float | None, typer.Option(min=0.01, help="The first mean rate, arrivals/s; its `load`'s, else 50.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, max=100, help="Trials of every rate.")] = 1,
    settings: Assignments = None,
    out: Annotated[Path | None, typer.Option(help="The folder of all runs; one that was cut off goes on.")] = None,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Find the saturation point: the highest mean rate of the trace at which the objective still holds.

    The rate is doubled until it does not hold, and no further; then the gap is halved until it is below 5 %, or the interval
    of a p99 (from three trials) has the objective within it. The same as the key `load` of an experiment that is run.
    """
    from tailrace.harness.plan.experiment import LoadSearch, TailObjective
    from tailrace.harness.plan.loading import load_experiment
    from tailrace.harness.records.store import default_folder
    from tailrace.tuner.objective import parse_objective

    overrides: dict[str, Any] = {"trials": trials}
    if adapter:
        overrides["adapters"] = list(dict.fromkeys(adapter))
    chosen = load_experiment(experiment, overrides=overrides, assignments=settings or ())
    load = chosen.load or LoadSearch(find="saturation", slo=TailObjective(p99_ms=DEFAULT_P99_MS))
    if slo:
        load = load.model_copy(update={"slo": TailObjective(**asdict(parse_objective(slo)))})
    if start is not None:
        load = load.model_copy(update={"start": start})
    search(chosen.model_copy(update={"load": load}), out or default_folder("saturate"), form)


def search(experiment: Experiment, folder: Path, form: TableOrJson, *, strict: bool = False) -> None:
    """Search the highest rate of every cell of an experiment that has a ``load``, and tell. Exits with 1 where a search was
    stopped (what is INVALID says nothing of the server), and if ``strict`` with 3 where a load was measured UNKNOWN."""
    from tailrace.cli.console import ConsoleObserver
    from tailrace.tuner.saturation import saturate_cells

    with (
        keeping(lambda: f"what was measured is in {folder}; go on with the same command and --out {folder}"),
        ConsoleObserver(stderr()) as observer,
    ):
        found = saturate_cells(experiment, folder, observer)
    show(form, {name: _content(point) for name, point in found.points.items()}, _parts(found, folder))
    if any(point.ended == "stopped" for point in found.points.values()):
        raise typer.Exit(1)
    if strict and any(load.figures.verdict == "UNKNOWN" for point in found.points.values() for load in point.loads):
        raise typer.Exit(EXIT_INVALID)


def _parts(found: Saturations, folder: Path) -> Iterator[Part]:
    from tailrace.reports.report import write

    columns: dict[str, Callable[[tuple[str, Load]], str]] = {
        "cell": lambda row: row[0],
        "mean rate/s": lambda row: figure(row[1].rate, ".4g"),
        "held": lambda row: figure(row[1].held),
        "p99 ms": lambda row: figure(row[1].figures.p99_ms, ".1f"),
        "goodput/s/device": lambda row: figure(row[1].figures.goodput_rps_per_device, ".1f"),
        "within SLO": lambda row: percent(row[1].figures.slo_attainment),
        "verdict": lambda row: row[1].figures.verdict,
    }
    loads = [
        (name, load) for name, point in found.points.items() for load in sorted(point.loads, key=lambda load: load.rate)
    ]
    yield sheet(loads, columns)
    for name, point in found.points.items():
        yield f"{name} saturates at {found.objective.words}: {point.words}."
    if found.runs:
        yield str(write(found.runs, folder / "report.html").resolve())


def _content(point: Saturation) -> dict[str, Any]:
    keys = ("p99_ms", "p99_ci_ms", "goodput_rps_per_device", "slo_attainment", "verdict")
    return {
        "holds": point.holds,
        "fails": point.fails,
        "ended": point.ended,
        "stopped_by": point.stopped_by,
        "loads": [
            {"rate": load.rate, "held": load.held, **{key: getattr(load.figures, key) for key in keys}}
            for load in point.loads
        ],
    }
