"""What every adapter promises of a running server: one server each, asked, measured, scaled, hurt, and stopped."""

from __future__ import annotations

import signal
import statistics
import time

import pytest

from tailrace.harness.contract.adapter import CAPABILITIES, Adapter, Deployment, Replica, Tuning
from tailrace.harness.errors import ServerError
from tailrace.harness.processes import descendants
from tests.contract.bench import PATIENCE_S, Bench, Reply, Stream, ask, ask_all, closed, until
from tests.contract.conftest import MODELS, Observe, Server, traces_on_disk, used_by_others

pytestmark = pytest.mark.e2e

REPLICAS = 2


def failures(replies: list[Reply]) -> list[Reply]:
    return [reply for reply in replies if not reply.right]


def worst_s(replies: list[Reply]) -> float:
    return max((reply.took_s for reply in replies if reply.right), default=float("inf"))


def told(replies: list[Reply]) -> str:
    """What became of them, in words."""
    wrong = sum(reply.wrong for reply in replies)
    slowest = f", the slowest answer took {worst_s(replies):.2f} s" if any(reply.right for reply in replies) else ""
    return (
        f"{len(failures(replies))} of {len(replies)} requests failed"
        + (f" ({wrong} with a wrong answer)" if wrong else "")
        + slowest
    )


def replica_of(deployment: Deployment) -> Replica:
    return next(replica for replica in deployment.replicas() if replica.model == MODELS[0])


def pids(deployment: Deployment) -> set[int]:
    return {replica.process.pid for replica in deployment.replicas() if replica.model == MODELS[0]}


def test_capabilities_are_known_words(adapter: Adapter) -> None:
    assert set(adapter.capabilities()) <= set(CAPABILITIES)


def test_ready_is_not_claimed_before_a_right_answer(adapter: Adapter, server: Server, observe: Observe) -> None:
    start = server.start
    assert start.claim_s is not None
    assert start.lie_s(start.claim_s) == 0, [reply.said for reply in start.replies]
    assert start.replies[-1].right
    assert not any(reply.wrong for reply in start.replies)
    if "health" in adapter.capabilities():
        lie_s = start.lie_s(start.health_s)
        text = f"says «healthy» {lie_s:.1f} s before it can answer" if lie_s else "never says «healthy» too early"
        observe("readiness", f"its plain health check {text}", health_lie_s=lie_s)


@pytest.mark.needs("applied")
def test_the_server_reports_the_configuration_that_was_rendered(adapter: Adapter, server: Server) -> None:
    applied = server.deployment.applied()
    asked = server.request.tuning.model_dump(exclude_none=True)
    assert asked
    assert {knob: applied[knob] for knob in asked if knob in applied} == {
        k: v for k, v in asked.items() if k in applied
    }
    assert set(applied) & set(asked)


def test_every_model_answers_as_its_reference(server: Server) -> None:
    for model in MODELS:
        replies = [ask(server.deployment, model, number) for number in (-(2**30), -1, 0, 1, 2**30)]
        assert all(reply.right for reply in replies), failures(replies)
        assert {reply.marker for reply in replies} == {1}
    assert not ask(server.deployment, "nobody").right


def test_batches_are_as_large_as_asked_and_no_larger(adapter: Adapter, server: Server, observe: Observe) -> None:
    tuning = server.request.tuning
    replies = ask_all(server.deployment, 160, sleep_ms=20, at_once=48)
    assert not failures(replies)
    largest = max(reply.batch for reply in replies)
    # Every request of a batch of n says n: the mean batch is the harmonic mean of what they say.
    mean = statistics.harmonic_mean([reply.batch for reply in replies])
    if tuning.max_batch is None:
        assert largest == 1, "the framework is said to have no place for batches"
    else:
        assert 1 < largest <= tuning.max_batch
        if tuning.batch_window_ms is not None:
            alone = ask(server.deployment)
            assert alone.batch == 1
            assert alone.took_s >= tuning.batch_window_ms / 1e3 * 0.8, "a lone request waits for company"
    asked = f"asked for at most {tuning.max_batch}" if tuning.max_batch else "nothing to ask for"
    observe(
        "batching",
        f"formed {mean:.1f} requests per batch, {largest} at most, from 48 at once ({asked})",
        mean_batch=mean,
        largest_batch=largest,
    )


@pytest.mark.needs("replicas")
@pytest.mark.places("replicas")
def test_replicas_are_the_processes_that_answer(adapter: Adapter, server: Server) -> None:
    until(lambda: len(pids(server.deployment)) == REPLICAS, "both replicas are there")
    answering: set[int] = set()

    def all_seen() -> bool:
        answering.update(reply.pid for reply in ask_all(server.deployment, 32, sleep_ms=20) if reply.right)
        return len(answering) == REPLICAS

    until(all_seen, "both replicas have answered")
    assert answering == pids(server.deployment)


