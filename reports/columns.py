"""The comparison table: its columns with their units and definitions, and what stands in each field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tailrace.harness.records.summary import Figures, TrialSummary
from tailrace.reports.evidence import ShownCell
from tailrace.reports.text import interval, quantity, share

Shown = ShownCell | TrialSummary


@dataclass(frozen=True)
class Field:
    """One field: what is read, what is sorted and copied, and what stands small below it."""

    text: str
    value: str
    """A plain number, ``inf`` or nothing; for sorting and copying."""
    note: str = ""
    low: str = ""
    high: str = ""
    tone: str = ""
    """``bad`` where the value misses the objective or is our own fault; never the only sign of it."""


@dataclass(frozen=True)
class Column:
    """One column, with the definition that a reader can look up."""

    key: str
    title: str
    unit: str
    group: str
    meaning: str
    field: Callable[[Shown], Field]
    has_interval: bool = False


def _plain(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return "inf" if math.isinf(value) else f"{value:.6g}"


def _number(key: str) -> Callable[[Shown], Field]:
    def field(s: Shown) -> Field:
        value, ends = s.figure(key), s.ends(key)
        low, high = (_plain(ends[0]), _plain(ends[1])) if ends else ("", "")
        return Field(quantity(value), _plain(value), interval(ends), low, high)

    return field


def _percentile(key: str) -> Callable[[Shown], Field]:
    def field(s: Shown) -> Field:
        value = s.figure(key)
        if value is None:
            more = f"{s.p99_more_needed:,} more needed" if key == "p99_ms" and s.p99_more_needed else ""
            return Field("not claimed", "", more)
        field = _number(key)(s)
        missed = key == "p99_ms" and value > s.slo_ms
        note = f"{field.note} {optimistic(s, key)}".strip()
        return Field(field.text, field.value, note, field.low, field.high, "bad" if missed else "")

    return field


def optimistic(summary: Figures, key: str) -> str:
    """The word that goes with an interval from within trials, which takes arrivals as independent."""
    return "optimistic" if summary.optimistic(key) else ""


def _share(key: str) -> Callable[[Shown], Field]:
    return lambda s: Field(share(s.figure(key)), _plain(s.figure(key)))


def _count(number: Callable[[Shown], int], *, ours: bool = False) -> Callable[[Shown], Field]:
    return lambda s: Field(f"{number(s):,}", str(number(s)), tone="bad" if ours and number(s) else "")


def _trials(s: Shown) -> Field:
    if isinstance(s, TrialSummary):
        return Field(f"no. {s.number}", str(s.number), "" if s.state == "done" else "not finished")
    return Field(str(s.trials), str(s.trials), "" if s.finished == s.trials else f"{s.finished} finished")


def _verdict(s: Shown) -> Field:
    codes = [reason.code for reason in s.reasons] if isinstance(s, TrialSummary) else s.reasons
    return Field(s.verdict, s.verdict, ", ".join(codes), tone=s.verdict.lower())


COLUMNS = (
    Column("verdict", "Verdict", "", "", "VALID, UNKNOWN or INVALID, with the reasons given at the top.", _verdict),
    Column(
        "trials",
        "Trials",
        "",
        "",
        "Repetitions of the cell, interleaved with those of the others. Only those that finished make rates, percentiles and "
        "curves; counts are of all.",
        _trials,
    ),
    Column("offered", "Offered", "req/s", "Throughput", "Arrivals of the trace ÷ its span.", _number("offered_rps")),
    Column(
        "goodput",
        "Goodput per device",
        "req/s",
        "Throughput",
        "Successful answers within the objective ÷ span ÷ devices. In brackets, from three trials on: the 95 % "
        "interval of the mean over trials (Student's t; from eight trials on a BCa bootstrap).",
        _number("goodput_rps_per_device"),
        has_interval=True,
    ),
    Column(
        "attainment",
        "Within SLO",
        "share",
        "Throughput",
        "Answers within the objective ÷ everything that was offered, rounded down.",
        _share("slo_attainment"),
    ),
    Column(
        "p50",
        "p50",
        "ms",
        "Response time",
        "Median of done − intended start over all arrivals, failures as +∞, nearest rank; intervals as for p99.",
        _percentile("p50_ms"),
        has_interval=True,
    ),
    Column(
        "p99",
        "p99",
        "ms",
        "Response time",
        "99th percentile over all arrivals, failures as +∞, nearest rank; claimed only where the exact binomial 95 % "
        "upper bound exists. In brackets: from three finite trials on, the interval of the geometric mean over trials "
        "(Student's t on logarithms; from eight a BCa bootstrap); else the binomial one within trials, called "
        "«optimistic», for it takes arrivals as independent, which a queue makes them not: see effective arrivals. "
        "Of two trials the worse one stands.",
        _percentile("p99_ms"),
        has_interval=True,
    ),
    Column(
        "p99ok",
        "p99 of successes",
        "ms",
        "Response time",
        "The same over successes alone, for orientation; it flatters a server that fails. Median over trials, of two the worse.",
        _number("p99_ok_ms"),
    ),
    Column(
        "effective",
        "Effective arrivals",
        "",
        "Response time",
        "How many independent arrivals would tell as much about the level of the response time: arrivals ÷ integrated "
        "autocorrelation time of their ranks. The smallest over trials.",
        _number("effective_arrivals"),
    ),
    Column("ok", "OK", "", "Outcomes", "Answers with success, all trials together.", _count(lambda s: s.ok)),
    Column(
        "shed",
        "Shed",
        "",
        "Outcomes",
        "Refused by the server (429, 503, RESOURCE_EXHAUSTED …).",
        _count(lambda s: s.shed),
    ),
    Column("errors", "Errors", "", "Outcomes", "Answered with anything else but success.", _count(lambda s: s.errors)),
    Column(
        "timeouts",
        "Time-outs",
        "",
        "Outcomes",
        "No answer in the client's time: indeterminate.",
        _count(lambda s: s.timeouts),
    ),
    Column(
        "connection",
        "Conn. errors",
        "",
        "Outcomes",
        "The connection was refused, reset or closed before a whole answer.",
        _count(lambda s: s.connection_errors),
    ),
    Column(
        "dropped",
        "Dropped",
        "",
        "Outcomes",
        "Not sent by the generator: our fault, and makes the trial INVALID.",
        _count(lambda s: s.dropped, ours=True),
    ),
    Column(
        "utilization",
        "Utilization",
        "share",
        "Resources",
        "Busy share of the devices over the trace; on device cpu the server's share of the host's cores.",
        _share("utilization"),
    ),
    Column(
        "cold",
        "Cold start",
        "s",
        "Resources",
        "From the spawn of the server's process to its first correct answer; mean over trials.",
        _number("cold_start_s"),
    ),
    Column(
        "lag",
        "Send lag p99",
        "ms",
        "Trust",
        "sent − intended start: the start lag, and the wait for a connection, which is the server's. The largest over "
        "trials.",
        _number("send_lag_p99_ms"),
    ),
    Column(
        "start_lag",
        "Start lag p99",
        "ms",
        "Trust",
        "The generator's own lateness: from the intended start until it took the arrival up. What «generator-saturated» "
        "judges. The largest over trials.",
        _number("start_lag_p99_ms"),
    ),
)


def fields(summary: Shown) -> list[tuple[Column, Field]]:
    """One row of the table, from the summary of a cell or of a trial."""
    return [(column, column.field(summary)) for column in COLUMNS]
