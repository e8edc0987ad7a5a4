"""What is typed: ``tailrace simulate``, ``fit`` and ``validate-sim``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.run import measured
from tailrace.cli.show import Form, TableOrJson, facts, note, sheet, show
from tailrace.harness.errors import InputError
from tailrace.harness.quantities import figure, seconds


def simulate(
    system: Annotated[
        str | None,
        typer.Argument(help="A YAML file of a system; `published`: the published case; left out: the default system."),
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
        note("the reference case has a name of its own by now: `tailrace simulate published`")
    if system in ("published", "reference"):
        if settings:
            raise InputError("the published case is what it is", remedy="leave --set out, or SYSTEM")
        _published(form)
        return
    import numpy as np

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
    told = {"simulated": True, "trace": trace, "seed": seed, "slo_ms": slo_ms}
    content = {**told, "system": chosen.model_dump(mode="json"), "figures": figures}
    show(form, content, [f"simulated, not measured: {trace}, seed {seed}, SLO {slo_ms:g} ms", facts(figures)])


def _published(form: TableOrJson) -> None:
    from tailrace.simulator import published_case

    published, actual = (asdict(told) for told in published_case.run()[:2])
    show(
        form,
        {"published": published, "actual": actual},
        ["the case as it was published", facts(published), "what came to pass in it", facts(actual)],
    )


def fit(
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
    from tailrace.harness.records.store import RunFolder
    from tailrace.simulator.fitting import fit_run
    from tailrace.simulator.system import write_system

    folder, fitted = fit_run(RunFolder.open(run), trial)
    system = fitted.system
    if out is not None:
        write_system(system, out)
    content = {
        "trial": folder.id,
        "error": fitted.error,
        "service_from": fitted.service_from,
        "cold_start": asdict(fitted.cold_start_s),
        "system": system.model_dump(mode="json"),
        "others": [{"mechanism": name, "error": error} for name, error in fitted.others],
    }
    figures = {
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
    }
    show(
        form,
        content,
        [f"fitted to {folder.id}", facts(figures), *([] if out is None else [f"tailrace simulate {out}"])],
    )


def calibrate(
    run: Annotated[Path, typer.Argument(help="As for `tailrace fit`.")],
    trial: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option()] = None,
    form: Form = TableOrJson.TABLE,
) -> None:
    """The former name of `tailrace fit`: what is calibrated is the load generator."""
    note("`tailrace calibrate` is called `tailrace fit` by now")
    fit(run, trial, out, form)


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
    from tailrace.harness.records.store import RunFolder
    from tailrace.simulator.fitting import validate

    if run is not None and (adapter or trials or out):
        raise InputError("--adapter, --trials and --out are for a new run", remedy="leave them out, or RUN")
    opened = RunFolder.open(run if run is not None else _surge(adapter, trials, out))
    rows = validate(opened)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "trial": lambda row: row["trial"],
        "fitted as": lambda row: row["router"],
        "figure": lambda row: row["figure"].replace("_", " "),
        "predicted": lambda row: figure(row["predicted"]),
        "measured": lambda row: figure(row["measured"]),
        "error": lambda row: figure(row["error"], "+.1%"),
    }
    told = Text(f"run: {opened.folder}", style="dim")
    show(form, {"run": str(opened.folder), "rows": rows}, [sheet(rows, columns, words=3), told])


def _surge(adapters: list[str] | None, trials: int | None, out: Path | None) -> Path:
    """Run the experiment that the simulator is tried on; returns its folder."""
    from tailrace.harness.plan.loading import load_experiment
    from tailrace.harness.records.store import default_folder
    from tailrace.harness.run.runner import run_experiment

    replaced = {"adapters": adapters or None, "trials": trials}
    experiment = load_experiment("simulator", overrides={k: v for k, v in replaced.items() if v is not None})
    folder = out or default_folder(experiment.name)
    measured(lambda observer: run_experiment(experiment, folder, observer), folder)
    return folder