@pytest.mark.needs("scrape")
def test_its_metrics_agree_with_what_the_client_counted(adapter: Adapter, server: Server, observe: Observe) -> None:
    deployment = server.deployment

    def totals() -> dict[str, float]:
        found = deployment.scrape()
        mine = {s.metric: s.value for s in found if s.scope == "alpha"}
        return mine or {s.metric: s.value for s in found if s.scope == "server"}

    until(lambda: bool(totals()), "there are metrics of the model")
    before, since = totals(), time.monotonic()

    def quiet() -> bool:
        """Counts of earlier requests may come late."""
        nonlocal before, since
        if (now := totals()) != before:
            before, since = now, time.monotonic()
        return time.monotonic() - since > 2.5

    until(quiet, "the counters stand still while nothing is asked")
    replies = ask_all(deployment, 60)
    assert not failures(replies)
    wrongs = [ask(deployment, fail=True) for _ in range(5)]
    assert not any(reply.right for reply in wrongs)
    batches = sum(1 / reply.batch for reply in replies) + len(wrongs)
    expected = {
        "requests_ok_total": float(len(replies)),
        "requests_failed_total": float(len(wrongs)),
        "items_total": float(len(replies) + len(wrongs)),
        "batches_total": batches,
    }

    def counted() -> dict[str, float]:
        now = totals()
        return {metric: now[metric] - before.get(metric, 0.0) for metric in expected if metric in now}

    def agrees(metric: str, value: float) -> bool:
        # A batch that failed counts as none on some servers, as items or not.
        slack = len(wrongs) if metric in ("items_total", "batches_total") else 0
        return expected[metric] - slack - 0.5 <= value <= expected[metric] + 0.5

    exact = [metric for metric in counted() if metric not in adapter.approximate]
    until(lambda: all(agrees(m, v) for m, v in counted().items() if m in exact), f"{exact} are counted", 30)
    loose = {m: v for m, v in counted().items() if m in adapter.approximate}
    for metric, value in loose.items():
        assert 0 <= value <= expected[metric] + 0.5, f"{metric}: an approximation counts nothing that was not there"
    assert {s.metric for s in deployment.scrape()} >= set(adapter.approximate), "what is declared is there"
    told = [f"{metric} {loose[metric]:.0f} of {expected[metric]:.0f}" for metric in loose]
    observe(
        "metrics",
        f"count as the client does: {', '.join(exact) or 'none'}"
        + (f"; approximate: {', '.join(told)}" if told else ""),
    )


@pytest.mark.needs("scale", "replicas")
def test_replicas_come_and_go(adapter: Adapter, server: Server, observe: Observe) -> None:
    deployment = server.deployment
    with Stream(deployment, 20) as stream:
        begun_s = time.monotonic()
        deployment.scale(REPLICAS + 1)
        said_s = time.monotonic() - begun_s
        until(lambda: len(pids(deployment)) == REPLICAS + 1, "the third replica is there")
        answering: set[int] = set()

        def third_answers() -> bool:
            answering.update(r.pid for r in ask_all(deployment, 24, sleep_ms=20) if r.right)
            return len(answering) > REPLICAS

        until(third_answers, "the third replica answers")
        up_s = time.monotonic() - begun_s
        replies = stream.finish()
    deployment.scale(REPLICAS)
    until(lambda: len(pids(deployment)) == REPLICAS, "it has gone again")
    assert all(reply.right for reply in ask_all(deployment, 32))
    observe(
        "scaling",
        f"from {REPLICAS} to {REPLICAS + 1} replicas in {said_s:.1f} s by its own word, in {up_s:.1f} s until all three had "
        f"answered; {len(failures(replies))} of {len(replies)} requests at 20/s failed meanwhile",
        scale_up_s=up_s,
    )


@pytest.mark.needs("load_model", "unload_model")
def test_models_come_and_go(adapter: Adapter, bench: Bench, observe: Observe) -> None:
    """On a server of one replica, whose artifact also holds a model that cannot be loaded."""
    request = bench.request(Tuning(replicas=1), broken=["wreck"])
    with bench.running(request) as deployment, Stream(deployment, 10) as stream:
        begun_s = time.monotonic()
        deployment.load_model("gamma")
        loaded_s = time.monotonic() - begun_s
        until(lambda: ask(deployment, "gamma").right, "the new model answers")
        assert deployment.claims_ready()
        with pytest.raises(ServerError, match="the weights of wreck are not there"):
            deployment.load_model("wreck")
        begun_s = time.monotonic()
        deployment.unload_model("gamma")
        unloaded_s = time.monotonic() - begun_s
        assert not ask(deployment, "gamma").right
        assert deployment.claims_ready(), "what was unloaded on purpose, or never came, does not count"
        deployment.load_model("gamma")
        assert ask(deployment, "gamma").right
        replies = stream.finish()
    assert not any(reply.wrong for reply in replies)
    observe(
        "models",
        f"one more model in {loaded_s:.1f} s, gone again in {unloaded_s:.1f} s; {len(failures(replies))} of {len(replies)} "
        "requests to another model at 10/s failed meanwhile",
        load_s=loaded_s,
        unload_s=unloaded_s,
    )


