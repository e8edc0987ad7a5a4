"""Many models in one memory: who met a cold one, what memory buys, what theory and the simulator say of the same arrivals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tailrace.harness.analysis.merit import tail_ms, within_objective
from tailrace.harness.analysis.metrics import Floats, percentile
from tailrace.harness.analysis.residence import Met
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.contract.multiplexing import MIB
from tailrace.harness.records.store import TrialFolder
from tailrace.harness.records.summary import Multiplexing as Sharing
from tailrace.reports.conditions import distinction
from tailrace.reports.evidence import CellView, RunView
from tailrace.reports.text import NOTHING, interval, listing, milliseconds, quantity, seconds, share
from tailrace.simulator.caching import least_loads, lru_hit_rates
from tailrace.simulator.multiplexed_trial import MultiplexedTrial, fitted, predict, read_multiplexed

_KINDS = ("cold", "warm", "hot")
MULTIPLEXING_HEADINGS = (
    *("Cell", "Memory", "Policy", "Driven by"),
    *(
        title
        for kind in _KINDS
        for title in (kind.capitalize(), f"{kind.capitalize()} p50", f"{kind.capitalize()} p99")
    ),
    *("Loads", "A load", "Evictions", "Failed or refused", "Reloaded", "Least headroom"),
)
PREDICTION_HEADINGS = (
    *("Cell", "Cold, measured", "simulated", "error", "Loads, measured", "simulated", "error"),
    *("p50, measured", "simulated", "error", "p99, measured", "simulated", "error", "Calibrated on"),
)
BRIEF_HEADINGS = ("cell", "memory", "policy", "cold", "LRU in theory", "fewest", "p50", "p99", "loads", "reloaded")
CONTROLLER = "the harness"
_POINTS = 48
"""Of a theoretical curve over models of several sizes."""


@dataclass(frozen=True)
class Line:
    """The cells of one framework under one policy, by memory."""

    label: str
    cells: tuple[CellView, ...]

    @property
    def memory_mb(self) -> Floats:
        """One entry for each cell."""
        return np.array([shared(cell).memory_mb for cell in self.cells], dtype=np.float64)

    @property
    def cold(self) -> Floats:
        """The share of requests for which their model was loaded; NaN where there were none."""
        return np.array([_cold_share(cell) for cell in self.cells], dtype=np.float64)


@dataclass(frozen=True)
class Theory:
    """What is known of the arrivals of one trial, by memory."""

    memory_mb: Floats
    lru: Floats
    """The share of cold requests by Che's approximation."""
    least: Floats
    """The share that would have been cold had the whole future been known; the fewest, or where sizes differ a bound."""
    exact: bool


@dataclass(frozen=True)
class Group:
    """Cells that met the same models and traffic, and so compare."""

    title: str
    lines: tuple[Line, ...]
    theory: Theory | None
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Headroom:
    """How much of the memory nobody had over the first trial of a cell, in MiB at seconds of its trace."""

    cell: CellView
    t_s: Floats
    free_mb: Floats


@dataclass(frozen=True)
class Multiplexing:
    """The section: groups with their curves and sentences, tables, and the memory of every cell over time."""

    groups: tuple[Group, ...]
    note: str
    rows: list[tuple[str, ...]]
    """By :data:`MULTIPLEXING_HEADINGS`."""
    brief: list[tuple[str, ...]]
    """By :data:`BRIEF_HEADINGS`."""
    predictions: list[tuple[str, ...]]
    """By :data:`PREDICTION_HEADINGS`."""
    headroom: tuple[Headroom, ...]


