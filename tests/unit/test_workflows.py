"""The workflows: valid by GitHub's own schema, and every step that runs something is a nox session that there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_documented_commands import session_names

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_both_are_there() -> None:
    assert [path.stem for path in WORKFLOWS] == ["bench-gpu", "ci"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_they_are_what_github_takes(path: Path, tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*check, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(path.read_text().replace("runs-on:", "runs-at:"))
    assert subprocess.run([*check, str(wrong)], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_can_be_done_at_home(path: Path) -> None:
    ran = [step["run"] for step in steps(path) if "run" in step]
    assert ran
    for text in ran:
        if text == "pip install nox":
            continue
        found = re.findall(r"nox -s ((?:[\w-]+ ?)+?)(?= --|$| >>)", text, re.M)
        assert found, f"no nox session: {text}"
        assert {name for names in found for name in names.split()} <= session_names()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_others_write_is_not_run(path: Path) -> None:
    """Expressions within a shell line would be pasted into it: they come by way of the environment."""
    assert not [step["run"] for step in steps(path) if "${{" in step.get("run", "")]
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
