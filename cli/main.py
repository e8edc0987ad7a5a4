"""The command line. Exit codes: 0 all trials valid, 1 failure, 2 bad usage or input, 3 some trial INVALID, 130 interrupted;
of the gate also 4 regression, 5 inconclusive."""

from __future__ import annotations

import functools
import json
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailrace import __version__
from tailrace.cli.gate import baseline_app, compare, gate
from tailrace.cli.simulate import calibrate, plan_app, simulate, validate_sim
from tailrace.cli.terminal import TableOrJson, stderr, stdout
from tailrace.cli.tune import pareto, recommend, saturate, tune
from tailrace.harness.errors import EXIT_INTERRUPTED, EXIT_INVALID, InputError, TailraceError

if TYPE_CHECKING:
    from tailrace.harness.plan.experiment import Experiment

MAX_LOADGEN_RATE = 200_000
MAX_BATCH = 1024

app = typer.Typer(
    name="tailrace",
    help="Races model-serving frameworks on the same model, hardware and traffic, and tells the truth about the tail.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
traces_app = typer.Typer(help="Traffic: list, show and add traces.", no_args_is_help=True)
app.add_typer(traces_app, name="traces")
app.add_typer(plan_app, name="plan")
app.add_typer(baseline_app, name="baseline")
app.command()(simulate)
app.command()(calibrate)
app.command()(tune)
app.command()(pareto)
app.command()(saturate)
app.command()(recommend)
app.command()(gate)
app.command()(compare)
app.command(name="validate-sim")(validate_sim)


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


class LoadgenProtocol(StrEnum):
    """Protocols of `tailrace loadgen`."""

    HTTP = "http"
    GRPC = "grpc"


class ColdstartMode(StrEnum):
    """Modes of `tailrace coldstart`."""

    PROCESS = "process"
    PAGE_CACHE = "page-cache"
    MODEL = "model"


class DeviceChoice(StrEnum):
    """Devices of `tailrace ceiling` and `tailrace coldstart`."""

    EMULATED = "emulated"
    CPU = "cpu"
    CUDA = "cuda"


class PrecisionChoice(StrEnum):
    """Precisions of `tailrace ceiling` and `tailrace coldstart`."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class EnvironmentKind(StrEnum):
    """Environments of `tailrace ceiling` and `tailrace coldstart`."""

    VENV = "venv"
    CURRENT = "current"


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


@app.command()
def run(
    experiment: Annotated[
        str | None, typer.Argument(help="A built-in experiment (default, smoke, compare, faults) or a YAML file.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Race this adapter; may be given again.")] = None,
    workload: Annotated[str | None, typer.Option(help="A workload's name, or the path of its folder.")] = None,
    trace: Annotated[str | None, typer.Option(help="A trace's name.")] = None,
    trials: Annotated[int | None, typer.Option(help="Repetitions of every cell.")] = None,
    workers: Annotated[int | None, typer.Option(help="Load workers on this machine (client.workers).")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the experiment, in YAML.")
    ] = None,
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
    from tailrace.cli.console import ConsoleObserver, print_summary
    from tailrace.harness.plan.loading import load_experiment
    from tailrace.harness.records.store import RunFolder, default_folder
    from tailrace.harness.run.runner import resume_run, run_experiment
    from tailrace.reports.report import write

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
        folder, carry_out = resume, functools.partial(resume_run, resume)
    elif experiment is None:
        raise InputError(
            "Missing argument EXPERIMENT",
            remedy="name an experiment (tailrace run smoke), or go on with a run that was cut off (--resume RUN)",
        )
    else:
        chosen = load_experiment(experiment, overrides=overrides, trace=trace, assignments=given)
        if dry_run:
            _print_cells(chosen)
            return
        if chosen.load is not None:
            from tailrace.cli.tune import find_saturation

            find_saturation(chosen, out or default_folder(chosen.name), strict=strict)
            return
        folder = out or default_folder(chosen.name)
        carry_out = functools.partial(run_experiment, chosen, folder)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    console = stderr()
    try:
        with ConsoleObserver(console) as observer:
            summary = carry_out(observer)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what was measured is in {folder}; go on with: tailrace run --resume {folder}", soft_wrap=True
        )
        _report_quietly(folder, console)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except InputError:
        raise
    except TailraceError:
        _report_quietly(folder, console)
        raise
    print_summary(summary, stdout())
    path = write([RunFolder.open(folder)], folder / "report.html")
    typer.echo(path.resolve())
    bad = ("INVALID", "UNKNOWN") if strict else ("INVALID",)
    if summary["verdict"] in bad:
        raise typer.Exit(EXIT_INVALID)


def _print_cells(experiment: Experiment) -> None:
    """What `tailrace run --dry-run` says."""
    from tailrace.harness.run.preflight import check
    from tailrace.harness.run.runner import size_in_words

    checked = check(experiment)
    table = Table()
    for heading in ("adapter", "scenario", "knobs", "offered/s", "seconds"):
        table.add_column(heading, justify="left" if heading in ("adapter", "scenario", "knobs") else "right")
    first_of = {plan.cell.id: plan for plan in reversed(checked.plans)}
    for cell in checked.cells.values():
        trace = checked.trace_of(first_of[cell.id])
        knobs = ", ".join(f"{name} {value}" for name, value in cell.tuning.chosen().items()) or "defaults"
        row = (cell.adapter, cell.scenario.name, knobs, f"{trace.mean_rate:.1f}", f"{trace.span_s:g}")
        table.add_row(*(Text(value) for value in row))
    stdout().print(table)
    stdout().print(Text(size_in_words(checked)), soft_wrap=True)
    if experiment.load is not None:
        searched = f"so many times for each rate that is tried, from {experiment.load.start:g}/s on, until each cell is saturated"
        stdout().print(Text(searched), soft_wrap=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """The first Ctrl-C or SIGTERM stops the run in order; while that goes on, further ones are heard but change nothing."""
    signal.signal(signal.SIGINT, _already_stopping)
    signal.signal(signal.SIGTERM, _already_stopping)
    raise KeyboardInterrupt


def _already_stopping(_signal: int, _frame: FrameType | None) -> None:
    print("already stopping: servers are being ended", file=sys.stderr)


def _report_quietly(folder: Path, console: Console) -> None:
    """After a run that did not end well: a report of what there is, without hiding why it ended."""
    from tailrace.harness.records.store import RunFolder
    from tailrace.reports.report import write

    if not folder.exists():
        return  # it ended before anything was written
    try:
        run_folder = RunFolder.open(folder)
        if run_folder.trials:
            path = write([run_folder], folder / "report.html")
            console.print(f"report of what was measured: {path}", soft_wrap=True)
    except TailraceError as error:
        console.print(f"no report could be written: {error.message}", soft_wrap=True)


@app.command()
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


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("results"),
) -> None:
    """Write index.html over a folder of runs: what each asked and found, how far it can be trusted, and its report."""
    from tailrace.reports.index import write_index

    typer.echo(write_index(folder).resolve())


@app.command()
def summary(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    form: Annotated[SummaryFormat, typer.Option("--format", help="table, json or csv (one line per trial).")] = (
        SummaryFormat.TABLE
    ),
) -> None:
    """Print the figures of a run, recomputed from its records."""
    from tailrace.cli.console import print_summary
    from tailrace.harness.analysis.summary import jsonable, summarise
    from tailrace.harness.records.store import RunFolder
    from tailrace.reports.tables import figures_csv

    content = summarise(RunFolder.open(run_folder))
    if form is SummaryFormat.JSON:
        typer.echo(json.dumps(jsonable(content), indent=1, allow_nan=False))
    elif form is SummaryFormat.CSV:
        typer.echo(figures_csv({"": content}), nl=False)
    else:
        print_summary(content, stdout())


@app.command()
def adapters(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    faults: Annotated[bool, typer.Option("--faults", help="Which faults can be done to each on this machine.")] = False,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
) -> None:
    """List the adapters: what each can do, where each knob lands, what it refuses, and what was seen of it here.

    What was seen comes from the contract suite (`nox -s contract`), run on this machine.
    """
    from tailrace.cli.console import print_adapter, print_faults
    from tailrace.harness.contract.observations import observations_of
    from tailrace.harness.run.faults import fault_matrix
    from tailrace.harness.run.registry import all_adapters, get_adapter

    chosen = [get_adapter(name) for name in names] if names else list(all_adapters().values())
    if faults:
        matrix = fault_matrix(chosen)
        if form is TableOrJson.JSON:
            typer.echo(json.dumps(matrix, indent=1))
        else:
            print_faults(matrix, stdout())
        return
    if form is TableOrJson.JSON:
        told = {adapter.name: {**adapter.described(), "observed": observations_of(adapter)} for adapter in chosen}
        typer.echo(json.dumps(told, indent=1))
        return
    for adapter in chosen:
        print_adapter(adapter, observations_of(adapter), stdout())


@app.command()
def loadgen(
    rates: Annotated[
        str, typer.Option(metavar="RATE,RATE,…", help="Arrivals/s, one replay each.")
    ] = "500,2000,5000,9000",
    duration: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds at each rate.")] = 5.0,
    body_bytes: Annotated[int, typer.Option(min=1, max=50_000_000, help="Size of a request's body.")] = 100,
    protocol: Annotated[LoadgenProtocol, typer.Option(help="http or grpc.")] = LoadgenProtocol.HTTP,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Load workers on this machine.")] = 1,
    max_connections: Annotated[int, typer.Option(min=1, help="An arrival past it is dropped.")] = 8192,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
) -> None:
    """Measure the load generator itself: Poisson arrivals against the null server on this machine, on loopback.

    achieved: answers/s; cpu us: CPU time of the generator for one request; send lag: from the intended instant to the
    first byte sent; dropped: what it could not send.
    """
    from tailrace.harness.replay.driver import Workers
    from tailrace.harness.run.ruler import measure_rates

    console = stderr()
    rows = []
    for row in measure_rates(
        _rates(rates),
        duration_s=duration,
        body_bytes=body_bytes,
        protocol=protocol.value,
        workers=Workers(local=workers),
        max_connections=max_connections,
        on_progress=lambda text: console.print(Text(text, style="dim"), soft_wrap=True),
    ):
        rows.append(row)
        console.print(Text(f"{row['rate']:g}/s done", style="dim"))
    if form is TableOrJson.JSON:
        settings = {
            "duration_s": duration,
            "body_bytes": body_bytes,
            "protocol": protocol.value,
            "workers": workers,
        }
        typer.echo(json.dumps({**settings, "rows": rows}, indent=1))
        return
    table = Table()
    columns = {
        "rate": ("rate/s", "g"),
        "achieved": ("achieved/s", ".1f"),
        "cpu_us_per_request": ("cpu us/request", ".1f"),
        "send_lag_p50_ms": ("send lag p50 ms", ".3f"),
        "send_lag_p99_ms": ("send lag p99 ms", ".3f"),
        "response_p50_ms": ("response p50 ms", ".3f"),
        "response_p99_ms": ("response p99 ms", ".3f"),
        "dropped": ("dropped", "d"),
        "failed": ("failed", "d"),
    }
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*("–" if row[key] is None else f"{row[key]:{shape}}" for key, (_, shape) in columns.items()))
    stdout().print(table)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate <= MAX_LOADGEN_RATE for rate in rates):
        raise InputError(
            f"--rates {text!r}: give arrivals/s above 0 and up to {MAX_LOADGEN_RATE:,}, separated by commas: "
            "--rates 500,2000"
        )
    return rates


@app.command()
def coldstart(
    names: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="The adapters, interleaved.")],
    workload: Annotated[str, typer.Option(help="A workload's name, or the path of its folder.")] = "emulated",
    trials: Annotated[int, typer.Option(min=1, max=1000, help="Starts of each adapter.")] = 10,
    mode: Annotated[
        ColdstartMode,
        typer.Option(
            help="process: a fresh one, its files in the page cache; page-cache: dropped before each start; model: unloaded "
            "and loaded again."
        ),
    ] = ColdstartMode.PROCESS,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Replicas of the model.")] = 1,
    device: Annotated[
        DeviceChoice | None, typer.Option(help="cpu, cuda or emulated; default: the workload's first.")
    ] = (None),
    precision: Annotated[PrecisionChoice | None, typer.Option(help="Of those that the workload offers.")] = None,
    environment: Annotated[EnvironmentKind, typer.Option(help="venv, or current: this interpreter.")] = (
        EnvironmentKind.VENV
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the order of starts, and of the workload.")] = 7,
    out: Annotated[Path | None, typer.Option(help="The folder itself; default results/coldstart-TIME.")] = None,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
) -> None:
    """Measure cold starts by phase, and what the first request costs beyond a warm one.

    Writes coldstart.json, coldstart.html and every server's logs. Each trial is a fresh server, gone before the next.
    """
    from tailrace.cli.console import print_coldstart
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
    folder, console = out or default_folder("coldstart"), stderr()
    starts = ColdStarts(plan, folder, lambda text: console.print(Text(text, style="dim"), soft_wrap=True))
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        starts.run()
    except KeyboardInterrupt:
        path = write(starts.record, folder)
        console.print(f"interrupted; what was measured is in {folder}: {path.name}", soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    path = write(starts.record, folder)
    if form is TableOrJson.JSON:
        typer.echo(json.dumps(starts.record, indent=1, allow_nan=False))
    else:
        print_coldstart(starts.record, stdout())
        typer.echo(path.resolve())
    done = [trial for trial in starts.record["trials"] if trial["state"] == "done"]
    if len(done) < (planned := trials * len(names)):
        raise TailraceError(f"{planned - len(done)} of {planned} starts failed", remedy=f"read why above, or in {path}")


@app.command()
def ceiling(
    workload: Annotated[
        str | None, typer.Argument(help="A workload's name or folder; left out: that of the runs.")
    ] = None,
    run_folders: Annotated[
        list[Path] | None,
        typer.Option("--run", metavar="RUN", help="Beside it, what this run reached of it; or a folder of runs."),
    ] = None,
    device: Annotated[
        DeviceChoice | None, typer.Option(help="cpu, cuda or emulated; default: the workload's first.")
    ] = (None),
    devices: Annotated[int, typer.Option(min=1, help="Devices over which copies are dealt out.")] = 1,
    batch: Annotated[str, typer.Option(metavar="N,N,…", help="Items in a call.")] = "1,8",
    instances: Annotated[str, typer.Option(metavar="N,N,…", help="Copies of the model at work at once.")] = "1",
    precision: Annotated[PrecisionChoice | None, typer.Option(help="Of those that the workload offers.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compiled (torch.compile).")] = False,
    environment: Annotated[EnvironmentKind, typer.Option(help="venv, or current: this interpreter.")] = (
        EnvironmentKind.VENV
    ),
    duration: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds at each batch.")] = 5.0,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
) -> None:
    """Measure the bare model: the same model and batch with no server around it, as fast as it goes.

    With --run, at the batches and numbers of copies of those runs' cells, on their device, in their precision: the goodput
    of each framework's best cell as a share of that limit.
    """
    from tailrace.cli.console import print_ceiling
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.records.store import RunFolder
    from tailrace.harness.run.ceiling import BareModel, best_cells, told
    from tailrace.harness.run.runner import experiment_of

    console = stderr()
    runs = [RunFolder.open(folder) for given in run_folders or () for folder in _runs_below(given)]
    asked: dict[str, Any] = {
        "device": device.value if device else None,
        "devices": devices,
        "precision": precision.value if precision else None,
        "compiled": compiled,
        "environment": environment.value,
    }
    if runs:
        experiments = [experiment_of(run) for run in runs]
        first = experiments[0]
        of_runs = [(e.workload, e.device, e.devices, e.precision, e.compile, e.workload_options) for e in experiments]
        if workload is not None or any(one != of_runs[0] for one in of_runs):
            raise InputError(
                "--run takes the workload, its device and its precision from the runs, which must agree on them",
                remedy="leave WORKLOAD out, and name runs of one workload on one device in one precision",
            )
        workload = first.workload
        asked = {
            "device": first.device,
            "devices": first.devices,
            "precision": first.precision,
            "compiled": first.compile,
            "environment": first.environment,
            "options": first.workload_options,
            "seed": first.seed,
        }
    elif workload is None:
        raise InputError(
            "Missing argument WORKLOAD", remedy="name a workload (tailrace ceiling minilm), or a run (--run RUN)"
        )
    reached = best_cells({str(run.folder): summarise(run) for run in runs})
    points = sorted({(one.batch, one.instances) for one in reached}) or [
        (size, copies) for copies in _counts("--instances", instances) for size in _counts("--batch", batch)
    ]

    def note(text: str) -> None:
        console.print(Text(text, style="dim"), soft_wrap=True)

    bare = BareModel(workload, **asked, on_progress=note)
    measured = []
    for size, copies in points:
        measured.append(bare.measure(size, copies, duration))
        note(f"batch {size}, {copies} at once: {measured[-1].items_per_s:.1f} items/s")
    content = {
        "workload": bare.workload.spec.name,
        "device": bare.workload.device,
        "precision": bare.workload.precision,
        "compiled": bare.workload.compiled,
        **told(measured, reached),
    }
    if form is TableOrJson.JSON:
        typer.echo(json.dumps(content, indent=1))
    else:
        print_ceiling(content, stdout())


def _runs_below(folder: Path) -> list[Path]:
    """The folder, if it is a run's, else all runs below it; a search for a saturation point leaves many."""
    return sorted(path.parent for path in folder.rglob("manifest.json")) or [folder]


def _counts(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and 0 < int(part) <= MAX_BATCH for part in parts):
        raise InputError(f"{option} {text!r}: give numbers from 1 to {MAX_BATCH}, separated by commas: {option} 1,8")
    return [int(part) for part in parts]


@app.command(name="load-worker")
def load_worker(
    master: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the run listens (client.listen).")],
) -> None:
    """Send load from this machine for runs on another one, until Ctrl-C.

    The run counts it with client.remote_workers. Whoever can reach that address can take part: use a private network.
    """
    from tailrace.harness.replay.load_worker import serve

    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--master {master!r}: write it as HOST:PORT, for example --master 10.0.0.5:5557")
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    serve(master, lambda text: stderr().print(text, soft_wrap=True))


@app.command()
def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="What `device: cuda` needs, in its place.")] = False,
) -> None:
    """Say what this machine lacks, and the command that mends it."""
    from tailrace.cli.doctor import examine
    from tailrace.cli.gpu_doctor import examine_gpus

    console = stdout()
    table = Table(show_header=True)
    for heading in ("", "what", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    findings = examine_gpus() if gpu else examine()
    for finding in findings:
        mark = Text("ok", style="green") if finding.ok else Text("missing" if finding.needed else "optional", "yellow")
        table.add_row(mark, finding.what, Text(finding.found), Text("" if finding.ok else finding.remedy))
    console.print(table)
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def clean() -> None:
    """End processes and containers and remove files that a crashed run left; runs in progress are not touched."""
    from tailrace.harness.servers.guardian import sweep

    told = sweep()
    for sentence in told:
        typer.echo(sentence)
    if not told:
        typer.echo("nothing to clean")


@traces_app.command("list")
def traces_list() -> None:
    """List all traces by name."""
    from tailrace.traces import catalogue

    table = Table()
    for heading in ("name", "title", "kind"):
        table.add_column(heading)
    for name in catalogue.names():
        entry = catalogue.entry(name)
        table.add_row(name, Text(entry.title), entry.kind)
    stdout().print(table)


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
    console = stdout()
    console.print(Text(f"{entry.name}: {entry.title}", style="bold"))
    console.print(Text(entry.description.strip()))
    _describe(describe(trace).as_dict(), {**entry.params, "fault_at_s": trace.fault_at_s, "transient": trace.transient})


def _describe(figures: dict[str, Any], parameters: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for key, value in {**parameters, **figures}.items():
        shown = "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), Text(shown))
    stdout().print(table)


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
    _describe(description.as_dict(), {"name": trace.name, "transient": trace.transient})
    typer.echo(f"added: use it with --trace {trace.name}")


def main() -> None:
    """Entry point: errors as one clear message and the documented exit code."""
    try:
        app()
    except TailraceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
