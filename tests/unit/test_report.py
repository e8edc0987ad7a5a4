"""The report page: complete, deterministic, safe and honest, on synthetic runs of every kind."""

from __future__ import annotations

import colorsys
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t

from tailrace.harness.analysis.comparison import paired_ratio
from tailrace.harness.analysis.frontier import non_dominated
from tailrace.harness.analysis.metrics import measured, percentile, samples_needed
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.errors import InputError, StorageError
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.store import RunFolder, write_json
from tailrace.reports.benefits import ATTAINMENT, GOODPUT, PER_DOLLAR, PER_JOULE, others
from tailrace.reports.columns import COLUMNS, fields
from tailrace.reports.contestants import UNSEEN, left_out, profiles
from tailrace.reports.defaults import defaults
from tailrace.reports.downsample import largest_triangles
from tailrace.reports.evidence import NINES, Band, CellView, FaultWindow, batch_series, view
from tailrace.reports.figures.cold_start import cold_starts
from tailrace.reports.figures.drawing import DASHES, MARKERS
from tailrace.reports.figures.frontier import frontier, frontiers
from tailrace.reports.figures.knobs import knobs
from tailrace.reports.figures.recovery import recovery_curves
from tailrace.reports.figures.timeline import timelines
from tailrace.reports.headline import headline, pair, ratio_words
from tailrace.reports.report import MARKER_SHAPES, build, write
from tailrace.reports.reproduce import Portable, reproduce
from tailrace.reports.ruler import HEADINGS, ruler
from tailrace.reports.svg import palette, slots
from tailrace.reports.text import printable, share, significant, tied
from tests.records import cell_summary
from tests.synthetic import SCRIPT, calibration, make_run


class Page(HTMLParser):
    """What a browser would see of a page: its elements with their attributes, and the text of each heading."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self) -> list[dict[str, str]]:
        """The cell rows of the comparison table: column key → value."""
        keys = [column.key for column in COLUMNS]
        values = [a["data-value"] for name, a in self.elements if name == "td" and "data-value" in a]
        return [dict(zip(keys, values[i : i + len(keys)], strict=True)) for i in range(0, len(values), len(keys))]


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("compare") / "run", trials=3)


@pytest.fixture(scope="module")
def pair_of_trials(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("two") / "run"
    return make_run(folder, scenarios=("no-fault",), trials=2, span_s=12)


def changed(run: RunFolder, folder: Path, **changes: Any) -> RunFolder:
    """A copy of a run with another manifest; ``name`` and other keys of the experiment go where they belong."""
    shutil.copytree(run.folder, folder)
    experiment = {**run.manifest["experiment"], **changes.pop("experiment", {})}
    copy = RunFolder.open(folder)
    copy.amend_manifest(experiment=experiment, **changes)
    return RunFolder.open(folder)


def with_facts(run: RunFolder, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> RunFolder:
    """The run with facts of its trials changed."""
    for trial in run.trials:
        facts = trial.facts.dump()
        write_json(trial.facts_path, {**facts, **change(facts)})
    return RunFolder.open(run.folder)


@pytest.fixture(scope="module")
def html(compare: RunFolder) -> str:
    return build([compare])


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


# ---------------------------------------------------------------- structure


def test_the_page_has_its_sections_figures_and_table(page: Page) -> None:
    assert {"compare", "tail", "frontier", "time", "faults", "cold", "reproduce"} <= {
        a.get("id") for a in page.of("section")
    }
    assert len(page.of("h1")) == 1
    figures = [a for a in page.of("svg") if a.get("role") == "img"]
    assert len(figures) == 1 + 1 + 4 + 1 + 1  # tail, frontier, a timeline per cell, recovery, cold start
    assert all(len(a["aria-label"]) > 40 for a in figures)
    rows = page.rows()
    assert len(rows) == 4 + 12  # cells and their trials
    assert [row["trials"] for row in rows[:4]] == ["3", "1", "2", "3"]


def test_ids_are_unique_and_every_reference_has_its_target(html: str, page: Page) -> None:
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert [name for name, number in ids.items() if number > 1] == []
    inside = {a["href"][1:] for a in page.of("a") if a["href"].startswith("#")}
    inside |= {a["xlink:href"][1:] for a in page.of("use")}
    inside |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert inside <= set(ids)


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    assert not page.of("img") and not page.of("iframe") and not page.of("object")
    assert [a["href"] for a in page.of("link")] == ["data:,"]
    assert all("src" not in a for _, a in page.elements)
    assert all(a["href"].startswith(("#", "https://")) for a in page.of("a"))
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_it_stays_small_with_many_cells(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        adapters=[f"framework-{i}" for i in range(9)],
        scenarios=["no-fault"],
        span_s=12,
        fault_at=6,
    )
    html = build([run])
    assert len(html.encode()) < 5_000_000 * 9 / 50  # fifty are opened in the browser tests
    assert len(Page(html).rows()) == 9


# ---------------------------------------------------------------- determinism and sources


def test_the_same_sources_give_the_same_bytes_wherever_they_lie(compare: RunFolder, html: str, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(compare.folder, copy)
    assert build([RunFolder.open(copy)]) == html
    assert str(compare.folder) not in html


def test_paths_are_shown_from_the_run_on_wherever_it_lay(compare: RunFolder) -> None:
    portable = Portable(compare)
    trial = compare.manifest["trials"][0]["id"]
    assert portable(f"log: {compare.folder}/trials/x") == "log: RUN/trials/x"
    assert portable(f'"/old/place/run-1/trials/{trial}/server"') == f'"RUN/trials/{trial}/server"'
    assert portable(f"/old/trials/{trial}0/server") == f"/old/trials/{trial}0/server"  # another run's
    assert portable("/home/ada/.cache/x /root/.cache/y /srv/root/z") == "~/.cache/x ~/.cache/y /srv/root/z"


def test_what_a_server_compiled_is_no_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), variant="empty")
    (run.trials[0].server / "config" / "model.pyc").write_bytes(b"\x00\xff\x00")
    assert "model.pyc" not in build([run])


def test_write_is_staged_and_says_what_went_wrong(tmp_path: Path) -> None:
    compare = make_run(tmp_path / "run", adapters=("triton",), variant="empty")
    path = write([compare], tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="taken"):
        write([compare], tmp_path / "taken")
    with pytest.raises(InputError):
        build([])


def test_runs_side_by_side_are_told_apart(compare: RunFolder, tmp_path: Path) -> None:
    other = make_run(tmp_path / "run", adapters=("triton",), name="second", seed=8)
    page = Page(build([compare, other]))
    assert len([a for a in page.of("tr") if a.get("class") == "cell"]) == 4 + 2
    labels = [a["data-value"] for a in page.of("th") if a.get("data-value", "").startswith("Triton · no-fault")]
    assert labels == ["Triton · no-fault · compare", "Triton · no-fault · second"]
    twins = [v.label for v in view([other, other])]
    assert len(set(twins)) == 2


# ---------------------------------------------------------------- what may be compared


def _tagged(html: str) -> set[str]:
    """The labels of the cells that bear the frontier's tag in the table."""
    heads = re.findall(r'<tr class="cell"><th scope="row" data-value="([^"]*)">(.*?)</th>', html, flags=re.DOTALL)
    return {label for label, inner in heads if 'class="tag best"' in inner}


