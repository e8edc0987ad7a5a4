"""A trial's phases in their order, and what goes beside them: on a deployment and a load that are made up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tailrace.harness.contract.adapter import CapabilityMissingError, Endpoint, ServerEnvironment
from tailrace.harness.contract.exchange import Answer
from tailrace.harness.errors import DeployError, TailraceError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.processes import ProcessRef
from tailrace.harness.records.store import TrialFolder
from tailrace.harness.replay.driver import Progress, ReplayResult
from tailrace.harness.run import answers, deploy, start, trial
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.preflight import check
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.run.ruler import plain_workload
from tailrace.harness.run.setup import TrialSetup
from tailrace.traces.trace import Trace

FEATURES = (
    *("failures_raised", "scratch_folder", "nvml_opened", "server_host", "deployed", "models_controlled"),
    *("nodes_watched", "load_generator", "samples_taken", "servers_scaled", "faults_injected"),
)
"""In the order in which they are entered."""
ORDER = [
    *("+failures_raised", "+scratch_folder", "deploy", "+nvml_opened", "+server_host", "+deployed"),
    *("brought up", "+models_controlled", "verify", "verified", "+nodes_watched"),
    *("+load_generator", "warm up", "+samples_taken", "+servers_scaled", "+faults_injected", "measure"),
    *("-faults_injected", "-servers_scaled", "-samples_taken", "-load_generator", "drained", "accounted", "probed"),
    *("-nodes_watched", "-models_controlled", "-deployed", "stop", "stopped"),
    *("-server_host", "-nvml_opened", "-scratch_folder", "-failures_raised"),
]
PHASES = ["deploy", "brought up", "verify", "verified", "warm up", "measure", "drained", "accounted", "probed", "stop"]

Log = Callable[[str], None]


class MadeUp:
    """A cluster of one node that is there at once."""

    node_count = 1
    deaths = 0
    log = Path("/nonexistent.log")

    def __init__(self, told: Log) -> None:
        codec = SimpleNamespace(encode=lambda model, payload: b"")
        self.endpoint = Endpoint("http", "127.0.0.1", 1, codec)  # type: ignore[arg-type]
        self.process = ProcessRef.of(os.getpid())
        self.notes: list[str] = []
        self._told = told

    def open(self) -> bool:
        return True

    claims_ready = alive = open

    def nothing(self, *_: Any) -> None:
        """Of what is told of, and asked to begin or to end."""

    check_alive = watch = stop_watching = nothing

    def none(self) -> list[Any]:
        return []

    trees = scrape = replicas = none

    def companions(self) -> dict[str, Any]:
        return {}

    def applied(self) -> dict[str, object]:
        self._told("verified")
        raise CapabilityMissingError("applied")

    def stop(self, _: float) -> None:
        self._told("stopped")


class Load:
    """A load generator that has sent everything already."""

    pid = None
    aborted = False

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        pass

    def go(self, epoch_ns: int) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True

    def wait(self, follow: Callable[[Progress], None] = lambda _: None) -> ReplayResult:
        if not self.aborted:
            follow(Progress(**dict.fromkeys(Progress.__dataclass_fields__, 0)))
        told = dict.fromkeys(ReplayResult.__dataclass_fields__)
        return ReplayResult(**told | {"cpu_s": 1.0, "answers": (), "workers": (), "unchecked": 0})  # type: ignore[arg-type]


class Stand:
    """Where a trial runs; whatever happens to it is in ``log``, and one thing that happens may end it."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, module: ModuleType = trial) -> None:
        self.log: list[str] = []
        self.fails_at: str | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.folder = TrialFolder(folder / "null--no-fault--1")
        self._module = module
        real = {name: getattr(module, name) for name in FEATURES} | {"load_generator": lambda *_: Load()}
        for name, feature in real.items():
            patch.setattr(module, name, self.recorded(name, feature))
        guardian = SimpleNamespace(remove_later=lambda _: None, spawned_ns=lambda _: 0)
        patch.setattr(module, "Guardian", lambda: contextlib.nullcontext(guardian))
        patch.setattr(module, "_sleep_until", lambda _: None)
        patch.setattr(deploy, "Cluster", lambda *_: MadeUp(self.tell))
        for asking in (start, answers):
            patch.setattr(asking, "exchange", lambda *_: Answer(True))
            patch.setattr(asking, "check_answer", lambda *_: None)
        for phase, function in (("accounted", "check_outputs"), ("probed", "ask_state")):
            patch.setattr(module, function, self.noted(phase, getattr(module, function)))
        come_up = start.ServerStart.first_answer
        patch.setattr(start.ServerStart, "first_answer", self.noted("brought up", come_up))

    def tell(self, what: str) -> None:
        self.log.append(what)
        if what == self.fails_at:
            raise self.error

    def noted(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            self.tell(phase)
            return function(*given)

        return wrapped

    def recorded(self, name: str, feature: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def wrapped(*given: Any, **more: Any) -> Iterator[Any]:
            with feature(*given, **more) as made:
                self.tell(f"+{name}")
                try:
                    yield made
                finally:
                    self.log.append(f"-{name}")

        return wrapped

    def run(self) -> Any:
        checked = check(Experiment.model_validate({"name": "x", "adapters": ["null"], "trace": "steady"}))
        plan, workload = checked.plans[0], plain_workload(16)
        cell = checked.cells[plan.cell].model_copy(update={"models": tuple(workload.references)})
        setup = TrialSetup(
            cell=cell,
            plan=plan,
            adapter=get_adapter("null"),
            environment=ServerEnvironment(Path("/nonexistent/python"), "current"),
            workload=workload,
            trace=Trace("one", np.zeros(1, np.int64), 1_000_000),
        )

        class Watching(Observer):
            def stage(_, plan: Any, name: str) -> None:  # noqa: N805
                self.tell(name)

        made = self._module.Trial(setup, self.folder, Watching())
        made.run()
        return made


def left(log: list[str]) -> list[str]:
    return [name[1:] for name in log if name.startswith("-")]


def entered(log: list[str]) -> list[str]:
    return [name[1:] for name in log if name.startswith("+")]


def test_phases_come_in_their_order_and_features_are_left_in_the_reverse_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand = Stand(monkeypatch, tmp_path)
    facts = stand.run().facts
    assert (facts.state, facts.error) == ("done", None)
    assert stand.log == ORDER
    assert tuple(entered(stand.log)) == FEATURES
    assert left(stand.log) == list(reversed(FEATURES[7:])) + list(reversed(FEATURES[:7]))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), DeployError("it fell over"), ZeroDivisionError("a bug")], ids=repr
)
def test_whatever_ends_a_phase_everything_is_left_and_the_server_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: str, error: BaseException
) -> None:
    stand = Stand(monkeypatch, tmp_path)
    stand.fails_at, stand.error = phase, error
    with contextlib.nullcontext() if isinstance(error, TailraceError) else pytest.raises(type(error)):
        stand.run()
    done = ORDER[: ORDER.index(phase) + 1]
    assert stand.log[: len(done)] == done
    assert sorted(entered(stand.log)) == sorted(left(stand.log))
    open_then = [name for name in entered(done) if name not in left(done)]
    assert left(stand.log[len(done) :]) == open_then[::-1]
    assert ("stopped" in stand.log) == ("+deployed" in stand.log)
    facts = json.loads(stand.folder.facts_path.read_text())
    assert facts["state"] == ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
    assert facts["error"]["message"]
    events = [json.loads(line) for line in (stand.folder.folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == f"trial-{facts['state']}"


FEATURE = """
import contextlib

@contextlib.contextmanager
def temperature_told(cluster, events):
    events.write("temperature", degrees=20)
    yield
    events.write("temperature", degrees=30)
"""


def test_a_new_feature_is_one_file_and_the_line_that_enters_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "thermometer.py").write_text(FEATURE)
    monkeypatch.syspath_prepend(tmp_path)
    source, anchor = Path(trial.__file__).read_text(), "            enter(nodes_watched("
    assert source.count(anchor) == 1
    planted = tmp_path / "planted_trial.py"
    planted.write_text(
        source.replace(anchor, f"            enter(temperature_told(cluster, events))\n{anchor}").replace(
            "import contextlib\n", "import contextlib\nfrom thermometer import temperature_told\n", 1
        )
    )
    spec = importlib.util.spec_from_file_location("planted_trial", planted)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted_trial", module)
    spec.loader.exec_module(module)
    stand = Stand(monkeypatch, tmp_path, module)
    assert stand.run().facts.state == "done"
    assert [event["degrees"] for event in stand.folder.events if event["event"] == "temperature"] == [20, 30]
    assert stand.log == ORDER