def multiplexing(views: Sequence[RunView]) -> Multiplexing | None:
    """What runs say of models that share a memory; ``None`` where none did."""
    cells = [cell for run in views for cell in run.cells if cell.summary.multiplexing is not None]
    if not cells:
        return None
    folders = {cell.key: _folders(run, cell) for run in views for cell in run.cells if cell in cells}
    recorded = {key: [t for t in map(read_multiplexed, own) if t is not None] for key, own in folders.items()}
    members: dict[tuple[object, ...], list[CellView]] = {}
    for cell in cells:
        members.setdefault((cell.run, cell.conditions, cell.summary.mean_rate), []).append(cell)
    conditions = [cell.conditions for cell in cells]
    groups: list[Group] = []
    theories: dict[str, Theory | None] = {}
    for own in members.values():
        title = " · ".join(part for part in (own[0].run, distinction(own[0].conditions, conditions)) if part)
        groups.append(_group(title, own, recorded))
        theories |= {cell.key: groups[-1].theory for cell in own}
    return Multiplexing(
        tuple(groups),
        _note(cells),
        [_row(cell) for cell in cells],
        [_brief(cell, theories[cell.key]) for cell in cells],
        [row for run in views for row in _predictions(run, [c for c in run.cells if c in cells], recorded)],
        tuple(told for cell in cells if (told := _headroom(cell, folders[cell.key])) is not None),
    )


def policy_words(cell: CellView) -> str:
    """``lru, 4 pinned``."""
    told = shared(cell)
    return f"{told.policy}, {told.pinned} pinned" if told.pinned else str(told.policy)


def shared(cell: CellView) -> Sharing:
    """What came of models that share a limited memory, of a cell that has such models."""
    if cell.summary.multiplexing is None:
        raise ValueError(f"{cell.label}: its models share no memory")
    return cell.summary.multiplexing


def memory(value_mb: float | None) -> str:
    """A size in whole MiB."""
    return NOTHING if value_mb is None else quantity(value_mb, "MiB", digits=max(3, len(str(int(value_mb)))))


def _folders(run: RunView, cell: CellView) -> list[TrialFolder]:
    """The folders of the trials from which the cell's figures are made."""
    return [run.folder.trial(trial.trial) for trial in cell.repetitions]


def _cold_share(cell: CellView) -> float:
    value = shared(cell).cold.share
    return math.nan if value is None else value


# ---------------------------------------------------------------- curves


def _group(title: str, cells: Sequence[CellView], recorded: dict[str, list[MultiplexedTrial]]) -> Group:
    lines: dict[str, list[CellView]] = {}
    for cell in cells:
        if cell.comparable and not cell.faulty:
            lines.setdefault(f"{cell.framework} · {policy_words(cell)}", []).append(cell)
    drawn = tuple(
        Line(label, tuple(sorted(own, key=lambda cell: float(shared(cell).memory_mb)))) for label, own in lines.items()
    )
    trials = [trial for cell in cells for trial in recorded[cell.key] if len(trial.trace)]
    sizes = [float(shared(cell).memory_mb) for cell in cells]
    theory = theory_of(trials[0], sizes) if trials else None
    return Group(title, drawn, theory, tuple(_sentences(drawn, theory)))


def theory_of(trial: MultiplexedTrial, measured_mb: Sequence[float]) -> Theory:
    """From the shares that the trial's models had of its arrivals, and from their order; at and between these sizes."""
    sizes = np.array(trial.memory.sizes, dtype=np.float64)
    shares = np.bincount(trial.trace, minlength=len(sizes)) / len(trial.trace)
    low_mb, high_mb = min(measured_mb), max(measured_mb)
    alike = bool((sizes == sizes[0]).all())
    # Of models of one size, a part of another one buys nothing.
    between = np.arange(1, len(sizes)) * sizes[0] / MIB if alike else np.linspace(low_mb, high_mb, _POINTS)
    memory_mb = np.unique(np.r_[between[(between > low_mb) & (between < high_mb)], measured_mb])
    sequence = trial.trace.tolist()
    return Theory(
        memory_mb,
        np.array([1 - float(shares @ lru_hit_rates(shares, sizes, mb * MIB)) for mb in memory_mb]),
        np.array([least_loads(sequence, sizes, mb * MIB).loads / len(sequence) for mb in memory_mb]),
        exact=alike,
    )


