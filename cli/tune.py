"""What is typed: ``tailrace tune``, ``pareto`` and ``saturate``."""

from __future__ import annotations

import functools
import json
import math
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tailrace.cli.simulate import CHECKED_SEEDS, ENOUGH_SEEDS
from tailrace.cli.terminal import TableOrJson, stderr, stdout
from tailrace.harness.errors import EXIT_INTERRUPTED, EXIT_INVALID, InputError

if TYPE_CHECKING:
    from tailrace.harness.plan.experiment import Experiment
    from tailrace.tuner.grid import Case
    from tailrace.tuner.objective import Objective
    from tailrace.tuner.saturation import Saturation
    from tailrace.tuner.search import Found

SHOWN_STEPS = 12
DEFAULT_P99_MS = 120.0
CONNECTIONS = 32_768
"""At the least, of a search that doubles the load: a slow server's backlog is not to be booked as our drop."""
CASE_COLUMNS = (
    *("max batch", "window ms", "up above", "warm pool", "replicas"),
    *("p99 ms", "throughput/s", "used", "mean replicas", "other seeds"),
)


def tune(
    adapter: Annotated[list[str] | None, typer.Option(help="Tune this framework; may be given again.")] = None,
    workload: Annotated[str, typer.Option(help="A workload's name, or the path of its folder.")] = "emulated",
    trace: Annotated[str, typer.Option(help="A trace's name.")] = "surge",
    devices: Annotated[int, typer.Option(min=1, help="Devices; up to one replica on each.")] = 3,
    slo: Annotated[
        list[str] | None, typer.Option(metavar="p99=…|attainment=…", help="The objective; p99=120ms if left out.")
    ] = None,
    budget: Annotated[int, typer.Option(min=3, max=10_000, help="Settings to run, besides the defaults.")] = 30,
    trials: Annotated[int, typer.Option(min=1, max=100, help="Trials of best and defaults in the end.")] = 3,
    simulate_first: Annotated[
        bool, typer.Option("--simulate-first", help="Run only what the calibrated simulator ranks highest.")
    ] = False,
    simulator: Annotated[
        bool, typer.Option("--simulator", help="Start no server: search the simulator's own knobs on the trace.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of trace and search.")] = 7,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="--simulator: draw the frontier here.")] = None,
    out: Annotated[Path | None, typer.Option(help="The search's folder; one that was cut off goes on.")] = None,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
) -> None:
    """Find the settings that serve a trace best within an objective, starting from the framework's defaults.

    In the end the best settings are measured afresh against the defaults, in interleaved trials, and their native
    configuration files lie ready to copy. With --simulator nothing is measured: max batch, window, scale-up threshold, warm
    pool and initial replicas of a simulated system are searched.
    """
    from tailrace.tuner.objective import parse_objective

    objective = parse_objective(slo or ["p99=120ms"])
    if simulator:
        if adapter or simulate_first or out:
            raise InputError(
                "--simulator starts no server: it takes no --adapter, --simulate-first or --out",
                remedy="leave them out, or --simulator",
            )
        _tight_case(objective, trace, seed, plot, form)
        return
    if plot is not None:
        raise InputError("--plot goes with --simulator", remedy="the report of a real search has the frontier in it")
    if not adapter:
        raise InputError("there is no --adapter to tune", remedy="for example --adapter triton, or --simulator")
    _on_servers(
        adapter,
        {"workload": workload, "trace": trace, "devices": devices, "seed": seed},
        objective,
        budget=budget,
        trials=trials,
        simulate_first=simulate_first,
        out=out,
        form=form,
    )


