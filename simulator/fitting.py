"""From a measured trial to the system that would have behaved like it; and what that system says of other trials.

Service times come from the device's own counters where they are kept (the emulated accelerator), and else from the
fit. What cannot be counted, the overhead of an answer and how requests find replicas, is what makes the simulated response times
fit the measured ones best, on the very same arrivals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize, nnls

from tailrace.harness.analysis.metrics import MEASURED_COLUMNS, Floats, Ints, measured, percentile
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.analysis.summary import summarise_trial
from tailrace.harness.errors import InputError
from tailrace.harness.records import facts as records
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.store import RunFolder, TrialFolder
from tailrace.harness.records.summary import TrialSummary
from tailrace.simulator.engine import NS_PER_S, Simulated, simulate
from tailrace.simulator.system import Batching, Router, Service, System, WindowOpens, load_system

FITTED_QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)
_ROUTERS: tuple[Router, ...] = ("shared", "power_of_two", "round_robin", "random")
_MIN_ARRIVALS = 500
TOLD = "config/system.json"
"""Where, below a trial's server folder, an adapter may have rendered its server's mechanisms as a :class:`System`."""


@dataclass(frozen=True)
class Trial:
    """What a calibration needs of a trial: the arrivals, what became of them, and the figures to be met."""

    id: str
    arrivals_ns: Ints
    response_ms: Floats
    span_ns: int
    figures: TrialSummary
    """As in ``summary.json``."""
    samples: Samples
    told: System | None = None
    """The mechanisms that its server says it has, where it does (:data:`TOLD`)."""


@dataclass(frozen=True)
class ColdStart:
    """How long the trial's server took to come up; NaN where its trial did not say."""

    server_s: float
    """From nothing to the first right answer."""
    model_s: float
    """From the port that opens to readiness: what the first replica of a framework that runs already has to do."""

    @classmethod
    def of(cls, phases: records.ColdStart | None) -> ColdStart:
        told = phases or records.ColdStart()
        port, ready, first = (
            math.nan if at_s is None else at_s for at_s in (told.port_open_s, told.ready_s, told.first_answer_s)
        )
        return cls(first, ready - port)


@dataclass(frozen=True)
class Fitted:
    """The system that fits a trial best."""

    system: System
    error: float
    """Root mean square of the logarithm of simulated ÷ measured over :data:`FITTED_QUANTILES`."""
    service_from: str
    """Where the service times come from."""
    others: tuple[tuple[str, float], ...]
    """The other mechanisms that were tried, with their errors, best first."""
    cold_start_s: ColdStart


def read_trial(folder: TrialFolder) -> Trial:
    """A trial that is done and had no faults. Raises :class:`InputError` for any other."""
    requests = folder.request_columns(*MEASURED_COLUMNS) if folder.done else None
    if requests is None:
        raise InputError(f"{folder.folder} is not done: there is nothing to fit on")
    figures = summarise_trial(folder, {})
    if figures.faults:
        raise InputError(f"{folder.folder} had faults, which a calibration would take for the system")
    if figures.verdict == "INVALID":
        codes = ", ".join(reason.code for reason in figures.reasons)
        raise InputError(f"{folder.folder} is INVALID ({codes}), and no measurement of the system")
    if figures.nodes > 1:
        raise InputError(
            f"{folder.folder} had {figures.nodes} nodes, and the load balancer between is not modelled",
            remedy="fit on a trial of one node",
        )
    if len(folder.facts.models) > 1:
        raise InputError(
            f"{folder.folder} had {len(folder.facts.models)} models, which are not modelled",
            remedy="fit on a trial of one model",
        )
    if any(event["event"] == "scaled" for event in folder.events):
        raise InputError(f"{folder.folder} was scaled while it ran", remedy="fit on a trial without a scaler")
    trace = measured(requests)
    if len(trace) < _MIN_ARRIVALS:
        raise InputError(
            f"{folder.folder} has {len(trace)} arrivals, fewer than the {_MIN_ARRIVALS} from which its tail can be fitted",
            remedy="fit on a longer trace",
        )
    response = trace.response_ms()
    if not math.isfinite(percentile(response, max(FITTED_QUANTILES))):
        raise InputError(
            f"{folder.folder}: more than 1 % of its requests failed: there is no p99 to fit",
            remedy="fit on a trial within the system's capacity",
        )
    samples = Samples(folder.samples if folder.samples is not None else SAMPLE_SCHEMA.empty_table())
    span_ns = round(figures.span_s * NS_PER_S)
    told = load_system(str(folder.server / TOLD)) if (folder.server / TOLD).is_file() else None
    return Trial(folder.id, trace.intended_ns, response, span_ns, figures, samples, told)