def _best(runs: list[RunFolder]) -> set[str]:
    cells = [cell for seen in view(runs) for cell in seen.cells]
    return {cell.label for group in frontiers(cells) for cell in group.best}


def test_the_table_and_the_figure_know_the_same_frontier(pair_of_trials: RunFolder, tmp_path: Path) -> None:
    other = changed(pair_of_trials, tmp_path / "run", experiment={"name": "gpu"})
    other = with_facts(other, lambda facts: {"device": "cpu"})
    html = build([pair_of_trials, other])
    assert _tagged(html) == _best([pair_of_trials, other])
    assert {label.rpartition(" · ")[2] for label in _tagged(html)} == {"compare", "gpu"}  # neither beats the other
    assert "on different devices" in Page(html).text


@pytest.mark.parametrize(
    ("changes", "facts", "told"),
    [
        ({"hardware": {"cpu_model": "Other CPU", "cpu_count": 64, "memory_bytes": 2**36}}, {}, "on different hardware"),
        ({}, {"slo_ms": 50.0}, "against different objectives"),
        ({"experiment": {"trace": {"name": "surge", "mean_rate": 500.0}}}, {}, "under different traffic"),
        ({}, {"workload": "another"}, "with different workloads"),
    ],
)
def test_runs_under_other_conditions_are_said_to_be_so_and_kept_apart(
    pair_of_trials: RunFolder, tmp_path: Path, changes: dict[str, Any], facts: dict[str, Any], told: str
) -> None:
    experiment = {"name": "second", **changes.pop("experiment", {})}
    other = with_facts(changed(pair_of_trials, tmp_path / "run", experiment=experiment, **changes), lambda _: facts)
    cells = [cell for seen in view([pair_of_trials, other]) for cell in seen.cells]
    groups = frontiers(cells)
    assert [{cell.run for cell in group.cells} for group in groups] == [{"compare"}, {"second"}]
    assert len({group.title for group in groups}) == 2 and all(group.title for group in groups)
    page = Page(build([pair_of_trials, other]))
    assert f"Runs compare and second were made {told} (compare: " in page.text
    assert page.text.count("do not read across") == 1


def test_runs_under_the_same_conditions_share_a_frontier_without_a_note(
    pair_of_trials: RunFolder, tmp_path: Path
) -> None:
    other = changed(pair_of_trials, tmp_path / "run", experiment={"name": "second", "seed": 99})
    (group,) = frontiers([cell for seen in view([pair_of_trials, other]) for cell in seen.cells])
    assert group.title == "" and len(group.cells) == 4
    assert "do not read across" not in build([pair_of_trials, other])


# ---------------------------------------------------------------- what the frontier is of


@given(st.lists(st.tuples(st.floats(50, 60), st.none() | st.floats(1, 9), st.none() | st.floats(1, 9)), max_size=4))
def test_a_further_frontier_needs_every_cell_and_attainment_different_loads(
    cells: list[tuple[float, float | None, float | None]],
) -> None:
    summaries = [
        cell_summary(offered_rps=rate, slo_attainment=0.9, goodput_per_dollar=dollar, goodput_per_joule=joule)
        for rate, dollar, joule in cells
    ]
    rates, dollars, joules = (list(values) for values in zip(*cells, strict=True)) if cells else ([], [], [])
    expected = [ATTAINMENT] if cells and max(rates) / min(rates) > 1.05 else []
    expected += [PER_DOLLAR] if cells and None not in dollars else []
    expected += [PER_JOULE] if cells and None not in joules else []
    assert others(summaries) == expected


@pytest.mark.parametrize(
    ("device", "price", "loads_differ", "told"),
    [
        ("emulated", None, False, []),
        ("emulated", None, True, [ATTAINMENT]),
        ("emulated", 2.5, False, [PER_DOLLAR]),
        ("cuda", 2.5, True, [ATTAINMENT, PER_DOLLAR, PER_JOULE]),
    ],
)
def test_each_benefit_that_tells_more_has_a_figure(
    tmp_path: Path, device: Any, price: float | None, loads_differ: bool, told: list[Any]
) -> None:
    run = make_run(tmp_path / "run", scenarios=("no-fault", "calm"), device=device, span_s=12, fault_at=99)
    run = with_facts(run, lambda facts: {"device_price_per_hour": price})
    if loads_differ:
        run = with_facts(run, lambda facts: {"span_s": 10.0} if facts["scenario"] == "calm" else {})
    html = build([run])
    page = Page(html)
    drawn = [a["aria-label"] for a in page.of("svg") if " against p99. " in a.get("aria-label", "")]
    assert [alt.partition(" against p99. ")[0] for alt in drawn] == [b.title for b in (GOODPUT, *told)]
    captions = re.findall("<figcaption>(.*) against p99</figcaption>", html)
    assert captions == [benefit.title for benefit in told]
    assert all(benefit.heading in page.text for benefit in told)
    assert ("At 2.50 US dollars per device and hour" in page.text) == (price is not None)
    assert _tagged(html) == _best([run]), "the table marks goodput per device"
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_cell_out_of_the_race_leaves_only_the_figures_that_it_has_no_value_for(tmp_path: Path) -> None:
    """A framework that never came up read no power; it stands in the figure of goodput, hollow, and not in that of joules."""
    run = make_run(tmp_path / "run", scenarios=("no-fault",), device="cuda", span_s=12)
    cells = [cell for seen in view([run]) for cell in seen.cells]
    broken = cells[0].summary.model_copy(update={"verdict": "INVALID", "goodput_per_joule": None})
    goodput, joule = frontier(frontiers([replace(cells[0], summary=broken), cells[1]]))
    assert cells[0].label in goodput.svg and cells[0].label not in joule.svg
    assert cells[1].label in joule.svg
    valid = broken.model_copy(update={"verdict": "VALID"})
    assert len(frontier(frontiers([replace(cells[0], summary=valid), cells[1]]))) == 1


