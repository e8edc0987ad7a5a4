"""Results doubt themselves: each trial is VALID, INVALID or UNKNOWN, with reasons and what to do about each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tailrace.harness.analysis.metrics import NS_PER_S, Measured, percentile
from tailrace.harness.analysis.steadiness import Steadiness
from tailrace.harness.contract.multiplexing import MIB
from tailrace.harness.plan.schedule import most_at_once
from tailrace.harness.records.facts import LoadGeneratorFacts, Outputs, TrialError, TrialFacts
from tailrace.harness.records.schema import Outcome
from tailrace.harness.records.summary import GpuFigures, Reason, ResourceUse, Verdict

STEAL_LIMIT = 0.05
"""Mean share of CPU time stolen by the hypervisor above which a host is noisy."""
OUTSIDE_LOAD_LIMIT = 0.20
"""Mean share of the host's CPU used by processes that are not the trial's above which a host is noisy."""

FREQUENCY_LIMIT = 0.20
"""Fall of the mean CPU frequency from the first half of the trace to the second above which a host is noisy."""


THROTTLED_LIMIT = 0.05
"""Share of the trace during which a GPU's clocks were held down above which it is a throttled one."""
OTHER_GPU_USE_LIMIT = 0.02
"""Mean share of a GPU's time used by processes that are not the server's above which it is a shared one."""
OTHER_GPU_MEMORY_LIMIT = 256 << 20
"""Bytes of its memory that they may hold: what a desktop takes, but less than a CUDA context with a model in it."""


def judge(
    facts: TrialFacts,
    trace: Measured,
    warmup: Measured,
    host: ResourceUse,
    steady: Steadiness | None = None,
    ruler: Mapping[str, Any] | None = None,
    gpus: Sequence[GpuFigures] = (),
) -> tuple[Verdict, list[Reason]]:
    """The verdict on one trial.

    ``facts`` is the trial's ``trial.json``; ``host`` says how noisy the machine was;
    ``steady`` is what :func:`steadiness` found; ``ruler`` is
    the run's calibration of the generator with this trial's protocol (:func:`calibrate`); ``gpus`` are the
    figures of each (:func:`gpu_figures`). What an injected fault does to a server is a result, never a
    reason.
    """
    reasons = [
        *_completeness(facts),
        *_generator(facts, trace, ruler or {}),
        *_clocks(facts, trace),
        *_server(facts, trace, warmup),
        *_host(facts, host),
        *_gpus(gpus),
        *_shared_memory(facts, gpus),
        *_steadiness(facts, warmup, steady),
    ]
    if any(reason.effect == "INVALID" for reason in reasons):
        return "INVALID", reasons
    return ("UNKNOWN" if reasons else "VALID"), reasons


def _invalid(code: str, text: str, remedy: str) -> Reason:
    return Reason(code=code, text=text, remedy=remedy, effect="INVALID")


def _unknown(code: str, text: str, remedy: str) -> Reason:
    return Reason(code=code, text=text, remedy=remedy, effect="UNKNOWN")


def _completeness(facts: TrialFacts) -> list[Reason]:
    if facts.state == "done":
        return []
    error = facts.error or TrialError(message="the harness was stopped before the trial ended")
    text = f"the trial did not finish ({facts.state}): {error.message}"
    return [_invalid("incomplete", text, error.remedy or "run it again")]


def _generator(facts: TrialFacts, trace: Measured, ruler: Mapping[str, Any]) -> list[Reason]:
    reasons = []
    generator = facts.load_generator or LoadGeneratorFacts()
    if lost := [worker.lost for worker in generator.workers if worker.lost]:
        reasons.append(
            _invalid("worker-lost", "; ".join(lost), "look at that machine, and at load-generator.log; run it again")
        )
    if dropped := trace.count(Outcome.DROPPED):
        reasons.append(
            _invalid(
                "dropped",
                f"the generator could not send {dropped} of {len(trace)} arrivals",
                "raise client.max_connections, lower the rate, or shorten client.timeout_s",
            )
        )
    # The generator's own lateness: the send lag also holds the wait for a connection, which is the server's.
    p99, limit = generator.start_lag_p99_ms, tolerated_ms(trace)
    if p99 is not None and p99 > limit:
        reasons.append(
            _invalid(
                "generator-saturated",
                f"arrivals were taken up late: p99 {p99:.2f} ms is above {limit:.2f} ms (the larger of 1 ms and a tenth "
                "of the median response time)",
                "lower the rate, add load workers, or leave the generator a core of its own",
            )
        )
    reasons += _proven(trace, ruler)
    return reasons


