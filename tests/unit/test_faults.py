"""Faults: planned by the seed, injected on the trace clock, healed whatever happens, refused where they cannot be done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.contract.adapter import Replica, Tuning
from tailrace.harness.contract.fault import Circumstances
from tailrace.harness.errors import InputError
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.fault_kinds import fault_kinds, refusal
from tailrace.harness.plan.faults import FaultChoice, FaultSchedule, PlannedFault, plan_faults
from tailrace.harness.processes import ProcessRef
from tailrace.harness.records.store import EventLog
from tailrace.harness.run.nemesis import Nemesis
from tailrace.harness.run.preflight import check
from tailrace.harness.run.registry import all_adapters, get_adapter
from tailrace.harness.servers.device_memory import LOADS, fail_loads, loaders, loads_under_way
from tests.conftest import wait_until


def planned(*faults: dict[str, Any], seed: int = 1) -> list[PlannedFault]:
    return plan_faults([FaultChoice(**fault) for fault in faults], span_s=30, suggested_at_s=None, seed=seed)


def test_a_fault_without_a_time_comes_where_the_trace_suggests_it_else_two_thirds_through() -> None:
    choice = FaultChoice(kind="kill_node")
    assert plan_faults([choice], span_s=30, suggested_at_s=12, seed=1)[0].at_s == 12
    assert plan_faults([choice], span_s=30, suggested_at_s=None, seed=1)[0].at_s == 20


def test_faults_are_ordered_and_know_all_their_parameters() -> None:
    late, early = {"kind": "latency", "at_s": 9, "round_trip_ms": 80}, {"kind": "pause_node", "at_s": 2}
    first, second = planned(late, early)
    assert (first.kind, first.duration_s) == ("pause_node", fault_kinds()["pause_node"].parameters()["duration_s"])
    assert second.parameters == {"duration_s": 10, "round_trip_ms": 80}


@given(st.integers(0, 2**32 - 1), st.floats(1, 600), st.sampled_from(["1/s", "6/min", "100/h"]))
def test_a_random_schedule_follows_from_its_seed_and_stays_within_the_trace(
    seed: int, span_s: float, rate: str
) -> None:
    schedule = FaultSchedule(rate=rate, kinds=("kill_node", "latency"), duration_s=2)
    drawn = plan_faults(schedule, span_s=span_s, suggested_at_s=None, seed=seed)
    assert drawn == plan_faults(schedule, span_s=span_s, suggested_at_s=5, seed=seed)
    assert [fault.at_s for fault in drawn] == sorted(fault.at_s for fault in drawn)
    assert all(0 <= fault.at_s < span_s and fault.kind in schedule.kinds for fault in drawn)
    assert all(fault.duration_s == 2 for fault in drawn if fault.kind == "latency")


def test_the_rate_of_a_random_schedule_is_its_mean() -> None:
    schedule = FaultSchedule(rate="2/min", kinds=("kill_replica",))
    counts = [len(plan_faults(schedule, span_s=600, suggested_at_s=None, seed=seed)) for seed in range(200)]
    assert 18.5 < sum(counts) / len(counts) < 21.5  # 20, with a standard error of 0.32


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": "kill_nod"}, "did you mean 'kill_node'"),
        ({"kind": "kill_node", "duration_s": 3}, "kill_node has no duration_s"),
        ({"kind": "latency", "cpus": 1}, "latency has no cpus; its parameters: duration_s, round_trip_ms"),
        ({"kind": "rolling_restart", "target": 1}, "every node in turn"),
        ({"kind": "kill_node", "target": -1}, "greater than or equal to 0"),
    ],
)
def test_what_does_not_fit_a_kind_is_refused(fault: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FaultChoice(**fault)


def test_a_schedule_refuses_what_none_of_its_kinds_has() -> None:
    with pytest.raises(ValueError, match="none of kill_node, reset has cpus"):
        FaultSchedule(rate="1/min", kinds=("kill_node", "reset"), cpus=1)
    with pytest.raises(ValueError, match="String should match pattern"):
        FaultSchedule(rate="often", kinds=("reset",))


def test_every_framework_can_have_the_faults_that_are_mandatory() -> None:
    for name in ("triton", "ray_serve", "torchserve", "kserve", "reference"):
        for kind in ("kill_replica", "kill_node", "pause_replica", "pause_node", "latency", "reset"):
            assert refusal(kind, Circumstances(get_adapter(name), Tuning(replicas=2), 2)) is None


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailrace.harness.cgroups.refusal", lambda: "a CPU quota needs a control group")
    assert (
        refusal("slow_node", Circumstances(get_adapter("triton"), Tuning(), 2)) == "a CPU quota needs a control group"
    )
    assert "nodes: 2" in str(refusal("rolling_restart", Circumstances(get_adapter("triton"), Tuning(), 1)))
    assert "one worker" in str(refusal("model_reload", Circumstances(get_adapter("kserve"), Tuning(replicas=2), 2)))
    assert refusal("model_reload", Circumstances(get_adapter("kserve"), Tuning(replicas=1), 2)) is None
    assert "`load_model`" in str(refusal("model_reload", Circumstances(get_adapter("null"), Tuning(), 2)))
    triton, ray_serve = get_adapter("triton"), get_adapter("ray_serve")
    for kind in ("memory_limit", "disconnect_node"):
        assert "`environment: docker`" in str(refusal(kind, Circumstances(triton, Tuning(), 2)))
        assert refusal(kind, Circumstances(triton, Tuning(), 2, containers=True)) is None
        assert refusal(kind, Circumstances(ray_serve, Tuning(), 1, containers=True)) is None
    assert "share one address" in str(
        refusal("disconnect_node", Circumstances(ray_serve, Tuning(), 2, containers=True))
    )
    assert refusal("slow_node", Circumstances(triton, Tuning(), 2, containers=True)) is None, (
        "the engine has control groups of its own"
    )


def test_faults_of_loading_need_models_that_come_and_go() -> None:
    reference = get_adapter("reference")
    for kind in ("kill_loading", "load_failure"):
        assert "needs `multiplexing`" in str(refusal(kind, Circumstances(reference, Tuning(replicas=1), 1)))
        assert refusal(kind, Circumstances(reference, Tuning(replicas=1), 1, multiplexed=True)) is None
    assert "pids" in str(
        refusal("kill_loading", Circumstances(reference, Tuning(), 1, multiplexed=True, containers=True))
    )
    assert "its policy" in str(refusal("model_reload", Circumstances(reference, Tuning(), 1, multiplexed=True)))


MULTIPLEXED = {
    **{"name": "multiplexed", "adapters": ["reference"], "workload": "emulated", "trace": {"name": "steady"}},
    **{"models": 3, "multiplexing": {"memory_mb": 900}},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"multiplexing": None}, "kill_loading cannot be done to reference: .* needs `multiplexing`"),
        ({"scenarios": [{"name": "s", "faults": [{"kind": "load_failure", "target": 3}]}]}, "there are 3 models"),
        ({"scenarios": [{"name": "s", "faults": [{"kind": "model_reload"}]}]}, "models come and go by its policy"),
    ],
)
def test_what_cannot_be_done_to_models_is_known_before_the_start(changes: dict[str, Any], said: str) -> None:
    scenarios = [{"name": "s", "faults": [{"kind": "kill_loading", "target": 2}, {"kind": "load_failure"}]}]
    check(Experiment.model_validate({**MULTIPLEXED, "scenarios": scenarios}))
    with pytest.raises(InputError, match=said):
        check(Experiment.model_validate({**MULTIPLEXED, "scenarios": scenarios, **changes}))


def test_fault_refusals_of_adapters_name_known_kinds() -> None:
    for adapter in all_adapters().values():
        assert set(adapter.fault_refusals(Tuning(replicas=3))) <= set(fault_kinds())


class FakeCluster:
    """Records what is done to it, in order."""

    def __init__(self, *, alive: bool = True) -> None:
        self.did: list[tuple[Any, ...]] = []
        self.device_folder = Path()
        self.trees: Callable[[], list[ProcessRef]] = list
        self.models = ["m"]
        self.node_count = 2
        self.link_names = ["node-0", "node-1"]
        self.sharing = ["emulated-00", "emulated-01"]
        self.alive = alive
        self.host = SimpleNamespace(
            signal=self._record("signal", True),
            kill_tree=self._record("kill_tree", alive),
            signal_tree=self._record("signal_tree", 3),
            limit_cpus=self._record("limit_cpus", None),
            limit_memory=self._record("limit_memory", None),
            disconnect=self._record("disconnect", None),
            reconnect=self._record("reconnect", None),
        )
        self.links = SimpleNamespace(
            latency=self._record("latency", 1),
            stalls=self._record("stalls", 1),
            partition=self._record("partition", 1),
            reset=self._record("reset", 1),
            clear=self._record("clear", 1),
        )

    def _record(self, name: str, answer: Any) -> Callable[..., Any]:
        def record(*arguments: Any, **named: Any) -> Any:
            self.did.append((name, *arguments, *named.items()))
            return answer

        return record

    def replicas(self) -> list[Replica]:
        return [Replica(f"r{i}", "m", ProcessRef(100 + i, i)) for i in range(3)] if self.alive else []

    def living(self) -> dict[int, ProcessRef]:
        return {i: ProcessRef(10 + i, 1) for i in range(2)} if self.alive else {}

    @staticmethod
    def node_name(index: int) -> str:
        return f"node-{index}"

    part_name = node_name

    def member(self, _index: int) -> Any:
        return SimpleNamespace(unload_model=self._record("unload", None), load_model=self._record("load", None))

    @property
    def containers(self) -> Any:
        return self.host

    def loading(self) -> list[tuple[str, ProcessRef]]:
        return loaders(self.device_folder, self.trees)

    def fail_loads(self, model: str, *, failing: bool) -> None:
        fail_loads(self.device_folder, model, failing=failing)

    def restart(self, index: int, *, stopped: Any) -> None:
        self.did.append(("restart", index))


def inject(tmp_path: Path, cluster: Any, faults: list[PlannedFault], *, for_s: float, seed: int = 1) -> Nemesis:
    events = EventLog(tmp_path / "events.jsonl")
    nemesis = Nemesis(faults, cluster, events, epoch_ns=time.monotonic_ns(), seed=seed)
    nemesis.start()
    time.sleep(for_s)
    nemesis.stop()
    events.close()
    return nemesis


def test_what_lasts_is_healed_in_time(tmp_path: Path) -> None:
    cluster = FakeCluster()
    faults = planned(
        {"kind": "pause_node", "at_s": 0.05, "duration_s": 0.2, "target": 1},
        {"kind": "latency", "at_s": 0.1, "duration_s": 0.3, "target": 0, "round_trip_ms": 40},
    )
    nemesis = inject(tmp_path, cluster, faults, for_s=0.8)
    assert [(name, *rest[:1]) for name, *rest in cluster.did] == [
        ("signal_tree", ProcessRef(11, 1)),
        ("latency", "node-0"),
        ("signal_tree", ProcessRef(11, 1)),
        ("clear", "node-0"),
    ]
    assert [signal.Signals(done[2]).name for done in cluster.did if done[0] == "signal_tree"] == ["SIGSTOP", "SIGCONT"]
    for told in nemesis.done:
        assert told["injected_s"] >= told["at_s"]
        assert told["healed_s"] - told["injected_s"] >= told["duration_s"] - 1e-6


def test_a_load_that_fails_is_healed(tmp_path: Path) -> None:
    cluster = FakeCluster()
    cluster.device_folder = tmp_path
    faults = planned({"kind": "load_failure", "at_s": 0, "duration_s": 0.3, "target": 1})
    events = EventLog(tmp_path / "events.jsonl")
    nemesis = Nemesis(faults, cluster, events, epoch_ns=time.monotonic_ns(), seed=1)  # type: ignore[arg-type]
    nemesis.start()
    mark = tmp_path / "load-fails.emulated-01"
    wait_until(mark.exists, "loads fail")
    wait_until(lambda: not mark.exists(), "they do no more")
    nemesis.stop()
    events.close()
    assert [(told["target"], told["healed_s"] > 0.29) for told in nemesis.done] == [("emulated-01", True)]


def told_of(folder: Path, *lines: tuple[str, str, int]) -> None:
    with (folder / LOADS).open("a") as log:
        for what, model, pid in lines:
            log.write(json.dumps({"what": what, "model": model, "pid": pid}) + "\n")


def test_loads_under_way_are_those_that_have_not_ended(tmp_path: Path) -> None:
    assert loads_under_way(tmp_path) == []
    told_of(tmp_path, ("begun", "a", 1), ("begun", "b", 2), ("loaded", "a", 1), ("begun", "c", 3), ("refused", "d", 4))
    told_of(tmp_path, ("failed", "c", 3), ("begun", "a", 5))
    with (tmp_path / LOADS).open("a") as log:
        log.write('{"what": "loaded", "mod')
    assert loads_under_way(tmp_path) == [("b", 2), ("a", 5)]


@pytest.fixture
def loader() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def test_whoever_loads_the_model_is_killed_and_nobody_else(tmp_path: Path, loader: subprocess.Popen[bytes]) -> None:
    cluster = FakeCluster()
    cluster.device_folder = tmp_path
    cluster.trees = lambda: [ProcessRef.of(loader.pid)]
    told_of(tmp_path, ("begun", "emulated-00", loader.pid), ("begun", "emulated-01", os.getpid()))
    faults = planned({"kind": "kill_loading", "at_s": 0, "target": 1})
    events = EventLog(tmp_path / "events.jsonl")
    nemesis = Nemesis(faults, cluster, events, epoch_ns=time.monotonic_ns(), seed=1)  # type: ignore[arg-type]
    nemesis.start()
    time.sleep(0.2)
    assert cluster.did == [], "the other model's loader is not meant, and this very process is none of the cluster's"
    told_of(tmp_path, ("begun", "emulated-01", loader.pid))
    wait_until(lambda: nemesis.done[0]["injected_s"] is not None, "the fault was injected")
    nemesis.stop()
    events.close()
    assert cluster.did == [("signal", ProcessRef.of(loader.pid), signal.SIGKILL)]
    assert (nemesis.done[0]["target"], nemesis.done[0]["pid"]) == ("emulated-01", loader.pid)


def test_without_a_load_nobody_is_killed_and_others_come_in_time(tmp_path: Path) -> None:
    cluster = FakeCluster()
    cluster.device_folder = tmp_path
    faults = planned({"kind": "kill_loading", "at_s": 0}, {"kind": "kill_node", "at_s": 0.1})
    nemesis = inject(tmp_path, cluster, faults, for_s=0.5)
    assert [told["injected_s"] is None for told in nemesis.done] == [True, False]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "fault-missed"] == [
        "no model was loaded from then on"
    ]


def test_what_is_done_to_containers_alone_is_taken_back(tmp_path: Path) -> None:
    cluster = FakeCluster()
    faults = planned(
        {"kind": "memory_limit", "at_s": 0, "duration_s": 0.2, "target": 0, "memory_mb": 512},
        {"kind": "disconnect_node", "at_s": 0.1, "duration_s": 0.2, "target": 1},
    )
    nemesis = inject(tmp_path, cluster, faults, for_s=0.6)
    assert cluster.did == [
        ("limit_memory", ProcessRef(10, 1), 512 << 20),
        ("disconnect", ProcessRef(11, 1)),
        ("limit_memory", ProcessRef(10, 1), None),
        ("reconnect", ProcessRef(11, 1)),
    ]
    assert [told["target"] for told in nemesis.done] == ["node-0", "node-1"]


def test_the_end_heals_what_is_not_healed_yet(tmp_path: Path) -> None:
    cluster = FakeCluster()
    faults = planned(
        {"kind": "partition", "at_s": 0, "duration_s": 60, "target": 1},
        {"kind": "slow_node", "at_s": 0, "duration_s": 60, "target": 0, "cpus": 0.5},
        {"kind": "kill_node", "at_s": 50},
    )
    nemesis = inject(tmp_path, cluster, faults, for_s=0.2)
    assert cluster.did == [
        ("partition", "node-1"),
        ("limit_cpus", ProcessRef(10, 1), 0.5),
        ("clear", "node-1", "partition"),
        ("limit_cpus", ProcessRef(10, 1), None),
    ]
    assert all(told["healed_s"] is not None for told in nemesis.done)
    assert len(nemesis.done) == 2, "what had not come yet does not come any more"


def test_of_two_faults_that_overlap_in_one_place_the_last_end_heals(tmp_path: Path) -> None:
    cluster = FakeCluster()
    faults = planned(
        {"kind": "latency", "at_s": 0.0, "duration_s": 0.4, "target": 0, "round_trip_ms": 10},
        {"kind": "latency", "at_s": 0.1, "duration_s": 0.1, "target": 0, "round_trip_ms": 90},
    )
    inject(tmp_path, cluster, faults, for_s=0.7)
    assert cluster.did == [
        ("latency", "node-0", 10),
        ("latency", "node-0", 90),
        ("latency", "node-0", 10),
        ("clear", "node-0", "latency"),
    ]


def test_what_died_while_it_was_paused_twice_is_over_all_the_same(tmp_path: Path) -> None:
    cluster = FakeCluster()
    sent = [3, 3, 0, 0]  # the node is gone when the first pause ends
    cluster.host.signal_tree = lambda *_: sent.pop(0)
    faults = planned(
        {"kind": "pause_node", "at_s": 0.0, "duration_s": 0.2, "target": 0},
        {"kind": "pause_node", "at_s": 0.0, "duration_s": 0.4, "target": 0},
        {"kind": "kill_node", "at_s": 0.5, "target": 1},
    )
    nemesis = inject(tmp_path, cluster, faults, for_s=0.8)
    assert [told["healed_s"] is not None for told in nemesis.done] == [True, True, False]
    assert nemesis.done[2]["injected_s"] is not None, "the next fault still comes"


@given(st.integers(0, 2**32 - 1))
def test_the_same_seed_hits_the_same_targets(seed: int) -> None:
    choices = [{"kind": kind, "at_s": 0} for kind in ("kill_replica", "kill_node", "reset", "pause_replica")]
    hits = []
    for _ in range(2):
        cluster, told = FakeCluster(), []
        log: Any = SimpleNamespace(write=lambda *_, **more: told.append(more.get("target")))  # noqa: B023
        nemesis = Nemesis(planned(*choices), cluster, log, epoch_ns=time.monotonic_ns(), seed=seed)  # type: ignore[arg-type]
        for _ in range(len(choices)):
            nemesis._due[0][2]()
            nemesis._due.pop(0)
        hits.append((cluster.did, told))
    assert hits[0] == hits[1]


def test_when_nothing_is_alive_the_fault_is_told_as_missed(tmp_path: Path) -> None:
    nemesis = inject(tmp_path, FakeCluster(alive=False), planned({"kind": "kill_replica", "at_s": 0}), for_s=0.1)
    assert nemesis.done[0]["injected_s"] is None
    assert "no replica was alive" in (tmp_path / "events.jsonl").read_text()


def test_an_unknown_target_is_missed_and_the_next_fault_still_comes(tmp_path: Path) -> None:
    cluster = FakeCluster()
    faults = planned({"kind": "kill_node", "at_s": 0, "target": 7}, {"kind": "kill_node", "at_s": 0.05, "target": 1})
    nemesis = inject(tmp_path, cluster, faults, for_s=0.3)
    assert [told["target"] for told in nemesis.done] == [None, "node-1"]


def test_errands_take_their_time_beside_other_faults(tmp_path: Path) -> None:
    cluster = FakeCluster()
    faults = planned({"kind": "rolling_restart", "at_s": 0}, {"kind": "model_reload", "at_s": 0.1, "target": 0})
    nemesis = inject(tmp_path, cluster, faults, for_s=0.4)
    assert sorted(cluster.did) == [("load", "m"), ("restart", 0), ("restart", 1), ("unload", "m")]
    assert all(told["healed_s"] is not None for told in nemesis.done)