@pytest.fixture(scope="module")
def measured_cell(pair_of_trials: RunFolder) -> CellView:
    return view([pair_of_trials])[0].cells[0]


def test_who_is_on_the_frontier_and_how_surely_is_judged_by_what_is_drawn(measured_cell: CellView) -> None:
    """The greedy one has more goodput for a longer tail, and less of it from every joule."""

    def cell(name: str, p99_ms: float, goodput_rps: float, per_joule: float) -> CellView:
        figures = {"p99_ms": p99_ms, "goodput_rps_per_device": goodput_rps, "goodput_per_joule": per_joule}
        trials = tuple(measured_cell.trials[0].model_copy(update={**figures, "number": number}) for number in (1, 2, 3))
        summary = measured_cell.summary.model_copy(update={**figures, "scenario": name, "goodput_per_joule_ci": None})
        return replace(measured_cell, key=name, summary=summary, trials=trials)

    frugal, greedy = cell("frugal", 50.0, 100.0, 2.0), cell("greedy", 60.0, 200.0, 1.0)
    goodput, joule = frontier(frontiers([frugal, greedy]))
    assert goodput.note.startswith(f"On the frontier: {frugal.label} and {greedy.label}.")
    assert joule.note.startswith(f"On the frontier: {frugal.label}.")
    assert goodput.svg.count("with probability 100\u202f%") == 2 * 2, "in the words for all and in those of each mark"
    assert joule.svg.count("with probability 100\u202f%") == joule.svg.count("with probability 0.0\u202f%") == 2


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=12
    )
)
def test_each_framework_has_the_frontier_of_its_own_cells(
    measured_cell: CellView, points: list[tuple[str, int, int, bool]]
) -> None:
    """Among several frameworks, of each that has two comparable cells; what nobody beats, none of its own beats either."""
    cells = [
        replace(
            measured_cell,
            key=f"cell-{i}",
            framework=name,
            summary=measured_cell.summary.model_copy(
                update={
                    "adapter": name,
                    "p99_ms": float(p99),
                    "goodput_rps_per_device": float(goodput),
                    "verdict": "VALID" if comparable else "INVALID",
                }
            ),
        )
        for i, (name, p99, goodput, comparable) in enumerate(points)
    ]
    (group,) = frontiers(cells)
    chosen = [cell for cell in cells if cell.comparable]
    own = {members[0].framework: members for members in group.own}
    names = Counter(cell.framework for cell in chosen)
    assert set(own) == ({name for name, number in names.items() if number > 1} if len(names) > 1 else set())
    for name, members in own.items():
        (alone,) = frontiers([cell for cell in chosen if cell.framework == name])
        assert members == alone.best
        assert {cell.key for cell in group.best if cell.framework == name} <= {cell.key for cell in members}


def test_a_frameworks_own_frontier_is_drawn_and_told(pair_of_trials: RunFolder) -> None:
    cells = view([pair_of_trials])[0].cells
    (plain,) = frontier(frontiers(cells))
    assert not any("own frontier" in key.label for key in plain.keys)
    slow = replace(
        cells[0],
        key="slow",
        summary=cells[0].summary.model_copy(update={"scenario": "slow", "goodput_rps_per_device": 1.0}),
    )
    (figure,) = frontier(frontiers([*cells, slow]))
    assert [key.slot for key in figure.keys if "own frontier" in key.label] == [cells[0].slot]
    assert f"On {cells[0].framework}'s own: {cells[0].label}." in figure.svg.replace("&#39;", "'")
    assert f"On {cells[1].framework}'s own" not in figure.svg


# ---------------------------------------------------------------- trials that did not finish


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_a_trial_that_did_not_finish_is_listed_and_enters_no_figure(
    compare: RunFolder, tmp_path: Path, state: str
) -> None:
    whole = {cell.label: cell for cell in view([compare])[0].cells}
    folder = tmp_path / "run"
    shutil.copytree(compare.folder, folder)
    run = with_facts(RunFolder.open(folder), lambda f: {"state": state, "span_s": 500.0} if f["number"] == 3 else {})
    (seen,) = view([run])
    for cell in seen.cells:
        assert [trial.number for trial in cell.trials] == [1, 2, 3]
        assert [trial.number for trial in cell.repetitions] == [1, 2]
        before = whole[cell.label]
        assert cell.evidence is not None
        drawn = cell.evidence.latency_ms.high
        assert drawn[~np.isnan(drawn)].tolist() == _highest(compare, cell.summary.cell, {1, 2}).tolist()
        assert len(cell.evidence.rate.mid) == 50
        assert cell.summary.p99_ok_ms == max(t.p99_ok_ms for t in before.trials if t.number < 3)
        trials_field = {column.key: field for column, field in fields(cell.summary)}["trials"]
        assert (trials_field.text, trials_field.note) == ("3", "2 finished")
        assert not cell.comparable
        assert cell.failures == before.failures  # like the counts, of all trials
    assert {start.starts for start in cold_starts(seen.cells)} == {4}  # two scenarios, two whole trials each
    page = Page(build([run]))
    assert f"the trial did not finish ({state})" in page.text
    assert "no. 3, not finished" in page.text


def _highest(run: RunFolder, cell: str, numbers: set[int]) -> Any:
    """The highest response time of some trials of a cell at each of the drawn percentiles that are claimed."""
    rows = []
    for trial in run.trials:
        if trial.facts.dump()["cell"] == cell and trial.facts.dump()["number"] in numbers:
            assert trial.requests is not None
            response = measured(trial.requests).response_ms()
            claimed = [q for q in 1 - 10.0 ** -NINES[1:] if samples_needed(q) <= len(response)]
            rows.append([float(response.min()), *(percentile(response, q) for q in claimed)])
    shortest = min(map(len, rows))
    return np.max([row[:shortest] for row in rows], axis=0)