def tolerated_ms(trace: Measured) -> float:
    """How wrong an instant may be: the larger of 1 ms and a tenth of the median response time of the successes."""
    answered = trace.response_ms()[trace.ok]
    return max(1.0, 0.1 * percentile(answered, 0.5) if len(answered) else 0.0)


def _proven(trace: Measured, ruler: Mapping[str, Any]) -> list[Reason]:
    """Whether this run's own calibration has shown that the generator can send what it was asked to."""
    if "ceiling_rps" not in ruler:
        why = ruler.get("error") or "the run holds no calibration of this protocol"
        return [_unknown("not-calibrated", f"what the generator can send was not measured: {why}", "run it again")]
    peak, ceiling = float(most_at_once(trace.intended_ns, 1.0)), ruler["ceiling_rps"] or 0.0
    if peak <= ceiling:
        return []
    return [
        _invalid(
            "generator-saturated",
            f"up to {peak:.0f} arrivals/s were offered, the calibration proved {ceiling:.0f}/s",
            "lower the rate, add load workers, or leave the generator a core of its own",
        )
    ]


def _clocks(facts: TrialFacts, trace: Measured) -> list[Reason]:
    """Whether the instants of workers on other machines can be set beside each other and beside the faults."""
    # One that did not live to its end has nothing to say of its clock, and is told elsewhere.
    workers = [worker for worker in (facts.load_generator or LoadGeneratorFacts()).workers if worker.cpu_s is not None]
    known = [worker.clock_uncertainty_ms for worker in workers if worker.clock_uncertainty_ms is not None]
    limit = tolerated_ms(trace)
    if len(known) < len(workers):
        text = "a load worker's clock could not be read again after the replay"
    elif max(known, default=0.0) > limit:
        text = (
            f"a load worker's clock is known to {max(known):.2f} ms only, more than {limit:.2f} ms (the larger of 1 ms "
            "and a tenth of the median response time)"
        )
    else:
        return []
    remedy = "use a faster network to the load workers on other machines, or fewer of them"
    return [_unknown("clock-uncertain", text, remedy)]


def _server(facts: TrialFacts, trace: Measured, warmup: Measured) -> list[Reason]:
    reasons = []
    outputs = facts.outputs or Outputs()
    if outputs.mismatched:
        reasons.append(
            _invalid(
                "output-mismatch",
                f"{outputs.mismatched} of {outputs.checked} checked answers differ from the reference"
                + (f": {outputs.example}" if outputs.example else ""),
                "the server does not run the same model, or mixes requests up: do not compare it",
            )
        )
    elif trace.ok.any() and facts.outputs and not outputs.checked:
        reasons.append(
            _invalid("outputs-unchecked", "no answer of the run was compared with the reference", "run it again")
        )
    if facts.state == "done" and not len(trace):
        reasons.append(
            _invalid("nothing-measured", "the trace had no arrivals", "choose a trace or a window with some")
        )
    if len(trace) and not trace.ok.any():
        reasons.append(
            _invalid("errors-only", f"none of {len(trace)} arrivals was answered with success", "read the server's log")
        )
    if len(warmup) and not warmup.ok.any():
        reasons.append(
            _invalid("never-warm", f"none of {len(warmup)} warm-up requests was answered", "lengthen warmup.duration_s")
        )
    if facts.not_applied:
        reasons.append(
            _invalid(
                "configuration-not-applied",
                "the server reports other settings than were asked for: " + "; ".join(facts.not_applied),
                "read server/config in the trial's folder, and the server's log",
            )
        )
    injected, planned = len(facts.injected), facts.planned_faults
    if facts.state == "done" and injected < planned:
        reasons.append(
            _invalid(
                "fault-missed",
                f"{planned - injected} of {planned} planned faults hit nothing (see events.jsonl)",
                "choose a target that exists at that time",
            )
        )
    probe = facts.final_probe
    if probe is not None and not injected:
        if not probe.process_alive or facts.node_deaths:
            reasons.append(
                _invalid("server-died", "the server's main process ended during the trial", "read the server's log")
            )
        elif probe.wedged:
            text = f"in the end {probe.contradiction}"
            reasons.append(_invalid("wedged", text, "read the server's log; report it upstream"))
    return reasons