def fit(trial: Trial) -> Fitted:
    """Fit service time, overhead and mechanism to one trial. Where its server has not told its mechanisms, its tuning must have
    said ``replicas``; a batch is as large as ``max_batch``, or 1."""
    if "autoscale" in trial.figures.tuning:
        raise InputError(f"{trial.id} was scaled while it ran: fit on a trial with a fixed number of replicas")
    counted = counted_service(trial.samples)
    devices = trial.figures.devices if trial.figures.device == "emulated" else None
    found: list[tuple[float, str, System]] = []
    for candidate in (trial.told,) if trial.told else _candidates(trial):
        system = candidate.model_copy(update={"service": counted or Service(), "devices": devices})
        fitted, error = _fitted(system, trial, fit_service=counted is None)
        found.append((error, f"{system.router} queue, window from {system.batching.window_opens}", fitted))
    found.sort(key=lambda one: one[0])
    best = found[0]
    return Fitted(
        system=best[2],
        error=best[0],
        service_from="the device's counters" if counted else "the fit",
        others=tuple((name, error) for error, name, _ in found[1:]),
        cold_start_s=ColdStart.of(trial.figures.cold_start_phases_s),
    )


def _candidates(trial: Trial) -> list[System]:
    """The mechanisms that a server with the trial's tuning may have."""
    tuning = trial.figures.tuning
    replicas = tuning.get("replicas")
    if replicas is None:
        raise InputError(
            f"{trial.id}: how many replicas served is not known, for its tuning leaves `replicas` to the framework",
            remedy="fit on a trial whose tuning says `replicas` (and `max_batch`)",
        )
    routers = _ROUTERS if replicas > 1 else _ROUTERS[:1]
    windows: tuple[WindowOpens, ...] = ("arrival", "idle") if tuning.get("batch_window_ms") else ("arrival",)
    return [
        System(
            batching=Batching(
                max_batch=tuning.get("max_batch", 1), window_ms=tuning.get("batch_window_ms", 0.0), window_opens=opens
            ),
            replicas=replicas,
            router=router,
            queue_limit=tuning.get("queue_limit"),
        )
        for router, opens in itertools.product(routers, windows)
    ]


def counted_service(samples: Samples) -> Service | None:
    """Base and per-item time by which busy time grew with batches and items, by non-negative least squares over the
    readings; ``None`` where the device does not count."""
    rows, busy_s = [], []
    for scope in samples.scopes("device", "batches_total"):
        _, busy = samples.series("device", "busy_s_total", scope)
        _, batches = samples.series("device", "batches_total", scope)
        _, items = samples.series("device", "items_total", scope)
        length = min(len(busy), len(batches), len(items))
        # Every tenth reading: within one a batch may be half done.
        steps = [np.diff(values[:length][::10]) for values in (batches, items, busy)]
        rows.append(np.stack(steps[:2], axis=1))
        busy_s.append(steps[2])
    if not rows or sum(len(part) for part in busy_s) < 10:
        return None
    (base_s, per_item_s), _ = nnls(np.concatenate(rows), np.concatenate(busy_s))
    return Service(base_ms=base_s * 1e3, per_item_ms=per_item_s * 1e3) if base_s + per_item_s > 0 else None