# ---------------------------------------------------------------- safety


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    html = build([make_run(tmp_path / "run", variant="hostile")])
    page = Page(html)
    assert len(page.of("script")) == 1
    assert SCRIPT not in html
    assert page.text.count(SCRIPT) > 10  # title, trace, error, configuration, event, warning …
    assert "{{ 7 * 7 }}" in page.text
    assert not any(a["href"].startswith("javascript:") for a in page.of("a"))
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert "\u202e" not in html


@given(st.text())
def test_printable_leaves_only_what_a_page_may_hold(text: str) -> None:
    cleaned = printable(text)
    assert len(cleaned) == len(text)
    cleaned.encode("utf-8")
    assert not any(ord(c) < 32 and c not in "\t\n\r" for c in cleaned)


# ---------------------------------------------------------------- honesty


def test_every_figure_of_an_emulated_device_says_so(page: Page, tmp_path: Path) -> None:
    html = build([make_run(tmp_path / "e", adapters=("triton",))])
    drawings = re.findall(r"<svg[^>]*role=\"img\".*?</svg>", html, flags=re.DOTALL)
    assert drawings and all(">emulated</text>" in drawing for drawing in drawings)
    assert "EMULATED" in page.text
    real = build([make_run(tmp_path / "c", adapters=("triton",), device="cuda")])
    assert ">emulated</text>" not in real and "EMULATED" not in Page(real).text


def test_failures_own_the_tail(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), fail_fraction=0.05)
    page = Page(build([run]))
    (row,) = page.rows()
    assert row["p99"] == "inf" and float(row["p99ok"]) > 0
    assert "∞" in headline(view([run])[0]).lede
    assert int(row["ok"]) + sum(int(row[k]) for k in ("errors", "shed", "timeouts", "connection", "dropped")) > 0
    assert "queue full" in page.text


def test_a_percentile_that_is_not_claimed_says_how_many_more_it_takes(tmp_path: Path) -> None:
    page = Page(build([make_run(tmp_path / "run", adapters=("triton",), variant="one-request")]))
    assert page.rows()[0]["p99"] == ""
    assert "not claimed" in page.text and f"{samples_needed(0.99) - 1:,} more needed" in page.text


def test_an_empty_trace_claims_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", variant="empty")
    page = Page(build([run]))
    assert "not one arrival" in headline(view([run])[0]).lede
    assert not [a for a in page.of("section") if a.get("id") in ("tail", "time", "frontier")]


def test_a_killed_run_shows_what_there_is_and_claims_nothing_from_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", variant="killed")
    page = Page(build([run]))
    assert "INVALID" in page.text and "incomplete" in page.text
    assert "E1123 failed to load" in page.text  # the log's tail
    assert str(tmp_path) not in page.text
    (run_view,) = view([run])
    killed = [cell for cell in run_view.cells if not cell.comparable]
    assert len(killed) == 2
    assert not any(cell in killed for group in frontiers(run_view.cells) for cell in group.best)
    told = " ".join(headline(run_view).support)
    assert all(cell.label in told for cell in killed)
    # Trials that were planned and never began are said to be missing.
    shutil.rmtree(run.trial(run.manifest["trials"][-1]["id"]).folder)
    assert "1 of 4\u00a0planned trials never began" in Page(build([RunFolder.open(run.folder)])).text


def test_a_run_without_any_trial_still_gives_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",))
    shutil.rmtree(run.folder / "trials")
    assert "Nothing was measured" in Page(build([RunFolder.open(run.folder)])).text


def test_keys_that_a_killed_run_lacks_are_not_needed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",))
    for trial in run.trials:
        facts = trial.facts.dump()
        for key in ("cold_start", "outputs", "load_generator", "final_probe", "warnings", "applied", "tuning", "error"):
            facts.pop(key, None)
        trial.facts_path.write_text(json.dumps(facts))
    manifest = {k: run.manifest[k] for k in ("schema_version", "experiment", "trials")}
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    page = Page(build([RunFolder.open(run.folder)]))
    assert len(page.rows()) == 2 and not [a for a in page.of("section") if a.get("id") == "cold"]


# ---------------------------------------------------------------- words


def _with_goodput(run: RunFolder, change: Callable[[str, int], float]) -> Any:
    """The view of a run whose trials have other goodputs: adapter, number → requests per second and device."""
    return _given_goodput(view([run])[0], change)


def _given_goodput(seen: Any, change: Callable[[str, int], float]) -> Any:
    for cell in seen.cells:
        for trial in cell.trials:
            trial.goodput_rps_per_device = change(trial.adapter, trial.number)
        cell.summary.goodput_rps_per_device = float(np.mean([t.goodput_rps_per_device for t in cell.trials]))
    return seen


def test_the_verdict_is_as_sure_as_the_intervals(compare: RunFolder) -> None:
    noise = {1: 1.0, 2: 1.02, 3: 0.99}
    clear = _with_goodput(compare, lambda a, n: (160 if a == "triton" else 100) * noise[n if a == "triton" else 1])
    lede = headline(clear).lede
    assert re.search(r"Triton reaches 1\.6\d× \[1\.\d+,\s1\.\d+\] the goodput of Ray Serve", lede), lede
    level = _with_goodput(compare, lambda a, n: 100 * (noise[n] if a == "triton" else 1.001))
    assert "are level" in headline(level).lede


def test_one_trial_gives_no_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    seen = _with_goodput(run, lambda a, n: 160 if a == "triton" else 100)
    assert "1.60× the goodput of Ray Serve (1\u00a0trial each: no interval)" in headline(seen).lede
    close = _with_goodput(run, lambda a, n: 101 if a == "triton" else 100)
    assert "within 1\u202f% of each other" in headline(close).lede


def test_the_leader_is_the_one_that_the_paired_ratio_favours(pair_of_trials: RunFolder) -> None:
    goodputs = {("triton", 1): 250.0, ("triton", 2): 50.0, ("ray_serve", 1): 140.0, ("ray_serve", 2): 140.0}
    lede = headline(_with_goodput(pair_of_trials, lambda a, n: goodputs[a, n])).lede
    assert "Ray Serve reaches 1.25× the goodput of Triton (2\u00a0trials each: no interval)" in lede
    assert "within" not in lede