def expects_steady(facts: TrialFacts) -> bool:
    """Whether nothing about the load or the server was meant to change: no transient trace, no injected fault."""
    return not facts.transient and not facts.injected


def _host(facts: TrialFacts, host: ResourceUse) -> list[Reason]:
    """Noise of the machine, by the mean over the trace.

    Frequency: only a fall counts, for governors raise it when load comes; and only under load that is meant to be the
    same throughout, for they lower it when load goes. Virtual machines and some drivers report the nominal frequency
    whatever the cores do: no fall can be seen there, and steal, where it is told, says more.
    """
    texts = []
    steal, outside, change = host.steal, host.outside_load, host.frequency_change
    if steal is not None and np.isfinite(steal) and steal > STEAL_LIMIT:
        texts.append(f"the hypervisor took {steal:.1%} of the CPU time")
    if outside is not None and np.isfinite(outside) and outside > OUTSIDE_LOAD_LIMIT:
        texts.append(f"processes outside the trial used {outside:.1%} of the CPU")
    if change is not None and change < -FREQUENCY_LIMIT and expects_steady(facts):
        texts.append(f"the CPU frequency fell by {-change:.0%} from the first half of the trace to the second")
    if not texts:
        return []
    return [_unknown("noisy-host", "; ".join(texts), "stop other load and run again, or use more trials")]


def _gpus(gpus: Sequence[GpuFigures]) -> list[Reason]:
    """What makes figures of a GPU those of its cooling, its power limit or its neighbours."""
    reasons = []
    if lost := [gpu.gpu for gpu in gpus if gpu.lost]:
        remedy = "look for «Xid» in dmesg; reset it (nvidia-smi -r), or restart the machine"
        reasons.append(_invalid("gpu-lost", f"the driver lost {', '.join(lost)} during the trial", remedy))
    if throttled := [gpu for gpu in gpus if (gpu.throttled or 0.0) > THROTTLED_LIMIT]:
        texts = [
            f"{gpu.gpu} for {gpu.throttled:.0%} of the trace ("
            + ", ".join(f"{kind} {share:.0%}" for kind, share in _throttled(gpu).items())
            + ")"
            for gpu in throttled
        ]
        remedies = [remedy for kind, remedy in _COOLING.items() if any(kind in _throttled(gpu) for gpu in throttled)]
        text = f"clocks were held down: {'; '.join(texts)}"
        reasons.append(_unknown("gpu-throttled", text, "; ".join(remedies)))
    if shared := [text for text in map(_others_on, gpus) if text]:
        remedy = "end them (nvidia-smi lists them), or choose another GPU by CUDA_VISIBLE_DEVICES"
        reasons.append(_unknown("gpu-shared", "; ".join(shared), remedy))
    return reasons


