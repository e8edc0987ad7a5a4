"""What is typed: ``tailrace simulate``, ``plan``, ``calibrate`` and ``validate-sim``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tailrace.cli.terminal import TableOrJson, stderr, stdout
from tailrace.harness.errors import InputError
from tailrace.harness.quantities import assignments, seconds

if TYPE_CHECKING:
    from tailrace.harness.records.store import TrialFolder
    from tailrace.simulator.calibration import Calibrated
    from tailrace.simulator.capacity import Ramp
    from tailrace.simulator.system import Autoscaler, Batching, Service

plan_app = typer.Typer(help="Capacity: what a load needs, in closed form, checked by simulation.", no_args_is_help=True)
MOST_REPLICAS = 1_000
CHECKED_SEEDS = 20
ENOUGH_SEEDS = 19
"""Of those; one may miss by chance."""

Form = Annotated[TableOrJson, typer.Option("--format", help="table or json.")]


def simulate(
    system: Annotated[
        str | None,
        typer.Argument(help="A YAML file of a system; `reference`: the reference case; left out: the default system."),
    ] = None,
    trace: Annotated[str, typer.Option(help="A trace's name.")] = "surge",
    seed: Annotated[int, typer.Option(help="Of the trace, if it is generated, and of what the system draws.")] = 7,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the system, in YAML.")
    ] = None,
    slo: Annotated[str, typer.Option(metavar="DURATION", help="The objective of one request.")] = "120ms",
    form: Form = TableOrJson.TABLE,
) -> None:
    """Simulate a serving system under a trace: router, batcher, replicas, queue limit, autoscaler, failures.

    Keys of a system: service, batching, replicas, router, queue_limit, devices, autoscaler, failures, overhead_ms,
    timeout_s (docs/simulator.md). A simulation is a prediction, and never a measurement.
    """
    if system == "reference":
        if settings:
            raise InputError("the reference case is what it is", remedy="leave --set out, or SYSTEM")
        _reference(form)
        return
    import numpy as np

    from tailrace.harness.analysis.summary import jsonable
    from tailrace.simulator.engine import simulate as run
    from tailrace.simulator.system import load_system
    from tailrace.traces import catalogue

    chosen = load_system(system, settings or ())
    traffic = catalogue.load(trace, seed=seed)
    slo_ms = seconds(slo, "--slo") * 1e3
    models = traffic.model_index
    count = 1 if models is None or not len(models) else int(models.max()) + 1
    if beyond := [failure.model for failure in chosen.failures if failure.model >= count]:
        raise InputError(f"`failures`: model {beyond[0]} does not exist: {trace} has {count}, which count from 0")
    simulated = run(
        chosen,
        traffic.arrivals_ns,
        span_ns=traffic.span_ns,
        models=None if models is None else models.astype(np.uint16),
        model_count=count,
        seed=seed,
    )
    figures = simulated.figures(slo_ms)
    if form is TableOrJson.JSON:
        told = {"simulated": True, "trace": trace, "seed": seed, "slo_ms": slo_ms}
        typer.echo(
            json.dumps({**told, "system": chosen.model_dump(mode="json"), "figures": jsonable(figures)}, indent=1)
        )
        return
    _show(f"simulated, not measured: {trace}, seed {seed}, SLO {slo_ms:g} ms", figures)


def _reference(form: TableOrJson) -> None:
    from tailrace.simulator import reference

    published, actual, _ = reference.run()
    if form is TableOrJson.JSON:
        typer.echo(json.dumps({"published": asdict(published), "actual": asdict(actual)}, indent=1))
        return
    _show("the reference case as it was published", asdict(published))
    _show("what came to pass in it", asdict(actual))


def _show(title: str, figures: Mapping[str, Any]) -> None:
    table = Table(show_header=False)
    for key, value in figures.items():
        table.add_row(key.replace("_", " "), Text(_shown(value)))
    stdout().print(Text(title), soft_wrap=True)
    stdout().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@plan_app.command(name="warm-pool")
def warm_pool(
    from_rps: Annotated[float, typer.Option("--from", min=0.001, help="Arrivals/s before the ramp.")],
    to_rps: Annotated[float, typer.Option("--to", min=0.001, help="Arrivals/s at its peak.")],
    ramp: Annotated[str, typer.Option(metavar="DURATION", help="From one to the other; it falls as fast.")],
    service: Annotated[
        str, typer.Option(metavar="base=…,per_item=…", help="What a batch takes, and each item in it.")
    ] = "base=12ms,per_item=3ms",
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="The largest batch.")] = 16,
    window: Annotated[str, typer.Option(metavar="DURATION", help="How long a batch waits to fill.")] = "10ms",
    cold_start: Annotated[str, typer.Option(metavar="DURATION", help="Until a new replica is ready.")] = "0.8s",
    up_above: Annotated[float, typer.Option(min=0.001, help="The scaler adds one when more wait for each.")] = 10.0,
    down_below: Annotated[float, typer.Option(min=0, help="It retires one when fewer do.")] = 3.0,
    period: Annotated[str, typer.Option(metavar="DURATION", help="How often the scaler looks.")] = "100ms",
    slo: Annotated[str, typer.Option(metavar="DURATION", help="The objective of one request.")] = "200ms",
    form: Form = TableOrJson.TABLE,
) -> None:
    """How many replicas to keep warm for a ramp of load: in closed form (docs/capacity.md), and checked by simulation.

    shortfall: arrivals/s at the peak beyond what the replicas that are ready then serve. worst: at the worst instant, by
    the closed form. p99: simulated, its median and range over 20 seeds, of which 19 must meet the SLO.
    """
    from tailrace.simulator.capacity import Ramp, replica_rps, shortfalls
    from tailrace.simulator.system import Autoscaler, validated

    if to_rps <= from_rps:
        raise InputError(f"--to {to_rps:g} is not above --from {from_rps:g}: there is no ramp to be ready for")
    given = assignments(service, "--service", ("base", "per_item"))
    ramp_s = seconds(ramp, "--ramp")
    if ramp_s <= 0:
        raise InputError("--ramp 0s is no ramp", remedy="give the time from one rate to the other: --ramp 9s")
    system = validated(
        {
            "service": {
                "base_ms": seconds(given.get("base", "0ms"), "--service base") * 1e3,
                "per_item_ms": seconds(given.get("per_item", "0ms"), "--service per_item") * 1e3,
            },
            "batching": {"max_batch": max_batch, "window_ms": seconds(window, "--window") * 1e3},
            "autoscaler": {
                "period_s": seconds(period, "--period"),
                "up_above": up_above,
                "down_below": down_below,
                "max": MOST_REPLICAS,
                "cold_start_s": seconds(cold_start, "--cold-start"),
            },
        },
        "plan",
    )
    times, batching, scaler = system.service, system.batching, system.autoscaler or Autoscaler()
    if to_rps > MOST_REPLICAS * replica_rps(times, batching):
        raise InputError(
            f"--to {to_rps:g} needs more than {MOST_REPLICAS:,} replicas of {replica_rps(times, batching):.4g}/s each"
        )
    load = Ramp(from_rps, to_rps, ramp_s)
    slo_ms = seconds(slo, "--slo") * 1e3
    rows = []
    by_closed_form = by_simulation = None
    for row in shortfalls(load, times, batching, scaler):
        p99_ms = _simulated_p99_ms(load, times, batching, scaler, row.ready_at_start, row.warm_pool)
        met = sum(value <= slo_ms for value in p99_ms)
        rows.append((row, p99_ms, met))
        if by_closed_form is None and row.worst_ms <= slo_ms:
            by_closed_form = row.warm_pool
        if by_closed_form is not None and met >= ENOUGH_SEEDS:
            by_simulation = row.warm_pool
            break
    if form is TableOrJson.JSON:
        told = [
            {**asdict(row), "simulated_p99_ms": sorted(p99_ms), "simulated_slo_met": met} for row, p99_ms, met in rows
        ]
        answer = {
            "recommended": by_simulation,
            "by_closed_form": by_closed_form,
            "slo_ms": slo_ms,
            "replica_rps": replica_rps(times, batching),
        }
        typer.echo(json.dumps({**answer, "rows": told}, indent=1))
        return
    table = Table()
    headings = (
        "warm pool",
        "ready at start",
        "ready at peak",
        "shortfall/s",
        "backlog",
        "worst ms",
        "p99 ms",
        "SLO met",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row, p99_ms, met in rows:
        table.add_row(
            str(row.warm_pool),
            str(row.ready_at_start),
            str(row.ready_at_peak),
            f"{row.shortfall_rps:.0f}",
            f"{row.backlog:.0f}",
            f"{row.worst_ms:.0f}",
            f"{median(p99_ms):.0f} [{min(p99_ms):.0f}, {max(p99_ms):.0f}]",
            f"{met} of {CHECKED_SEEDS}",
        )
    console = stdout()
    console.print(table)
    console.print(
        Text(
            f"A replica serves {replica_rps(times, batching):.0f}/s. "
            + _advice(slo_ms, by_closed_form, by_simulation)
            + " A replica lost in mid-ramp counts as one fewer kept warm."
        ),
        soft_wrap=True,
    )
    console.print(f"p99 and SLO met: simulated, not measured, over {CHECKED_SEEDS} seeds", style="dim", soft_wrap=True)


def _advice(slo_ms: float, by_closed_form: int | None, by_simulation: int | None) -> str:
    if by_simulation is None:
        return f"No warm pool keeps {slo_ms:g} ms here: a batch takes too long, or its window."
    if by_simulation == by_closed_form:
        return f"Keep {by_simulation} warm: by the closed form, and by the simulation that checks it."
    return f"Keep {by_simulation} warm: {by_closed_form} by the closed form, which knows no chance, and the simulation misses."


def _simulated_p99_ms(
    load: Ramp, service: Service, batching: Batching, scaler: Autoscaler, ready: int, kept_warm: int
) -> list[float]:
    """The p99 (ms) of such a ramp by seed."""
    from tailrace.harness.analysis.metrics import percentile
    from tailrace.simulator.engine import simulate as run
    from tailrace.simulator.system import System
    from tailrace.traces.generators import SurgeParameters, surge

    system = System(
        service=service,
        batching=batching,
        replicas=ready,
        autoscaler=scaler.model_copy(update={"min": ready - kept_warm, "warm_pool": kept_warm}),
    )
    parameters = SurgeParameters(
        duration_s=2 * load.ramp_s,
        base_rate=load.from_rps,
        surge_rate=load.to_rps - load.from_rps,
        peak_at_s=load.ramp_s,
        half_width_s=load.ramp_s,
        fault_at_s=None,
    )
    found = []
    for seed in range(CHECKED_SEEDS):
        trace = surge(parameters, seed=seed)
        found.append(percentile(run(system, trace.arrivals_ns, span_ns=trace.span_ns).response_ms(), 0.99))
    return found


def calibrate(
    run: Annotated[
        Path, typer.Argument(help="A run folder with a trial without faults, whose tuning says `replicas`.")
    ],
    trial: Annotated[str | None, typer.Option(help="The trial's name; default: the first that can be used.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the system here, as YAML for `tailrace simulate`.")] = None,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Fit the simulator to a measured trial: service time, overhead, and how requests find replicas.

    error: root mean square of log(simulated ÷ measured) over seven percentiles, on the trial that was fitted. How well it
    predicts others is another question: tailrace validate-sim.
    """
    from tailrace.harness.analysis.summary import jsonable
    from tailrace.harness.records.store import RunFolder
    from tailrace.simulator.system import write_system

    opened = RunFolder.open(run)
    known = {folder.id: folder for folder in opened.trials}
    if trial is not None and trial not in known:
        raise InputError(f"{run} has no trial {trial!r}", remedy=f"one of {', '.join(known)}")
    if not known:
        raise InputError(f"{run} has no trials", remedy="give a run that measured something")
    folder, fitted = _first_that_fits([known[trial]] if trial is not None else list(known.values()))
    if out is not None:
        write_system(fitted.system, out)
    if form is TableOrJson.JSON:
        told = {
            "trial": folder.id,
            "error": fitted.error,
            "service_from": fitted.service_from,
            "cold_start": jsonable(asdict(fitted.cold_start_s)),
        }
        others = [{"mechanism": name, "error": error} for name, error in fitted.others]
        typer.echo(json.dumps({**told, "system": fitted.system.model_dump(mode="json"), "others": others}, indent=1))
        return
    system = fitted.system
    _show(
        f"fitted to {folder.id}",
        {
            "base ms": system.service.base_ms,
            "per item ms": system.service.per_item_ms,
            "service times from": fitted.service_from,
            "overhead ms": system.overhead_ms,
            "cycle ms": system.cycle_ms,
            "router": system.router,
            "window opens": system.batching.window_opens,
            "cold start s": fitted.cold_start_s.server_s,
            "of that, its first replica's s": fitted.cold_start_s.model_s,
            "error": fitted.error,
        },
    )
    if out is not None:
        stdout().print(Text(f"tailrace simulate {out}"), soft_wrap=True)