def pareto(
    adapter: Annotated[
        list[str] | None, typer.Option(help="A framework; may be given again. Left out: triton and ray_serve.")
    ] = None,
    workload: Annotated[str, typer.Option(help="A workload's name, or the path of its folder.")] = "emulated",
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
    from tailrace.cli.console import ConsoleObserver, print_summary
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.records.store import default_folder
    from tailrace.reports.report import write
    from tailrace.tuner.objective import parse_objective
    from tailrace.tuner.pareto import measure

    names = list(dict.fromkeys(adapter or ["triton", "ray_serve"]))
    objective = parse_objective([f"p99={slo}"])
    folder = out or default_folder("pareto")
    base = {"workload": workload, "devices": devices, "seed": seed, "trace": SHORT_SURGE, "warmup": CALM}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ConsoleObserver(stderr()) as observer:
        try:
            outcome = measure(names, base, objective, trials, folder, observer)
        except KeyboardInterrupt:
            observer.note(f"interrupted; go on with the same command and --out {folder}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    console = stdout()
    print_summary(summarise(outcome.run), console)
    table = Table()
    for heading in ("adapter", "cell", "p99 predicted", "p99 ms", "goodput predicted", "goodput/s/device"):
        table.add_column(heading, justify="left" if heading in ("adapter", "cell") else "right")
    for cell in outcome.cells:
        told = cell.predicted
        table.add_row(
            cell.adapter,
            cell.scenario,
            "–" if told is None else _number(told["p99_ms"]),
            _number(cell.cell["p99_ms"]),
            "–" if told is None else _number(told["goodput_rps"] / devices),
            _number(cell.cell["goodput_rps_per_device"]),
        )
    console.print(table)
    for name in names:
        best = outcome.best(name, objective)
        console.print(
            Text(
                f"{name}: of no cell does the whole interval keep {objective.words}."
                if best is None
                else f"{name}: most goodput with the whole interval within {objective.words}: {best.scenario}, "
                f"{_number(best.cell['goodput_rps_per_device'])}/s per device."
            ),
            soft_wrap=True,
        )
    typer.echo(write([outcome.run], outcome.run.folder / "report.html").resolve())
    if any(cell.cell["verdict"] == "INVALID" for cell in outcome.cells):
        raise typer.Exit(EXIT_INVALID)


CALM = {"rate": 40}
"""The warm-up's rate is the surge's own first one: a scaler that had been woken by more would begin with replicas that it is
about to retire."""
SHORT_SURGE = {"name": "surge", "params": {"duration_s": 20, "peak_at_s": 10, "half_width_s": 6, "fault_at_s": None}}


# ---------------------------------------------------------------- on real servers


def _on_servers(
    adapters: list[str],
    base: dict[str, Any],
    objective: Objective,
    *,
    budget: int,
    trials: int,
    simulate_first: bool,
    out: Path | None,
    form: TableOrJson,
) -> None:
    from tailrace.cli.console import ConsoleObserver
    from tailrace.harness.records.store import default_folder
    from tailrace.harness.run.registry import get_adapter
    from tailrace.reports.report import write
    from tailrace.tuner.grid import knobs
    from tailrace.tuner.search import Search, told

    chosen = {name: get_adapter(name) for name in adapters}
    folder = out or default_folder("tune")
    answers = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ConsoleObserver(stderr()) as observer:
        for name, adapter in chosen.items():
            space = knobs(adapter, adapter.Options(), adapter.protocols[0], base["devices"])
            (folder / name).mkdir(parents=True, exist_ok=True)
            search = Search(
                base={**base, "adapters": [name], "slo": {"latency_ms": objective.p99_ms}},
                space=space,
                objective=objective,
                folder=folder / name,
                observer=observer,
                seed=base["seed"],
            )
            try:
                answers[name] = search.run(budget, simulate_first=simulate_first, trials=trials)
            except KeyboardInterrupt:
                observer.note(
                    f"interrupted; what was measured is in {folder}; go on with the same command and --out {folder}"
                )
                raise typer.Exit(EXIT_INTERRUPTED) from None
    if form is TableOrJson.JSON:
        typer.echo(json.dumps({name: told(found, objective) for name, found in answers.items()}, indent=1))
    for name, found in answers.items():
        if form is TableOrJson.JSON:
            break
        _print_search(name, found, objective)
        if found.confirmation is not None:
            path = write([found.confirmation], found.confirmation.folder / "report.html")
            stdout().print(Text(f"report: {path.resolve()}"), soft_wrap=True)
            stdout().print(Text(f"configuration to copy: {folder / name / 'best-configuration'}"), soft_wrap=True)
    if any(cell["verdict"] == "INVALID" for found in answers.values() for cell in found.confirmed.values()):
        raise typer.Exit(EXIT_INVALID)


def _print_search(name: str, found: Found, objective: Objective) -> None:
    console = stdout()
    console.print(Text(f"{name}: {objective.words}", style="bold"))
    table = Table()
    for heading in ("settings", "p99 ms", "predicted", "goodput/s/device", "within SLO", "batch", "verdict"):
        table.add_column(heading, justify="left" if heading == "settings" else "right")
    ranked = sorted(found.steps, key=lambda step: objective.score(step.figures), reverse=True)
    shown = [step for position, step in enumerate(ranked) if position < SHOWN_STEPS or step.settings is None]
    for step in shown:
        figures = step.figures
        table.add_row(
            Text(step.name + (" (control)" if step.control else "")),
            _number(figures["p99_ms"]),
            _number(step.predicted_p99_ms),
            _number(figures["goodput_rps_per_device"]),
            f"{figures['slo_attainment']:.1%}",
            _number(figures["batch_size_mean"]),
            figures["verdict"],
        )
    console.print(table)
    for sentence in sentences(found, objective):
        console.print(Text(sentence), soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else "∞" if math.isinf(value) else f"{value:.1f}"


def _confirmed(found: Found, objective: Objective) -> list[str]:
    """What the best did when it was measured afresh: the best of many was partly lucky."""
    cell = found.confirmed.get("best")
    if cell is None:
        return ["It was not measured afresh."]
    if any(told["verdict"] == "INVALID" for told in found.confirmed.values()):
        return ["Measured afresh, a trial was INVALID: nothing is claimed of it."]
    ends = cell["p99_ci_ms"]
    interval = "" if ends is None else f" [{_number(ends[0])}, {_number(ends[1])}]"
    verdict = (
        "did not keep it"
        if not objective.met(cell)
        else "kept it, with the whole interval"
        if ends is not None and ends[1] <= objective.p99_ms
        else "kept it, but its interval reaches beyond"
    )
    return [
        f"Measured afresh in {cell['trials']} trials, its p99 was {_number(cell['p99_ms'])} ms{interval}: it {verdict}."
    ]


def sentences(found: Found, objective: Objective) -> list[str]:
    """What a search found, in words that claim no more than its intervals allow."""
    if found.best is None:
        lines = [f"No setting that was tried keeps {objective.words}."]
    else:
        lines = [f"Best within {objective.words} in the search: {found.best.name}.", *_confirmed(found, objective)]
        for figure, word in (("p99_ms", "p99"), ("goodput_rps_per_device", "goodput per device")):
            if figure not in found.ratios:
                continue
            ratio = found.ratios[figure]
            if ratio is None:
                lines.append(f"Defaults against best, {word}: not compared (not claimed, or ∞, in some trial).")
                continue
            ends = "" if ratio.ends is None else f" [{ratio.ends[0]:.2f}, {ratio.ends[1]:.2f}]"
            sure = "" if ratio.settled else "; no difference shown"
            lines.append(f"The defaults' {word} was {ratio.value:.2f}×{ends} that of the best{sure}.")
    if found.skipped:
        controls = [step for step in (*found.steps, *found.pruned) if step.control]
        reached = max(objective.score(step.figures) for step in found.steps if not step.control)
        missed = [step.name for step in controls if not step.pruned and objective.score(step.figures) > reached]
        lines.append(
            f"The simulator saved {found.skipped} runs; of {len(controls)} that it would have skipped and that were run "
            + (f"it would have missed {', '.join(missed)}." if missed else "none was better.")
        )
    lines += [f"Ended early, {step.name}: {step.pruned}." for step in found.pruned]
    return lines + [f"Not measured: {reason}" for reason in found.failed]


# ---------------------------------------------------------------- in the simulator


def _tight_case(objective: Objective, trace: str, seed: int, plot: Path | None, form: TableOrJson) -> None:
    import numpy as np

    from tailrace.reports.case import plot as draw
    from tailrace.simulator.reference import AUTOSCALER, SYSTEM
    from tailrace.traces import catalogue
    from tailrace.tuner.grid import held_seeds, scaled_cases

    traffic = catalogue.load(trace, seed=seed)
    failures = tuple(failure for failure in SYSTEM.failures if failure.at_s < traffic.span_s)
    base = SYSTEM.model_copy(update={"failures": failures})
    cases = scaled_cases(base, AUTOSCALER, traffic.arrivals_ns, traffic.span_ns, objective.p99_ms)
    within = [case for case in cases if objective.met(case.figures)]
    # The cheapest first; of equally cheap ones that with the better tail.
    within.sort(key=lambda case: (round(case.mean_replicas, 2), case.figures["p99_ms"]))
    drawn = catalogue.entry(trace).kind == "generator"  # a trace that is a file has no other seeds to be tried under
    seeds = range(seed + 1, seed + 1 + CHECKED_SEEDS)
    held: dict[int, int] = {}
    chosen = None if drawn or not within else 0
    for position, case in enumerate(within if drawn else []):
        held[position] = held_seeds(case.system, trace, seeds, objective)
        if held[position] >= ENOUGH_SEEDS:
            chosen = position
            break
    cheapest = min(cases, key=lambda case: (case.mean_replicas, case.figures["p99_ms"]))
    if plot is not None:
        draw(
            np.array([case.mean_replicas for case in cases]),
            np.array([case.figures["p99_ms"] for case in cases]),
            chosen=None if chosen is None else cases.index(within[chosen]),
            slo_ms=objective.p99_ms,
            title=f"{trace}, seed {seed}",
            path=plot,
        )
    if form is TableOrJson.JSON:
        answer = {
            "simulated": True,
            "tried": len(cases),
            "within_objective": [_case(case) for case in within],
            "chosen": None if chosen is None else {**_case(within[chosen]), "held_seeds": held.get(chosen)},
            "cheapest_of_all": _case(cheapest),
        }
        typer.echo(json.dumps(answer, indent=1))
        return
    console = stdout()
    lost = "".join(f", a replica lost at second {failure.at_s:g}" for failure in failures)
    console.print(
        f"simulated, not measured: {trace}, seed {seed}{lost}; "
        f"{len(within)} of {len(cases)} settings keep {objective.words}",
        soft_wrap=True,
    )
    table = Table()
    for heading in CASE_COLUMNS:
        table.add_column(heading, justify="right")
    first = max(0, (chosen or 0) + 1 - SHOWN_STEPS)
    for position, case in list(enumerate(within))[first : first + SHOWN_STEPS]:
        table.add_row(*_row(case, traffic.span_s), f"{held[position]} of {CHECKED_SEEDS}" if position in held else "")
    table.add_row(*_row(cheapest, traffic.span_s), "")
    console.print(table)
    console.print(Text(_cost_of_the_tail(within, chosen, cheapest, objective, drawn)), soft_wrap=True)


def _row(case: Case, span_s: float) -> list[str]:
    figures = case.figures
    return [
        *(f"{value:g}" for value in case.settings.values()),
        _number(figures["p99_ms"]),
        f"{figures['answered'] / span_s:.1f}",
        f"{figures['utilisation']:.1%}",
        f"{case.mean_replicas:.2f}",
    ]


def _cost_of_the_tail(within: list[Case], chosen: int | None, cheapest: Case, objective: Objective, drawn: bool) -> str:
    if not within:
        return f"No setting keeps {objective.words}; the row is the cheapest of all."
    if chosen is None:
        return (
            f"No setting keeps {objective.words} under {ENOUGH_SEEDS} of {CHECKED_SEEDS} other seeds: those above kept it "
            "by luck."
        )
    best = within[chosen]
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in best.settings.items())
    why = (
        f"under {ENOUGH_SEEDS} of {CHECKED_SEEDS} other seeds too"
        if drawn
        else "on these very arrivals, and there are no others to try it on"
    )
    return (
        f"Chosen: {settings}; it is the cheapest that keeps {objective.words} {why}. The tail costs "
        f"{best.mean_replicas / cheapest.mean_replicas - 1:.0%} more replicas than the cheapest setting of all (last row), "
        f"whose p99 is {_number(cheapest.figures['p99_ms'])} ms."
    )


def _case(case: Case) -> dict[str, Any]:
    from tailrace.harness.analysis.summary import jsonable

    return {"settings": case.settings, "mean_replicas": case.mean_replicas, "figures": jsonable(case.figures)}


# ---------------------------------------------------------------- saturation


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
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the experiment, in YAML.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of all runs; one that was cut off goes on.")] = None,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
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
    find_saturation(chosen.model_copy(update={"load": load}), out or default_folder("saturate"), form)


def find_saturation(
    experiment: Experiment, folder: Path, form: TableOrJson = TableOrJson.TABLE, *, strict: bool = False
) -> None:
    """Search the highest rate of every cell of an experiment that has a ``load``, and tell. Exits with 1 where a search was
    stopped (what is INVALID says nothing of the server), and if ``strict`` with 3 where a load was measured UNKNOWN."""
    from tailrace.cli.console import ConsoleObserver
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.plan.cells import Cell, cells
    from tailrace.harness.records.store import RunFolder
    from tailrace.harness.run.runner import run_or_go_on
    from tailrace.reports.report import write
    from tailrace.tuner.objective import Objective
    from tailrace.tuner.saturation import find

    load = experiment.load
    if load is None:
        raise ValueError("the experiment has no load to search")
    objective = Objective(load.slo.p99_ms, load.slo.attainment)
    base = experiment.model_dump(mode="json")
    client = {**base["client"], "max_connections": max(CONNECTIONS, base["client"]["max_connections"])}
    common = {**base, "name": "saturate", "load": None, "slo": {"latency_ms": objective.p99_ms}, "client": client}
    found = {}
    runs: list[RunFolder] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ConsoleObserver(stderr()) as observer:

        def cell_at(cell: Cell, rate: float) -> dict[str, Any]:
            scenario = {**cell.scenario.model_dump(mode="json"), "mean_rate": rate, "adapters": None}
            options = {name: value for name, value in base["options"].items() if name == cell.adapter}
            content = {**common, "adapters": [cell.adapter], "options": options, "scenarios": [scenario]}
            run = run_or_go_on(folder / cell.id / f"rate-{rate:.6g}", content, observer)
            runs.append(run)
            (measured,) = summarise(run)["cells"]
            return dict(measured)

        for cell in cells(experiment):
            try:
                found[cell.id] = find(functools.partial(cell_at, cell), load.start, objective)
            except KeyboardInterrupt:
                observer.note(f"interrupted; go on with the same command and --out {folder}")
                raise typer.Exit(EXIT_INTERRUPTED) from None
    if form is TableOrJson.JSON:
        typer.echo(json.dumps({name: _saturation(point) for name, point in found.items()}, indent=1))
    else:
        _print_saturation(found, objective)
        if runs:
            typer.echo(write(runs, folder / "report.html").resolve())
    if any(point.ended == "stopped" for point in found.values()):
        raise typer.Exit(1)
    if strict and any(load.figures["verdict"] == "UNKNOWN" for point in found.values() for load in point.loads):
        raise typer.Exit(EXIT_INVALID)


def _print_saturation(found: dict[str, Saturation], objective: Objective) -> None:
    console = stdout()
    table = Table()
    for heading in ("cell", "mean rate/s", "held", "p99 ms", "goodput/s/device", "within SLO", "verdict"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for name, point in found.items():
        for load in sorted(point.loads, key=lambda load: load.rate):
            cell = load.figures
            table.add_row(
                name,
                f"{load.rate:.4g}",
                "yes" if load.held else "no",
                _number(cell["p99_ms"]),
                _number(cell["goodput_rps_per_device"]),
                f"{cell['slo_attainment']:.1%}",
                cell["verdict"],
            )
    console.print(table)
    for name, point in found.items():
        console.print(Text(f"{name} saturates at {objective.words}: {point.words}."), soft_wrap=True)


def _saturation(point: Saturation) -> dict[str, Any]:
    from tailrace.harness.analysis.summary import jsonable

    keys = ("p99_ms", "p99_ci_ms", "goodput_rps_per_device", "slo_attainment", "verdict")
    return {
        "holds": point.holds,
        "fails": point.fails,
        "ended": point.ended,
        "stopped_by": point.stopped_by,
        "loads": [
            {"rate": load.rate, "held": load.held, **jsonable({key: load.figures[key] for key in keys})}
            for load in point.loads
        ],
    }


# ---------------------------------------------------------------- recommend


def recommend(
    run: Annotated[
        Path, typer.Argument(help="A run of the frameworks that are to choose from, on your model and traffic.")
    ],
    need: Annotated[
        list[str] | None,
        typer.Option(help="hosted, scale-to-zero, canary, python-pipeline or one-model; may be given again."),
    ] = None,
    form: Annotated[TableOrJson, typer.Option("--format", help="table or json.")] = TableOrJson.TABLE,
) -> None:
    """Say which framework to take, why, and what the second choice would cost.

    First what decides before any figure does (--need), then the figures of the run: within its objective, then goodput per
    device where its interval settles it, then p99.
    """
    from tailrace.harness.analysis.summary import summarise
    from tailrace.harness.records.store import RunFolder
    from tailrace.harness.run.registry import all_adapters
    from tailrace.tuner.recommend import recommend as decide

    answer = decide(summarise(RunFolder.open(run)), all_adapters(), need or [])
    if form is TableOrJson.JSON:
        typer.echo(json.dumps(asdict(answer), indent=1))
        return
    console = stdout()
    console.print(Text(answer.framework or "nothing that was measured", style="bold"))
    for reason in answer.reasons:
        console.print(Text(f"- {reason}"), soft_wrap=True)