def _fitted(system: System, trial: Trial, *, fit_service: bool) -> tuple[System, float]:
    """The system with the times that fit best, and its error."""

    def with_times(logs: Floats) -> System:
        times = [float(value) for value in np.exp(logs)]
        update: dict[str, Any] = {"overhead_ms": times[0], "cycle_ms": times[1]}
        if fit_service:
            update["service"] = Service(base_ms=times[2], per_item_ms=times[3])
        return system.model_copy(update=update)

    low_ms = percentile(trial.response_ms, 0.05)
    start = [max(0.1, 0.1 * low_ms), 0.5]
    if fit_service:
        start += [0.7 * low_ms, 0.1 * low_ms]
    best = minimize(
        lambda logs: fit_error(with_times(logs), trial),
        np.log(start),
        method="Nelder-Mead",
        options={"maxfev": 120 * len(start), "xatol": 0.01, "fatol": 1e-4},
    )
    return with_times(best.x), float(best.fun)


def fit_error(system: System, trial: Trial) -> float:
    """Root mean square of log(simulated ÷ measured) over :data:`FITTED_QUANTILES`; failures count as ten times too slow."""
    simulated = simulate(system, trial.arrivals_ns, span_ns=trial.span_ns).response_ms()
    logs = [
        min(abs(math.log(percentile(simulated, q) / percentile(trial.response_ms, q))), math.log(10))
        for q in FITTED_QUANTILES
    ]
    return math.sqrt(sum(log**2 for log in logs) / len(logs))


def device_share(simulated: Simulated, devices: int) -> float:
    """The share of the span in which devices computed, as :func:`resource_use` has it of an emulated one."""
    return simulated.busy_ns / (simulated.span_ns * devices)


PREDICTED = {
    "p50_ms": "p50_ms",
    "p99_ms": "p99_ms",
    "goodput_rps": "goodput_rps",
    "utilization": "utilization",
    "mean_batch": "batch_size_mean",
}
"""What is predicted, and the summary's name for what was measured."""


def predict(system: System, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """For every trial and figure: predicted, measured, and predicted ÷ measured − 1; ``None`` where it was not
    measured."""
    rows = []
    for trial in trials:
        slo_ms = trial.figures.slo_ms
        outcome = simulate(system, trial.arrivals_ns, span_ns=trial.span_ns)
        simulated = {**outcome.figures(slo_ms), "utilization": device_share(outcome, trial.figures.devices)}
        for name, key in PREDICTED.items():
            # Of what computes for others too (a host's cores, a GPU's gauge) the model knows nothing.
            emulated = trial.figures.device == "emulated"
            true = trial.figures.figure(key) if name != "utilization" or emulated else None
            error = None if true is None or not math.isfinite(true) or true <= 0 else simulated[name] / true - 1
            rows.append(
                {
                    "trial": trial.id,
                    "figure": name,
                    "predicted": simulated[name],
                    "measured": true,
                    "error": error,
                }
            )
    return rows


def fit_run(run: RunFolder, name: str | None = None) -> tuple[TrialFolder, Fitted]:
    """The trial of that name, else the first one that a system can be fitted to, and that system. Raises
    :class:`InputError`, of the first trial where none can be used."""
    known = {folder.id: folder for folder in run.trials}
    if name is not None and name not in known:
        raise InputError(f"{run.folder} has no trial {name!r}", remedy=f"one of {', '.join(known)}")
    if not known:
        raise InputError(f"{run.folder} has no trials", remedy="give a run that measured something")
    refused = []
    for folder in [known[name]] if name is not None else known.values():
        try:
            return folder, fit(read_trial(folder))
        except InputError as error:
            refused.append(error)
    raise refused[0]


def validate(run: RunFolder) -> list[dict[str, Any]]:
    """For every cell of a run, what a system fitted to its first trial predicts of the others, as :func:`predict` has it.
    Raises :class:`InputError` for a cell with one trial."""
    cells: dict[str, list[TrialFolder]] = {}
    for folder in run.trials:
        cells.setdefault(folder.facts.cell, []).append(folder)
    rows = []
    for cell, folders in cells.items():
        if len(folders) < 2:
            raise InputError(
                f"{run.folder}: {cell} has one trial; what was fitted to it must be tried on another",
                remedy="run it with --trials 2 or more",
            )
        first, *others = (read_trial(folder) for folder in folders)
        fitted = fit(first)
        common = {"cell": cell, "router": fitted.system.router, "fit_error": fitted.error}
        rows += [{**common, **row} for row in predict(fitted.system, others)]
    return rows
