"""The search: what it wants, what it tries, and what it says, on a framework that is made up of a simulated system."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.cli.tune import sentences
from tailrace.harness.analysis.metrics import percentile
from tailrace.harness.contract.adapter import Tuning
from tailrace.harness.errors import InputError, TailraceError, TrialPrunedError
from tailrace.harness.plan.cells import Cell, TrialPlan
from tailrace.harness.plan.experiment import Scenario
from tailrace.harness.records.store import RunFolder
from tailrace.harness.replay.driver import Progress
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.registry import get_adapter
from tailrace.simulator.engine import Simulated, simulate
from tailrace.simulator.fitting import fit
from tailrace.simulator.system import Service, System
from tailrace.traces import catalogue
from tailrace.tuner import search
from tailrace.tuner.grid import TARGET_ONGOING, applied, best_by, combinations, knobs, targets, tuning
from tailrace.tuner.objective import Expected, Objective, parse_objective
from tailrace.tuner.pareto import Pick, choose, choose_scaled
from tailrace.tuner.search import Found, Search, Step, told
from tests.conftest import tailrace
from tests.records import cell_summary, trial_summary
from tests.simulated import TRUE, measured_trial

OBJECTIVE = Objective(120)
SPACE: dict[str, tuple[Any, ...]] = {"max_batch": (1, 4, 16), "batch_window_ms": (0, 5), "replicas": (1, 2, 3)}


class TestTheObjective:
    def test_is_read(self) -> None:
        assert parse_objective(["p99=120ms", "attainment=99%"]) == Objective(120, 0.99)
        assert parse_objective(["p99=0.2s"]) == Objective(200)

    @pytest.mark.parametrize("texts", [[], ["p99"], ["p95=1s"], ["p99=1s", "p99=2s"], ["attainment=99%"], ["p99=fast"]])
    def test_anything_else_is_refused(self, texts: list[str]) -> None:
        with pytest.raises(InputError, match="slo"):
            parse_objective(texts)

    @given(st.integers(1, 3000), st.sampled_from([None, 0.9, 0.995, 1.0]), st.integers(0, 3000))
    def test_what_may_miss_it_is_exactly_what_it_leaves_room_for(
        self, arrivals: int, attainment: float | None, missed: int
    ) -> None:
        objective = Objective(100, attainment)
        missed = min(missed, arrivals)
        response = np.array([200.0] * missed + [50.0] * (arrivals - missed))
        figures = Expected(percentile(response, 0.99), (arrivals - missed) / arrivals)
        assert objective.met(figures) == (missed <= objective.affordable(arrivals))

    def test_settings_within_it_come_first(self) -> None:
        """However much a setting attains that misses it; then attainment; then the tail."""
        ranked = [
            trial_summary(p99_ms=50.0, slo_attainment=1.0),
            trial_summary(p99_ms=119.0, slo_attainment=1.0),
            trial_summary(p99_ms=50.0, slo_attainment=0.7),
            trial_summary(p99_ms=121.0, slo_attainment=0.99),
            trial_summary(p99_ms=None, slo_attainment=0.95),
            trial_summary(p99_ms=float("inf"), slo_attainment=0.5),
            trial_summary(p99_ms=float("inf"), slo_attainment=float("nan")),
        ]
        scores = [OBJECTIVE.score(figures) for figures in ranked]
        assert scores == sorted(scores, reverse=True)
        assert [OBJECTIVE.met(figures) for figures in ranked] == [True] * 3 + [False] * 4
        assert not Objective(120, 0.99).met(ranked[2])


class TestTheGrid:
    def test_a_knob_without_a_place_is_not_searched(self) -> None:
        for name, lacking in (("triton", set()), ("kserve", {"max_batch", "batch_window_ms", "queue_limit"})):
            adapter = get_adapter(name)
            values = knobs(adapter, adapter.Options(), adapter.protocols[0], 2)
            assert {"max_batch", "batch_window_ms", "replicas", "queue_limit"} - values.keys() == lacking
            assert values["replicas"] == (1, 2)

    def test_a_value_without_a_place_is_not_searched(self) -> None:
        """TorchServe waits for a whole number of milliseconds, and 0 is none to it; every combination can be asked for."""
        for name in ("triton", "ray_serve", "torchserve", "kserve"):
            adapter = get_adapter(name)
            values = knobs(adapter, adapter.Options(), adapter.protocols[0], 3)
            assert (0 in values.get("batch_window_ms", ())) == (name in ("triton", "ray_serve"))
            for settings in combinations(values):
                tuning = Tuning.model_validate({knob: value for knob, value in settings.items() if value is not None})
                assert adapter.expressible(tuning, adapter.Options(), adapter.protocols[0])[1] == {}

    def test_only_who_scales_itself_has_targets(self) -> None:
        for name, expected in (("ray_serve", TARGET_ONGOING), ("triton", ()), ("torchserve", ()), ("kserve", ())):
            adapter = get_adapter(name)
            assert targets(adapter, adapter.Options(), adapter.protocols[0], 3) == expected
            assert targets(adapter, adapter.Options(), adapter.protocols[0], 1) == (), "there is nowhere to go"

    def test_a_target_becomes_the_knob(self) -> None:
        settings = {"max_batch": 8, "queue_limit": None, "replicas": None, "target_ongoing": 4}
        asked = Tuning.model_validate(tuning(settings, 3))
        assert asked.max_batch == 8
        assert asked.replicas is asked.queue_limit is None
        assert asked.autoscale is not None
        assert (asked.autoscale.min, asked.autoscale.max, asked.autoscale.target_ongoing) == (1, 3, 4)
        system = applied(TRUE, settings, 0.7)
        assert system.tracking is not None
        assert (system.replicas, system.tracking.max, system.tracking.cold_start_s) == (1, TRUE.replicas, 0.7)
        assert system.tracking.up_after_s == asked.autoscale.up_after_s
        assert applied(system, {"replicas": 2}).tracking is None

    def test_batches_of_one_have_no_window(self) -> None:
        assert len(list(combinations(SPACE))) == 3 + 2 * 2 * 3
        assert all(s["max_batch"] > 1 or s["batch_window_ms"] == 0 for s in combinations(SPACE))

    def test_settings_take_the_place_of_those_of_the_calibration(self) -> None:
        system = applied(TRUE, {"max_batch": 4, "replicas": 2})
        assert (system.batching.max_batch, system.batching.window_ms, system.replicas) == (4, 10, 2)
        assert (system.overhead_ms, system.cycle_ms) == (TRUE.overhead_ms, TRUE.cycle_ms)

    def test_the_best_of_equals_is_the_first(self) -> None:
        assert best_by([1.0, 3.0, 3.0, 2.0], 3) == [1, 2, 3]


class MadeUp:
    """In place of real servers: runs are answered by a simulated system, and counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, broken: str = "") -> None:
        self.asked: list[str] = []
        self.broken = broken
        monkeypatch.setattr(search, "run_or_go_on", self.run)
        monkeypatch.setattr(search, "summarise", lambda summary: summary)
        monkeypatch.setattr(Search, "_keep_configuration", lambda *_: None)
        monkeypatch.setattr(RunFolder, "open", lambda folder: folder)

    def run(self, folder: Path, content: Mapping[str, Any], observer: Observer) -> SimpleNamespace:
        if folder.name == self.broken:
            raise TailraceError("the server did not come up")
        if folder.name not in self.asked:
            self.asked.append(folder.name)
        trials = []
        for number in range(1, content["trials"] + 1):
            trace = catalogue.load("surge", seed=number)
            for scenario in content["scenarios"]:
                tuning = scenario["tuning"]
                settings = {"max_batch": 1, "batch_window_ms": 0, "replicas": 1} if tuning == "defaults" else tuning
                figures = simulate(applied(TRUE, settings), trace.arrivals_ns, span_ns=trace.span_ns).figures(120)
                state, reasons = "done", []
                plan = TrialPlan(Cell("null", Scenario(name="x")), number, 1)
                try:
                    observer.progress(plan, at_the_end(figures))
                except TrialPrunedError as error:
                    state, reasons = (
                        "pruned",
                        [{"code": "incomplete", "text": error.message, "remedy": "", "effect": "INVALID"}],
                    )
                told = {
                    "p50_ms": figures["p50_ms"],
                    "p99_ms": figures["p99_ms"],
                    "slo_attainment": figures["slo_attainment"],
                    "goodput_rps_per_device": figures["goodput_rps"] / 3,
                    "utilization": figures["utilization"],
                    "batch_size_mean": figures["mean_batch"],
                    "scenario": scenario["name"],
                    "verdict": "INVALID" if reasons else "VALID",
                }
                trials.append((told, trial_summary(**told, number=number, state=state, reasons=reasons)))
        cells = [
            cell_summary(**max(of, key=lambda told: told["p99_ms"]), trials=len(of))
            for scenario in content["scenarios"]
            if (of := [told for told, _ in trials if told["scenario"] == scenario["name"]])
        ]
        return SimpleNamespace(trials=[trial for _, trial in trials], cells=cells)