def knee(memory_mb: Floats, cold: Floats) -> float | None:
    """The memory after which more buys least: where the curve of cold requests lies deepest below the straight line between its
    ends. ``None`` with fewer than three points, or where the curve is nowhere below."""
    known = ~np.isnan(cold)
    x, y = memory_mb[known], cold[known]
    if len(x) < 3 or x[-1] <= x[0]:
        return None
    below = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0]) - y
    deepest = int(np.argmax(below))
    return float(x[deepest]) if below[deepest] > 1e-9 else None


def _sentences(lines: Sequence[Line], theory: Theory | None) -> list[str]:
    """The recommendation first."""
    cells = [cell for line in lines for cell in line.cells]
    if not cells:
        return []
    told = [_recommendation(cells)]
    knees = [(line.label, at) for line in lines if (at := knee(line.memory_mb, line.cold)) is not None]
    if theory is not None and (at := knee(theory.memory_mb, theory.lru)) is not None:
        knees.append(("LRU in theory", at))
    if knees:
        places: dict[str, list[str]] = {}
        for label, at in knees:
            places.setdefault(memory(at), []).append(label)
        told.append(
            "The knee, where the curve of cold requests lies deepest below the straight line between its ends, so that more "
            "memory buys less from there on: "
            + "; ".join(f"{at} ({listing(labels)})" for at, labels in places.items())
            + "."
        )
    return told


def _recommendation(cells: Sequence[CellView]) -> str:
    """Of each framework the smallest memory, and of policies with that the one with the fewest cold requests."""
    objective = listing(sorted({milliseconds(cell.summary.slo_ms) for cell in cells}))
    claimed = [cell for cell in cells if cell.summary.p99_ms is not None]
    if not claimed:
        return f"Whether a memory keeps p99 within {objective} is not known: too few arrivals to claim a p99."
    best: dict[str, CellView] = {}
    for cell in sorted(claimed, key=lambda c: (shared(c).memory_mb, _cold_share(c))):
        if within_objective(cell.summary):
            best.setdefault(cell.framework, cell)
    if not best:
        nearest = min(claimed, key=lambda cell: tail_ms(cell.summary))
        return (
            f"None of these memories and policies keeps p99 within {objective}: the best is {_p99(nearest)}, by "
            f"{nearest.framework} with {_setting(nearest)}."
        )
    told = [
        f"{_setting(cell)} with {name} ({_p99(cell)}, {share(_cold_share(cell))} of requests cold)"
        for name, cell in best.items()
    ]
    missed = [name for name in dict.fromkeys(cell.framework for cell in claimed) if name not in best]
    return f"The smallest memory that keeps p99 within {objective}: {listing(told)}" + (
        f"; with {listing(missed)} none of those that were tried does." if missed else "."
    )


def _setting(cell: CellView) -> str:
    return f"{memory(shared(cell).memory_mb)} under {policy_words(cell)}"


def _p99(cell: CellView) -> str:
    return milliseconds(cell.summary.p99_ms)


def _note(cells: Sequence[CellView]) -> str:
    driven = list(dict.fromkeys(c.framework for c in cells if shared(c).controlled))
    if not driven:
        return ""
    return (
        f"{listing(driven)} {'has' if len(driven) == 1 else 'have'} no policy for that: the harness's own controller, a proxy "
        "before the server, says which models are in memory, through the server's management interface."
    )


# ---------------------------------------------------------------- tables


def _row(cell: CellView) -> tuple[str, ...]:
    told = shared(cell)
    row = [cell.label, memory(told.memory_mb), policy_words(cell), CONTROLLER if told.controlled else "itself"]
    for own in (told.hot, told.warm, told.cold):
        row.append(NOTHING if own.share is None else f"{share(own.share)} {_percent_interval(own.share_ci)}")
        for value, ends in ((own.p50_ms, own.p50_ci_ms), (own.p99_ms, own.p99_ci_ms)):
            row.append("not claimed" if value is None else f"{milliseconds(value)} {interval(ends)}".strip())
    return (
        *row,
        f"{told.loads:,}",
        seconds(told.load_p50_s),
        f"{told.evictions:,}",
        f"{told.load_failures + told.refused:,}",
        _gibibytes(told.reload_mb),
        memory(told.headroom_min_mb),
    )