def test_the_runner_up_is_the_one_that_the_paired_ratio_favours(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", adapters=("triton", "ray_serve", "kserve"), scenarios=("no-fault",), trials=2, span_s=12
    )
    goodputs = {"triton": (250.0, 50.0), "ray_serve": (140.0, 140.0), "kserve": (100.0, 100.0 * 1.4)}
    lede = headline(_with_goodput(run, lambda a, n: goodputs[a][n - 1])).lede
    assert "Ray Serve reaches 1.18× the goodput of KServe" in lede


def test_a_trial_without_its_pair_makes_nobody_the_leader(pair_of_trials: RunFolder) -> None:
    goodputs = {("triton", 1): 100.0, ("triton", 2): 300.0, ("ray_serve", 1): 140.0, ("ray_serve", 2): 140.0}
    seen = _with_goodput(pair_of_trials, lambda a, n: goodputs[a, n])
    cut = [replace(c, trials=c.trials[:1]) if c.summary.adapter == "ray_serve" else c for c in seen.cells]
    lede = headline(replace(seen, cells=tuple(cut))).lede
    assert "Ray Serve reaches 1.40× the goodput of Triton (1\u00a0trial each: no interval)" in lede


def test_a_leader_without_a_goodput_in_some_trial_is_not_passed_over(pair_of_trials: RunFolder) -> None:
    goodputs = {("triton", 1): 300.0, ("triton", 2): 0.0, ("ray_serve", 1): 140.0, ("ray_serve", 2): 140.0}
    lede = headline(_with_goodput(pair_of_trials, lambda a, n: goodputs[a, n])).lede
    assert "not every framework answered within the objective in every trial" in lede


@pytest.fixture(scope="module")
def view_of_two(pair_of_trials: RunFolder) -> Any:
    return view([pair_of_trials])[0]


@given(st.lists(st.tuples(st.floats(50, 300), st.floats(50, 300)), min_size=2, max_size=2))
def test_no_order_of_goodputs_makes_a_lead_of_less_than_one(
    view_of_two: Any, goodputs: list[tuple[float, float]]
) -> None:
    seen = _given_goodput(view_of_two, lambda a, n: goodputs[n - 1][a == "triton"])
    lede = headline(seen).lede
    apart = abs(sum(math.log(a / b) for a, b in goodputs) / 2)
    close = re.search(r"within (\d+)\u202f% of each other", lede)
    assert (close is not None) == (apart < math.log(1.05))
    if close is not None:
        assert math.exp(apart) - 1 <= int(close[1]) / 100 + 1e-9


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=3, max_size=7))
def test_paired_ratio_is_the_t_interval_of_log_ratios(pairs: list[tuple[float, float]]) -> None:
    ratio = paired_ratio(pairs)
    assert ratio is not None and ratio.ends is not None
    logs = np.log([a / b for a, b in pairs])
    low, high = student_t.interval(
        0.95, len(logs) - 1, logs.mean(), max(logs.std(ddof=1), 1e-300) / math.sqrt(len(logs))
    )
    assert ratio.value == pytest.approx(math.exp(logs.mean()))
    assert ratio.ends == pytest.approx((math.exp(low), math.exp(high)))


def test_paired_ratio_claims_nothing_of_nothing() -> None:
    assert paired_ratio([]) is None
    assert paired_ratio([(1.0, 0.0)]) is None
    two = paired_ratio([(2.0, 1.0), (2.0, 1.0)])
    assert two is not None and two.ends is None and not two.settled


def _with_recoveries(run: RunFolder, *told: Mapping[str, Any]) -> Any:
    """The headline of a run whose faults recovered so, trial by trial."""
    (seen,) = view([run])
    for cell in seen.cells:
        for trial, recovery in zip(cell.trials, told, strict=False):
            for fault in trial.faults:
                for name, value in recovery.items():
                    setattr(fault.recovery, name, value)
    return " ".join(headline(seen).support)


def test_what_a_fault_cost_is_said_as_it_is_defined(compare: RunFolder) -> None:
    held = {"recovery_s": 0.0, "relapse_s": 0}
    assert "attainment never fell by more than 5 points" in _with_recoveries(compare, held, held, held)
    back = _with_recoveries(compare, {"recovery_s": 3.0, "relapse_s": 1}, held, held)
    assert "attainment was back after 3.00\u202fs and was low again in 1\u00a0later second." in back
    again = _with_recoveries(compare, {"recovery_s": 3.0, "relapse_s": 2}, held, held)
    assert "low again in 2\u00a0later seconds." in again
    lost = {"recovery_s": None, "relapse_s": 0}
    assert "attainment came back in 2 of 3 faults" in _with_recoveries(compare, lost, held, held)


def test_faults_injected_at_slightly_different_times_are_still_held(compare: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compare.folder, folder)

    def late(facts: Mapping[str, Any]) -> Mapping[str, Any]:
        moved = [{**f, "injected_s": 49.2 + 0.01 * facts["number"]} for f in facts["faults"]]  # felt by nobody
        return {"faults": moved, "slo_ms": 1e6}

    windows = [w for cell in view([with_facts(RunFolder.open(folder), late)])[0].cells for w in cell.faults]
    assert windows and all(isinstance(w, FaultWindow) and w.recovery_s == 0 for w in windows)


def test_the_page_defines_recovery_as_it_is_computed(page: Page) -> None:
    definition = page.text[page.text.index("How each number is made") :]
    for words in ("once it has fallen below", "Arrivals under way at the fault", "Low again", "p99 until recovery"):
        assert words in definition
    assert "Lost:" not in definition