def at_the_end(figures: Mapping[str, float]) -> Progress:
    arrived = int(figures["arrived"])
    missed = arrived - round(figures["slo_attainment"] * arrived)
    return Progress(
        t_s=30, intended=arrived, sent=arrived, done=arrived, ok=arrived, failed=0, rate_rps=0, p99_ms=None,
        measured=arrived, missed=missed,
    )  # fmt: skip


def searching(folder: Path) -> Search:
    folder.mkdir(exist_ok=True)
    return Search({"devices": 3}, SPACE, OBJECTIVE, folder, Observer(), seed=3)


class TestTheSearch:
    def test_finds_what_trying_everything_finds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        servers = MadeUp(monkeypatch)
        found = searching(tmp_path / "all").run(100, simulate_first=False, trials=3)
        assert len(servers.asked) == len(list(combinations(SPACE))) + 2, (
            "every setting once, the defaults, the confirmation"
        )
        assert found.best is not None
        assert OBJECTIVE.score(found.best.figures) == max(OBJECTIVE.score(step.figures) for step in found.steps)
        assert found.steps[0].settings is None, "the defaults come first"
        ratio = found.ratios["goodput_rps_per_device"]
        assert ratio is not None
        assert ratio.settled
        assert ratio.value < 0.5

    def test_what_is_lost_is_ended_and_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        MadeUp(monkeypatch)
        found = searching(tmp_path / "s").run(100, simulate_first=False, trials=1)
        assert found.pruned, "one replica is not enough for the surge"
        assert all(OBJECTIVE.met(step.figures) for step in found.steps if step.settings is not None)
        assert not any(OBJECTIVE.met(step.figures) for step in found.pruned), "nothing is ended that would have made it"
        assert found.steps[0].settings is None, "the defaults are measured to their end, lost or not"
        assert not OBJECTIVE.met(found.steps[0].figures)
        words = " ".join(sentences(found, OBJECTIVE))
        assert f"Ended early, {found.pruned[0].name}: after 30.0 s" in words
        assert [lost["name"] for lost in told(found, OBJECTIVE)["pruned"]] == [step.name for step in found.pruned]

    def test_keeps_to_its_budget_and_goes_on_where_it_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        servers = MadeUp(monkeypatch)
        first = searching(tmp_path / "s").run(5, simulate_first=False, trials=3)
        steps = [name for name in servers.asked if not name.startswith("confirmation")]
        assert len(steps) == 1 + 5
        again = searching(tmp_path / "s").run(8, simulate_first=False, trials=3)
        assert [step.name for step in again.steps][: len(first.steps)] == [step.name for step in first.steps]
        assert [step.name for step in again.pruned][: len(first.pruned)] == [step.name for step in first.pruned]
        assert len([name for name in servers.asked if not name.startswith("confirmation")]) == 1 + 8

    def test_a_step_that_cannot_be_measured_is_told_and_the_others_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        MadeUp(monkeypatch, broken="defaults")
        found = searching(tmp_path / "s").run(5, simulate_first=False, trials=3)
        assert found.failed == ["defaults: the server did not come up"]
        assert len(found.steps) + len(found.pruned) == 5
        assert found.confirmation is None
        assert any("did not come up" in sentence for sentence in sentences(found, OBJECTIVE))

    def test_the_simulator_saves_runs_and_its_misses_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        servers = MadeUp(monkeypatch)

        class Folder:
            trials = (None,)

        monkeypatch.setattr(RunFolder, "open", lambda folder: Folder())
        monkeypatch.setattr(search, "read_trial", lambda folder: measured_trial(TRUE, 1))
        found = searching(tmp_path / "s").run(6, simulate_first=True, trials=3)
        assert len(servers.asked) == 1 + 6 + 1
        assert found.skipped == len(list(combinations(SPACE))) - 6
        ran = [*found.steps, *found.pruned]
        assert sum(step.control for step in ran) == 2
        assert sum(step.predicted_p99_ms is not None for step in ran) == 5
        assert found.best is not None
        assert not found.best.control
        (line,) = [sentence for sentence in sentences(found, OBJECTIVE) if "saved" in sentence]
        assert f"saved {found.skipped} runs" in line
        assert "none was better" in line
        assert json.loads(json.dumps(told(found, OBJECTIVE)))["best"] == found.best.settings


