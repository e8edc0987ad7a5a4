"""The report in other forms: Markdown for a CI job, rows for people with their own plots."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.analysis.summary import summarise, write_summary
from tailrace.harness.errors import InputError
from tailrace.harness.records.store import RunFolder
from tailrace.reports.index import write_index
from tailrace.reports.markdown import markdown
from tailrace.reports.report import write
from tailrace.reports.tables import figures_csv, write_parquet
from tailrace.reports.text import markdown_safe
from tests.conftest import tailrace
from tests.synthetic import SCRIPT, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("formats") / "run", trials=3)


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, the line of dashes left out."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").replace("\\|", "¦").split("|")])
        elif found[-1]:
            found.append([])
    return [[row for row in table if set(row) != {"---"}] for table in found if table]


def test_markdown_says_what_the_page_says(run: RunFolder) -> None:
    text = markdown([run])
    cells, ratios = tables(text)
    assert len(cells) == 1 + 4, "a row for each cell"
    assert len({len(row) for row in cells}) == 1
    assert ratios[0] == ["Pair", "Blocks", "p99", "p50", "Goodput per device"]
    assert "Triton" in text
    assert "emulated" in text
    assert "× \\[" in text, "a ratio comes with its interval"
    assert summarise(run).verdict in text


def test_markdown_of_several_runs_tells_them_apart(run: RunFolder, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", adapters=("kserve",), name="second", trials=3, slo_ms=100)
    text = markdown([run, other])
    assert len(tables(text)[0]) == 1 + 4 + 2
    assert "kserve" in text.lower()
    assert "objective" in text or "slo" in text.lower(), "runs under other conditions are said to be so"


def test_hostile_text_means_nothing_in_markdown(tmp_path: Path) -> None:
    text = markdown([make_run(tmp_path / "run", variant="hostile", trials=1)])
    assert SCRIPT not in text
    assert "<" not in text.replace("\\<", "")
    assert len({len(row) for row in tables(text)[0]}) == 1


@given(st.text())
def test_whatever_is_said_stays_in_its_field(text: str) -> None:
    safe = markdown_safe(text)
    assert "\n" not in safe
    assert "\r" not in safe
    for special in "|<`*[":
        assert special not in safe.replace("\\\\", "").replace("\\" + special, "")


def test_rows_are_one_per_trial_with_their_run(run: RunFolder, tmp_path: Path) -> None:
    summary = summarise(run)
    rows = list(csv.DictReader(io.StringIO(figures_csv({"results/a": summary, "results/b": summary}))))
    assert [row["run"] for row in rows] == ["results/a"] * 12 + ["results/b"] * 12
    for row, trial in zip(rows, summary.trials * 2, strict=True):
        assert row["trial"] == trial.trial
        assert int(row["arrivals"]) == trial.arrivals
        assert float(row["p99_ms"]) == pytest.approx(trial.p99_ms)
        assert row["tuning.max_batch"] == "16"
    path = tmp_path / "rows.parquet"
    write_parquet({"a": summary}, path)
    table = pq.read_table(path)
    assert table["p99_ms"].to_pylist() == pytest.approx([trial.p99_ms for trial in summary.trials])
    assert table["arrivals"].type == "int64"


def test_infinite_and_missing_figures_are_kept_apart(tmp_path: Path) -> None:
    failing = summarise(make_run(tmp_path / "failing", fail_fraction=0.05, scenarios=("no-fault",)))
    (row, *_) = csv.DictReader(io.StringIO(figures_csv({"": failing})))
    assert row["p99_ms"] == "inf"
    assert row["gpu_power_w"] == ""
    assert "run" not in row
    write_parquet({"": failing}, tmp_path / "f.parquet")
    assert pq.read_table(tmp_path / "f.parquet")["p99_ms"][0].as_py() == float("inf")


def test_an_index_lists_runs_and_what_could_not_be_read(tmp_path: Path) -> None:
    good = make_run(tmp_path / "sub" / "a run#1", trials=1)
    write([good], good.folder / "report.html")
    write_summary(good)
    make_run(tmp_path / "hostile", variant="hostile", trials=1)
    spoilt = make_run(tmp_path / "spoilt", variant="one-request", trials=1)
    (spoilt.folder / "manifest.json").write_text('{"schema_version": 1}')
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert 'href="sub/a%20run%231/report.html"' in page
    assert "triton, no-fault" in page
    assert "without a summary" in page, "of the hostile one, which nobody has analysed"
    assert SCRIPT not in page
    assert "Not read: spoilt" in page
    with pytest.raises(InputError, match="no run"):
        write_index(tmp_path / "hostile" / "trials" / "nowhere")


def test_on_the_command_line(run: RunFolder, tmp_path: Path) -> None:
    folder = str(run.folder)
    assert tailrace("report", folder, "--format", "md", cwd=tmp_path).stdout.startswith("## ")
    told = json.loads(tailrace("report", folder, "--format", "json", cwd=tmp_path).stdout)
    assert list(told) == [folder]
    done = tailrace("report", folder, folder, "--format", "csv", "-o", "both.csv", cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "both.csv")
    done = tailrace("report", folder, "--format", "parquet", "-o", "nowhere/x.parquet", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere/x.parquet could not be written" in done.stderr
    for arguments in (["--format", "parquet"], [folder]):
        refused = tailrace("report", folder, *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert "-o FILE" in refused.stderr
