"""The summary of a run: per trial and per cell, every figure by its documented key, made from stored records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tailrace.harness.analysis.aftermath import accounting, aftermath, pair
from tailrace.harness.analysis.comparison import comparisons, over_trials
from tailrace.harness.analysis.gpu_figures import gpu_figures, gpus_power_w
from tailrace.harness.analysis.metrics import (
    MEASURED_COLUMNS,
    NS_PER_S,
    Measured,
    claim_percentile,
    measured,
    percentile,
)
from tailrace.harness.analysis.residence import residence, residence_across
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.analysis.steadiness import steadiness
from tailrace.harness.analysis.verdicts import expects_steady, judge
from tailrace.harness.plan.schedule import Phase
from tailrace.harness.records.schema import REQUEST_SCHEMA, SAMPLE_SCHEMA, Outcome
from tailrace.harness.records.store import RunFolder, TrialFolder, write_json

SUMMARY_FILE = "summary.json"

Summary = dict[str, Any]


def summarise(run: RunFolder) -> Summary:
    """The summary of a run, with ``inf`` as floats; see ``docs/record.md`` for every key."""
    ruler = run.manifest.get("ruler") or {}
    trials = [summarise_trial(trial, ruler) for trial in run.trials]
    pair(trials)
    cells = _cells(trials)
    planned = [trial["id"] for trial in run.manifest["trials"]]
    return {
        "schema_version": run.manifest["schema_version"],
        "run": run.manifest["experiment"]["name"],
        "question": run.manifest["experiment"]["question"],
        "verdict": _worst(trial["verdict"] for trial in trials) if trials else "INVALID",
        "planned_trials": len(planned),
        "cells": cells,
        "ruler": ruler,
        "comparisons": [vars(comparison) for comparison in comparisons(cells, trials)],
        "trials": trials,
    }


def write_summary(run: RunFolder) -> Summary:
    """Make ``summary.json`` of a run, and return its content."""
    summary = summarise(run)
    write_json(run.folder / SUMMARY_FILE, jsonable(summary))
    return summary


def jsonable(value: Any) -> Any:
    """The same value fit for JSON: +∞ as ``"inf"``, NaN (nothing to say) as ``null``."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else "inf"
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def _worst(verdicts: Iterable[str]) -> str:
    return max(verdicts, key=["VALID", "UNKNOWN", "INVALID"].index)


