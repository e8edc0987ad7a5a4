"""The summary of a run: per trial and per cell, every figure by its documented key, made from stored records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tailrace.harness.analysis.across import across, largest, mean, percentile_across
from tailrace.harness.analysis.aftermath import accounting, aftermath, pair
from tailrace.harness.analysis.comparison import comparisons
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
from tailrace.harness.records.facts import ColdStart, LoadGeneratorFacts, TrialFacts
from tailrace.harness.records.record import Record
from tailrace.harness.records.schema import REQUEST_SCHEMA, SAMPLE_SCHEMA, Outcome
from tailrace.harness.records.store import RunFolder, TrialFolder, write_json
from tailrace.harness.records.summary import (
    CellSummary,
    ModelFigures,
    ResourceUse,
    RunSummary,
    StageFigures,
    TrialSummary,
    Verdict,
)

SUMMARY_FILE = "summary.json"


def summarise(run: RunFolder) -> RunSummary:
    """The summary of a run."""
    ruler = run.manifest.get("ruler") or {}
    trials = [summarise_trial(trial, ruler) for trial in run.trials]
    pair(trials)
    cells = _cells(trials)
    return RunSummary(
        schema_version=run.manifest["schema_version"],
        run=run.manifest["experiment"]["name"],
        question=run.manifest["experiment"]["question"],
        verdict=_worst(trial.verdict for trial in trials) if trials else "INVALID",
        planned_trials=len(run.manifest["trials"]),
        cells=cells,
        ruler=ruler,
        comparisons=comparisons(cells, trials),
        trials=trials,
    )


def write_summary(run: RunFolder) -> RunSummary:
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
    if isinstance(value, Record):
        return jsonable(value.dump())
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=["VALID", "UNKNOWN", "INVALID"].index)


def summarise_trial(trial: TrialFolder, ruler: Mapping[str, Any]) -> TrialSummary:
    """All figures of one trial. ``ruler`` is the run's calibration by protocol, as the manifest keeps it.

    Long because it names every figure once, in the order in which they are kept.
    """
    facts = trial.facts
    several = facts.models if len(facts.models) > 1 else ()
    requests = trial.request_columns(*MEASURED_COLUMNS, *(("model",) if several else ()))
    if requests is None:
        requests = REQUEST_SCHEMA.empty_table()
    samples = Samples(trial.samples if trial.samples is not None else SAMPLE_SCHEMA.empty_table())
    trace, warmup = measured(requests, models=several), measured(requests, Phase.WARMUP)
    del requests  # as large again as what was taken from it
    steady = steadiness(trace, warmup)  # before the arrays below: ranking ten million takes room of its own
    span_s, slo_ms, devices, price = facts.span_s, facts.slo_ms, facts.devices, facts.device_price_per_hour
    if facts.state != "done" and len(trace):
        # A trial cut short is judged on the part that was measured.
        span_s = min(span_s, math.ceil(float(trace.intended_ns[-1]) / NS_PER_S + 1e-9) or 1.0)
    response, service, lag = trace.response_ms(), trace.service_ms(), trace.send_lag_ms()
    good = int(np.count_nonzero(response <= slo_ms))
    arrivals = len(trace)
    p50, p90, p99 = (claim_percentile(response, q) for q in (0.50, 0.90, 0.99))
    usage = resource_use(facts, samples, span_s)
    gpus = gpu_figures(samples, span_s)
    verdict, reasons = judge(facts, trace, warmup, usage, steady, ruler.get(facts.protocol), gpus)
    calm = expects_steady(facts)
    generator, cold_start = facts.load_generator or LoadGeneratorFacts(), facts.cold_start or ColdStart()
    return TrialSummary(
        trial=trial.id,
        cell=facts.cell,
        number=facts.number,
        adapter=facts.adapter,
        scenario=facts.scenario,
        mean_rate=facts.mean_rate,
        state=facts.state,
        workload=facts.workload,
        trace=facts.trace,
        device=facts.device,
        emulated=facts.device == "emulated",
        devices=devices,
        device_price_per_hour=price,
        protocol=facts.protocol,
        tuning={knob: value for knob, value in facts.tuning.items() if value is not None},
        left_out=facts.left_out,
        composition=facts.composition,
        stages=[stage_figures(name, samples, span_s) for name in facts.stages],
        span_s=span_s,
        slo_ms=slo_ms,
        arrivals=arrivals,
        offered_rps=arrivals / span_s,
        throughput_rps=trace.count(Outcome.OK) / span_s,
        goodput_rps=good / span_s,
        goodput_rps_per_device=good / span_s / devices,
        goodput_per_dollar=goodput_per_dollar(good / span_s, devices, price),
        goodput_per_joule=goodput_per_joule(good / span_s, gpus_power_w(gpus, devices, span_s)),
        slo_attainment=good / arrivals if arrivals else math.nan,
        p50_ms=p50.value,
        p50_ci_ms=p50.ends,
        p90_ms=p90.value,
        p90_ci_ms=p90.ends,
        p99_ms=p99.value,
        p99_ci_ms=p99.ends,
        p99_more_needed=p99.more_needed,
        p50_ok_ms=percentile(response[trace.ok], 0.50),
        p99_ok_ms=percentile(response[trace.ok], 0.99),
        p50_service_ms=percentile(service, 0.50),
        p99_service_ms=percentile(service, 0.99),
        models=by_model(several, trace, slo_ms),
        multiplexing=residence(facts, trace, several, trial.events, samples, span_s),
        good=good,
        ok=trace.count(Outcome.OK),
        errors=trace.count(Outcome.ERROR),
        shed=trace.count(Outcome.SHED),
        timeouts=trace.count(Outcome.TIMEOUT),
        connection_errors=trace.count(Outcome.CONNECTION),
        dropped=trace.count(Outcome.DROPPED),
        effective_arrivals=steady.effective_arrivals,
        warmup_detected_s=steady.warmup_detected_s if calm else None,
        drift=steady.drift if calm else None,
        failure_drift=steady.failure_drift if calm else None,
        send_lag_p50_ms=percentile(lag, 0.50),
        send_lag_p99_ms=percentile(lag, 0.99),
        send_lag_max_ms=float(lag.max()) if len(lag) else math.nan,
        start_lag_p99_ms=generator.start_lag_p99_ms,
        **usage.dump(),
        gpus=gpus,
        cold_start_s=cold_start.first_answer_s,
        cold_start_phases_s=facts.cold_start,
        outputs=facts.outputs,
        generator_cpu_us_per_request=generator.cpu_us_per_request,
        nodes=facts.nodes,
        supervision=facts.supervision,
        cold_copies_hit=cold_copies(samples, span_s),
        faults=[aftermath(fault, trace, trial.events, span_s, slo_ms) for fault in facts.faults],
        accounting=accounting(
            trace,
            warmup,
            # An item of a pipeline may be computed by several stages, or by none.
            executed=None if facts.stages else samples.grown("device", "items_total"),
            server_ok=samples.grown("server", "requests_ok_total"),
            probes=sum(event["event"] == "node-first-answer" for event in trial.events),
        ),
        verdict=verdict,
        reasons=reasons,
    )


def by_model(models: Sequence[str], trace: Measured, slo_ms: float) -> list[ModelFigures]:
    """The figures of each of several models that a trial served, in their order; nothing for a single one."""
    response = trace.response_ms()
    figures = []
    for position, name in enumerate(models):
        own = response[trace.model == position]
        p50, p99 = (claim_percentile(own, q) for q in (0.50, 0.99))
        good = int(np.count_nonzero(own <= slo_ms))
        figures.append(
            ModelFigures(
                model=name,
                arrivals=len(own),
                good=good,
                slo_attainment=good / len(own) if len(own) else math.nan,
                p50_ms=p50.value,
                p50_ci_ms=p50.ends,
                p99_ms=p99.value,
                p99_ci_ms=p99.ends,
            )
        )
    return figures


_ANSWERS, _ANSWER_S = "stage_answers_total", "stage_answer_s_total"


def stage_figures(name: str, samples: Samples, span_s: float) -> StageFigures:
    """Figures of one stage of a pipeline over the trace; ``None`` for what was not counted.

    What is computed is counted where it is computed, whoever composes; how long an answer took, by the server or by what calls
    the stages in it: where a process runs all of them, nobody asks for an answer.
    """
    busy, batches, items = (
        samples.rate("stages", metric, span_s, name) for metric in ("busy_s_total", "batches_total", "items_total")
    )
    source = "server" if name in samples.scopes("server", _ANSWERS) else "stages"
    answers, answer_s = (samples.rate(source, metric, span_s, name) for metric in (_ANSWERS, _ANSWER_S))
    return StageFigures(
        stage=name,
        items_rps=items,
        batch_size_mean=items / batches if items and batches else None,
        predict_ms=busy / batches * 1e3 if busy and batches else None,
        answer_ms=answer_s / answers * 1e3 if answer_s and answers else None,
    )


def _stages(members: Sequence[TrialSummary]) -> list[StageFigures]:
    """The figures of stages in the mean over trials."""
    found = []
    for name in (stage.stage for stage in members[0].stages):
        own = [stage for trial in members for stage in trial.stages if stage.stage == name]
        found.append(
            StageFigures(
                stage=name,
                items_rps=mean(stage.items_rps for stage in own),
                batch_size_mean=mean(stage.batch_size_mean for stage in own),
                predict_ms=mean(stage.predict_ms for stage in own),
                answer_ms=mean(stage.answer_ms for stage in own),
            )
        )
    return found


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


def resource_use(facts: TrialFacts, samples: Samples, span_s: float) -> ResourceUse:
    """Use of devices and host over the trace."""
    devices, cores = facts.devices, facts.cpu_count
    server_cores = samples.rate("server-process", "cpu_s_total", span_s)
    own = [server_cores, *(samples.rate(source, "cpu_s_total", span_s) for source in _OWN_SOURCES)]
    busy = samples.mean("host", "cpu_busy", span_s)
    outside = None if busy is None else max(0.0, busy - sum(rate or 0.0 for rate in own) / cores)
    if facts.device == "emulated":
        rates = [
            samples.rate("device", "busy_s_total", span_s, scope) for scope in samples.scopes("device", "busy_s_total")
        ]
        known = [rate for rate in rates if rate is not None]
        utilization = min(1.0, sum(known) / devices) if known else None
    elif facts.device == "cuda":
        utilization = samples.mean("gpu", "utilization", span_s)
    else:
        utilization = None if server_cores is None else server_cores / cores
    return ResourceUse(
        utilization=utilization,
        server_cpu_cores=server_cores,
        server_memory_bytes=samples.peak("server-process", "memory_bytes", span_s),
        batch_size_mean=_batch_size(samples, span_s),
        queue_depth_max=samples.peak("server", "queue_depth", span_s),
        gpu_memory_bytes=samples.peak("gpu", "memory_bytes", span_s),
        gpu_power_w=samples.mean("gpu", "power_w", span_s),
        host_cpu=busy,
        steal=samples.mean("host", "steal", span_s),
        outside_load=outside,
        frequency_mhz=samples.mean("host", "frequency_mhz", span_s),
        frequency_change=samples.halves("host", "frequency_mhz", span_s),
        throttled_per_s=samples.rate("host", "throttled_total", span_s),
    )


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


def _cells(trials: Sequence[TrialSummary]) -> list[CellSummary]:
    cells = []
    for cell_id in dict.fromkeys(trial.cell for trial in trials):
        members = [trial for trial in trials if trial.cell == cell_id]
        # What a trial measured before it broke off is no repetition; it still counts, and still dooms the verdict.
        whole = [trial for trial in members if trial.state == "done"] or members
        lags = [trial.send_lag_p99_ms for trial in whole if not math.isnan(trial.send_lag_p99_ms)]
        figures: dict[str, Any] = {name: mean(trial.figure(name) for trial in whole) for name in _AVERAGED}
        figures |= {name: largest(trial.figure(name) for trial in whole) for name in _LARGEST}
        cells.append(
            CellSummary(
                **{name: getattr(members[0], name) for name in _SHARED},
                trials=len(members),
                stages=_stages(whole),
                **{name: sum(getattr(trial, name) for trial in members) for name in _COUNTED},
                **figures
                | across(whole, "goodput_rps_per_device", "goodput_rps_per_device_ci", log=False)
                | across(whole, "goodput_per_dollar", "goodput_per_dollar_ci", log=False)
                | across(whole, "goodput_per_joule", "goodput_per_joule_ci", log=False)
                | across(whole, "slo_attainment", "slo_attainment_ci", log=False, within=(0.0, 1.0)),
                **percentile_across(whole, "p50_ms"),
                **percentile_across(whole, "p99_ms"),
                models=_models_across(members, whole),
                multiplexing=residence_across(whole),
                send_lag_p99_ms=max(lags, default=math.nan),
                verdict=_worst(trial.verdict for trial in members),
                reasons=sorted({reason.code for trial in members for reason in trial.reasons}),
            )
        )
    return cells


def _models_across(members: Sequence[TrialSummary], whole: Sequence[TrialSummary]) -> list[ModelFigures]:
    """Model by model what :func:`_cells` does with all requests."""
    cells = []
    for position, model in enumerate(members[0].models):
        every, finished = ([trial.models[position] for trial in trials] for trials in (members, whole))
        cells.append(
            ModelFigures(
                model=model.model,
                arrivals=sum(one.arrivals for one in every),
                good=sum(one.good for one in every),
                slo_attainment=mean(one.slo_attainment for one in finished),
                **percentile_across(finished, "p50_ms"),
                **percentile_across(finished, "p99_ms"),
            )
        )
    return cells