def test_two_servers_do_not_collide(adapter: Adapter, bench: Bench, server: Server) -> None:
    """The second with the framework's defaults, over the other protocol where there is one."""
    request = bench.request(marker=2, protocol=adapter.protocols[-1])
    with bench.running(request) as other:
        assert other.endpoint.port != server.deployment.endpoint.port
        for number in range(8):
            first, second = ask(server.deployment, value=number), ask(other, value=number)
            assert first.right, first
            assert second.right, second
            assert (first.marker, second.marker) == (1, 2)
        if "applied" in adapter.capabilities():
            assert other.applied() != server.deployment.applied()
    assert closed(other)
    assert ask(server.deployment).right, "the first one has noticed nothing"
    assert server.deployment.claims_ready()


@pytest.mark.needs("replicas")
def test_a_killed_replica_is_gone_and_every_request_ends(bench: Bench, server: Server, observe: Observe) -> None:
    deployment = server.whole()
    count = len(pids(deployment))
    victim = replica_of(deployment)
    with Stream(deployment, 20) as stream:
        time.sleep(1)
        killed_s = time.monotonic()
        assert bench.guardian.signal(victim.process, signal.SIGKILL)
        until(lambda: victim.process not in {r.process for r in deployment.replicas()}, "the replica has gone")
        replaced_s = None
        while time.monotonic() - killed_s < 12 and replaced_s is None:
            time.sleep(0.05)
            if len(pids(deployment)) == count:
                replaced_s = time.monotonic() - killed_s
        time.sleep(1)
        says_ready = deployment.claims_ready()
        replies = stream.finish()
    back = f"replaced after {replaced_s:.1f} s" if replaced_s is not None else "not replaced within 12 s"
    observe(
        "failure",
        f"one of {count} replicas killed at 20/s: {told(replies)}; {back}; afterwards it says that it is "
        + ("ready" if says_ready else "not ready"),
        kill_failed=len(failures(replies)),
        kill_wrong=sum(reply.wrong for reply in replies),
        kill_worst_s=worst_s(replies),
        **({} if replaced_s is None else {"kill_replaced_s": replaced_s}),
    )
    if count > 1:
        assert any(reply.right for reply in replies if reply.started_s > killed_s), "the other replica goes on"


@pytest.mark.needs("replicas")
def test_a_paused_replica_is_told_by_what_it_does(bench: Bench, server: Server, observe: Observe) -> None:
    """Wrong answers and a server that ends are results here: a framework may do that, tailrace must see it."""
    deployment = server.whole()
    count = len(pids(deployment))
    victim = replica_of(deployment)
    with Stream(deployment, 20) as stream:
        time.sleep(1)
        assert bench.guardian.signal(victim.process, signal.SIGSTOP)
        assert victim.process in {replica.process for replica in deployment.replicas()}, "paused is not dead"
        time.sleep(3)
        bench.guardian.signal(victim.process, signal.SIGCONT)
        time.sleep(3)
        replies = stream.finish()
    if not deployment.process.alive():
        end = "; the whole server ended when the replica went on"
    elif victim.process not in {replica.process for replica in deployment.replicas()}:
        end = "; the replica was replaced"
    else:
        end = ""
    observe(
        "failure",
        f"one of {count} replicas stopped for 3 s at 20/s: {told(replies)}{end}",
        pause_failed=len(failures(replies)),
        pause_wrong=sum(reply.wrong for reply in replies),
        pause_worst_s=worst_s(replies),
    )
    assert all(reply.right for reply in ask_all(server.whole(), 16)), "with all its replicas it answers"


def test_stop_leaves_nothing(server: Server) -> None:
    deployment = server.whole()
    family = [reference for reference, _ in descendants(deployment.process)]
    assert family
    deployment.stop()
    assert not [reference for reference in family if reference.alive()]
    assert closed(deployment)
    assert not deployment.claims_ready()
    left = traces_on_disk() - server.before
    # The family is dead: what a living process uses is of a server of another test, side by side with this one.
    until(
        lambda: not [path for path in left & traces_on_disk() if not used_by_others(path)],
        f"nothing is left of {sorted(map(str, left))}",
        2 * PATIENCE_S,
    )
