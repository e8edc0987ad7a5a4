"""A server's way from its start to its first correct answer, phase by phase: what trials and cold starts both begin with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tailrace.harness.contract.adapter import Endpoint
from tailrace.harness.contract.exchange import Answer, check_answer, exchange
from tailrace.harness.errors import DeployError, ServerError
from tailrace.harness.processes import log_tail
from tailrace.harness.run.setup import ServerSetup

ANSWER_TIMEOUT_S = 30.0
POLL_S = 0.01


class Starting(Protocol):
    """What comes up: a deployment, seen from outside."""

    endpoint: Endpoint
    log: Path

    def open(self) -> bool: ...
    def claims_ready(self) -> bool: ...
    def check_alive(self) -> None: ...


@dataclass(frozen=True)
class _Asked:
    """One answer, and when on the monotonic clock it was asked for and there."""

    answer: Answer
    sent_ns: int
    done_ns: int


def wrong_answer(name: str, difference: str, detail: str | None = None) -> ServerError:
    """What ends a trial whose server answers otherwise than the reference."""
    return ServerError(
        f"{name} does not compute what the reference computes: {difference}",
        remedy="the server runs another model, or the workload's tolerance is too tight for this device",
        detail=detail,
    )


class ServerStart:
    """Waits for one phase after the other. Every wait raises :class:`DeployError` when it takes too long or the server dies."""

    def __init__(
        self,
        setup: ServerSetup,
        deployment: Starting,
        start_ns: int,
        reached: Callable[[str, float], None],
    ) -> None:
        """``reached`` is told of each phase, by its key in the record, and the seconds from ``start_ns`` to its end."""
        self._name = setup.cell.adapter
        self._timeout_s = setup.adapter.start_timeout_s
        self._deployment = deployment
        self._workload = setup.workload
        self._model = setup.cell.models[0]
        self._request = deployment.endpoint.codec.encode(self._model, setup.workload.payloads[0])
        self._start_ns = start_ns
        self._reached = reached
        self.failed_answers = 0
        """How many requests failed before the first answer."""
        self.lied_s = 0.0
        """For how long that went on, while the server said that it was ready."""

    def come_up(self) -> None:
        """Wait for the port, and for the framework's own word."""
        self._wait("open its port", self._deployment.open)
        self.reached("port_open_s", time.monotonic_ns())
        self._wait(
            "say that it is ready",
            self._deployment.claims_ready,
            lambda: ", though it answers requests: it is wedged" if self._ask().answer.ok else "",
        )
        self.reached("ready_s", time.monotonic_ns())

    def first_answer(self) -> float:
        """Ask until there is an answer; how long that one took, in milliseconds. Raises :class:`ServerError` for a wrong one."""
        claimed_ns = time.monotonic_ns()
        while not (asked := self._ask()).answer.ok:
            self.failed_answers += 1
            self.lied_s = (time.monotonic_ns() - claimed_ns) / 1e9
            excuse = f", though it says that it is ready; its last answer: {asked.answer.text}"
            self._go_on("answer a request", excuse.__str__)
        took_ms = self._judged(asked)
        self.reached("first_answer_s", asked.done_ns)
        return took_ms

    def next_answer(self) -> float:
        """As :meth:`first_answer`, but one that fails is an error."""
        return self._judged(self._ask())

    def _ask(self) -> _Asked:
        """Always the same request, so that times compare."""
        sent_ns = time.monotonic_ns()
        answer = exchange(self._deployment.endpoint, self._request, ANSWER_TIMEOUT_S)
        return _Asked(answer, sent_ns, time.monotonic_ns())

    def _judged(self, asked: _Asked) -> float:
        answer, endpoint = asked.answer, self._deployment.endpoint
        if not answer.ok:
            raise ServerError(
                f"{self._name} failed after its first correct answer: {answer.text}",
                remedy=f"read the log: {self._deployment.log}",
                detail=log_tail(self._deployment.log),
            )
        difference = check_answer(endpoint, self._workload, self._model, 0, answer.headers, answer.body)
        if difference is not None:
            raise wrong_answer(self._name, difference, log_tail(self._deployment.log))
        return (asked.done_ns - asked.sent_ns) / 1e6

    def reached(self, phase: str, at_ns: int) -> None:
        """A phase has ended, at an instant of the monotonic clock."""
        self._reached(phase, (at_ns - self._start_ns) / 1e9)

    def _wait(self, purpose: str, reached: Callable[[], bool], excuse: Callable[[], str] = str) -> None:
        while not reached():
            self._go_on(purpose, excuse)

    def _go_on(self, purpose: str, excuse: Callable[[], str]) -> None:
        """A short pause, unless there is nothing left to wait for."""
        self._deployment.check_alive()
        if time.monotonic_ns() - self._start_ns > self._timeout_s * 1e9:
            raise DeployError(
                f"{self._name} did not {purpose} within {self._timeout_s:.0f} s{excuse()}",
                remedy=f"read the log: {self._deployment.log}",
                detail=log_tail(self._deployment.log),
            )
        time.sleep(POLL_S)