def _shared_memory(facts: TrialFacts, gpus: Sequence[GpuFigures]) -> list[Reason]:
    """What makes figures of models that share a GPU's memory those of more memory than is said."""
    if facts.memory is None:
        return []
    budget_bytes = facts.memory.budget_bytes
    reasons = []
    told = [gpu.server_memory_bytes for gpu in gpus]
    taken = max((held for held in told if held is not None), default=0.0)
    if None in told:
        text = "the driver does not tell what the server's processes hold of the GPU's memory, which its models share"
        reasons.append(
            _unknown("memory-untold", text, "run where it does: some containers and some MIG drivers do not")
        )
    if taken > budget_bytes:
        text = f"the server's processes held up to {taken / MIB:,.0f} MiB of the GPU, not {budget_bytes / MIB:,.0f} MiB"
        remedy = (
            "let models.size_mb be what a loaded copy holds, the context of its process included, or raise memory_mb"
        )
        reasons.append(_unknown("memory-exceeded", text, remedy))
    return reasons


_COOLING = {
    "thermal": "cool the GPU, or fix a clock that it can hold (nvidia-smi -lgc MHZ)",
    "power": "raise its power limit (nvidia-smi -pl WATT), or fix a clock that it can hold (nvidia-smi -lgc MHZ)",
    "hardware": "see what slows it down: nvidia-smi -q -d PERFORMANCE",
}


def _throttled(gpu: GpuFigures) -> dict[str, float]:
    """For which share of the readings its clocks were held down, by what did it."""
    by = {"thermal": gpu.throttled_thermal, "power": gpu.throttled_power, "hardware": gpu.throttled_hardware}
    return {kind: share for kind, share in by.items() if share}


def _others_on(gpu: GpuFigures) -> str | None:
    """What processes that are not the server's had of a GPU, if that is too much."""
    memory, use, count = gpu.other_memory_bytes, gpu.other_utilization, gpu.other_processes or 0
    had = []
    if (use or 0.0) > OTHER_GPU_USE_LIMIT:
        had.append(f"used {use:.0%} of {gpu.gpu}")
    if (memory or 0.0) > OTHER_GPU_MEMORY_LIMIT:
        had.append(f"held {(memory or 0.0) / 2**30:.1f} GiB of {gpu.gpu}")
    if count and memory is None:
        had.append(f"were {count:.0f} on {gpu.gpu} (of which the driver tells no memory)")
    return f"processes outside the trial {' and '.join(had)}" if had else None


def _steadiness(facts: TrialFacts, warmup: Measured, steady: Steadiness | None) -> list[Reason]:
    """Whether the figures would be others had the trace begun later or lasted longer."""
    if steady is None or not expects_steady(facts):
        return []
    texts, remedies = [], []
    if steady.unlike_rest:
        end_s, begin_s = steady.warmup_detected_s, float(warmup.intended_ns[0]) / NS_PER_S if len(warmup) else 0.0
        slower = steady.warmup_excess > 0
        texts.append(
            f"{'the server was still warming up' if slower else 'the queue was still filling'} until second {end_s:.1f} of "
            f"the trace: its median response time was {_apart(steady.warmup_excess)} until then than afterwards"
        )
        remedies.append(f"lengthen warmup.duration_s to at least {math.ceil(end_s - begin_s)}" if slower else _OVERLOAD)
    if steady.drifting:
        slower = steady.drift > 0
        texts.append(f"the median response time {'rose' if slower else 'fell'} {_by(steady.drift)} over the trace")
        remedies.append(_OVERLOAD if slower else _LONGER)
    if steady.failures_drifting:
        grew = steady.failure_drift > 0
        texts.append(
            f"the share of failures {'rose' if grew else 'fell'} by {abs(steady.failure_drift) * 100:.0f} points over the trace"
        )
        remedies.append(_OVERLOAD if grew else _LONGER)
    if not texts:
        return []
    return [_unknown("not-steady", "; ".join(texts), "; ".join(dict.fromkeys(remedies)))]


_OVERLOAD = "lower the rate if the server cannot keep up with it, else find in its log what grows or fails"
_LONGER = "lengthen warmup.duration_s"


def _apart(excess: float) -> str:
    if math.isinf(excess):
        return "∞, for most requests failed, rather"
    return f"{abs(excess):.0%} {'higher' if excess > 0 else 'lower'}"


def _by(drift: float) -> str:
    return "to ∞, for most requests came to fail," if math.isinf(drift) else f"by {abs(drift):.0%}"
