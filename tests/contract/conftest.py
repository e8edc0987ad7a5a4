"""One server of each adapter for the whole suite, its start watched closely; what is seen is recorded at the end."""

from __future__ import annotations

import math
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tailrace.harness.contract.adapter import Adapter, CapabilityMissingError, Deployment, DeployRequest, Tuning
from tailrace.harness.contract.observations import Axis, Observation, record
from tailrace.harness.run.registry import all_adapters, get_adapter
from tailrace.harness.servers import environments
from tailrace.harness.servers.guardian import Guardian
from tests.contract.bench import Bench, Reply, ask

TUNING = Tuning(max_batch=8, batch_window_ms=100, replicas=2)
MODELS = ("alpha", "beta")
_REPLACEMENT_S = 10.0
Observe = Callable[..., None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes an adapter runs for each that claims all the capabilities it ``needs`` and ``places`` one of
    its knobs, one adapter after the other; ``--adapter NAME`` narrows it."""
    if "adapter" not in metafunc.fixturenames:
        return
    needed = {name for mark in metafunc.definition.iter_markers("needs") for name in mark.args}
    placed = {name for mark in metafunc.definition.iter_markers("places") for name in mark.args}
    chosen = metafunc.config.getoption("--adapter") or list(all_adapters())
    claiming = [
        name
        for name, adapter in ((name, get_adapter(name)) for name in chosen)
        if needed <= set(adapter.capabilities()) and (not placed or placed & set(adapter.knobs))
    ]
    metafunc.parametrize("adapter", claiming, indirect=True, scope="session")


@pytest.fixture(scope="session")
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """The adapter under test."""
    return get_adapter(request.param)


@pytest.fixture(scope="session")
def bench(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Its environment, from its lock file alone, and a guardian of its own."""
    environment = environments.build("venv", [adapter.requirements], name=adapter.name)
    with Guardian() as guardian:
        yield Bench(adapter, environment, guardian, tmp_path_factory.mktemp(adapter.name))


@dataclass
class Start:
    """How a start went: when health and readiness were first claimed, and every request sent meanwhile."""

    health_s: float | None = None
    claim_s: float | None = None
    replies: list[Reply] = field(default_factory=list)

    def lie_s(self, claimed_s: float | None) -> float:
        """For how long a claim stood before the first request that was answered rightly was sent."""
        first_right_s = next(reply.started_s for reply in self.replies if reply.right)
        failed_after = [r for r in self.replies if claimed_s is not None and r.started_s > claimed_s and not r.right]
        return first_right_s - claimed_s if failed_after and claimed_s is not None else 0.0


@dataclass
class Server:
    """The server that the tests of one adapter share."""

    bench: Bench
    request: DeployRequest
    deployment: Deployment
    start: Start
    before: frozenset[Path]

    def whole(self) -> Deployment:
        """The server with all its replicas: another one, where it or a replica has died and nobody replaces it."""
        deadline = time.monotonic() + _REPLACEMENT_S
        while not (self.deployment.claims_ready() and self._complete()):
            if time.monotonic() > deadline or not self.deployment.process.alive():
                self.deployment.stop()
                self.deployment = self.bench.deploy(self.bench.request(TUNING, models=MODELS))
                self.bench.wait_ready(self.deployment)
                break
            time.sleep(0.1)
        return self.deployment

    def _complete(self) -> bool:
        try:
            replicas = self.deployment.replicas()
        except CapabilityMissingError:
            return True
        return sum(replica.model == MODELS[0] for replica in replicas) == (self.request.tuning.replicas or 1)


_NOT_OF_SERVERS = re.compile(r"pytest-.*|tailrace-\w{8}")
"""Of the suite itself, and the scratch folders of trials that somebody else runs."""


def traces_on_disk() -> frozenset[Path]:
    """What lies where servers are known to forget things."""
    folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))  # noqa: S108 - looked at, not used
    return frozenset(p for folder in folders for p in folder.iterdir() if not _NOT_OF_SERVERS.fullmatch(p.name))


def used_by_others(path: Path) -> bool:
    """Whether a process that lives names or maps it: then it is of a server of another test, side by side with this one."""
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values(), *(mapped.path for mapped in process.memory_maps())]
        except (psutil.Error, OSError):
            continue
        if any(str(path) in text for text in told):
            return True
    return False


@pytest.fixture(scope="session")
def server(bench: Bench) -> Iterator[Server]:
    """A server of two models in two replicas that batches, as far as the framework has a place for that."""
    before = traces_on_disk()
    request = bench.request(TUNING, models=MODELS)
    deployment = bench.deploy(request)
    shared = Server(bench, request, deployment, Start(), before)
    try:
        _watch_start(shared)
        yield shared
    finally:
        shared.deployment.stop()


def _watch_start(server: Server) -> None:
    deployment, start, ended = server.deployment, server.start, threading.Event()

    def keep_asking() -> None:
        while not ended.wait(0.02):
            start.replies.append(ask(deployment, timeout_s=20))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    deadline = time.monotonic() + server.bench.adapter.start_timeout_s
    try:
        while not (any(reply.right for reply in start.replies) and start.claim_s is not None):
            deployment.check_alive()
            assert time.monotonic() < deadline, f"not ready in time; the last answer: {start.replies[-1:]}"
            now_s = time.monotonic()
            if start.claim_s is None and deployment.claims_ready():
                start.claim_s = now_s
            if start.health_s is None and _health(deployment):
                start.health_s = now_s
            time.sleep(0.02)
    finally:
        ended.set()
        asking.join()
    start.replies.append(ask(deployment))


def _health(deployment: Deployment) -> bool:
    try:
        return deployment.health()
    except CapabilityMissingError:
        return False


@pytest.fixture(scope="session")
def seen(adapter: Adapter) -> Iterator[list[Observation]]:
    """What the suite sees of one adapter; recorded for `tailrace adapters` and for reports."""
    found: list[Observation] = []
    yield found
    if found:
        record(adapter, found)


@pytest.fixture
def observe(seen: list[Observation]) -> Observe:
    """Take down an observation."""

    def take_down(axis: Axis, text: str, **figures: float) -> None:
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        seen.append(Observation(axis=axis, text=text, figures=finite))

    return take_down
