"""What is typed: ``tailrace ceiling``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.interrupt import keeping
from tailrace.cli.options import Device, Environment, EnvironmentKind, Precision
from tailrace.cli.show import EMULATED, Form, Part, TableOrJson, note, sheet, show
from tailrace.harness.errors import InputError
from tailrace.harness.quantities import figure

MAX_BATCH = 1024


def ceiling(
    workload: Annotated[
        str | None, typer.Argument(help="A workload's name or folder; left out: that of the runs.")
    ] = None,
    run_folders: Annotated[
        list[Path] | None,
        typer.Option("--run", metavar="RUN", help="Beside it, what this run reached of it; or a folder of runs."),
    ] = None,
    device: Device = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices over which copies are dealt out.")] = 1,
    batch: Annotated[str, typer.Option(metavar="N,N,…", help="Items in a call.")] = "1,8",
    instances: Annotated[str, typer.Option(metavar="N,N,…", help="Copies of the model at work at once.")] = "1",
    precision: Precision = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compiled (torch.compile).")] = False,
    environment: Environment = EnvironmentKind.VENV,
    duration: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds at each batch.")] = 5.0,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Measure the bare model: the same model and batch with no server around it, as fast as it goes.

    With --run, at the batches and numbers of copies of those runs' cells, on their device, in their precision: the goodput
    of each framework's best cell as a share of that limit.
    """
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.run.ceiling import BareModel, best_cells, model_of, runs_below, told

    asked: dict[str, Any] = {
        "workload": workload,
        "device": device.value if device else None,
        "devices": devices,
        "precision": precision.value if precision else None,
        "compiled": compiled,
        "environment": environment.value,
    }
    runs = [run for folder in run_folders or () for run in runs_below(folder)]
    if runs:
        asked = model_of(runs, workload)
    elif workload is None:
        raise InputError(
            "Missing argument WORKLOAD", remedy="name a workload (tailrace ceiling minilm), or a run (--run RUN)"
        )
    reached = best_cells({str(run.folder): summarise(run) for run in runs})
    points = sorted({(one.batch, one.instances) for one in reached}) or [
        (size, copies) for copies in _counts("--instances", instances) for size in _counts("--batch", batch)
    ]
    measured: list[Any] = []

    def tell() -> None:
        content = {**bare.described(), **told(measured, reached)}
        show(form, content, parts(content))

    def keep() -> str:
        if measured:
            tell()
        return f"{len(measured)} of {len(points)} points were measured"

    with keeping(keep):
        bare = BareModel(**asked, on_progress=note)
        for size, copies in points:
            measured.append(bare.measure(size, copies, duration))
            note(f"batch {size}, {copies} at once: {measured[-1].items_per_s:.1f} items/s")
    tell()


def _counts(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and 0 < int(part) <= MAX_BATCH for part in parts):
        raise InputError(f"{option} {text!r}: give numbers from 1 to {MAX_BATCH}, separated by commas: {option} 1,8")
    return [int(part) for part in parts]


def parts(content: Mapping[str, Any]) -> Iterator[Part]:
    """What the bare model can, and beside it what races reached of that."""
    if content["device"] == "emulated":
        yield EMULATED
    how = ", compiled" if content["compiled"] else ""
    yield f"{content['workload']} with no server, on {content['device']} in {content['precision']}{how}"
    columns = {
        "batch": lambda one: str(one["batch"]),
        "copies": lambda one: str(one["instances"]),
        "items/s": lambda one: figure(one["items_per_s"], ".2f"),
        "p50 ms": lambda one: figure(one["p50_ms"], ".2f"),
        "p99 ms": lambda one: figure(one["p99_ms"], ".2f"),
    }
    yield sheet(content["ceilings"], columns, words=0)
    if not content["cells"]:
        return
    columns = {
        "cell": lambda cell: cell["cell"],
        "batch": lambda cell: str(cell["batch"]),
        "copies": lambda cell: str(cell["instances"]),
        "goodput/s": lambda cell: figure(cell["goodput_rps"], ".2f"),
        "of the bare model's": lambda cell: figure(cell["of_ceiling"], ".0%"),
    }
    yield sheet(content["cells"], columns)
    yield Text("a share below what was offered is the framework's overhead", style="dim")
    if any(cell["of_ceiling"] > 1 for cell in content["cells"]):
        warning = (
            "more than the bare model can: the machine was busier now than in the race; measure again on a quiet one"
        )
        yield Text(warning, style="yellow")
