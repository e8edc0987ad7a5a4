"""What is typed: ``tailrace tune``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tailrace.cli.interrupt import keeping
from tailrace.cli.options import Workload
from tailrace.cli.show import Form, Part, TableOrJson, sheet, show, stderr
from tailrace.harness.errors import EXIT_INVALID, InputError
from tailrace.harness.quantities import figure, percent

if TYPE_CHECKING:
    from tailrace.tuner.objective import Objective
    from tailrace.tuner.search import Found, Step

SHOWN_STEPS = 12


def tune(
    adapter: Annotated[list[str] | None, typer.Option(help="Tune this framework; may be given again.")] = None,
    workload: Workload = "emulated",
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
    form: Form = TableOrJson.TABLE,
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
        from tailrace.cli.tight_case import show_tight_case

        show_tight_case(objective, trace, seed, plot, form)
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
    from tailrace.tuner.grid import knobs
    from tailrace.tuner.search import Search, told

    chosen = {name: get_adapter(name) for name in adapters}
    folder = out or default_folder("tune")
    answers = {}
    with (
        keeping(lambda: f"what was measured is in {folder}; go on with the same command and --out {folder}"),
        ConsoleObserver(stderr()) as observer,
    ):
        for name, adapter in chosen.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            search = Search(
                base={**base, "adapters": [name], "slo": {"latency_ms": objective.p99_ms}},
                space=knobs(adapter, adapter.Options(), adapter.protocols[0], base["devices"]),
                objective=objective,
                folder=folder / name,
                observer=observer,
                seed=base["seed"],
            )
            answers[name] = search.run(budget, simulate_first=simulate_first, trials=trials)
    content = {name: told(found, objective) for name, found in answers.items()}
    parts = (part for name, found in answers.items() for part in _parts(name, found, objective, folder / name))
    show(form, content, parts)
    if any(cell.verdict == "INVALID" for found in answers.values() for cell in found.confirmed.values()):
        raise typer.Exit(EXIT_INVALID)


def _parts(name: str, found: Found, objective: Objective, folder: Path) -> Iterator[Part]:
    from tailrace.reports.report import write

    yield Text(f"{name}: {objective.words}", style="bold")
    ranked = sorted(found.steps, key=lambda step: objective.score(step.figures), reverse=True)
    shown = [step for position, step in enumerate(ranked) if position < SHOWN_STEPS or step.settings is None]
    columns: dict[str, Callable[[Step], str]] = {
        "settings": lambda step: step.name + (" (control)" if step.control else ""),
        "p99 ms": lambda step: figure(step.figures.p99_ms, ".1f"),
        "predicted": lambda step: figure(step.predicted_p99_ms, ".1f"),
        "goodput/s/device": lambda step: figure(step.figures.goodput_rps_per_device, ".1f"),
        "within SLO": lambda step: percent(step.figures.slo_attainment),
        "batch": lambda step: figure(step.figures.batch_size_mean, ".1f"),
        "verdict": lambda step: step.figures.verdict,
    }
    yield sheet(shown, columns)
    yield from sentences(found, objective)
    if found.confirmation is not None:
        yield f"report: {write([found.confirmation], found.confirmation.folder / 'report.html').resolve()}"
        yield f"configuration to copy: {folder / 'best-configuration'}"


def _confirmed(found: Found, objective: Objective) -> list[str]:
    """What the best did when it was measured afresh: the best of many was partly lucky."""
    cell = found.confirmed.get("best")
    if cell is None:
        return ["It was not measured afresh."]
    if any(told.verdict == "INVALID" for told in found.confirmed.values()):
        return ["Measured afresh, a trial was INVALID: nothing is claimed of it."]
    ends = cell.p99_ci_ms
    interval = "" if ends is None else f" [{figure(ends[0], '.1f')}, {figure(ends[1], '.1f')}]"
    verdict = (
        "did not keep it"
        if not objective.met(cell)
        else "kept it, with the whole interval"
        if ends is not None and ends[1] <= objective.p99_ms
        else "kept it, but its interval reaches beyond"
    )
    return [
        f"Measured afresh in {cell.trials} trials, its p99 was {figure(cell.p99_ms, '.1f')} ms{interval}: it {verdict}."
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