@pytest.fixture(scope="module")
def with_defaults(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("defaults") / "run"
    names = ("triton", "ray_serve", "kserve")
    return make_run(folder, adapters=names, scenarios=("no-fault", "kill-replica", "defaults"), trials=3)


def test_defaults_stand_beside_the_tuned_settings(with_defaults: RunFolder) -> None:
    (run,) = view([with_defaults])
    told = defaults(run.cells)
    assert told is not None
    assert [row[0] for row in told.rows] == ["Triton", "Ray Serve", "KServe"]
    by_label = {cell.label: cell for cell in run.cells}
    ratios = []
    for row in told.rows:
        tuned, own = by_label[f"{row[0]} · no-fault"], by_label[f"{row[0]} · defaults"]
        assert (tuned.tuned, own.tuned) == (True, False)
        values = [
            (t.goodput_rps_per_device, o.goodput_rps_per_device)
            for t, o in zip(tuned.repetitions, own.repetitions, strict=True)
        ]
        ratio = paired_ratio(values)
        assert ratio is not None
        assert row[3] == ratio_words(ratio)
        ratios.append((ratio.value, row[0]))
    assert told.sentence.startswith(f"{min(ratios)[1]}'s own defaults came closest")
    html = build([with_defaults])
    assert 'id="defaults"' in html
    assert Page(html).of("section")


def test_without_defaults_there_is_no_such_section(compare: RunFolder, html: str) -> None:
    (run,) = view([compare])
    assert defaults(run.cells) is None
    assert 'id="defaults"' not in html


def test_a_fault_is_weighed_against_the_same_tuning(with_defaults: RunFolder, tmp_path: Path) -> None:
    """Also where the scenario on defaults comes first."""
    folder = tmp_path / "run"
    make_run(folder, scenarios=("defaults", "no-fault", "kill-replica"), trials=3)
    (run,) = view([RunFolder.open(folder)])
    cells = {cell.label: cell for cell in run.cells}
    calm, hurt = cells["Triton · no-fault"], cells["Triton · kill-replica"]
    expected = paired_ratio(pair(hurt, calm, "goodput_rps_per_device"))
    told = next(sentence for sentence in headline(run).support if sentence.startswith("Triton, kill replica"))
    assert expected is not None
    assert f"goodput was {ratio_words(expected)} that without it" in told


def test_what_was_claimed_stands_beside_what_was_seen(compare: RunFolder, with_defaults: RunFolder) -> None:
    rows = profiles(view([compare]))
    assert ("Triton", "how it batches", "triton batches in its own way", "formed 7.6 requests per batch") in rows
    failing = "one of 2 replicas killed: 3 of 141 requests failed"
    assert ("Triton", "when a replica dies or stops", "–", failing) in rows
    (unseen,) = [row for row in rows if row[0] == "Ray Serve"]
    assert unseen[3] == UNSEEN
    page = Page(build([compare]))
    assert failing in page.text
    assert left_out(view([compare])) == []
    (sentence,) = left_out(view([with_defaults]))
    assert sentence == "KServe ran without «queue_limit», for which it has no place: none."
    assert sentence in " ".join(Page(build([with_defaults])).text.split())


def test_the_same_warning_of_several_trials_is_told_once(compare: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(compare.folder, tmp_path / "copy")
    run = with_facts(RunFolder.open(tmp_path / "copy"), lambda _: {"warnings": ["a stand-in took its place"]})
    page = Page(build([run]))
    assert page.text.count("a stand-in took its place") == 1
    assert f"{run.trials[0].id} and {len(run.trials) - 1} more trials: a stand-in" in " ".join(page.text.split())


def test_one_trial_is_not_called_trials(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), variant="empty")
    assert "1 INVALID of 1\u00a0trial." in Page(build([run])).text


def test_the_generators_own_lateness_stands_beside_the_send_lag(compare: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compare.folder, folder)
    run = with_facts(RunFolder.open(folder), lambda f: {"load_generator": {"start_lag_p99_ms": 0.25 * f["number"]}})
    page = Page(build([run]))
    assert [row["start_lag"] for row in page.rows()[:4]] == ["0.75", "0.25", "0.5", "0.75"]
    assert "generator-saturated" in page.text and "the wait for a connection" in page.text


@given(st.integers(0, 10**6), st.sampled_from(["s", "ms", "%", "req/s", "GiB"]), st.sampled_from(["", ".", ",", " x"]))
def test_a_number_and_its_unit_stay_on_one_line(number: int, unit: str, after: str) -> None:
    assert tied(f"within {number} {unit}{after}") == f"within {number}\u00a0{unit}{after}"
    assert tied(f"{number} servers, {number} mains") == f"{number} servers, {number} mains"


def test_sentences_of_the_page_hold_numbers_to_their_units(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",))
    told = {"message": "the server did not answer within 1 s", "remedy": "give it 5 s", "detail": ""}
    run = with_facts(run, lambda _: {"state": "failed", "error": told, "warnings": ["threads ended within 1 s."]})
    page = Page(build([run]))
    for words in ("did not answer within 1\u00a0s", "give it 5\u00a0s", "ended within 1\u00a0s."):
        assert words in page.text


@given(st.floats(0, 1))
def test_a_share_is_never_rounded_up_to_all(value: float) -> None:
    shown = share(value)
    number = float(shown.removesuffix("\u202f%"))
    assert (number == 100) == (value == 1)
    assert number <= value * 100 + 1e-6


@given(st.floats(1e-6, 1e9))
def test_significant_keeps_three_digits_without_exponents(value: float) -> None:
    shown = significant(value)
    assert "e" not in shown
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.0051)


# ---------------------------------------------------------------- figures' arithmetic

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


@given(points)
def test_non_dominated_is_what_the_definition_says(pairs: list[tuple[int, int]]) -> None:
    cost, benefit = (np.array([p[i] for p in pairs], dtype=np.float64) for i in (0, 1))
    expected = [
        not any(c <= a and d >= b and (c < a or d > b) for c, d in zip(cost, benefit, strict=True))
        for a, b in zip(cost, benefit, strict=True)
    ]
    assert non_dominated(cost, benefit).tolist() == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(3, 60))
def test_down_sampling_keeps_the_ends_and_no_more_than_asked(values: list[float], most: int) -> None:
    y = np.array(values)
    kept = largest_triangles(np.arange(len(y), dtype=np.float64), y, most)
    assert len(kept) == min(len(y), most)
    assert (kept[0], kept[-1]) == (0, len(y) - 1)
    assert (np.diff(kept) > 0).all()


def test_down_sampling_keeps_a_lone_spike() -> None:
    y = np.zeros(10_000)
    y[4321] = 50.0
    assert 4321 in largest_triangles(np.arange(10_000, dtype=np.float64), y, 240)


def test_a_band_over_trials_knows_gaps_lengths_and_failures() -> None:
    band = Band.over([np.array([1.0, np.nan, np.inf]), np.array([3.0, 5.0, 2.0, 7.0]), np.array([2.0, np.nan, np.inf])])
    assert band.low.tolist() == [1.0, 5.0, 2.0, 7.0]
    assert band.mid.tolist() == [2.0, 5.0, math.inf, 7.0]
    assert band.high.tolist() == [3.0, 5.0, math.inf, 7.0]


