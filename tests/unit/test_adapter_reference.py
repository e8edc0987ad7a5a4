"""The reference server without processes: what is rendered, and its queues, batches, scalers and HTTP held against the
simulator and against hostile bytes."""

from __future__ import annotations

import asyncio
import heapq
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tailrace.adapters.reference.adapter import ADAPTER, Options, knobs_in, system_of
from tailrace.adapters.reference.server.__main__ import Server
from tailrace.adapters.reference.server.batching import NEVER, Batching, Request
from tailrace.adapters.reference.server.http import HEAD_BYTES, Answer, Connection, RefusedError, parse_head
from tailrace.adapters.reference.server.prediction import Service, p99_s
from tailrace.adapters.reference.server.queueing import Dispatcher
from tailrace.adapters.reference.server.replica import Layout
from tailrace.adapters.reference.server.scaling import Autoscaler, Look, Scaler, SloTracking, TargetTracking
from tailrace.harness.analysis.metrics import Ints, percentile
from tailrace.harness.contract.adapter import AXES, CAPABILITIES, Autoscale, DeployRequest, ServerEnvironment, Tuning
from tailrace.harness.contract.multiplexing import MemoryPlan
from tailrace.harness.contract.workload import PreparedWorkload, Slo, TensorSpec, WorkloadSpec
from tailrace.harness.processes import free_ports
from tailrace.simulator import system as model
from tailrace.simulator.engine import ANSWERED, NS_PER_S, QUEUED, SHED, simulate
from tailrace.simulator.system import System

NS_PER_MS = 1_000_000
SPEC = WorkloadSpec(
    name="toy",
    title="Toy",
    description="",
    devices=("cpu",),
    inputs=(TensorSpec(name="x", dtype="float16", shape=(2, 2)), TensorSpec(name="k", dtype="int64", shape=(1,))),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(3,)),),
    slo=Slo(latency_ms=150),
)
REQUEST = DeployRequest(
    workload=PreparedWorkload(SPEC, "cpu", Path("/w/model.py"), Path('/a/tïny "one"'), "", None, (), {}),
    models=("alpha", "beta"),
    tuning=Tuning(),
    options=Options(),
    protocol="http",
    environment=ServerEnvironment(Path("/env/bin/python"), "venv"),
    workdir=Path("/run"),
    scratch=Path("/scratch"),
    server_env={},
)
SCALE = Autoscale(min=1, max=4, target_ongoing=12, up_after_s=3)


class TestAdapter:
    def test_everything_is_claimed_and_every_knob_has_a_place(self) -> None:
        assert ADAPTER.capabilities() == list(CAPABILITIES)
        assert set(ADAPTER.knobs) == set(Tuning.model_fields)
        assert set(ADAPTER.traits) == set(AXES)
        assert not ADAPTER.exposes
        assert not ADAPTER.approximate

    def test_what_the_server_is_told(self) -> None:
        config = json.loads(ADAPTER.render(REQUEST)["server.json"])
        assert config["models"] == ["alpha", "beta"]
        assert (config["model_file"], config["artifact"], config["device"]) == ("/w/model.py", '/a/tïny "one"', "cpu")
        assert (config["input_bytes"], config["output_bytes"]) == (16, 12)
        assert config["slo_ms"] == 150
        slower = replace(REQUEST, options=Options(slo_ms=400, admission="slo"))
        told = json.loads(ADAPTER.render(slower)["server.json"])
        assert (told["slo_ms"], told["admission"]) == (400, "slo")

    @pytest.mark.parametrize(
        ("tuning", "options"),
        [
            (Tuning(), Options()),
            (
                Tuning(max_batch=4, batch_window_ms=0, replicas=3, queue_limit=7, server_timeout_s=2),
                Options(router="random"),
            ),
            (Tuning(autoscale=SCALE), Options(warm_pool=1, window_opens="idle")),
            (Tuning(autoscale=SCALE), Options(scale_on="waiting")),
        ],
    )
    def test_the_system_that_is_rendered_is_one_that_the_simulator_takes(
        self, tuning: Tuning, options: Options
    ) -> None:
        rendered = ADAPTER.render(replace(REQUEST, tuning=tuning, options=options))["system.json"]
        system = model.validated(json.loads(rendered), "system.json")
        assert system.router == options.router
        assert system.batching.window_opens == options.window_opens
        assert system.batching.max_batch == (tuning.max_batch or 16)
        assert system.timeout_s == tuning.server_timeout_s
        if tuning.autoscale is None:
            assert system.replicas == (tuning.replicas or 1)
        elif options.scale_on == "waiting":
            assert system.autoscaler is not None
            assert (system.autoscaler.up_above, system.autoscaler.down_below) == (12, 4)
        else:
            assert system.tracking is not None
            assert (system.tracking.target_ongoing, system.tracking.up_after_s) == (12, 3)
            assert system.tracking.min == system.replicas == 2, "the fewest and the warm pool"

    def test_its_defaults_are_the_simulators_but_for_the_bound_of_its_queue(self) -> None:
        system = model.validated(system_of(Tuning(), Options()), "defaults")
        assert system == System(queue_limit=1024)

    def test_a_fixed_number_of_replicas_that_is_to_change_is_refused(self) -> None:
        refusals = ADAPTER.refusals(Tuning(autoscale=SCALE, replicas=2), Options(), "http")
        assert list(refusals) == ["replicas"]
        assert not ADAPTER.refusals(Tuning(autoscale=SCALE), Options(), "http")

    def test_what_it_reports_is_read_as_knobs(self) -> None:
        reported = {
            "batching": {"max_batch": 8, "window_s": 0.0101, "window_opens": "arrival"},
            "router": "shared",
            "queue_limit": 9,
            "replicas": 2,
            "timeout_s": None,
            "warm_pool": 1,
        }
        assert knobs_in(reported) == {"max_batch": 8, "batch_window_ms": 10.1, "queue_limit": 9, "replicas": 2}
        scaler = {"min": 2, "max": 4, "period_s": 0.1, "target_ongoing": 12, "up_after_s": 3.0}
        assert knobs_in({**reported, "scaler": scaler})["autoscale"] == {
            "min": 1,
            "max": 4,
            "target_ongoing": 12,
            "up_after_s": 3.0,
        }
        assert "replicas" not in knobs_in({**reported, "scaler": scaler})


