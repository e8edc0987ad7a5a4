"""What is typed: ``tailrace loadgen`` and ``tailrace load-worker``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from tailrace.cli.interrupt import keeping
from tailrace.cli.show import Form, TableOrJson, note, read, sheet, show, stderr
from tailrace.harness.errors import InputError
from tailrace.harness.quantities import figure

MAX_LOADGEN_RATE = 200_000


class LoadgenProtocol(StrEnum):
    """Protocols of `tailrace loadgen`."""

    HTTP = "http"
    GRPC = "grpc"


def loadgen(
    rates: Annotated[
        str, typer.Option(metavar="RATE,RATE,…", help="Arrivals/s, one replay each.")
    ] = "500,2000,5000,9000",
    duration: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds at each rate.")] = 5.0,
    body_bytes: Annotated[int, typer.Option(min=1, max=50_000_000, help="Size of a request's body.")] = 100,
    protocol: Annotated[LoadgenProtocol, typer.Option(help="http or grpc.")] = LoadgenProtocol.HTTP,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Load workers on this machine.")] = 1,
    max_connections: Annotated[int, typer.Option(min=1, help="An arrival past it is dropped.")] = 8192,
    form: Form = TableOrJson.TABLE,
) -> None:
    """Measure the load generator itself: Poisson arrivals against the null server on this machine, on loopback.

    achieved: answers/s; cpu us: CPU time of the generator for one request; send lag: from the intended instant to the
    first byte sent; dropped: what it could not send.
    """
    from tailrace.harness.replay.driver import Workers
    from tailrace.harness.run.ruler import measure_rates

    asked = {"duration_s": duration, "body_bytes": body_bytes, "protocol": protocol.value, "workers": workers}
    rows: list[dict[str, Any]] = []

    def tell() -> None:
        columns = {
            "rate/s": lambda row: figure(row["rate"], "g"),
            "achieved/s": lambda row: figure(row["achieved"], ".1f"),
            "cpu us/request": lambda row: figure(row["cpu_us_per_request"], ".1f"),
            "send lag p50 ms": lambda row: figure(row["send_lag_p50_ms"], ".3f"),
            "send lag p99 ms": lambda row: figure(row["send_lag_p99_ms"], ".3f"),
            "dropped": lambda row: figure(row["dropped"], "d"),
            "failed": lambda row: figure(row["failed"], "d"),
        }
        show(form, {**asked, "rows": rows}, [sheet(rows, columns, words=0)])

    def keep() -> str:
        tell()
        return f"{len(rows)} rates were measured"

    with keeping(keep):
        for row in measure_rates(
            _rates(rates),
            duration_s=duration,
            body_bytes=body_bytes,
            protocol=protocol.value,
            workers=Workers(local=workers),
            max_connections=max_connections,
            on_progress=note,
        ):
            rows.append(row)
            note(f"{row['rate']:g}/s done")
    tell()


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
    serve(master, lambda text: read(stderr(), text))