def test_of_two_trials_the_worse_one_is_drawn() -> None:
    rows = [np.array([1.0, 2.0, np.nan]), np.array([math.inf, 1.0, 3.0])]
    assert Band.over(rows, high_is_bad=True).mid.tolist() == [math.inf, 2.0, 3.0]
    assert Band.over(rows).mid.tolist() == [1.0, 1.0, 3.0]  # goodput


def test_the_latency_of_two_trials_is_that_of_the_worse(pair_of_trials: RunFolder) -> None:
    for cell in view([pair_of_trials])[0].cells:
        assert cell.evidence is not None
        assert cell.summary.p99_ok_ms == max(trial.p99_ok_ms for trial in cell.trials)
        for curve in (cell.evidence.latency_ms, cell.evidence.p99_ms):
            assert np.array_equal(curve.mid, curve.high, equal_nan=True)
        assert "worse second of 2 trials" in timelines([cell])[0].note


def test_the_drawn_percentiles_are_those_of_the_table(compare: RunFolder) -> None:
    for cell in view([compare])[0].cells:
        assert cell.evidence is not None
        at = int(np.argmin(abs(NINES - 2)))
        assert cell.evidence.latency_ms.mid[at] == sorted(trial.p99_ms for trial in cell.trials)[1]


@given(st.sets(st.text(min_size=1, max_size=8), max_size=12))
def test_frameworks_get_colours_of_their_own_while_there_are_enough(names: set[str]) -> None:
    chosen = slots(names)
    assert set(chosen) == names
    assert len(set(chosen.values())) == min(len(names), len(palette()))


def test_a_framework_keeps_its_colour_whoever_else_races() -> None:
    known = ("triton", "ray_serve", "torchserve", "kserve")
    together = slots(known)
    assert all(slots([name])[name] == together[name] for name in known)


def test_the_frameworks_of_this_project_are_told_apart_by_hue() -> None:
    """Two shades of one blue are one colour to a reader."""

    def hue(colour: str) -> float:
        return colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))[0]

    chosen = slots(("triton", "ray_serve", "torchserve", "kserve"))
    for theme in (0, 1):
        hues = sorted(hue(palette()[slot][theme]) for slot in chosen.values())
        gaps = np.diff([*hues, hues[0] + 1])
        assert gaps.min() > 0.1, chosen


def test_colours_stand_out_by_day_and_by_night() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for light, dark in palette():
        assert contrast(light, "#fefdfb") >= 3
        assert contrast(dark, "#12171d") >= 3


def test_legends_know_every_marker_and_dash() -> None:
    assert len(MARKER_SHAPES) == len(MARKERS)
    assert len(DASHES) >= 6


@pytest.fixture(autouse=True)
def _no_pyplot_state() -> Iterator[None]:
    """Figures live outside of pyplot, and matplotlib's settings are as they were."""
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    pyplot = __import__("sys").modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_the_ruler_is_told_with_its_own_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",))
    figures = calibration(640.0, ceiling_rps=5120.0, at_least=False) | {"send_lag_p99_ms": 0.07, "floor_p99_ms": 0.6}
    run.amend_manifest(ruler={"http": figures, "grpc": {"error": "no server"}})
    (http, grpc) = ruler(view([RunFolder.open(run.folder)]))
    numbers = [float(re.match(r"[\d.,]+", cell)[0].replace(",", "")) for cell in http[1:]]  # type: ignore[index]
    assert numbers == [640, 5120, 0.03, 0.07, 0.15, 0.6, 66, 0.31]
    assert grpc[0] == "grpc" and "no server" in grpc[2]
    assert len(http) == len(grpc) == len(HEADINGS)


def test_a_sweep_of_two_knobs_is_drawn_as_a_map(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "e")
    run = make_run(tmp_path / "run", adapters=("triton",), scenarios=names, trials=1, fault_at=1e9)
    assert knobs(view([run])[0].cells) == [], "nothing was swept"
    swept = {
        "a": {"max_batch": 4, "batch_window_ms": 0.0, "replicas": 2},
        "b": {"max_batch": 8, "batch_window_ms": 0.0, "replicas": 2},
        "c": {"max_batch": 4, "batch_window_ms": 5.0, "replicas": 2},
        "d": {"max_batch": 16, "batch_window_ms": 5.0, "replicas": 1},
        "e": {"max_batch": 16, "batch_window_ms": 5.0, "replicas": 2},
    }
    cells = [
        replace(
            cell, summary=cell.summary.model_copy(update={"tuning": swept[cell.scenario]}), trials=calm(cell.trials)
        )
        for cell in view([run])[0].cells
    ]
    fast = {"p99_ms": 50.0, "goodput_rps_per_device": 10.0}
    slow = {"p99_ms": math.inf, "goodput_rps_per_device": 20.0}
    cells = [
        replace(cell, summary=cell.summary.model_copy(update=slow if cell.scenario == "d" else fast)) for cell in cells
    ]
    (figure,) = knobs(cells)
    assert "max batch 16, batch window ms 5: " in figure.svg
    assert figure.svg.count("<title>") == 4, "two cells share a place"
    assert "∞" not in figure.svg, "the one within the objective is the better one"
    assert "differ by replicas" in figure.note
    assert "emulated" in figure.svg