def test_words_when_nothing_holds() -> None:
    step = Step("defaults", None, trial_summary(p99_ms=500.0, slo_attainment=0.1))
    assert sentences(Found(steps=[step]), OBJECTIVE) == ["No setting that was tried keeps p99 ≤ 120 ms."]


def test_a_control_that_beats_all_is_a_miss_of_the_simulator() -> None:
    def step(name: str, p99_ms: float, *, control: bool = False) -> Step:
        figures = trial_summary(p99_ms=p99_ms, slo_attainment=0.9)
        return Step(name, {"max_batch": 4}, figures, predicted_p99_ms=50.0, control=control)

    found = Found(steps=[step("picked", 150), step("control", 110, control=True)], skipped=9)
    assert "it would have missed control" in sentences(found, OBJECTIVE)[-1]
    found = Found(steps=[step("picked", 150), step("control", 160, control=True)], skipped=9)
    assert "none was better" in sentences(found, OBJECTIVE)[-1]


def confirmed(p99_ms: float, low: float, high: float, verdict: str = "VALID") -> Found:
    step = Step("max_batch-4", {"max_batch": 4}, trial_summary(p99_ms=110.0))
    cell = cell_summary(p99_ms=p99_ms, p99_ci_ms=[low, high], slo_attainment=1.0, trials=3)
    best = cell.model_copy(update={"verdict": verdict})
    return Found(steps=[step], best=step, confirmed={"best": best, "defaults": cell})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (confirmed(110, 105, 115), "kept it, with the whole interval"),
        (confirmed(110, 95, 130), "its interval reaches beyond"),
        (confirmed(150, 140, 160), "did not keep it"),
        (confirmed(110, 105, 115, "INVALID"), "nothing is claimed"),
    ],
)
def test_the_best_of_the_search_is_not_said_to_keep_what_it_did_not(found: Found, words: str) -> None:
    lines = sentences(found, OBJECTIVE)
    assert words in lines[1]
    assert len(lines) == 2, "no ratio where none was made"


