"""The report in headless Chromium: opens silently, sorts, opens rows, copies, fits a phone and prints."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tailrace.gate.baselines import of_run
from tailrace.gate.decision import decide
from tailrace.gate.judgement import Judgement, keep
from tailrace.gate.rules import parse_rules
from tailrace.harness.records.store import RunFolder
from tailrace.reports.report import write
from tests.synthetic import SCRIPT, make_run

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_S = 60


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    helper = shutil.which("chromedriver") or shutil.which("chromium-driver")
    if browser is None or helper is None:
        missing = "this machine has no chromium" if browser is None else "this machine has no chromedriver"
        if os.environ.get("TAILRACE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{missing}, and TAILRACE_REQUIRE_BROWSER=1 demands one")
        pytest.skip(f"{missing} (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(executable_path=helper))
    started.set_page_load_timeout(WAIT_S)
    started.set_script_timeout(WAIT_S)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "compare": make_run(folder / "compare", trials=3),
        "short": make_run(folder / "short", adapters=("triton", "ray_serve"), variant="killed"),
        "hostile": make_run(folder / "hostile", variant="hostile"),
        "sharing": make_run(
            folder / "sharing",
            adapters=("reference", "triton"),
            scenarios=("lru-200", "lru-400"),
            memories={f"lru-{mb}": {"memory_mb": mb} for mb in (200, 400)},
            span_s=30,
            peak_rate=4,
        ),
        "gated": _judged(folder),
    }


def _judged(folder: Path) -> RunFolder:
    """A run beside which the gate left a regression."""
    cells: dict[str, Any] = {"adapters": ("triton",), "scenarios": ("no-fault",), "trials": 3, "span_s": 12}
    before, run = (make_run(folder / f"gated-{seed}", seed=seed, **cells) for seed in (7, 8))
    decision = decide(of_run(before), of_run(run), parse_rules(["p50_ms <= 0.02", "p50_ms <= 50"]))
    keep(Judgement.of("main", "gated", decision, decision.verdict), run)
    return run


@pytest.fixture(scope="module")
def pages(runs: dict[str, RunFolder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: write([run], folder / f"{name}.html") for name, run in runs.items()}


def resize(driver: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_page(driver: Any, path: Path, width: int = 1280) -> None:
    driver.get_log("browser")  # forget what came before
    resize(driver, width)
    driver.get(path.as_uri())


def assert_silent(driver: Any) -> None:
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource').map(r => r.name)") == []


def column(driver: Any, title: str) -> int:
    """The place of a column in the comparison table."""
    titles = driver.execute_script(
        "return [...document.querySelectorAll('#comparison thead tr:last-child th button')].map(b => b.textContent)"
    )
    return int(titles.index(title))


def values(driver: Any, title: str) -> list[str]:
    """What the cells' rows hold in a column, from top to bottom."""
    return list(
        driver.execute_script(
            "const rows = [...document.querySelectorAll('#comparison tr.cell')];"
            "return rows.map(row => row.cells[arguments[0]].dataset.value)",
            column(driver, title),
        )
    )


def sort(driver: Any, title: str) -> str:
    """Press the header of a column; returns the direction that it then announces."""
    driver.execute_script(
        "document.querySelectorAll('#comparison thead tr:last-child th button')[arguments[0]].click()",
        column(driver, title),
    )
    announced = driver.execute_script(
        "return [...document.querySelectorAll('#comparison th[aria-sort]')].map(h => h.getAttribute('aria-sort'))"
    )
    assert len(announced) == 1
    return str(announced[0])


def test_it_opens_without_a_word(driver: Any, pages: dict[str, Path]) -> None:
    for path in pages.values():
        open_page(driver, path)
        assert driver.execute_script("return document.documentElement.className") == "js"
        assert_silent(driver)


def test_it_sorts_by_number_with_infinity_above_all(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["compare"])
    assert sort(driver, "p99") == "ascending"
    rising = values(driver, "p99")
    assert rising[-1] == "inf"
    assert [float(v) for v in rising] == sorted(float(v) for v in rising)
    assert sort(driver, "p99") == "descending"
    assert values(driver, "p99")[0] == "inf"
    assert sort(driver, "Cell") == "ascending"
    assert values(driver, "Cell") == sorted(values(driver, "Cell"))
    assert_silent(driver)


def test_what_says_nothing_is_sorted_last_either_way(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["short"])
    for _ in range(2):
        sort(driver, "p99")
        order = values(driver, "p99")
        assert order[-1] == "" and "" not in order[:-1]