def summarise_trial(trial: TrialFolder, ruler: Mapping[str, Any]) -> Summary:
    """All figures of one trial. ``ruler`` is the run's calibration by protocol, as the manifest keeps it."""
    facts = trial.facts
    models = facts.get("models") or ()
    several = models if len(models) > 1 else ()
    requests = trial.request_columns(*MEASURED_COLUMNS, *(("model",) if several else ()))
    if requests is None:
        requests = REQUEST_SCHEMA.empty_table()
    samples = Samples(trial.samples if trial.samples is not None else SAMPLE_SCHEMA.empty_table())
    trace, warmup = measured(requests, models=several), measured(requests, Phase.WARMUP)
    del requests  # as large again as what was taken from it
    steady = steadiness(trace, warmup)  # before the arrays below: ranking ten million takes room of its own
    span_s, slo_ms, devices = float(facts["span_s"]), float(facts["slo_ms"]), int(facts["devices"])
    if facts["state"] != "done" and len(trace):
        # A trial cut short is judged on the part that was measured.
        span_s = min(span_s, math.ceil(float(trace.intended_ns[-1]) / NS_PER_S + 1e-9) or 1.0)
    response, service, lag = trace.response_ms(), trace.service_ms(), trace.send_lag_ms()
    good = int(np.count_nonzero(response <= slo_ms))
    price = facts.get("device_price_per_hour")
    arrivals = len(trace)
    p50, p90, p99 = (claim_percentile(response, q) for q in (0.50, 0.90, 0.99))
    usage = resource_use(facts, samples, span_s)
    gpus = gpu_figures(samples, span_s)
    verdict, reasons = judge(facts, trace, warmup, usage, steady, ruler.get(facts["protocol"]), gpus)
    calm = expects_steady(facts)
    return {
        "trial": trial.id,
        "cell": facts["cell"],
        "number": facts["number"],
        "adapter": facts["adapter"],
        "scenario": facts["scenario"],
        "mean_rate": facts.get("mean_rate"),
        "state": facts["state"],
        "workload": facts["workload"],
        "trace": facts["trace"],
        "device": facts["device"],
        "emulated": facts["device"] == "emulated",
        "devices": devices,
        "device_price_per_hour": price,
        "protocol": facts["protocol"],
        "tuning": {knob: value for knob, value in (facts.get("tuning") or {}).items() if value is not None},
        "left_out": facts.get("left_out") or {},
        "composition": facts.get("composition"),
        "stages": [stage_figures(name, samples, span_s) for name in facts.get("stages") or []],
        "span_s": span_s,
        "slo_ms": slo_ms,
        "arrivals": arrivals,
        "offered_rps": arrivals / span_s,
        "throughput_rps": trace.count(Outcome.OK) / span_s,
        "goodput_rps": good / span_s,
        "goodput_rps_per_device": good / span_s / devices,
        "goodput_per_dollar": goodput_per_dollar(good / span_s, devices, price),
        "goodput_per_joule": goodput_per_joule(good / span_s, gpus_power_w(gpus, devices, span_s)),
        "slo_attainment": good / arrivals if arrivals else math.nan,
        "p50_ms": p50.value,
        "p50_ci_ms": p50.ends,
        "p90_ms": p90.value,
        "p90_ci_ms": p90.ends,
        "p99_ms": p99.value,
        "p99_ci_ms": p99.ends,
        "p99_more_needed": p99.more_needed,
        "p50_ok_ms": percentile(response[trace.ok], 0.50),
        "p99_ok_ms": percentile(response[trace.ok], 0.99),
        "p50_service_ms": percentile(service, 0.50),
        "p99_service_ms": percentile(service, 0.99),
        "models": by_model(several, trace, slo_ms),
        "multiplexing": residence(facts, trace, several, trial.events, samples, span_s),
        "good": good,
        "ok": trace.count(Outcome.OK),
        "errors": trace.count(Outcome.ERROR),
        "shed": trace.count(Outcome.SHED),
        "timeouts": trace.count(Outcome.TIMEOUT),
        "connection_errors": trace.count(Outcome.CONNECTION),
        "dropped": trace.count(Outcome.DROPPED),
        "effective_arrivals": steady.effective_arrivals,
        "warmup_detected_s": steady.warmup_detected_s if calm else None,
        "drift": steady.drift if calm else None,
        "failure_drift": steady.failure_drift if calm else None,
        "send_lag_p50_ms": percentile(lag, 0.50),
        "send_lag_p99_ms": percentile(lag, 0.99),
        "send_lag_max_ms": float(lag.max()) if len(lag) else math.nan,
        "start_lag_p99_ms": (facts.get("load_generator") or {}).get("start_lag_p99_ms"),
        **usage,
        "gpus": gpus,
        "cold_start_s": (facts.get("cold_start") or {}).get("first_answer_s"),
        "cold_start_phases_s": facts.get("cold_start"),
        "outputs": facts.get("outputs"),
        "generator_cpu_us_per_request": (facts.get("load_generator") or {}).get("cpu_us_per_request"),
        "nodes": facts.get("nodes", 1),
        "supervision": facts.get("supervision", "none"),
        "cold_copies_hit": cold_copies(samples, span_s),
        "faults": [aftermath(fault, trace, trial.events, span_s, slo_ms) for fault in facts.get("faults") or []],
        "accounting": accounting(
            trace,
            warmup,
            # An item of a pipeline may be computed by several stages, or by none.
            executed=None if facts.get("stages") else samples.grown("device", "items_total"),
            server_ok=samples.grown("server", "requests_ok_total"),
            probes=sum(event["event"] == "node-first-answer" for event in trial.events),
        ),
        "verdict": verdict,
        "reasons": [vars(reason) for reason in reasons],
    }


def by_model(models: Sequence[str], trace: Measured, slo_ms: float) -> list[Summary]:
    """The figures of each of several models that a trial served, in their order; nothing for a single one."""
    response = trace.response_ms()
    figures = []
    for position, name in enumerate(models):
        own = response[trace.model == position]
        p50, p99 = (claim_percentile(own, q) for q in (0.50, 0.99))
        good = int(np.count_nonzero(own <= slo_ms))
        figures.append(
            {
                "model": name,
                "arrivals": len(own),
                "good": good,
                "slo_attainment": good / len(own) if len(own) else math.nan,
                "p50_ms": p50.value,
                "p50_ci_ms": p50.ends,
                "p99_ms": p99.value,
                "p99_ci_ms": p99.ends,
            }
        )
    return figures


_ANSWERS, _ANSWER_S = "stage_answers_total", "stage_answer_s_total"