# ------------------------------------------------------------------------- the same code, on the simulator's clock


@dataclass
class Served:
    """What became of every arrival, in the simulator's terms; and replicas ready at every sample."""

    done_ns: Ints
    outcome: Ints
    batches: Ints
    ready: list[int]

    def response_ms(self, arrivals_ns: Ints) -> Any:
        return np.where(self.outcome == ANSWERED, (self.done_ns - arrivals_ns) / NS_PER_MS, np.inf)


class Clockwork:
    """The server's own dispatcher and scaler, driven from event to event as the simulator goes; all times are whole nanoseconds,
    so that ties are ties. At one instant: replicas that are done or have come up, arrivals, batches, scaler, sample."""

    def __init__(
        self, system: System, arrivals_ns: Ints, admit_within_ns: float, scaler: Scaler | None, cold_start_ns: int
    ) -> None:
        batching = Batching(
            system.batching.max_batch, round(system.batching.window_ms * NS_PER_MS), system.batching.window_opens
        )
        limit = cast(int, NEVER) if system.queue_limit is None else system.queue_limit
        self.dispatcher: Dispatcher[int] = Dispatcher(batching, system.router, limit, admit_within_s=admit_within_ns)
        self.times = system.service.times_ns(batching.max_batch)
        self.arrivals_ns, self.scaler, self.cold_start_ns = arrivals_ns, scaler, cold_start_ns
        self.numbers: dict[Request, int] = {}
        count = len(arrivals_ns)
        self.served = Served(
            np.full(count, -1, np.int64), np.full(count, QUEUED), np.zeros(batching.max_batch + 1, np.int64), []
        )
        self.born = system.replicas
        self.coming: list[tuple[int, int, bool]] = []
        """When a replica is done with its batch, or comes up."""
        self.arrival = self.arrived = self.starting = 0
        for replica in range(system.replicas):
            self.dispatcher.add(replica, 0)

    def run(self, span_ns: int, sample_ns: int = NS_PER_S // 10) -> Served:
        """Until nothing more happens; scaler and samples until the span has passed."""
        looks = set(range(0, span_ns + 1, int(self.scaler.period_s))) if self.scaler else set()
        samples = set(range(0, span_ns + 1, sample_ns)) if span_ns else set()
        clock = sorted(looks | samples)
        while True:
            arrives = self.arrivals_ns[self.arrival] if self.arrival < len(self.arrivals_ns) else NEVER
            comes = self.coming[0][0] if self.coming else NEVER
            now = min(arrives, comes, self.dispatcher.next_start_s(), clock[0] if clock else NEVER)
            if now == NEVER:
                return self.served
            self._instant(int(now))
            if clock and clock[0] == now:
                clock.pop(0)
                if now in looks:
                    self._look(int(now))
                if now in samples:
                    self.served.ready.append(len(self.dispatcher.seats))

    def _instant(self, now: int) -> None:
        while self.coming and self.coming[0][0] == now:
            _, replica, is_new = heapq.heappop(self.coming)
            if is_new:
                self.dispatcher.add(replica, now)
                self.starting -= 1
                continue
            for request in self.dispatcher.finish(replica, now):
                number = self.numbers[request]
                self.served.done_ns[number], self.served.outcome[number] = now, ANSWERED
        while self.arrival < len(self.arrivals_ns) and self.arrivals_ns[self.arrival] == now:
            request = Request(b"", now, lambda status, body: None)
            self.numbers[request] = self.arrival
            if self.dispatcher.arrive(request, now) is not None:
                self.served.outcome[self.arrival] = SHED
            self.arrival += 1
            self.arrived += 1
        for replica, batch in self.dispatcher.start(now):
            self.served.batches[len(batch)] += 1
            heapq.heappush(self.coming, (now + int(self.times[len(batch)]), replica, False))

    def _look(self, now: int) -> None:
        dispatcher = self.dispatcher
        assert self.scaler is not None
        look = Look(now, dispatcher.waiting, dispatcher.in_hand, self.arrived, len(dispatcher.seats), self.starting)
        change = self.scaler.change(look)
        self.arrived = 0
        for _ in range(max(0, change)):
            heapq.heappush(self.coming, (now + self.cold_start_ns, self.born, True))
            self.born, self.starting = self.born + 1, self.starting + 1
        idle = [replica for replica, seat in dispatcher.seats.items() if not seat.in_hand]
        for replica in idle[: max(0, -change)]:
            dispatcher.remove(replica)


def serve(
    system: System,
    arrivals_ns: Ints,
    *,
    admit_within_ns: float = NEVER,
    scaler: Scaler | None = None,
    cold_start_ns: int = 0,
    span_ns: int = 0,
) -> Served:
    return Clockwork(system, arrivals_ns, admit_within_ns, scaler, cold_start_ns).run(span_ns)


def poisson(rate: float, count: int, seed: int = 3) -> Ints:
    gaps = np.random.default_rng(seed).exponential(1e9 / rate, count)
    return np.cumsum(gaps).astype(np.int64)


@st.composite
def systems(draw: st.DrawFn) -> System:
    base_ms = draw(st.integers(0, 20))
    return System(
        service=model.Service(base_ms=base_ms, per_item_ms=draw(st.integers(0 if base_ms else 1, 10))),
        batching=model.Batching(
            max_batch=draw(st.integers(1, 8)),
            window_ms=draw(st.sampled_from([0, 1, 5, 20])),
            window_opens=draw(st.sampled_from(["arrival", "idle"])),
        ),
        replicas=draw(st.integers(1, 4)),
        router=draw(st.sampled_from(["shared", "round_robin", "shortest_queue"])),
        queue_limit=draw(st.none() | st.integers(1, 20)),
    )


class TestAgainstTheSimulator:
    @given(system=systems(), gaps=st.lists(st.integers(0, 40), min_size=1, max_size=150))
    @settings(max_examples=150, deadline=None)
    def test_it_does_what_the_model_does_to_the_nanosecond(self, system: System, gaps: list[int]) -> None:
        """Whole milliseconds, so that there are ties in plenty."""
        arrivals = np.cumsum(gaps).astype(np.int64) * NS_PER_MS
        modelled = simulate(system, arrivals, span_ns=int(arrivals[-1]) + NS_PER_S)
        served = serve(system, arrivals)
        assert served.outcome.tolist() == modelled.outcome.tolist()
        assert served.done_ns.tolist() == modelled.done_ns.tolist()
        assert served.batches.tolist() == modelled.batches.tolist()

    @pytest.mark.parametrize("router", ["random", "power_of_two"])
    def test_routers_that_draw_come_out_alike(self, router: Any) -> None:
        system = System(replicas=4, router=router)
        arrivals = poisson(700, 20_000)
        modelled = simulate(system, arrivals, span_ns=int(arrivals[-1]))
        served = serve(system, arrivals)
        mean = float(np.mean(served.response_ms(arrivals)))
        assert mean == pytest.approx(float(np.mean(modelled.response_ms())), rel=0.05)

    def test_a_shared_queue_forms_the_largest_batches_and_chance_makes_the_longest_tail(self) -> None:
        """Four replicas serve 1,067/s at most."""

        def routed(router: Any, rate: float) -> tuple[float, float]:
            arrivals = poisson(rate, 20_000)
            served = serve(System(replicas=4, router=router), arrivals)
            return 20_000 / served.batches.sum(), percentile(served.response_ms(arrivals), 0.99)

        others = ("round_robin", "shortest_queue", "power_of_two", "random")
        calm = {router: routed(router, 700) for router in ("shared", *others)}
        assert all(calm["shared"][0] > 1.5 * calm[router][0] for router in others)
        busy = {router: routed(router, 950)[1] for router in ("shared", *others)}
        assert min(busy, key=lambda router: busy[router]) == "shared"
        assert max(busy, key=lambda router: busy[router]) == "random"

    def test_target_tracking_scales_as_the_model_does(self) -> None:
        tracking = model.TargetTracking(
            target_ongoing=6, max=5, averaged_over_s=0.5, up_after_s=0.3, down_after_s=1.5, cold_start_s=0.7
        )
        system = System(tracking=tracking)
        arrivals = np.sort(np.concatenate([poisson(60, 900, 1), 2 * NS_PER_S + poisson(600, 1800, 2)]))
        span = 15 * NS_PER_S
        modelled = simulate(system, arrivals, span_ns=span)
        scaler = TargetTracking(
            min=1,
            max=5,
            period_s=NS_PER_S // 10,
            target_ongoing=6,
            averaged_over_s=NS_PER_S // 2,
            up_after_s=3 * NS_PER_S // 10,
            down_after_s=3 * NS_PER_S // 2,
        )
        served = serve(system, arrivals, scaler=scaler, cold_start_ns=7 * NS_PER_S // 10, span_ns=span)
        assert max(served.ready) > 2
        assert served.ready == modelled.samples[:, 2].tolist()
        assert served.done_ns.tolist() == modelled.done_ns.tolist()

    def test_the_autoscaler_scales_as_the_model_does(self) -> None:
        rule = model.Autoscaler(up_above=8, down_below=2, max=4, cold_start_s=0.4)
        system = System(autoscaler=rule)
        arrivals = np.sort(np.concatenate([poisson(50, 600, 1), 2 * NS_PER_S + poisson(600, 1800, 2)]))
        span = 12 * NS_PER_S
        modelled = simulate(system, arrivals, span_ns=span)
        scaler = Autoscaler(min=1, max=4, period_s=NS_PER_S // 10, up_above=8, down_below=2)
        served = serve(system, arrivals, scaler=scaler, cold_start_ns=4 * NS_PER_S // 10, span_ns=span)
        assert max(served.ready) > 1
        assert served.ready == modelled.samples[:, 2].tolist()
        assert served.done_ns.tolist() == modelled.done_ns.tolist()


class TestPolicies:
    def test_admission_control_keeps_answers_within_the_slo_when_there_is_twice_too_much(self) -> None:
        """A replica answers 267/s in full batches. Behind a queue of 1024 every answer comes too late, and is in vain."""
        system = System(queue_limit=1024)
        arrivals = poisson(534, 10_000)
        slo_ns = 200 * NS_PER_MS
        open_door = serve(system, arrivals)
        at_the_door = serve(system, arrivals, admit_within_ns=slo_ns)

        def share_in_time(served: Served) -> float:
            return float(np.mean(served.response_ms(arrivals) * NS_PER_MS <= slo_ns))

        assert share_in_time(open_door) < 0.1
        assert share_in_time(at_the_door) > 0.45, "half is what can be served at all"
        late = at_the_door.response_ms(arrivals)
        assert np.mean(late[np.isfinite(late)] * NS_PER_MS <= slo_ns) > 0.98, "who is let in is answered in time"

    def test_who_is_turned_away_is_told_for_how_long(self) -> None:
        dispatcher: Dispatcher[int] = Dispatcher(Batching(4, 0.0, "arrival"), "shared", 8)
        dispatcher.add(0, 0.0)
        for n in (1, 2, 4):
            dispatcher.service.learn(n, 1.0 + n)
        told = [dispatcher.arrive(Request(b"", 0.0, lambda *_: None), 0.0) for _ in range(9)]
        assert told[:8] == [None] * 8
        assert told[8] == pytest.approx(15.0), "behind two full batches of 5 s, in a third one"

    @pytest.mark.parametrize("slo_ms", [120, 200])
    @pytest.mark.parametrize("rate", [60, 200, 450, 900])
    def test_scaling_on_the_slo_wants_as_many_replicas_as_meet_it(self, rate: float, slo_ms: float) -> None:
        scaler = slo_tracking(slo_ms / 1e3)
        scaler.change(Look(0.0, 0, 0, round(rate * scaler.period_s), 1, 0))
        wanted = scaler.wanted()
        arrivals = poisson(rate, 20_000)

        def p99_ms(replicas: int) -> float:
            simulated = simulate(System(replicas=replicas), arrivals, span_ns=int(arrivals[-1]))
            return percentile(simulated.response_ms(), 0.99)

        assert p99_ms(wanted) <= slo_ms
        needed = next(n for n in range(1, 30) if p99_ms(n) <= slo_ms)
        assert wanted <= 1.5 * needed + 1, "and not many more"

    def test_scaling_on_the_slo_wants_more_for_a_tighter_slo_and_the_same_queue(self) -> None:
        """What a target of ongoing requests cannot tell apart."""
        wanted = []
        for slo_s in (0.08, 0.4):
            scaler = slo_tracking(slo_s)
            scaler.change(Look(0.0, 10, 20, round(500 * scaler.period_s), 2, 0))
            wanted.append(scaler.wanted())
        assert wanted[0] > wanted[1] >= 2

    def test_scaling_on_the_slo_goes_by_the_target_until_it_knows_how_long_batches_take(self) -> None:
        scaler = replace(slo_tracking(0.2), service=Service())
        scaler.change(Look(0.0, 30, 0, 50, 1, 0))
        assert scaler.wanted() == 3


def slo_tracking(slo_s: float) -> SloTracking:
    service = Service()
    for n in (1, 4, 9, 16):
        service.learn(n, 0.012 + 0.003 * n)
    pace = {"averaged_over_s": 1.0, "up_after_s": 0.0, "down_after_s": 0.0}
    limits = {"min": 1, "max": 30}
    return SloTracking(
        **limits,
        period_s=1.0,
        target_ongoing=10,
        **pace,
        slo_s=slo_s,
        service=service,
        batching=Batching(16, 0.01, "arrival"),
    )


class TestPrediction:
    @given(
        base_ms=st.floats(0, 50),
        per_item_ms=st.floats(0.1, 20),
        sizes=st.lists(st.integers(1, 64), min_size=2, max_size=200).filter(lambda sizes: len(set(sizes)) > 1),
        asked=st.integers(1, 64),
    )
    @settings(deadline=None)
    def test_times_are_learnt_from_batches(
        self, base_ms: float, per_item_ms: float, sizes: list[int], asked: int
    ) -> None:
        service = Service()
        for n in sizes:
            service.learn(n, base_ms + per_item_ms * n)
        if len(set(sizes[-50:])) > 1:
            assert service.time_s(asked) == pytest.approx(base_ms + per_item_ms * asked, rel=1e-3, abs=1e-3)

    @given(batches=st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 10)), min_size=1, max_size=50))
    @settings(deadline=None)
    def test_no_time_is_ever_negative_and_none_shrinks_with_the_batch(self, batches: list[tuple[int, float]]) -> None:
        service = Service()
        assert service.time_s(16) == 0
        for n, took_s in batches:
            service.learn(n, took_s)
        times = [service.time_s(n) for n in range(1, 65)]
        assert times[0] >= -1e-9
        assert all(later >= earlier - 1e-9 for earlier, later in pairwise(times))

    def test_more_than_replicas_can_do_takes_for_ever(self) -> None:
        service = Service()
        for n in (1, 16):
            service.learn(n, 0.012 + 0.003 * n)
        batching = Batching(16, 0.01, "arrival")
        assert p99_s(service, batching, 500, 0, 1) == NEVER
        assert p99_s(service, batching, 500, 0, 3) < p99_s(service, batching, 500, 100, 3) < 0.5


class TestDispatcher:
    def dispatcher(self, router: str) -> Dispatcher[str]:
        found: Dispatcher[str] = Dispatcher(Batching(2, 1.0, "arrival"), router, 100)
        return found

    def arrive(self, dispatcher: Dispatcher[str], count: int) -> list[Request]:
        requests = [Request(b"", 0.0, lambda *_: None) for _ in range(count)]
        assert [dispatcher.arrive(request, 0.0) for request in requests] == [None] * count
        return requests

    @pytest.mark.parametrize("router", ["shared", "round_robin", "random", "power_of_two", "shortest_queue"])
    def test_what_waits_for_a_replica_that_dies_waits_for_another_and_what_it_held_is_returned(
        self, router: str
    ) -> None:
        dispatcher = self.dispatcher(router)
        dispatcher.add("one", 0.0)
        requests = self.arrive(dispatcher, 5)
        (started,) = dispatcher.start(0.0)
        assert started == ("one", requests[:2])
        held = dispatcher.remove("one")
        assert held == requests[:2]
        assert dispatcher.waiting == 3, "they wait although there is nobody"
        assert dispatcher.next_start_s() == NEVER
        dispatcher.put_back(held)
        dispatcher.add("two", 3.0)
        order = []
        for now_s in (3.0, 4.0, 5.0):
            order += [request for _, batch in dispatcher.start(now_s) for request in batch]
            dispatcher.finish("two", now_s)
        assert order == requests, "what was in hand is first in line again, and nothing is lost"

    @pytest.mark.parametrize("router", ["shared", "round_robin"])
    def test_a_replica_that_leaves_gets_nothing_more(self, router: str) -> None:
        dispatcher = self.dispatcher(router)
        dispatcher.add("one", 0.0)
        dispatcher.add("two", 0.0)
        self.arrive(dispatcher, 8)
        assert {replica for replica, _ in dispatcher.start(0.0)} == {"one", "two"}
        dispatcher.leave("one")
        assert len(dispatcher.finish("one", 1.0)) == 2
        assert dispatcher.start(1.0) == []
        assert len(dispatcher.finish("two", 1.0)) == 2
        assert [replica for replica, _ in dispatcher.start(1.0)] == ["two"]
        self.arrive(dispatcher, 2)
        assert dispatcher.remove("one") == []
        assert dispatcher.waiting == 4

    def test_who_gives_up_is_in_no_batch(self) -> None:
        dispatcher = self.dispatcher("shared")
        dispatcher.add("one", 0.0)
        first, second, third = self.arrive(dispatcher, 3)
        dispatcher.withdraw(second)
        assert dispatcher.start(0.0) == [("one", [first, third])]
        dispatcher.withdraw(first)
        assert dispatcher.finish("one", 1.0) == [first, third], "what is in hand stays there"

    def test_in_the_end_all_that_waits_is_handed_over(self) -> None:
        dispatcher = self.dispatcher("round_robin")
        dispatcher.add("one", 0.0)
        dispatcher.add("two", 0.0)
        requests = self.arrive(dispatcher, 4)
        assert set(dispatcher.take_all()) == set(requests)
        assert dispatcher.waiting == 0


# ---------------------------------------------------------------------------------------------------------- bytes


@given(
    count=st.integers(1, 5),
    tensors=st.lists(
        st.tuples(
            st.sampled_from(["int32", "int64", "uint8", "float32", "float16"]), st.lists(st.integers(1, 3), max_size=3)
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 100),
)
@settings(deadline=None)
def test_tensors_come_back_from_their_bytes(count: int, tensors: list[tuple[str, list[int]]], seed: int) -> None:
    named = [(f"t{index}", dtype, shape) for index, (dtype, shape) in enumerate(tensors)]
    layout = Layout(named)
    body = np.random.default_rng(seed).bytes(count * layout.item_bytes)
    batch = layout.read(body)
    assert {name: (str(array.dtype), list(array.shape)) for name, array in batch.items()} == {
        name: (dtype, [count, *shape]) for name, dtype, shape in named
    }
    assert layout.write(batch, count) == body


def test_outputs_of_another_shape_are_refused() -> None:
    layout = Layout([("y", "float32", [2])])
    with pytest.raises(ValueError, match=r"output y has the shape \[3, 1\] and not \[3, 2\]"):
        layout.write({"y": np.zeros((3, 1), np.float32)}, 3)
    with pytest.raises(KeyError):
        layout.write({"z": np.zeros((3, 2), np.float32)}, 3)


async def _refusals(config: Path) -> dict[str, int]:
    """What a server whose models share a memory says to those who would change by hand what is in it."""
    (port,) = free_ports(1)
    serving = asyncio.create_task(Server(str(config)).run("127.0.0.1", port))
    paths = ["repository/models/alpha/load", "repository/models/alpha/unload", "replicas/2"]
    try:
        statuses = {}
        for path in paths:
            while True:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    assert not serving.done(), serving
                    await asyncio.sleep(0.01)
            writer.write(f"POST /v2/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            statuses[path] = int((await reader.read()).split()[1])
            writer.close()
        return statuses
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def test_nobody_goes_behind_who_says_which_models_are_in_memory(tmp_path: Path) -> None:
    memory = MemoryPlan(budget_bytes=100, sizes={"alpha": 60, "beta": 60}, policy="lru", pinned=(), at_start=())
    config = tmp_path / "server.json"
    config.write_text(ADAPTER.render(replace(REQUEST, memory=memory))["server.json"])
    assert set(asyncio.run(_refusals(config)).values()) == {409}


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.reading = True

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Talk:
    """One connection and what its server is asked; answers are given when the test says so, or at once."""

    def __init__(self, *, at_once: bool = True, body_bytes: int = 100) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.answers: list[Answer] = []
        self.given_up = 0
        self.open: set[Connection] = set()
        self.wire = Wire()
        self.now_s = 100.0
        self.at_once = at_once
        self.connection = Connection(self._handle, body_bytes, self.open, now_s=lambda: self.now_s)
        self.connection.connection_made(cast(Any, self.wire))

    def _handle(self, method: str, path: str, body: bytes, answer: Answer) -> Callable[[], None] | None:
        self.asked.append((method, path, body))
        if self.at_once:
            answer(200, b"<" + body + b">", {})
            return None
        self.answers.append(answer)
        return self._give_up

    def _give_up(self) -> None:
        self.given_up += 1

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", self.wire.written)]


def post(body: bytes = b"", path: str = "/p", headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class TestHttp:
    @given(
        bodies=st.lists(st.binary(max_size=30), min_size=1, max_size=6), cuts=st.lists(st.integers(0, 500), max_size=8)
    )
    @settings(deadline=None)
    def test_however_the_bytes_arrive_every_request_is_answered_once_and_in_order(
        self, bodies: list[bytes], cuts: list[int]
    ) -> None:
        stream = b"".join(post(body, f"/{number}") for number, body in enumerate(bodies))
        talk = Talk()
        edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        for start, end in pairwise(edges):
            talk.connection.data_received(stream[start:end])
        assert talk.asked == [("POST", f"/{number}", body) for number, body in enumerate(bodies)]
        answered = b"".join(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n<%b>" % (len(b) + 2, b) for b in bodies)
        assert talk.wire.written == answered
        assert not talk.wire.closed

    @given(noise=st.binary(max_size=400), cut=st.integers(0, 400))
    @example(b"\r\n\r\n", 2)
    @example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\0\0\r\n\r\n", 5)
    @settings(deadline=None, max_examples=300)
    def test_noise_is_refused_or_waits_for_more_and_nothing_else(self, noise: bytes, cut: int) -> None:
        talk = Talk()
        for part in (noise[:cut], noise[cut:]):
            if not talk.wire.closed:
                talk.connection.data_received(part)
        assert set(talk.statuses) <= {200, 400, 413, 501, 505}
        assert talk.wire.closed or 400 not in talk.statuses

    def test_pipelined_requests_wait_for_the_answer_before(self) -> None:
        talk = Talk(at_once=False)
        talk.connection.data_received(post(b"a") + post(b"b"))
        assert [body for _, _, body in talk.asked] == [b"a"]
        talk.answers.pop()(200, b"", {})
        assert [body for _, _, body in talk.asked] == [b"a", b"b"]

    def test_thousands_in_one_breath_are_answered_one_after_the_other(self) -> None:
        talk = Talk()
        talk.connection.data_received(post() * 5000)
        assert len(talk.statuses) == 5000

    def test_of_what_is_pipelined_the_one_that_waits_is_called_off(self) -> None:
        talk = Talk(at_once=False)
        talk.connection.data_received(post(b"a") + post(b"b"))
        talk.at_once = True
        talk.answers.pop()(200, b"", {})
        talk.at_once = False
        talk.connection.data_received(post(b"c") + post(b"d"))
        talk.connection.connection_lost(None)
        assert talk.asked[-1][2] == b"c"
        assert talk.given_up == 1

    def test_a_large_body_goes_on_when_its_client_reads_again(self) -> None:
        talk = Talk(body_bytes=200_000)
        request = post(b"x" * 200_000)
        talk.connection.pause_writing()
        talk.connection.data_received(request[:100_000])
        assert not talk.wire.reading
        talk.connection.resume_writing()
        assert talk.wire.reading
        talk.connection.data_received(request[100_000:])
        assert talk.statuses == [200]

    def test_who_sends_and_sends_is_read_no_further(self) -> None:
        talk = Talk(at_once=False)
        talk.connection.data_received(post(b"a"))
        for _ in range(1000):
            if talk.wire.reading:
                talk.connection.data_received(post(b"b" * 80))
        assert not talk.wire.reading
        talk.answers.pop()(200, b"", {})
        assert talk.wire.reading

    def test_who_asks_and_does_not_read_is_answered_no_further(self) -> None:
        talk = Talk()
        talk.connection.pause_writing()
        talk.connection.data_received(post(b"a"))
        assert talk.asked == []
        talk.connection.resume_writing()
        assert len(talk.asked) == 1

    @pytest.mark.parametrize(
        ("head", "status"),
        [
            ("GET / HTTP/1.1", 400),  # no host
            ("GET  / HTTP/1.1\r\nHost: a", 400),
            ("GET /\r\nHost: a", 400),
            ("GET http://a/ HTTP/1.1\r\nHost: a", 400),
            ("GET / HTTP/2\r\nHost: a", 505),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: ²", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 501),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 1", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\n folded: 1", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nX: a\nContent-Length: 5", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101", 413),
            ("GET / HTTP/1.1\r\nX: " + "a" * HEAD_BYTES, 431),
        ],
    )
    def test_what_breaks_a_rule_is_told_and_hung_up_on(self, head: str, status: int) -> None:
        talk = Talk()
        talk.connection.data_received(head.encode("latin-1") + b"\r\n\r\n")
        assert talk.statuses == [status]
        assert b"Connection: close" in talk.wire.written
        assert talk.wire.closed
        assert talk.asked == []

    def test_a_head_without_an_end_is_read_to_a_bound(self) -> None:
        talk = Talk()
        talk.connection.data_received(b"GET / HTTP/1.1\r\n" + b"X" * HEAD_BYTES)
        assert talk.statuses == [431]

    def test_a_request_that_does_not_come_to_an_end_is_hung_up_on_and_one_that_waits_is_not(self) -> None:
        slow, waiting, idle = Talk(), Talk(at_once=False), Talk()
        slow.connection.data_received(post(b"abc")[:-1])
        waiting.connection.data_received(post(b"abc"))
        for talk in (slow, waiting, idle):
            talk.now_s = 109.0
            talk.connection.overdue()
            talk.now_s = 111.0
            talk.connection.overdue()
        assert slow.statuses == [408]
        assert slow.wire.closed
        assert not waiting.wire.closed
        assert not idle.wire.closed

    def test_a_client_that_goes_away_is_told_to_who_works_for_it(self) -> None:
        talk = Talk(at_once=False)
        talk.connection.data_received(post(b"a"))
        talk.connection.connection_lost(None)
        assert talk.given_up == 1
        assert talk.open == set()

    def test_a_client_that_asks_whether_to_send_its_body_is_told_to(self) -> None:
        talk = Talk()
        request = post(b"abc", headers={"Expect": "100-continue"})
        talk.connection.data_received(request[:-3])
        assert talk.wire.written == b"HTTP/1.1 100 Continue\r\n\r\n"
        talk.connection.data_received(request[-3:])
        assert talk.statuses == [100, 200]

    @pytest.mark.parametrize(
        ("version", "header", "stays"),
        [("1.1", "", True), ("1.1", "close", False), ("1.0", "", False), ("1.0", "Keep-Alive", True)],
    )
    def test_connections_stay_as_long_as_the_client_wants(self, version: str, header: str, stays: bool) -> None:
        talk = Talk()
        more = f"Connection: {header}\r\n" if header else ""
        talk.connection.data_received(f"GET / HTTP/{version}\r\nHost: a\r\n{more}\r\n".encode())
        assert talk.statuses == [200]
        assert talk.wire.closed is not stays

    def test_a_head_says_what_it_is(self) -> None:
        head = parse_head(b"POST /a HTTP/1.1\r\nHost: x\r\ncontent-LENGTH: 7")
        assert (head.method, head.path, head.length, head.keep_alive) == ("POST", "/a", 7, True)
        with pytest.raises(RefusedError):
            parse_head(b"")