def test_trials_open_and_close_and_stay_with_their_cell(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["compare"])
    shown = "return [...document.querySelectorAll('#comparison tr.trial')].filter(r => r.offsetParent !== null).length"
    assert driver.execute_script(shown) == 0
    first = driver.find_element("css selector", "button.opens")
    first.click()
    assert first.get_attribute("aria-expanded") == "true"
    assert driver.execute_script(shown) == 3
    driver.find_element("css selector", "button[data-opens]").click()
    assert driver.execute_script(shown) == 12
    sort(driver, "p50")
    together = driver.execute_script(
        "return [...document.querySelectorAll('#comparison tbody')].every(body => {"
        " const [cell, ...trials] = [...body.rows].map(r => r.cells[0].dataset.value);"
        " const scenario = cell.split(' · ')[1];"
        " return trials.length === 3 && trials.every(t => t.includes(`--${scenario}--`)); })"
    )
    assert together is True


def test_the_table_copies_with_numbers_intervals_and_units(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["compare"])
    text = driver.execute_async_script(
        "const done = arguments[0];"
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => done(text)}});"
        "document.querySelector('button[data-copies]').click();"
    )
    head, *lines = [line.split("\t") for line in text.split("\n")]
    assert {"Cell", "p99 (ms)", "p99 (ms) low", "p99 (ms) high", "Verdict"} <= set(head)
    assert len(lines) == 4 and all(len(line) == len(head) for line in lines)
    for line in lines:
        low, p99, high = (float(line[head.index(f"p99 (ms){end}")]) for end in (" low", "", " high"))
        assert low <= p99 <= high


def test_it_works_by_keyboard(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(driver, pages["compare"])
    button = driver.find_elements("css selector", "#comparison th button.sort")[column(driver, "p99")]
    button.send_keys(Keys.ENTER)
    assert values(driver, "p99")[-1] == "inf"
    scrolling = driver.find_elements("css selector", ".scroll")
    assert scrolling and all(box.get_attribute("tabindex") == "0" for box in scrolling)


@pytest.mark.parametrize("width", [320, 390, 820, 1280, 1920])
def test_the_page_never_scrolls_sideways(driver: Any, pages: dict[str, Path], width: int) -> None:
    for path in pages.values():
        open_page(driver, path, width)
        driver.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, path.name
    resize(driver, 1280)


def test_figures_are_as_wide_as_the_phone(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["compare"], 390)
    widths = driver.execute_script(
        "return [...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(widths) == 8 and all(330 <= width <= 390 for width in widths)


def test_its_colours_follow_the_reader(driver: Any, pages: dict[str, Path]) -> None:
    seen = []
    for scheme in ("light", "dark"):
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        open_page(driver, pages["compare"])
        seen.append(
            driver.execute_script(
                "return [getComputedStyle(document.body).backgroundColor,"
                " getComputedStyle(document.querySelector('figure svg text')).fill,"
                " getComputedStyle(document.querySelector('figure svg .tip path')).stroke]"
            )
        )
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert all(light != dark for light, dark in zip(*seen, strict=True))


def test_the_gates_word_is_found_from_the_top(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["compare"])
    assert driver.find_elements("css selector", "#gate, nav a[href='#gate']") == []
    open_page(driver, pages["gated"])
    driver.find_element("css selector", "nav a[href='#gate']").click()
    section = driver.find_element("css selector", "#gate")
    top = driver.execute_script("return arguments[0].getBoundingClientRect().top", section)
    assert 0 <= top < 200
    assert section.find_element("css selector", ".banner .badge").text == "REGRESSION"
    assert "against main." in section.text
    last = [row.text.split()[-1] for row in section.find_elements("css selector", "tbody tr")]
    assert last == ["REGRESSION", "pass"]
    colours = driver.execute_script(
        "const colour = (name) => { const p = document.createElement('p'); p.style.color = name;"
        " document.body.append(p); const found = getComputedStyle(p).color; p.remove(); return found; };"
        "return [getComputedStyle(document.querySelector('#gate .badge')).color, colour('var(--alarm)')]"
    )
    assert colours[0] == colours[1]
    assert_silent(driver)


def test_it_prints(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["compare"])
    pdf = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    assert_silent(driver)


def test_hostile_text_is_only_text(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["hostile"])
    assert driver.execute_script("return document.scripts.length") == 1
    driver.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert SCRIPT in driver.execute_script("return document.body.innerText")
    assert_silent(driver)  # a script that ran would have opened a dialogue, or been reported by the page's policy


def test_fifty_cells_open(driver: Any, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        adapters=[f"framework-{i}" for i in range(10)],
        scenarios=["no-fault", "kill-a", "kill-b", "kill-c", "kill-d"],
        span_s=12,
        fault_at=6,
    )
    page = write([run], tmp_path / "report.html")
    assert page.stat().st_size < 5_000_000
    open_page(driver, page)
    assert len(values(driver, "p99")) == 50
    assert_silent(driver)
    open_page(driver, page, 390)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    resize(driver, 1280)
