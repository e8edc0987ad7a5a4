"""Where models share a limited memory: who had to wait for a model, and what went in and out, from a trial's records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tailrace.harness.analysis.across import mean, percentile_across
from tailrace.harness.analysis.metrics import NS_PER_S, Measured, claim_percentile
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.contract.multiplexing import MIB
from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.record import Ends
from tailrace.harness.records.summary import Meeting, Multiplexing, TrialSummary


class Met(IntEnum):
    """How a request met its model."""

    HOT = 0
    """It was in memory."""
    WARM = 1
    """It was already being loaded, or about to be, for another request (a delayed hit)."""
    COLD = 2
    """It was loaded for this one (a miss)."""


def loads_of(events: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, int, bool, int]]:
    """Every load in the order in which they began: model, begun and ended (ns from the epoch), whether it came to its end, and
    bytes. One that was cut off by a death ends where it began."""
    loads: list[tuple[str, int, int, bool, int]] = []
    begun: dict[tuple[str, int], Mapping[str, Any]] = {}
    for event in events:
        if not str(event["event"]).startswith("model-") or "t_ns" not in event:
            continue
        if event["event"] == "model-begun":
            begun[event["model"], event["pid"]] = event
        elif event["event"] in ("model-loaded", "model-failed"):
            first = begun.pop((event["model"], event["pid"]), None)
            if first is not None:
                whole = event["event"] == "model-loaded"
                loads.append((event["model"], first["t_ns"], event["t_ns"], whole, event["bytes"]))
    loads += [(e["model"], e["t_ns"], e["t_ns"], False, e["bytes"]) for e in begun.values()]
    return sorted(loads, key=lambda load: load[1])


def met(trace: Measured, models: Sequence[str], events: Iterable[Mapping[str, Any]]) -> NDArray[np.uint8]:
    """How each arrival met its model (:class:`Met`), in the order of ``trace``, which knows whom each is for.

    Those who waited for a load were sent before it ended and had no answer by then; the first of them is the one that it
    was for. Not told by evictions, for those are seen up to 50 ms later; nor by the server, for each would tell it otherwise. Who
    failed while no load ended is cold if the model was not in memory all the time.
    """
    found = np.zeros(len(trace), dtype=np.uint8)
    if trace.model is None:
        return found
    ended: dict[str, list[int]] = {}
    for model, _, end_ns, _, _ in loads_of(events):
        ended.setdefault(model, []).append(end_ns)
    copies = _copies(events)
    for position, model in enumerate(models):
        own = np.flatnonzero((trace.model == position) & (trace.sent_ns >= 0))
        own = own[np.argsort(trace.sent_ns[own], kind="stable")]
        if not len(own):
            continue
        sent, done = trace.sent_ns[own], trace.done_ns[own]
        longest = int((done - sent).max())
        for end_ns in sorted(ended.get(model, [])):
            first, last = np.searchsorted(sent, [end_ns - longest, end_ns])
            waited = own[first:last][done[first:last] >= end_ns]
            if len(waited):
                found[waited] = np.maximum(found[waited], Met.WARM)
                found[waited[0]] = Met.COLD
        lost = own[~trace.ok[own] & (found[own] == Met.HOT)]
        if len(lost) and model in copies:
            at_ns, count = copies[model]
            first, last = (
                np.searchsorted(at_ns, times[lost], side="right") - 1 for times in (trace.sent_ns, trace.done_ns)
            )
            absences = np.cumsum(count < 1)
            found[lost[(count[first] < 1) | (absences[last] > absences[first])]] = Met.COLD
    return found


def _copies(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """How many copies of each model are in memory, from when on (ns from the epoch), as far as events tell."""
    told = sorted((event for event in events if "t_ns" in event), key=lambda event: int(event["t_ns"]))
    steps: dict[str, list[tuple[int, int]]] = {}
    seen = False
    for event in told:
        match event["event"]:
            case "models-resident":
                seen = True
                for model in event["models"]:
                    steps[model] = [(np.iinfo(np.int64).min, 1)]
            case "model-loaded" | "model-gone" as name if seen:
                before = steps.setdefault(event["model"], [(np.iinfo(np.int64).min, 0)])
                before.append((event["t_ns"], before[-1][1] + (1 if name == "model-loaded" else -1)))
    return {
        model: (np.array([at for at, _ in own], dtype=np.int64), np.array([count for _, count in own], dtype=np.int64))
        for model, own in steps.items()
    }


def residence(
    facts: TrialFacts,
    trace: Measured,
    models: Sequence[str],
    events: Sequence[Mapping[str, Any]],
    samples: Samples,
    span_s: float,
) -> Multiplexing | None:
    """The figures of a trial whose models shared a limited memory; ``None`` for any other."""
    memory = facts.memory
    if memory is None:
        return None
    response = trace.response_ms()
    how = met(trace, models, events)
    within = [event for event in events if 0 <= event.get("t_ns", -1) <= span_s * NS_PER_S]
    loads = [load for load in loads_of(events) if 0 <= load[2] <= span_s * NS_PER_S]
    whole = [load for load in loads if load[3]]
    t_s, free = samples.series("memory", "memory_free_bytes")
    free = free[(t_s >= 0) & (t_s <= span_s)] / MIB
    return Multiplexing(
        policy=memory.policy,
        pinned=len(memory.pinned),
        memory_mb=memory.budget_bytes / MIB,
        controlled=memory.controlled,
        models=len(memory.sizes),
        loads=len(whole),
        evictions=sum(event["event"] == "model-gone" for event in within),
        load_failures=len(loads) - len(whole),
        refused=sum(event["event"] == "model-refused" for event in within),
        reload_mb=sum(load[4] for load in whole) / MIB,
        load_p50_s=float(np.median([(load[2] - load[1]) / NS_PER_S for load in whole])) if whole else None,
        hot=_meeting(how == Met.HOT, trace, response),
        warm=_meeting(how == Met.WARM, trace, response),
        cold=_meeting(how == Met.COLD, trace, response),
        headroom_min_mb=float(free.min()) if len(free) else None,
        headroom_mean_mb=float(free.mean()) if len(free) else None,
        resident_mean=samples.mean("memory", "models_resident", span_s),
    )


def _meeting(chosen: NDArray[np.bool_], trace: Measured, response: NDArray[np.float64]) -> Meeting:
    p50, p99 = (claim_percentile(response[chosen], q) for q in (0.50, 0.99))
    requests = int(np.count_nonzero(chosen))
    share, ends = _share(requests, len(trace))
    return Meeting(
        requests=requests,
        share=share,
        share_ci=ends,
        p50_ms=p50.value,
        p50_ci_ms=p50.ends,
        p99_ms=p99.value,
        p99_ci_ms=p99.ends,
        failed=int(np.count_nonzero(chosen & ~trace.ok)),
    )


def _share(count: int, of: int) -> tuple[float | None, Ends | None]:
    """With Wilson's interval, which treats requests as independent."""
    if not of:
        return None, None
    ends = binomtest(count, of).proportion_ci(method="wilson")
    return count / of, (float(ends.low), float(ends.high))


