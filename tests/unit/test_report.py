"""The report page: complete, deterministic, safe and honest, on synthetic runs of every kind."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t

from harness.errors import InputError, StorageError
from harness.metrics import samples_needed
from harness.store import RunFolder
from reports.columns import COLUMNS
from reports.downsample import largest_triangles
from reports.evidence import Band, view
from reports.figures import DASHES, MARKERS, frontier_members
from reports.frontier import non_dominated
from reports.headline import headline, paired_ratio
from reports.report import MARKER_SHAPES, build, write
from reports.reproduce import Portable
from reports.svg import palette, slots
from reports.text import printable, share, significant
from tests.synthetic import SCRIPT, make_run


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
    assert len(figures) == 1 + 1 + 4 + 1  # tail, frontier, a timeline per cell, cold start
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
    assert not frontier_members(run_view.cells)[[run_view.cells.index(cell) for cell in killed]].any()
    told = " ".join(headline(run_view).support)
    assert all(cell.label in told for cell in killed)
    # Trials that were planned and never began are said to be missing.
    shutil.rmtree(run.trial(run.manifest["trials"][-1]["id"]).folder)
    assert "1 of 4 planned trials never began" in Page(build([RunFolder.open(run.folder)])).text


def test_a_run_without_any_trial_still_gives_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",))
    shutil.rmtree(run.folder / "trials")
    assert "Nothing was measured" in Page(build([RunFolder.open(run.folder)])).text


def test_keys_that_a_killed_run_lacks_are_not_needed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapters=("triton",))
    for trial in run.trials:
        facts = trial.facts
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
    (seen,) = view([run])
    for cell in seen.cells:
        for trial in cell.trials:
            trial["goodput_rps_per_device"] = change(trial["adapter"], trial["number"])
        cell.summary["goodput_rps_per_device"] = float(np.mean([t["goodput_rps_per_device"] for t in cell.trials]))
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
    assert "within 1 % of each other" in headline(close).lede


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=3, max_size=12))
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


@given(st.sets(st.text(min_size=1, max_size=8), max_size=12))
def test_frameworks_get_colours_of_their_own_while_there_are_enough(names: set[str]) -> None:
    chosen = slots(names)
    assert set(chosen) == names
    assert len(set(chosen.values())) == min(len(names), len(palette()))


def test_a_framework_keeps_its_colour_whoever_else_races() -> None:
    known = ("triton", "ray_serve", "torchserve", "kserve")
    together = slots(known)
    assert all(slots([name])[name] == together[name] for name in known)


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