def stage_figures(name: str, samples: Samples, span_s: float) -> Summary:
    """Figures of one stage of a pipeline over the trace; ``None`` for what was not counted.

    What is computed is counted where it is computed, whoever composes; how long an answer took, by the server or by what calls
    the stages in it: where a process runs all of them, nobody asks for an answer.
    """
    busy, batches, items = (
        samples.rate("stages", metric, span_s, name) for metric in ("busy_s_total", "batches_total", "items_total")
    )
    source = "server" if name in samples.scopes("server", _ANSWERS) else "stages"
    answers, answer_s = (samples.rate(source, metric, span_s, name) for metric in (_ANSWERS, _ANSWER_S))
    return {
        "stage": name,
        "items_rps": items,
        "batch_size_mean": items / batches if items and batches else None,
        "predict_ms": busy / batches * 1e3 if busy and batches else None,
        "answer_ms": answer_s / answers * 1e3 if answer_s and answers else None,
    }


def _stages(members: Sequence[Summary]) -> list[Summary]:
    """The figures of stages in the mean over trials."""
    names = [stage["stage"] for stage in members[0]["stages"]]
    told = [[stage for trial in members for stage in trial["stages"] if stage["stage"] == name] for name in names]
    return [
        {"stage": name, **{key: _mean(one[key] for one in ones) for key in ones[0] if key != "stage"}}
        for name, ones in zip(names, told, strict=True)
    ]


def goodput_per_dollar(goodput_rps: float, devices: int, price_per_hour: float | None) -> float | None:
    """Good requests per US dollar, from those per second and the price of one device for an hour; ``None`` without one."""
    return None if price_per_hour is None else goodput_rps * 3600 / (devices * price_per_hour)


def goodput_per_joule(goodput_rps: float, power_w: float | None) -> float | None:
    """Good requests per joule, from those per second and the mean power in watts; ``None`` where none was drawn or read."""
    return goodput_rps / power_w if power_w else None


def cold_copies(samples: Samples, span_s: float) -> int | None:
    """How many copies of the model gave their first answer within the trace; ``None`` where that is not told."""
    t_s, used = samples.series("device", "copies_used")
    before, within = used[t_s < 0], used[(t_s >= 0) & (t_s <= span_s)]
    if not len(within):
        return None
    return int(within[-1] - (before[-1] if len(before) else 0.0))


_OWN_SOURCES = ("load-generator", "harness", "load-balancer", "link-proxy", "port-publisher")
"""Beside the server: what of the machine's load is the run's own doing."""


def resource_use(facts: Mapping[str, Any], samples: Samples, span_s: float) -> dict[str, float | None]:
    """Utilisation of devices and host over the trace; shares in 0..1, ``None`` for what was not read."""
    devices, cores = int(facts["devices"]), int(facts["cpu_count"])
    server_cores = samples.rate("server-process", "cpu_s_total", span_s)
    own = [server_cores, *(samples.rate(source, "cpu_s_total", span_s) for source in _OWN_SOURCES)]
    busy = samples.mean("host", "cpu_busy", span_s)
    outside = None if busy is None else max(0.0, busy - sum(rate or 0.0 for rate in own) / cores)
    if facts["device"] == "emulated":
        rates = [
            samples.rate("device", "busy_s_total", span_s, scope) for scope in samples.scopes("device", "busy_s_total")
        ]
        known = [rate for rate in rates if rate is not None]
        utilization = min(1.0, sum(known) / devices) if known else None
    elif facts["device"] == "cuda":
        utilization = samples.mean("gpu", "utilization", span_s)
    else:
        utilization = None if server_cores is None else server_cores / cores
    return {
        "utilization": utilization,
        "server_cpu_cores": server_cores,
        "server_memory_bytes": samples.peak("server-process", "memory_bytes", span_s),
        "batch_size_mean": _batch_size(samples, span_s),
        "queue_depth_max": samples.peak("server", "queue_depth", span_s),
        "gpu_memory_bytes": samples.peak("gpu", "memory_bytes", span_s),
        "gpu_power_w": samples.mean("gpu", "power_w", span_s),
        "host_cpu": busy,
        "steal": samples.mean("host", "steal", span_s),
        "outside_load": outside,
        "frequency_mhz": samples.mean("host", "frequency_mhz", span_s),
        "frequency_change": samples.halves("host", "frequency_mhz", span_s),
        "throttled_per_s": samples.rate("host", "throttled_total", span_s),
    }


def _batch_size(samples: Samples, span_s: float) -> float | None:
    """Items ÷ batches over the trace where the server counts both, else the mean of its own gauge."""
    rates = []
    for metric in ("items_total", "batches_total"):
        known = [samples.rate("server", metric, span_s, scope) for scope in samples.scopes("server", metric)]
        rates.append(sum(rate for rate in known if rate is not None))
    return rates[0] / rates[1] if rates[1] > 0 else samples.mean("server", "batch_size", span_s)