class TestThePicksOfTheFrontier:
    def test_one_has_the_most_goodput_and_one_the_shortest_tail(self) -> None:
        picks = choose(TRUE, measured_trial(TRUE, 1), SPACE, OBJECTIVE, 3)
        assert 1 <= len(picks) <= 2
        assert len({pick.name for pick in picks}) == len(picks)
        own_rate = len(measured_trial(TRUE, 1).arrivals_ns) / 30
        assert max(pick.rate for pick in picks) == pytest.approx(own_rate, rel=0.01), (
            "a quarter more is too much for it"
        )
        assert all(pick.settings["replicas"] == 3 for pick in picks)

    def test_who_scales_itself_gets_the_cheapest_that_keeps_the_objective(self) -> None:
        fitted = fit(measured_trial(TRUE, 1))
        assert fitted.cold_start_s.model_s == pytest.approx(0.8)
        assert fitted.cold_start_s.server_s == pytest.approx(2.9)
        trial = measured_trial(TRUE, 1)

        def simulated(pick: Pick) -> Simulated:
            system = applied(fitted.system, pick.settings, fitted.cold_start_s.model_s)
            return simulate(system, trial.arrivals_ns, span_ns=trial.span_ns)

        relaxed = choose_scaled(fitted, trial, SPACE, (4, 16), Objective(5_000))
        strict = choose_scaled(fitted, trial, SPACE, (4, 16), Objective(1_000))
        assert relaxed.settings["replicas"] is None
        assert Objective(1_000).met(Expected.of(simulated(strict).figures(1_000)))
        assert simulated(relaxed).ready_ns <= simulated(strict).ready_ns < 3 * trial.span_ns
        hopeless = choose_scaled(fitted, trial, SPACE, (4, 16), Objective(5))
        assert hopeless.settings["target_ongoing"] in (4, 16)

    def test_where_nothing_keeps_the_objective_there_is_still_a_pick(self) -> None:
        slow = System(service=Service(base_ms=300, per_item_ms=10), replicas=3, devices=3)
        assert choose(slow, measured_trial(TRUE, 1), SPACE, OBJECTIVE, 3)


def test_the_tight_case_on_the_command_line(tmp_path: Path) -> None:
    done = tailrace("tune", "--simulator", "--slo", "p99=120ms", "--plot", "case.svg", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told_case = json.loads(done.stdout)
    assert told_case["simulated"] is True
    assert told_case["chosen"]["held_seeds"] >= 19
    assert told_case["chosen"]["figures"]["p99_ms"] <= 120
    assert told_case["chosen"]["mean_replicas"] > told_case["cheapest_of_all"]["mean_replicas"]
    costs = [row["mean_replicas"] for row in told_case["within_objective"]]
    assert np.all(np.diff(costs) > -0.011), "the cheapest first"
    drawn = (tmp_path / "case.svg").read_text()
    assert "simulated" in drawn
    table = tailrace("tune", "--simulator", cwd=tmp_path)
    assert "Chosen: max batch" in table.stdout
    hopeless = tailrace("tune", "--simulator", "--slo", "p99=5ms", cwd=tmp_path)
    assert "No setting keeps p99 ≤ 5 ms" in hopeless.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--simulator", "--adapter", "triton"), "starts no server"),
        ((), "--adapter"),
        (("--adapter", "triton", "--plot", "x.svg"), "--plot goes with --simulator"),
        (("--adapter", "triton", "--slo", "p50=1s"), "--slo"),
        (("--adapter", "triton", "--slo", "p99=0ms"), "--slo"),
        (("--adapter", "triton", "--adapter", "trtion"), "trtion"),
        (("--adapter", "trtion"), "trtion"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    done = tailrace("tune", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr
