"""Results doubt themselves: each trial is VALID, INVALID or UNKNOWN, with reasons and what to do about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.metrics import Measured, percentile
from harness.records import Outcome

Verdict = Literal["VALID", "INVALID", "UNKNOWN"]

STEAL_LIMIT = 0.05
"""Mean share of CPU time stolen by the hypervisor above which a host is noisy."""
OUTSIDE_LOAD_LIMIT = 0.20
"""Mean share of the host's CPU used by processes that are not the trial's above which a host is noisy."""


@dataclass(frozen=True)
class Reason:
    """Why a trial is not simply VALID: a stable code, a sentence with the numbers, and a remedy."""

    code: str
    text: str
    remedy: str
    effect: Literal["INVALID", "UNKNOWN"]


def judge(
    facts: Mapping[str, Any], trace: Measured, warmup: Measured, host: Mapping[str, float | None]
) -> tuple[Verdict, list[Reason]]:
    """The verdict on one trial.

    ``facts`` is the trial's ``trial.json``; ``host`` holds ``steal`` and ``outside_load`` as mean shares (``None``: not
    known). What an injected fault does to a server is a result, never a reason.
    """
    reasons = [*_completeness(facts), *_generator(facts, trace), *_server(facts, trace, warmup), *_host(host)]
    if any(reason.effect == "INVALID" for reason in reasons):
        return "INVALID", reasons
    return ("UNKNOWN" if reasons else "VALID"), reasons


def _invalid(code: str, text: str, remedy: str) -> Reason:
    return Reason(code, text, remedy, "INVALID")


def _completeness(facts: Mapping[str, Any]) -> list[Reason]:
    if facts["state"] == "done":
        return []
    error = facts.get("error") or {}
    told = error.get("message", "the harness was stopped before the trial ended")
    return [
        _invalid(
            "incomplete", f"the trial did not finish ({facts['state']}): {told}", error.get("remedy") or "run it again"
        )
    ]


def _generator(facts: Mapping[str, Any], trace: Measured) -> list[Reason]:
    reasons = []
    if dropped := trace.count(Outcome.DROPPED):
        reasons.append(
            _invalid(
                "dropped",
                f"the generator could not send {dropped} of {len(trace)} arrivals",
                "raise client.max_connections, lower the rate, or shorten client.timeout_s",
            )
        )
    # The generator's own lateness: the send lag also holds the wait for a connection, which is the server's.
    p99 = (facts.get("load_generator") or {}).get("start_lag_p99_ms")
    if p99 is not None:
        answered = trace.response_ms()[trace.ok]
        limit = max(1.0, 0.1 * percentile(answered, 0.5) if len(answered) else 0.0)
        if p99 > limit:
            reasons.append(
                _invalid(
                    "generator-saturated",
                    f"arrivals were taken up late: p99 {p99:.2f} ms is above {limit:.2f} ms (the larger of 1 ms and a tenth "
                    "of the median response time)",
                    "lower the rate, or leave the generator a core of its own",
                )
            )
    return reasons


def _server(facts: Mapping[str, Any], trace: Measured, warmup: Measured) -> list[Reason]:
    reasons = []
    outputs = facts.get("outputs") or {}
    if wrong := outputs.get("mismatched", 0):
        reasons.append(
            _invalid(
                "output-mismatch",
                f"{wrong} of {outputs['checked']} checked answers differ from the reference"
                + (f": {outputs['example']}" if outputs.get("example") else ""),
                "the server does not run the same model, or mixes requests up: do not compare it",
            )
        )
    elif trace.ok.any() and outputs and not outputs["checked"]:
        reasons.append(
            _invalid("outputs-unchecked", "no answer of the run was compared with the reference", "run it again")
        )
    if facts["state"] == "done" and not len(trace):
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
    if missing := facts.get("not_applied"):
        reasons.append(
            _invalid(
                "configuration-not-applied",
                "the server reports other settings than were asked for: " + "; ".join(missing),
                "read server/config in the trial's folder, and the server's log",
            )
        )
    injected = sum(fault["injected_s"] is not None for fault in facts.get("faults") or [])
    planned = facts.get("planned_faults", 0)
    if facts["state"] == "done" and injected < planned:
        reasons.append(
            _invalid(
                "fault-missed",
                f"{planned - injected} of {planned} planned faults hit nothing (see events.jsonl)",
                "choose a target that exists at that time",
            )
        )
    probe = facts.get("final_probe")
    if probe and not injected:
        if not probe["process_alive"]:
            reasons.append(
                _invalid("server-died", "the server's main process ended during the trial", "read the server's log")
            )
        elif probe["claims_ready"] != probe["answers"]:
            state = (
                "health answers but inference does not"
                if probe["claims_ready"]
                else "inference answers but health does not"
            )
            reasons.append(_invalid("wedged", f"after the trial {state}", "read the server's log; report it upstream"))
    return reasons


def _host(host: Mapping[str, float | None]) -> list[Reason]:
    texts = []
    steal, outside = host.get("steal"), host.get("outside_load")
    if steal is not None and np.isfinite(steal) and steal > STEAL_LIMIT:
        texts.append(f"the hypervisor took {steal:.1%} of the CPU time")
    if outside is not None and np.isfinite(outside) and outside > OUTSIDE_LOAD_LIMIT:
        texts.append(f"processes outside the trial used {outside:.1%} of the CPU")
    if not texts:
        return []
    return [Reason("noisy-host", "; ".join(texts), "stop other load and run again, or use more trials", "UNKNOWN")]
