"""What a report shows of its runs: cells in order, with their summary and the curves that figures draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from tailrace.harness.analysis.merit import comparable
from tailrace.harness.analysis.metrics import (
    MEASURED_COLUMNS,
    Floats,
    Series,
    claim_percentile,
    measured,
    nearest_rank,
    samples_needed,
    series,
)
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.analysis.summary import summarise
from tailrace.harness.plan.matrix import spoken
from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.store import RunFolder, TrialFolder
from tailrace.harness.records.summary import CellSummary, RunSummary, TrialSummary
from tailrace.reports.conditions import Conditions
from tailrace.reports.svg import slots
from tailrace.reports.text import printable, seconds

NINES = np.linspace(0.0, 4.5, 46)
"""Where latency curves are read: −log10(1 − q), so 1 is p90 and 2 is p99."""


GAUGES = ("utilization", "queue_depth", "batch_size", "power_w", "replicas")
"""In the order in which a timeline shows them."""


@dataclass(frozen=True)
class Band:
    """A line with its uncertainty, one entry per place: the median over trials between the lowest and the highest.

    NaN: nothing to show there; +∞: failures. The curve of a single trial carries its 95 % interval instead.
    """

    mid: Floats
    low: Floats
    high: Floats

    @classmethod
    def over(cls, rows: Sequence[Floats], *, high_is_bad: bool = False) -> Band:
        """Across trials; shorter ones are padded, and places where a trial says nothing are left to the others.

        Of an even number the worse of the two in the middle stands: a failure is not fast.
        """
        width = max(len(row) for row in rows)
        stack = np.full((len(rows), width), np.nan)
        for i, row in enumerate(rows):
            stack[i, : len(row)] = row
        ordered = np.sort(stack, axis=0)  # NaN last
        known = np.count_nonzero(~np.isnan(stack), axis=0)
        last = np.maximum(known - 1, 0)
        columns = np.arange(width)
        middle = (last + 1) // 2 if high_is_bad else last // 2
        return cls(mid=ordered[middle, columns], low=ordered[0], high=ordered[last, columns])

    def times(self, factor: float) -> Band:
        """The same line in another unit."""
        return Band(self.mid * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class FaultWindow:
    """When a fault was there or hurt, over the trials of a cell: from the earliest injection on for the longest recovery."""

    kind: str
    from_s: float
    recovery_s: float | None
    """0: attainment held in every trial; ``None``: some trial did not recover before its trace ended."""
    seen: bool
    """Whether anything arrived after it, to tell what it did."""
    lasted_s: float
    """Until it was healed, the longest of the trials; 0 for what is over at once."""

    def until_s(self, span_s: float) -> float:
        """When it was over: healed, and recovered from, at the latest with the trace."""
        if self.recovery_s is None:
            return span_s
        return min(span_s, self.from_s + max(self.recovery_s, self.lasted_s))

    @property
    def outcome(self) -> str:
        """Whether attainment came back, in words."""
        if not self.seen:
            return "no arrivals after it"
        if self.recovery_s is None:
            return "not recovered"
        return f"recovered after {seconds(self.recovery_s)}" if self.recovery_s > 0 else "attainment held"


@dataclass(frozen=True)
class Evidence:
    """The curves of one cell; ``None`` where no trial of it measured anything."""

    latency_ms: Band
    """At :data:`NINES`; NaN where the percentile is not claimed."""
    rate: Band
    goodput: Band
    attainment: Band
    """Good ÷ offered, per second; NaN where nothing was offered."""
    p99_ms: Band
    gauges: dict[str, Band]
    """Per second, by the names in :data:`GAUGES`; without those that were not read."""


class ShownCell(CellSummary):
    """A cell, with what its row of the table says beside."""

    finished: int
    """trials that came to their end"""
    p99_ok_ms: float | None
    p99_more_needed: int
    effective_arrivals: float | None
    start_lag_p99_ms: float | None
    """of the trials that finished: the median (of two the worse one), the most, the least, the largest"""


@dataclass(frozen=True)
class CellView:
    """One cell of one run."""

    key: str
    """Unique in the report and fit for an id."""
    run: str
    """The run's label; empty when the report has but one."""
    framework: str
    baseline: bool
    """Whether it is what frameworks are measured against, and none itself."""
    slot: int
    scenario: str
    """As people say it; the name is in the summary."""
    conditions: Conditions
    summary: ShownCell
    trials: tuple[TrialSummary, ...]
    """All that began, for listing."""
    evidence: Evidence | None
    faults: tuple[FaultWindow, ...]
    failures: tuple[tuple[str, str, str, int], ...]
    """Outcome, status, error and how often, the most frequent first."""

    @property
    def label(self) -> str:
        """How the cell is called in text."""
        return " · ".join(part for part in (self.framework, self.scenario, self.run) if part)

    @property
    def repetitions(self) -> tuple[TrialSummary, ...]:
        """The trials from which figures are made: those that finished."""
        return _whole(self.trials)

    @property
    def faulty(self) -> bool:
        """Whether its scenario injects anything, hit or missed."""
        return any(trial.faults for trial in self.trials)

    @property
    def tuned(self) -> bool:
        """Whether any knob was asked for; without, the framework ran on its own defaults."""
        return bool(self.summary.tuning or self.summary.left_out)

    @property
    def comparable(self) -> bool:
        """Whether claims may be made from it: nothing INVALID, and something measured."""
        return comparable(self.summary)


