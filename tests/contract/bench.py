"""Servers and requests for the contract suite: one adapter, the suite's own model, and a client that keeps everything."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tailrace.harness.contract.adapter import (
    Adapter,
    Deployment,
    DeployRequest,
    ServerEnvironment,
    Tuning,
    WireProtocol,
)
from tailrace.harness.contract.exchange import exchange
from tailrace.harness.contract.workload import PreparedWorkload, Slo, TensorSpec, WorkloadSpec
from tailrace.harness.errors import DeployError, ServerError
from tailrace.harness.processes import log_tail, port_open
from tailrace.harness.servers.guardian import Guardian

MODEL_FILE = Path(__file__).with_name("model.py")
SPEC = WorkloadSpec(
    name="contract",
    title="Contract",
    description="Twice the input plus a number that the model's name gives.",
    devices=("cpu",),
    inputs=(TensorSpec(name="x", dtype="int32", shape=(4,)),),
    outputs=(TensorSpec(name="y", dtype="int64", shape=(4,)), TensorSpec(name="seen", dtype="int64", shape=(3,))),
    slo=Slo(latency_ms=1000),
)
PATIENCE_S = float(os.environ.get("TAILRACE_CONTRACT_PATIENCE_S", "60"))
"""How long a condition may take to come true; shorter where a suite is meant to fail."""


@dataclass(frozen=True)
class Reply:
    """What became of one request. ``right``: answered as the reference says; times are monotonic seconds."""

    started_s: float
    ended_s: float
    right: bool
    wrong: bool
    said: str
    batch: int = 0
    pid: int = 0
    marker: int = 0

    @property
    def took_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def shed(self) -> bool:
        """Refused because the server is full."""
        return not self.right and any(word in self.said for word in ("HTTP 503", "HTTP 429", "RESOURCE_EXHAUSTED"))


@dataclass
class Bench:
    """Deploys one adapter's servers and asks them."""

    adapter: Adapter
    environment: ServerEnvironment
    guardian: Guardian
    folder: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def request(
        self,
        tuning: Tuning | None = None,
        *,
        models: tuple[str, ...] = ("alpha",),
        broken: Sequence[str] = (),
        load_s: float = 0.0,
        marker: int = 1,
        protocol: WireProtocol | None = None,
        ports: tuple[int, ...] = (),
    ) -> DeployRequest:
        """A deployment of the contract's model with as much of the tuning as the adapter can express.

        Results may lie in a folder with a blank in its name; ``scratch`` is the harness's own choice.
        """
        number = next(self._numbers)
        folder, scratch = self.folder / f"server {number}", self.folder / f"scratch-{number}"
        folder.mkdir()
        scratch.mkdir()
        artifact = folder / "artifact.json"
        artifact.write_text(json.dumps({"load_s": load_s, "broken": list(broken)}))
        options = self.adapter.Options()
        spoken = protocol or self.adapter.protocols[0]
        return DeployRequest(
            workload=PreparedWorkload(SPEC, "cpu", MODEL_FILE, artifact, "", None, (), {}),
            models=models,
            tuning=self.adapter.expressible(tuning or Tuning(), options, spoken)[0],
            options=options,
            protocol=spoken,
            environment=self.environment,
            workdir=folder,
            scratch=scratch,
            server_env={"CONTRACT_MARKER": str(marker)},
            ports=ports,
        )

    def deploy(self, request: DeployRequest) -> Deployment:
        """Render, write, and start; returns at once."""
        return self.adapter.start(request, self.guardian)

    def wait_ready(self, deployment: Deployment, model: str = "alpha") -> None:
        """Until the server claims to be ready and answers; raises what ends that."""
        deadline = time.monotonic() + self.adapter.start_timeout_s
        while not (deployment.claims_ready() and ask(deployment, model).right):
            deployment.check_alive()
            if time.monotonic() > deadline:
                raise DeployError("not ready in time", detail=log_tail(deployment.log))
            time.sleep(0.05)

    @contextmanager
    def running(self, request: DeployRequest) -> Iterator[Deployment]:
        """A server that is ready, and stopped in the end."""
        deployment = self.deploy(request)
        try:
            self.wait_ready(deployment)
            yield deployment
        finally:
            deployment.stop()


def ask(
    deployment: Deployment,
    model: str = "alpha",
    value: int = 7,
    *,
    sleep_ms: int = 0,
    fail: bool = False,
    timeout_s: float = PATIENCE_S,
) -> Reply:
    """One request over a connection of its own, its answer compared with what the model must say."""
    x = np.array([value, sleep_ms, int(fail), value + 1], dtype=np.int32)
    request = deployment.endpoint.codec.encode(model, {"x": x})
    started_s = time.monotonic()
    answer = exchange(deployment.endpoint, request, timeout_s)
    ended_s = time.monotonic()
    if not answer.ok:
        return Reply(started_s, ended_s, False, False, answer.text)
    try:
        outputs = deployment.endpoint.codec.decode(answer.headers, answer.body)
    except ServerError as error:
        return Reply(started_s, ended_s, False, True, str(error))
    right = bool((outputs["y"] == x.astype(np.int64) * 2 + sum(model.encode())).all())
    batch, pid, marker = (int(number) for number in outputs["seen"])
    return Reply(started_s, ended_s, right, not right, "ok", batch, pid, marker)


def ask_all(
    deployment: Deployment, count: int, *, sleep_ms: int = 0, model: str = "alpha", at_once: int = 32
) -> list[Reply]:
    """``count`` requests, up to ``at_once`` at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(ask, deployment, model, number, sleep_ms=sleep_ms) for number in range(count)]
        return [future.result() for future in futures]


class Stream:
    """Requests at a steady rate, never waiting for answers, from ``start`` until ``finish`` collects every reply."""

    def __init__(self, deployment: Deployment, rate: float, *, timeout_s: float = 15.0) -> None:
        self._deployment = deployment
        self._gap_s = 1 / rate
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(256)
        self._futures: list[Future[Reply]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> list[Reply]:
        """Send no more; every reply, in the order in which requests were sent."""
        self._ending.set()
        self._thread.join()
        replies = [future.result() for future in self._futures]
        self._pool.shutdown()
        return replies

    def _send(self) -> None:
        begun_s = time.monotonic()
        for number in itertools.count():
            if self._ending.wait(max(0.0, begun_s + number * self._gap_s - time.monotonic())):
                return
            self._futures.append(self._pool.submit(ask, self._deployment, "alpha", number, timeout_s=self._timeout_s))


def until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> float:
    """Poll until a condition holds; how long that took, in seconds."""
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begun_s < timeout_s, f"timed out waiting until {what}"
        time.sleep(0.02)
    return time.monotonic() - begun_s


def closed(deployment: Deployment) -> bool:
    """Whether nobody listens on the server's port any more."""
    return not port_open(deployment.endpoint.host, deployment.endpoint.port)
