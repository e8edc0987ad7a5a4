"""What a trial asks its servers beside the load: whether they are right, what they were told, and how they stand."""

from __future__ import annotations

import math
import time
from typing import Any

from tailrace.harness.contract.adapter import CapabilityMissingError, Deployment, Endpoint
from tailrace.harness.contract.exchange import check_answer, exchange
from tailrace.harness.errors import ServerError
from tailrace.harness.processes import log_tail
from tailrace.harness.records.facts import Outputs, TrialFacts
from tailrace.harness.records.probe import Probe
from tailrace.harness.replay.driver import ReplayResult
from tailrace.harness.run.setup import ServerSetup
from tailrace.harness.run.start import ANSWER_TIMEOUT_S, POLL_S, wrong_answer
from tailrace.harness.servers.cluster import Cluster

_VERIFIED_PAYLOADS = 16
"""Payloads whose answers are compared with the reference before the clock starts, per model."""
_RESTARTED_ANSWER_TIMEOUT_S = 2.0


def verify(setup: ServerSetup, deployment: Deployment) -> int:
    """Compare answers with the reference before the clock starts, and say how many. Raises :class:`ServerError` on the first
    difference."""
    workload, endpoint = setup.workload, deployment.endpoint
    count = min(_VERIFIED_PAYLOADS, len(workload.payloads))
    # The most popular last: they are in memory then, if not all are.
    for model in reversed(setup.cell.models):
        for payload_id in range(count):
            request = endpoint.codec.encode(model, workload.payloads[payload_id])
            answer = exchange(endpoint, request, ANSWER_TIMEOUT_S)
            if not answer.ok:
                deployment.check_alive()
                raise ServerError(
                    f"{setup.cell.adapter} answered a verification request with {answer.text}",
                    remedy=f"read the log: {deployment.log}",
                    detail=log_tail(deployment.log),
                )
            difference = check_answer(endpoint, workload, model, payload_id, answer.headers, answer.body)
            if difference is not None:
                raise wrong_answer(setup.cell.adapter, difference)
    return count * len(setup.cell.models)


def check_applied(setup: ServerSetup, deployment: Deployment, facts: TrialFacts) -> None:
    """What the servers say of their own knobs, into the facts, where they say anything."""
    try:
        applied = deployment.applied()
    except CapabilityMissingError:
        return
    except (OSError, ServerError) as error:
        facts.warnings.append(f"the server did not report its configuration: {error}")
        return
    asked = setup.cell.tuning.model_dump(mode="json", exclude_none=True)
    facts.applied = applied
    facts.not_applied = [
        f"{knob}: asked for {value}, the server has {applied[knob]}"
        for knob, value in asked.items()
        if knob in applied and not _same_setting(applied[knob], value)
    ]


def _same_setting(reported: Any, asked: Any) -> bool:
    """Whether a server applied what was asked for; times may be rounded to the server's own unit, and of a knob with
    several parts it may report more than was asked for."""
    if isinstance(reported, dict) and isinstance(asked, dict):
        return all(key in reported and _same_setting(reported[key], value) for key, value in asked.items())
    if isinstance(reported, float) or isinstance(asked, float):
        return math.isclose(float(reported), float(asked), rel_tol=1e-3, abs_tol=1e-3)
    return bool(reported == asked)


def answers_rightly(setup: ServerSetup, endpoint: Endpoint) -> bool:
    """Whether a server that was started again answers as the reference does."""
    model, workload = setup.cell.models[0], setup.workload
    answer = exchange(endpoint, endpoint.codec.encode(model, workload.payloads[0]), _RESTARTED_ANSWER_TIMEOUT_S)
    return answer.ok and check_answer(endpoint, workload, model, 0, answer.headers, answer.body) is None


def check_outputs(setup: ServerSetup, deployment: Deployment, result: ReplayResult) -> Outputs:
    """Compare every distinct answer of the replay with the reference; counts are of requests, not of answers."""
    checked = mismatched = 0
    example = None
    for answer in result.answers:
        difference = check_answer(
            deployment.endpoint, setup.workload, answer.model, answer.payload_id, answer.headers, answer.body
        )
        checked += answer.count
        if difference is not None:
            mismatched += answer.count
            example = example or difference
    return Outputs(checked=checked, mismatched=mismatched, unchecked=result.unchecked, example=example)


def ask_state(setup: ServerSetup, cluster: Cluster) -> tuple[Probe, str | None]:
    """How the servers stand, and what one said in place of an answer.

    An overloaded server is given the time to come to this request, and after it to health checks that wait behind
    others that nobody wants any more.
    """
    request = cluster.endpoint.codec.encode(setup.cell.models[0], setup.workload.payloads[0])
    before = _work_done(cluster)
    answer = exchange(cluster.endpoint, request, ANSWER_TIMEOUT_S)
    busy = not answer.ok and before is not None and (_work_done(cluster) or 0.0) > before
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while (ready := cluster.claims_ready()) != answer.ok and answer.ok and time.monotonic() < deadline:
        time.sleep(POLL_S)
    probe = Probe(process_alive=cluster.alive(), claims_ready=ready, answers=answer.ok, busy=busy)
    return probe, None if answer.ok else answer.text


def _work_done(deployment: Deployment) -> float | None:
    """How many requests the server has ended by its own counters; ``None`` where it does not say."""
    try:
        return sum(s.value for s in deployment.scrape() if s.metric in ("requests_ok_total", "requests_failed_total"))
    except (OSError, CapabilityMissingError):
        return None
