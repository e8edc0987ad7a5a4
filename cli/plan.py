"""What is typed: ``tailrace plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from tailrace.cli.show import Form, Part, TableOrJson, sheet, show
from tailrace.harness.errors import InputError
from tailrace.harness.quantities import assignments, figure, seconds

if TYPE_CHECKING:
    from tailrace.simulator.capacity import Checked, WarmPool

plan_app = typer.Typer(help="Capacity: what a load needs, in closed form, checked by simulation.", no_args_is_help=True)
MOST_REPLICAS = 1_000


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
    from tailrace.simulator.capacity import Ramp, plan_warm_pool, replica_rps
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
    slo_ms = seconds(slo, "--slo") * 1e3
    found = plan_warm_pool(Ramp(from_rps, to_rps, ramp_s), times, batching, scaler, slo_ms)
    content = {
        "recommended": found.recommended,
        "by_closed_form": found.by_closed_form,
        "slo_ms": slo_ms,
        "replica_rps": found.replica_rps,
        "rows": [
            {**asdict(row.shortfall), "simulated_p99_ms": sorted(row.p99_ms), "simulated_slo_met": row.met}
            for row in found.rows
        ],
    }
    show(form, content, _parts(found, slo_ms))


def _parts(found: WarmPool, slo_ms: float) -> Iterator[Part]:
    columns: dict[str, Callable[[Checked], str]] = {
        "warm pool": lambda row: str(row.shortfall.warm_pool),
        "ready at start": lambda row: str(row.shortfall.ready_at_start),
        "ready at peak": lambda row: str(row.shortfall.ready_at_peak),
        "shortfall/s": lambda row: figure(row.shortfall.shortfall_rps, ".0f"),
        "backlog": lambda row: figure(row.shortfall.backlog, ".0f"),
        "worst ms": lambda row: figure(row.shortfall.worst_ms, ".0f"),
        "p99 ms": lambda row: "{} [{}, {}]".format(*(figure(told(row.p99_ms), ".0f") for told in (median, min, max))),
        "SLO met": lambda row: f"{row.met} of {len(row.p99_ms)}",
    }
    yield sheet(found.rows, columns, words=0)
    yield (
        f"A replica serves {found.replica_rps:.0f}/s. {_advice(found, slo_ms)} "
        "A replica lost in mid-ramp counts as one fewer kept warm."
    )
    yield Text(f"p99 and SLO met: simulated, not measured, over {len(found.rows[0].p99_ms)} seeds", style="dim")


def _advice(found: WarmPool, slo_ms: float) -> str:
    if found.recommended is None:
        return f"No warm pool keeps {slo_ms:g} ms here: a batch takes too long, or its window."
    if found.recommended == found.by_closed_form:
        return f"Keep {found.recommended} warm: by the closed form, and by the simulation that checks it."
    return (
        f"Keep {found.recommended} warm: {found.by_closed_form} by the closed form, which knows no chance, and the simulation "
        "misses."
    )