def _brief(cell: CellView, theory: Theory | None) -> tuple[str, ...]:
    told = shared(cell)
    lru = least = NOTHING
    if theory is not None:
        lru, least = (
            share(float(np.interp(told.memory_mb, theory.memory_mb, curve)))
            for curve in (theory.lru, theory.least)
        )  # fmt: skip
    return (
        cell.label,
        memory(told.memory_mb),
        policy_words(cell),
        f"{share(_cold_share(cell))} {_percent_interval(told.cold.share_ci)}".strip(),
        lru,
        least,
        *(
            "not claimed" if value is None else milliseconds(value)
            for value in (cell.summary.p50_ms, cell.summary.p99_ms)
        ),
        f"{told.loads:,}",
        _gibibytes(told.reload_mb),
    )


def _percent_interval(ends: Sequence[float] | None) -> str:
    return interval([100 * end for end in ends]) if ends else ""


def _gibibytes(value_mb: float) -> str:
    return quantity(value_mb / 1024, "GiB")


def _predictions(
    run: RunView, cells: Sequence[CellView], recorded: dict[str, list[MultiplexedTrial]]
) -> list[tuple[str, ...]]:
    """What the simulation says of every cell on an emulated device, its server's own costs taken from the one trial of the same
    framework that loaded most."""
    cost = run.manifest["workload"].get("cost") or {}
    rows = []
    for framework in dict.fromkeys(cell.framework for cell in cells):
        own = [
            cell
            for cell in cells
            if cell.framework == framework and cell.comparable and cell.summary.emulated and recorded[cell.key]
        ]
        if not own or "load_gb_per_s" not in cost:
            continue
        source = max(own, key=lambda cell: len(recorded[cell.key][0].loads))
        device = fitted(recorded[source.key][0], cost)
        for cell in own:
            predicted = [predict(device, trial) for trial in recorded[cell.key]]
            response, met = (np.concatenate([getattr(p, name) for p in predicted]) for name in ("response_ms", "met"))
            cold, cold_simulated = _cold_share(cell), float((met == Met.COLD).mean()) if len(met) else math.nan
            loads, loads_simulated = shared(cell).loads, sum(p.loads for p in predicted)
            row = [cell.label, share(cold), share(cold_simulated), _points(cold_simulated - cold)]
            row += [f"{loads:,}", f"{loads_simulated:,}", _relative(loads_simulated, loads)]
            for q, value in ((0.50, cell.summary.p50_ms), (0.99, cell.summary.p99_ms)):
                simulated = percentile(response, q)
                row += ["not claimed" if value is None else milliseconds(value), milliseconds(simulated)]
                row.append(NOTHING if value is None else _relative(simulated, value))
            rows.append((*row, "this one" if cell is source else source.scenario))
    return rows


def _relative(simulated: float, true: float) -> str:
    return f"{simulated / true - 1:+.0%}".replace("-", "\u2212") if 0 < true < math.inf else NOTHING


def _points(difference: float) -> str:
    return NOTHING if math.isnan(difference) else f"{100 * difference:+.1f} points".replace("-", "\u2212")


def _headroom(cell: CellView, folders: Sequence[TrialFolder]) -> Headroom | None:
    if not folders or folders[0].samples is None:
        return None
    t_s, free = Samples(folders[0].samples).series("memory", "memory_free_bytes")
    within = (t_s >= 0) & (t_s <= float(cell.repetitions[0].span_s))
    return Headroom(cell, t_s[within], free[within] / MIB) if within.any() else None


def words(told: Multiplexing) -> list[str]:
    """The sentences of all groups, each with its title where there are several."""
    sentences = [(group.title, sentence) for group in told.groups for sentence in group.sentences]
    return [f"{title}: {sentence}" if title else sentence for title, sentence in sentences] + [told.note] * bool(
        told.note
    )