_SHARED = (
    "cell",
    "adapter",
    "scenario",
    "mean_rate",
    "workload",
    "trace",
    "device",
    "emulated",
    "devices",
    "device_price_per_hour",
    "nodes",
    "supervision",
    "protocol",
    "tuning",
    "left_out",
    "composition",
    "slo_ms",
)
_AVERAGED = (
    "offered_rps",
    "throughput_rps",
    "goodput_rps",
    "goodput_rps_per_device",
    "goodput_per_dollar",
    "goodput_per_joule",
    "slo_attainment",
    "utilization",
    "cold_start_s",
    "server_cpu_cores",
    "batch_size_mean",
)
_LARGEST = ("server_memory_bytes", "queue_depth_max")
_COUNTED = ("arrivals", "good", "ok", "errors", "shed", "timeouts", "connection_errors", "dropped")


def _cells(trials: Sequence[Summary]) -> list[Summary]:
    cells: list[Summary] = []
    for cell_id in dict.fromkeys(trial["cell"] for trial in trials):
        members = [trial for trial in trials if trial["cell"] == cell_id]
        first = members[0]
        # What a trial measured before it broke off is no repetition; it still counts, and still dooms the verdict.
        whole = [trial for trial in members if trial["state"] == "done"] or members
        lags = [trial["send_lag_p99_ms"] for trial in whole if not math.isnan(trial["send_lag_p99_ms"])]
        cells.append(
            {
                **{key: first[key] for key in _SHARED},
                "trials": len(members),
                **{key: _mean(trial[key] for trial in whole) for key in _AVERAGED},
                "stages": _stages(whole),
                **{key: _largest(trial[key] for trial in whole) for key in _LARGEST},
                **{key: sum(trial[key] for trial in members) for key in _COUNTED},
                **_across(whole, "goodput_rps_per_device", "goodput_rps_per_device_ci", log=False),
                **_across(whole, "goodput_per_dollar", "goodput_per_dollar_ci", log=False),
                **_across(whole, "goodput_per_joule", "goodput_per_joule_ci", log=False),
                **_across(whole, "slo_attainment", "slo_attainment_ci", log=False, within=(0.0, 1.0)),
                **_percentile_across(whole, "p50_ms", "p50_ci_ms"),
                **_percentile_across(whole, "p99_ms", "p99_ci_ms"),
                "models": _models_across(members, whole),
                "multiplexing": residence_across(whole, _percentile_across),
                "send_lag_p99_ms": max(lags, default=math.nan),
                "verdict": _worst(trial["verdict"] for trial in members),
                "reasons": sorted({reason["code"] for trial in members for reason in trial["reasons"]}),
            }
        )
    return cells


def _models_across(members: Sequence[Summary], whole: Sequence[Summary]) -> list[Summary]:
    """Model by model what :func:`_cells` does with all requests."""
    cells = []
    for position, model in enumerate(members[0]["models"]):
        every, finished = ([trial["models"][position] for trial in trials] for trials in (members, whole))
        cells.append(
            {
                "model": model["model"],
                **{key: sum(trial[key] for trial in every) for key in ("arrivals", "good")},
                "slo_attainment": _mean(trial["slo_attainment"] for trial in finished),
                **_percentile_across(finished, "p50_ms", "p50_ci_ms"),
                **_percentile_across(finished, "p99_ms", "p99_ci_ms"),
            }
        )
    return cells


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _across(
    members: Sequence[Summary],
    key: str,
    ci_key: str,
    *,
    log: bool,
    within: tuple[float, float] = (0.0, math.inf),
) -> Summary:
    """A mean of a cell with its interval over trials, cut to what the figure can be; no interval where there is none."""
    interval = over_trials(np.array([trial[key] for trial in members], dtype=np.float64), log=log)
    if interval is None:
        return {ci_key: None}
    return {key: interval.centre, ci_key: np.clip(interval.ends, *within).tolist()}


def _percentile_across(members: Sequence[Summary], key: str, ci_key: str) -> Summary:
    """A percentile of a cell: from three finite trials on the geometric mean with its interval over trials; from
    fewer, the median trial (of two, the worse one) with the envelope of the within-trial intervals; nothing when a
    trial claims nothing."""
    source = f"{ci_key}_source"
    values = [trial[key] for trial in members]
    if any(value is None for value in values):
        return {key: None, ci_key: None, source: None}
    across = _across(members, key, ci_key, log=True)
    if across[ci_key] is not None:
        return {**across, source: "across-trials"}
    intervals = [trial[ci_key] for trial in members]
    envelope = [min(low for low, _ in intervals), max(high for _, high in intervals)]
    return {key: sorted(values)[len(values) // 2], ci_key: envelope, source: "within-trial"}
