"""What is typed: ``tailrace coldstart``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.interrupt import keeping
from tailrace.cli.options import Device, Environment, EnvironmentKind, Precision, Workload
from tailrace.cli.show import EMULATED, Form, Part, Sheet, TableOrJson, note, show
from tailrace.harness.errors import TailraceError
from tailrace.harness.quantities import figure


class ColdstartMode(StrEnum):
    """Modes of `tailrace coldstart`."""

    PROCESS = "process"
    PAGE_CACHE = "page-cache"
    MODEL = "model"


def coldstart(
    names: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="The adapters, interleaved.")],
    workload: Workload = "emulated",
    trials: Annotated[int, typer.Option(min=1, max=1000, help="Starts of each adapter.")] = 10,
    mode: Annotated[
        ColdstartMode,
        typer.Option(
            help="process: a fresh one, its files in the page cache; page-cache: dropped before each start; model: unloaded "
            "and loaded again."
        ),
    ] = ColdstartMode.PROCESS,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Replicas of the model.")] = 1,
    device: Device = None,
    precision: Precision = None,
    environment: Environment = EnvironmentKind.VENV,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of starts, and of the workload.")] = 7,
    out: Annotated[Path | None, typer.Option(help="The folder itself; default results/coldstart-TIME.")] = None,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Measure cold starts by phase, and what the first request costs beyond a warm one.

    Writes coldstart.json, coldstart.html and every server's logs. Each trial is a fresh server, gone before the next.
    """
    from tailrace.harness.records.store import default_folder
    from tailrace.harness.run.coldstart import ColdStarts, check
    from tailrace.reports.coldstart import write

    plan = check(
        names,
        workload,
        trials=trials,
        mode=mode.value,
        replicas=replicas,
        seed=seed,
        device=device.value if device else None,
        precision=precision.value if precision else None,
        environment=environment.value,
    )
    folder = out or default_folder("coldstart")
    starts = ColdStarts(plan, folder, note)
    with keeping(lambda: f"what was measured is in {folder}: {write(starts.record, folder).name}"):
        starts.run()
    path = write(starts.record, folder)
    show(form, starts.record, [*_parts(starts.record), str(path.resolve())])
    done = [trial for trial in starts.record["trials"] if trial["state"] == "done"]
    if len(done) < (planned := trials * len(names)):
        raise TailraceError(f"{planned - len(done)} of {planned} starts failed", remedy=f"read why above, or in {path}")


def _parts(record: Mapping[str, Any]) -> Iterator[Part]:
    """The phases of cold starts and the penalty of the first request, a line for each adapter."""
    from tailrace.harness.run.coldstart import MODES, PHASES

    if record["emulated"]:
        yield EMULATED
    yield Text(MODES[record["mode"]], style="dim")
    phases = PHASES[record["mode"]]
    rows: list[list[str]] = []
    for name, summary in record["summary"].items():
        row = [name, f"{summary['done']} of {summary['trials']}"]
        if summary["done"]:
            phases_s = [*(summary["phases"][key] for key in phases), summary["since_start"]["first_answer_s"]]
            requests = [summary[key] for key in ("first_request_ms", "warm_request_ms", "first_request_ratio")]
            row += [_spread(told, ".3f") for told in phases_s] + [_spread(told, ".2f") for told in requests]
            row += [_spread(summary["warm_after_requests"], "g"), _spread(summary["lied_s"], ".3f")]
        rows.append(row)
    headings = ("adapter", "starts", *(f"{words} s" for words in phases.values()), "in all s")
    yield Sheet((*headings, "first request ms", "warm ms", "ratio", "warm after", "lied s"), rows)
    yield Text("median; least to greatest; [95% interval of the median] from six starts on", style="dim")
    yield from {f"{trial['adapter']}: {told}": None for trial in record["trials"] for told in trial.get("notes", ())}


def _spread(told: Mapping[str, Any], shape: str) -> str:
    lines = [figure(told["median"], shape), f"{figure(told['min'], shape)} to {figure(told['max'], shape)}"]
    if told["interval"]:
        lines.append(f"[{', '.join(figure(end, shape) for end in told['interval'])}]")
    return "\n".join(lines)