def calm(trials: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(trial.model_copy(update={"faults": []}) for trial in trials)


def test_recovery_is_drawn_from_the_fault_on(tmp_path: Path) -> None:
    cells = view([make_run(tmp_path / "run", trials=3, fault_at=20)])[0].cells
    (figure,) = recovery_curves(cells)
    assert figure.title == "kill replica"
    assert len(figure.keys) == 2, "the calm scenario has no fault to count from"
    assert "Triton · kill-replica: at the lowest 65 %; not recovered." in figure.svg, "nobody brought its replica back"
    assert "Ray Serve · kill-replica: at the lowest 100 %; attainment held." in figure.svg
    assert recovery_curves([cell for cell in cells if not cell.faulty]) == []


def read(metric: str, values: list[float], scope: str = "m") -> list[dict[str, Any]]:
    return [
        {"t_ns": i * 10**9, "source": "server", "scope": scope, "metric": metric, "value": value, "unit": "1"}
        for i, value in enumerate(values)
    ]


def test_the_mean_batch_of_a_second_is_counted_where_it_can_be() -> None:
    def told(*rows: list[dict[str, Any]]) -> list[float]:
        table = pa.Table.from_pylist([row for part in rows for row in part], schema=SAMPLE_SCHEMA)
        return [round(value, 6) for value in batch_series(Samples(table), 3)]

    counted = read("items_total", [0, 40, 40, 44]), read("batches_total", [0, 10, 10, 14])
    assert told(*counted)[0::2] == [4, 1]
    assert math.isnan(told(*counted)[1]), "no batch was begun in that second"
    more = read("items_total", [0, 0, 8, 8], "n"), read("batches_total", [0, 0, 1, 1], "n")
    assert told(*counted, *more) == [4, 8, 1], "models together"
    assert told(read("batch_size", [2, 2, 4, 4])) == [2, 3, 4], "its own gauge, where nothing is counted"
    assert all(math.isnan(value) for value in told([]))


def swept(run: RunFolder, goodput: Mapping[tuple[str, str], float], p99_ms: Mapping[tuple[str, str], float]) -> Any:
    """The view of a run whose scenarios are batch sizes, with these figures by adapter and scenario."""
    (seen,) = view([run])
    cells = []
    for cell in seen.cells:
        key = cell.summary.adapter, cell.scenario
        figures = {"goodput_rps_per_device": goodput[key], "p99_ms": p99_ms[key]}
        summary = cell.summary.model_copy(
            update={**figures, "tuning": {"max_batch": int(cell.scenario), "replicas": 2}}
        )
        trials = tuple(trial.model_copy(update=figures) for trial in calm(cell.trials))
        cells.append(replace(cell, summary=summary, trials=trials, faults=()))
    return replace(seen, cells=tuple(cells))


def test_a_sweep_is_answered_by_the_best_setting_of_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenarios=("4", "8", "16"), fault_at=1e9, span_s=12)
    keys = [(adapter, batch) for adapter in ("triton", "ray_serve") for batch in ("4", "8", "16")]
    goodput = dict(zip(keys, (100.0, 160.0, 300.0, 90.0, 80.0, 70.0), strict=True))
    p99_ms = dict.fromkeys(keys, 50.0) | {("triton", "16"): math.inf}
    told = headline(swept(run, goodput, p99_ms))
    assert "of 3\u00a0settings, by goodput per emulated device within p99 ≤ 200\u202fms" in told.lede
    assert "Triton with max batch 8 reaches 1.78× the goodput of Ray Serve with max batch 4" in told.lede
    assert "replicas" not in told.lede, "every setting has as many"
    assert [sentence.split(" answered")[0].split(", ")[1] for sentence in told.support[:2]] == [
        "Triton with max batch 8",
        "Ray Serve with max batch 4",
    ]
    assert "flatters" in told.support[2]
    lost = headline(swept(run, goodput, p99_ms | {("ray_serve", batch): math.inf for batch in ("4", "8", "16")}))
    assert "no setting of Ray Serve is known to keep the objective" in lost.lede
    assert "Triton with max batch 8 gave the most goodput: 160" in lost.lede
    assert "none of which is known to keep" in headline(swept(run, goodput, dict.fromkeys(keys, math.inf))).lede


def test_attainment_of_a_second_without_arrivals_is_unknown(tmp_path: Path) -> None:
    cell = view([make_run(tmp_path / "run", adapters=("triton",), scenarios=("no-fault",), variant="one-request")])[
        0
    ].cells[0]
    assert cell.evidence is not None
    known = ~np.isnan(cell.evidence.attainment.mid)
    assert np.count_nonzero(known) == 1
    assert cell.evidence.attainment.mid[known] in (0.0, 1.0)


def test_knobs_stand_side_by_side_and_configurations_by_their_difference(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenarios=("no-fault", "defaults"), span_s=12)
    told = reproduce(view([run])[0])
    batch = next(row for row in told.knobs if row[0] == "max_batch")
    assert len(batch) == 3 and all("max_batch" in cell for cell in batch[1:]), batch
    own = [trial for trial in run.trials if trial.facts.dump()["adapter"] == "triton"]
    (own[1].server / "config" / "model.conf").write_text("name: triton\nmax_batch_size: 1\n")
    configs = [config for config in reproduce(view([run])[0]).configs if config.adapter == "triton"]
    assert [bool(config.against) for config in configs] == [False, True]
    assert re.search(r"^-max_batch_size: \d+\n\+max_batch_size: 1$", configs[1].text, re.M), configs[1].text
    assert "Knobs side by side" in build([run])
    alone = make_run(tmp_path / "alone", adapters=("triton",), scenarios=("no-fault",), span_s=12)
    assert reproduce(view([alone])[0]).knobs == []


def test_what_was_served_and_when_a_run_was_gone_on_with_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenarios=("no-fault",), span_s=12)
    assert "export to" not in build([run])
    own = next(trial for trial in run.trials if trial.facts.dump()["adapter"] == "triton")
    write_json(own.facts_path, {**own.facts.dump(), "artifact": "onnx"})
    run.amend_manifest(resumed=[{"at": "2026-11-23T23:00:00Z"}, {"at": "2026-11-23T23:30:00Z"}])
    told = reproduce(view([run])[0])
    assert [adapter.exports for adapter in told.adapters] == ["onnx", ""]
    assert [value for key, value in told.machine if key == "Gone on with"] == [
        "2026-11-23T23:00:00Z",
        "2026-11-23T23:30:00Z",
    ]
    assert build([run]).count("Served: the workload's export to onnx.") == 1


def test_a_baseline_leads_nobody_and_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton", "ray_serve", "kserve"), scenarios=("no-fault",), trials=3)
    goodputs = {"triton": 160.0, "ray_serve": 100.0, "kserve": 200.0}
    seen = _with_goodput(run, lambda a, n: goodputs[a] * (1 + 0.01 * n))
    assert headline(seen).lede.count("KServe reaches 1.25×") == 1, "as a framework it leads"
    cells = tuple(replace(cell, baseline=cell.summary.adapter == "kserve") for cell in seen.cells)
    told = headline(replace(seen, cells=cells))
    assert "Triton reaches 1.60×" in told.lede
    assert "KServe" not in told.lede
    over = r"Over KServe: Triton 0\.800× \[0\.\d+,\s0\.\d+\] the goodput and .*× .* the p99; Ray Serve 0\.500×"
    assert re.match(over, told.support[0]), told.support[0]
    alone = tuple(cell for cell in cells if cell.baseline)
    assert "KServe answered" in headline(replace(seen, cells=alone)).lede, "alone it is told like any other"