def _first_that_fits(folders: list[TrialFolder]) -> tuple[TrialFolder, Calibrated]:
    """The first trial that a system can be fitted to. Raises the first one's :class:`InputError` if there is none."""
    from tailrace.simulator.calibration import calibrate as fit
    from tailrace.simulator.calibration import read_trial

    refused = []
    for folder in folders:
        try:
            return folder, fit(read_trial(folder))
        except InputError as error:
            refused.append(error)
    raise refused[0]


def validate_sim(
    run: Annotated[
        Path | None, typer.Argument(help="A run with two or more trials of a cell; left out: a new one is made.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="New run: of this adapter; may be given again.")] = None,
    trials: Annotated[int | None, typer.Option(min=2, help="New run: trials of each.")] = None,
    out: Annotated[Path | None, typer.Option(help="New run: its folder.")] = None,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Predicted against measured: the simulator is fitted on the first trial of each cell and tried on the others.

    Without RUN, the surge is run on real servers first (experiment `simulator`).
    """
    from tailrace.harness.analysis.summary import jsonable
    from tailrace.harness.records.store import RunFolder
    from tailrace.simulator.calibration import calibrate as fit
    from tailrace.simulator.calibration import predict, read_trial

    if run is not None and (adapter or trials or out):
        raise InputError("--adapter, --trials and --out are for a new run", remedy="leave them out, or RUN")
    opened = RunFolder.open(run if run is not None else _surge(adapter, trials, out))
    cells: dict[str, list[TrialFolder]] = {}
    for folder in opened.trials:
        cells.setdefault(folder.facts["cell"], []).append(folder)
    rows: list[dict[str, Any]] = []
    for cell, folders in cells.items():
        if len(folders) < 2:
            raise InputError(
                f"{opened.folder}: {cell} has one trial; what was fitted to it must be tried on another",
                remedy="run it with --trials 2 or more",
            )
        first, *others = (read_trial(folder) for folder in folders)
        fitted = fit(first)
        rows += [
            {"cell": cell, "router": fitted.system.router, "fit_error": fitted.error, **row}
            for row in predict(fitted.system, others)
        ]
    if form is TableOrJson.JSON:
        typer.echo(json.dumps(jsonable({"run": str(opened.folder), "rows": rows}), indent=1))
        return
    table = Table()
    for heading in ("trial", "fitted as", "figure", "predicted", "measured", "error"):
        table.add_column(heading, justify="right" if heading in ("predicted", "measured", "error") else "left")
    for row in rows:
        error = "–" if row["error"] is None else f"{row['error']:+.1%}"
        shown = (row["trial"], row["router"], row["figure"].replace("_", " "))
        measured = "–" if row["measured"] is None else _shown(row["measured"])
        table.add_row(*(Text(word) for word in (*shown, _shown(row["predicted"]), measured, error)))
    stdout().print(table)
    stdout().print(Text(f"run: {opened.folder}", style="dim"), soft_wrap=True)


def _surge(adapters: list[str] | None, trials: int | None, out: Path | None) -> Path:
    """Run the experiment that the simulator is tried on; returns its folder."""
    from tailrace.cli.console import ConsoleObserver
    from tailrace.harness.plan.loading import load_experiment
    from tailrace.harness.records.store import default_folder
    from tailrace.harness.run.runner import run_experiment

    replaced = {"adapters": adapters or None, "trials": trials}
    experiment = load_experiment("simulator", overrides={k: v for k, v in replaced.items() if v is not None})
    folder = out or default_folder(experiment.name)
    with ConsoleObserver(stderr()) as observer:
        run_experiment(experiment, folder, observer)
    return folder