def residence_across(members: Sequence[TrialSummary]) -> Multiplexing | None:
    """The figures of a cell over its trials: counts add up."""
    told = [trial.multiplexing for trial in members if trial.multiplexing is not None]
    if not told:
        return None
    first, arrivals = told[0], sum(trial.arrivals for trial in members)
    return Multiplexing(
        policy=first.policy,
        pinned=first.pinned,
        memory_mb=first.memory_mb,
        controlled=first.controlled,
        models=first.models,
        loads=sum(one.loads for one in told),
        evictions=sum(one.evictions for one in told),
        load_failures=sum(one.load_failures for one in told),
        refused=sum(one.refused for one in told),
        reload_mb=sum(one.reload_mb for one in told),
        load_p50_s=mean(one.load_p50_s for one in told),
        hot=_meetings([one.hot for one in told], arrivals),
        warm=_meetings([one.warm for one in told], arrivals),
        cold=_meetings([one.cold for one in told], arrivals),
        headroom_min_mb=min((one.headroom_min_mb for one in told if one.headroom_min_mb is not None), default=None),
        headroom_mean_mb=mean(one.headroom_mean_mb for one in told),
        resident_mean=mean(one.resident_mean for one in told),
    )


def _meetings(kinds: Sequence[Meeting], arrivals: int) -> Meeting:
    requests = sum(one.requests for one in kinds)
    share, ends = _share(requests, arrivals)
    return Meeting(
        requests=requests,
        share=share,
        share_ci=ends,
        **percentile_across(kinds, "p50_ms"),
        **percentile_across(kinds, "p99_ms"),
        failed=sum(one.failed for one in kinds),
    )