@dataclass(frozen=True)
class RunView:
    """One run as the report shows it."""

    folder: RunFolder
    label: str
    title: str
    summary: RunSummary
    cells: tuple[CellView, ...]

    @property
    def manifest(self) -> dict[str, Any]:
        """The run's manifest."""
        return self.folder.manifest


def view(runs: Sequence[RunFolder]) -> list[RunView]:
    """Everything that a report shows, read from the sources of the runs."""
    titles = _titles(runs)
    colours = slots(adapter for run in runs for adapter in run.manifest["experiment"]["adapters"])
    return [
        _run_view(run, index, titles[index] if len(runs) > 1 else "", titles[index], colours)
        for index, run in enumerate(runs)
    ]


def _titles(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run; from the sources alone, so that a copied folder gives the same report."""
    names = [printable(str(run.manifest["experiment"]["name"])) for run in runs]
    if len(set(names)) < len(names):
        names = [
            f"{name} {_minute(run.manifest.get('started_at'))}".strip() for name, run in zip(names, runs, strict=True)
        ]
    seen: Counter[str] = Counter()
    titles = []
    for name in names:
        seen[name] += 1
        titles.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return titles


def _minute(started_at: object) -> str:
    """``2026-11-23T22:24:05Z`` → ``2026-11-23 22:24``."""
    return str(started_at or "")[:16].replace("T", " ")


def _run_view(run: RunFolder, index: int, label: str, title: str, colours: Mapping[str, int]) -> RunView:
    summary = summarise(run)
    by_id = {trial.trial: trial for trial in summary.trials}
    experiment = run.manifest["experiment"]
    adapters, scenarios = list(experiment["adapters"]), [s["name"] for s in experiment["scenarios"]]
    called = spoken(scenarios)
    cells = []
    for place, cell in enumerate(
        sorted(summary.cells, key=lambda c: (adapters.index(c.adapter), scenarios.index(c.scenario)))
    ):
        folders = [trial for trial in run.trials if by_id[trial.id].cell == cell.cell]
        folders.sort(key=lambda trial: by_id[trial.id].number)
        trials = [by_id[trial.id] for trial in folders]
        whole = _whole(trials)
        told = (run.manifest.get("adapters") or {}).get(cell.adapter) or {}
        cells.append(
            CellView(
                key=f"r{index}c{place}",
                run=label,
                framework=printable(str(told.get("title") or cell.adapter)),
                baseline=bool(told.get("baseline")),
                slot=colours[cell.adapter],
                scenario=called[cell.scenario],
                conditions=Conditions.of(run.manifest, cell),
                summary=ShownCell(
                    **dict(cell),
                    finished=sum(trial.state == "done" for trial in trials),
                    p99_ok_ms=_median(t.p99_ok_ms for t in whole),
                    p99_more_needed=max(t.p99_more_needed for t in whole),
                    effective_arrivals=min(_known(t.effective_arrivals for t in whole), default=None),
                    start_lag_p99_ms=max(_known(t.start_lag_p99_ms for t in whole), default=None),
                ),
                trials=tuple(trials),
                evidence=_evidence([folder for folder in folders if by_id[folder.id] in whole], whole),
                faults=_fault_windows(whole),
                failures=_failures(folders),
            )
        )
    return RunView(run, label, title, summary, tuple(cells))


def _whole(trials: Sequence[TrialSummary]) -> tuple[TrialSummary, ...]:
    """The trials that finished; what another measured before it broke off stands only where there is nothing else."""
    return tuple(trial for trial in trials if trial.state == "done") or tuple(trials)


def _known(values: Iterable[float | None]) -> list[float]:
    return sorted(value for value in values if value is not None and not math.isnan(value))


def _median(values: Iterable[float]) -> float | None:
    """Of latencies: of an even number the larger of the two in the middle."""
    known = _known(values)
    return known[len(known) // 2] if known else None


def _fault_windows(trials: Sequence[TrialSummary]) -> tuple[FaultWindow, ...]:
    """Faults of a cell by their place in the scenario; those that hit nothing are left out."""
    windows = []
    for place in range(max((len(trial.faults) for trial in trials), default=0)):
        there = [trial.faults[place] for trial in trials if len(trial.faults) > place]
        hit = [
            (fault, fault.recovery, fault.injected_s)
            for fault in there
            if fault.recovery is not None and fault.injected_s is not None
        ]
        if hit:
            took = [recovery.recovery_s for _, recovery, _ in hit]
            windows.append(
                FaultWindow(
                    hit[0][0].kind,
                    min(injected_s for _, _, injected_s in hit),
                    None if None in took else max(back_s for back_s in took if back_s is not None),
                    not all(math.isnan(recovery.dip_attainment) for _, recovery, _ in hit),
                    max((fault.healed_s - at_s for fault, _, at_s in hit if fault.healed_s), default=0.0),
                )
            )
    return tuple(windows)


def _evidence(folders: Sequence[TrialFolder], trials: Sequence[TrialSummary]) -> Evidence | None:
    curves: list[Band] = []
    timelines: list[Series] = []
    gauges: dict[str, list[Floats]] = {name: [] for name in GAUGES}
    alone = sum(trial.arrivals > 0 for trial in trials) == 1
    for folder, trial in zip(folders, trials, strict=True):
        requests = folder.request_columns(*MEASURED_COLUMNS)
        if trial.arrivals == 0 or requests is None:
            continue
        records = measured(requests)
        response = records.response_ms()
        curves.append(_curve(response, with_interval=alone))
        timelines.append(series(records, trial.span_s, trial.slo_ms))
        samples = Samples(folder.samples if folder.samples is not None else SAMPLE_SCHEMA.empty_table())
        span = len(timelines[-1].t_s)
        gauges["utilization"].append(utilization_series(folder.facts, samples, span))
        gauges["queue_depth"].append(gauge_series(samples, "server", "queue_depth", span))
        gauges["batch_size"].append(batch_series(samples, span))
        gauges["power_w"].append(gauge_series(samples, "gpu", "power_w", span))
        gauges["replicas"].append(gauge_series(samples, "replicas", "replicas_alive", span))
    if not curves:
        return None
    unclaimed = np.isnan([curve.mid for curve in curves]).any(axis=0)
    latency = curves[0] if alone else Band.over([curve.mid for curve in curves], high_is_bad=True)
    return Evidence(
        latency_ms=Band(*(np.where(unclaimed, np.nan, row) for row in (latency.mid, latency.low, latency.high))),
        rate=Band.over([t.offered.astype(np.float64) for t in timelines]),
        goodput=Band.over([t.good.astype(np.float64) for t in timelines]),
        attainment=Band.over([_attainment(t) for t in timelines]),
        p99_ms=Band.over([t.p99_ms for t in timelines], high_is_bad=True),
        gauges={
            name: Band.over(rows, high_is_bad=True)
            for name, rows in gauges.items()
            if not np.isnan(np.concatenate(rows)).all()
        },
    )


def _attainment(timeline: Series) -> Floats:
    offered = timeline.offered.astype(np.float64)
    good: Floats = np.divide(timeline.good, offered, out=np.full(len(offered), np.nan), where=offered > 0)
    return good


def _curve(response_ms: Floats, *, with_interval: bool) -> Band:
    """Percentiles at :data:`NINES` as far as they are claimed, with the exact interval of each if asked for."""
    ordered = np.sort(response_ms)
    n = len(ordered)
    mid, low, high = (np.full(len(NINES), np.nan) for _ in range(3))
    for i, q in enumerate(1 - 10.0**-NINES):
        if q <= 0:  # the minimum
            mid[i] = low[i] = high[i] = ordered[0]
        elif samples_needed(q) > n:
            break
        elif with_interval:
            claimed = claim_percentile(ordered, q)
            if claimed.value is not None and claimed.low is not None and claimed.high is not None:
                mid[i], low[i], high[i] = claimed.value, claimed.low, claimed.high
        else:
            mid[i] = ordered[nearest_rank(n, q) - 1]
    return Band(mid, low, high)


def utilization_series(facts: TrialFacts, samples: Samples, seconds: int) -> Floats:
    """Utilization per second of the trace, as ``utilization`` of the summary means it; NaN where nothing was read."""
    if facts.device == "cuda":
        return gauge_series(samples, "gpu", "utilization", seconds, mean=True)
    if facts.device == "emulated":
        source, metric, capacity = "device", "busy_s_total", facts.devices
    else:
        source, metric, capacity = "server-process", "cpu_s_total", facts.cpu_count
    return np.clip(counter_series(samples, source, metric, seconds) / capacity, 0.0, 1.0)


def batch_series(samples: Samples, seconds: int) -> Floats:
    """Mean batch of each second: items ÷ batches where the server counts both, else its own gauge; NaN where no batch was."""
    items, batches = (counter_series(samples, "server", metric, seconds) for metric in ("items_total", "batches_total"))
    if np.isnan(batches).all():
        return gauge_series(samples, "server", "batch_size", seconds, mean=True)
    mean: Floats = np.divide(items, batches, out=np.full(seconds, np.nan), where=batches > 0)
    return mean


def counter_series(samples: Samples, source: str, metric: str, seconds: int) -> Floats:
    """By how much a counter grew in each second, linear between readings and summed over scopes; NaN where nothing was
    read."""
    edges = np.arange(seconds + 1, dtype=np.float64)
    rates: list[Floats] = []
    for scope in samples.scopes(source, metric):
        t_s, values = samples.series(source, metric, scope)
        rates.append(np.diff(np.interp(edges, t_s, values, left=np.nan, right=np.nan)))
    total: Floats = np.sum(np.array(rates), axis=0) if rates else np.full(seconds, np.nan)
    return total


def gauge_series(samples: Samples, source: str, metric: str, seconds: int, *, mean: bool = False) -> Floats:
    """A gauge in the middle of each second, linear between readings; summed over scopes, or their mean."""
    middles = np.arange(seconds) + 0.5
    rows: list[Floats] = []
    for scope in samples.scopes(source, metric):
        t_s, values = samples.series(source, metric, scope)
        rows.append(np.interp(middles, t_s, values, left=np.nan, right=np.nan))
    if not rows:
        return np.full(seconds, np.nan)
    total: Floats = np.sum(np.array(rows), axis=0)
    return total / len(rows) if mean else total


def _failures(folders: Sequence[TrialFolder]) -> tuple[tuple[str, str, str, int], ...]:
    """Of all trials, like the counts of the cell."""
    failures: Counter[tuple[str, str, str]] = Counter()
    for folder in folders:
        requests = folder.request_columns("arrival_id", "outcome", "status", "error", "phase")
        if requests is None:
            continue
        failed = requests.filter(
            pc.and_(pc.equal(requests["phase"], "measure"), pc.not_equal(requests["outcome"], "ok"))
        ).unify_dictionaries()
        for group in failed.group_by(["outcome", "status", "error"]).aggregate([("arrival_id", "count")]).to_pylist():
            status = "" if group["status"] is None else str(group["status"])
            failures[group["outcome"], status, group["error"] or ""] += group["arrival_id_count"]
    ranked = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    return tuple((*what, number) for what, number in ranked)
