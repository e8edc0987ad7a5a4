"""The gate's word in the report: left beside the run that was judged, and shown from that file alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tailrace.cli.main import app
from tailrace.gate.baselines import of_run
from tailrace.gate.decision import GateVerdict, decide
from tailrace.gate.judgement import FILE, WORDS, Judgement, keep, kept
from tailrace.gate.rules import parse_rules
from tailrace.harness.errors import InputError
from tailrace.harness.records.store import RunFolder
from tailrace.reports.evidence import view
from tailrace.reports.gate import gated
from tailrace.reports.report import build
from tests.synthetic import SCRIPT, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: make_run(
            folder / name, seed=seed, adapters=("triton",), scenarios=("no-fault",), trials=3, span_s=12, peak_rate=12
        )
        for name, seed in (("base", 7), ("new", 8))
    }


@pytest.fixture
def new(runs: dict[str, RunFolder], tmp_path: Path) -> RunFolder:
    """A copy of the candidate that nobody has judged."""
    return RunFolder.open(Path(shutil.copytree(runs["new"].folder, tmp_path / "new")))


def judge(
    runs: dict[str, RunFolder], *rules: str, baseline: str = "main", taken: GateVerdict | None = None
) -> Judgement:
    decision = decide(of_run(runs["base"]), of_run(runs["new"]), parse_rules(rules))
    return Judgement.of(baseline, "new", decision, taken or decision.verdict)


PASS, FAIL, OPEN = "p50_ms <= 50", "p50_ms <= 0.02", "p50_ms <= 1.01"
HOPELESS = "p50_ms <= 1.0003"
"""So near to the ratio that no number of trials settles it."""


def section(page: str) -> str:
    found = re.search(r'<section id="gate".*?</section>', page, re.DOTALL)
    return found[0] if found else ""


def test_without_a_decision_there_is_no_section_and_with_one_nothing_else_changes(
    runs: dict[str, RunFolder], new: RunFolder
) -> None:
    before = build([new])
    assert 'id="gate"' not in before and "#gate" not in before
    keep(judge(runs, PASS), new)
    after = build([new])
    assert after == build([new])
    told = section(after)
    assert told
    link = '<li><a href="#gate">Gate</a></li>'
    assert after.count(link) == 1
    (new.folder / FILE).unlink()
    assert build([new]) == before
    assert re.sub(r"\s+", "", after.replace(told, "").replace(link, "")) == re.sub(r"\s+", "", before)


@pytest.mark.parametrize(
    ("rules", "verdict", "advice"),
    [
        ((PASS,), "pass", "nothing to do"),
        ((FAIL,), "fail", "Look for the cause in what changed"),
        ((OPEN,), "inconclusive", "more trials, about 14 of each run, or give"),
        ((OPEN, HOPELESS), "inconclusive", "more trials, or give the rule more room"),
        ((PASS, FAIL), "fail", "Some rule fails"),
    ],
)
def test_it_says_verdict_baseline_rules_and_what_to_do(
    runs: dict[str, RunFolder], new: RunFolder, rules: tuple[str, ...], verdict: GateVerdict, advice: str
) -> None:
    judgement = judge(runs, *rules)
    assert judgement.verdict == verdict
    keep(judgement, new)
    told = section(build([new]))
    assert f">{WORDS[verdict]}</strong> against main. " in told
    assert advice in told
    assert len(re.findall(r"<tr><th scope=\"row\">triton--no-fault</th>", told)) == len(rules)
    for finding in judgement.findings:
        assert finding.ratio is not None and finding.interval is not None
        assert f"<td>{finding.ratio:.3f}</td>" in told
        assert "<td>[{:.3f}, {:.3f}]</td>".format(*finding.interval) in told
        assert f"<td>{WORDS[finding.verdict]}</td>" in told
    assert ("would settle it" in told) == (verdict == "inconclusive")


def test_what_an_inconclusive_one_was_taken_for_is_said(runs: dict[str, RunFolder], new: RunFolder) -> None:
    keep(judge(runs, OPEN, taken="pass"), new)
    assert "taken for a pass: --inconclusive pass" in section(build([new]))


def test_infinite_ratios_come_back_as_such(runs: dict[str, RunFolder], new: RunFolder) -> None:
    judgement = judge(runs, PASS)
    (finding,) = judgement.findings
    infinite = finding.model_copy(update={"ratio": float("inf"), "interval": (0.0, float("inf"))})
    keep(judgement.model_copy(update={"findings": (infinite,)}), new)
    assert kept(new) == judgement.model_copy(update={"findings": (infinite,)})
    told = section(build([new]))
    assert "<td>∞</td>" in told and "<td>[0.000, ∞]</td>" in told


def test_hostile_names_are_only_text_and_paths_are_nobodys(runs: dict[str, RunFolder], new: RunFolder) -> None:
    keep(judge(runs, PASS, baseline=f"/home/jane/{SCRIPT}"), new)
    told = section(build([new]))
    assert SCRIPT not in told and "&lt;script" in told
    assert "jane" not in told


def test_of_several_runs_those_that_were_judged_are_told_by_their_labels(
    runs: dict[str, RunFolder], new: RunFolder
) -> None:
    keep(judge(runs, PASS), new)
    views = view([runs["base"], new])
    (told,) = gated(views)
    assert told.label == views[1].label
    assert f"<h3>{told.label}</h3>" in section(build([runs["base"], new]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1, "verdict": "fine"}'])
def test_a_spoilt_file_is_refused_by_name(new: RunFolder, text: str) -> None:
    (new.folder / FILE).write_text(text)
    with pytest.raises(InputError, match=r"gate\.json is not what a gate of this version leaves"):
        build([new])


def test_the_command_leaves_what_it_prints(runs: dict[str, RunFolder], new: RunFolder) -> None:
    command = ["gate", str(runs["base"].folder), str(new.folder), "--format", "json", "--rule", PASS]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((new.folder / FILE).read_text()) == {"schema_version": 1, **json.loads(result.stdout)}
    assert not (runs["base"].folder / FILE).exists()
    result = CliRunner().invoke(app, [*command[:-1], FAIL])
    assert result.exit_code == 4
    told = kept(new)
    assert told is not None and told.verdict == "fail", "the last word stands"


def test_a_folder_that_cannot_be_written_is_no_error(runs: dict[str, RunFolder], new: RunFolder) -> None:
    (new.folder / f"{FILE}.tmp").mkdir()  # stands in the way of writing, whoever runs this test
    result = CliRunner().invoke(app, ["gate", str(runs["base"].folder), str(new.folder), "--rule", PASS])
    assert result.exit_code == 0, result.output
    assert "report will not show this" in result.stderr
    assert kept(new) is None
