"""The house: one import name, rooms that look down, servers that stand alone. `docs/architecture.md` draws it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.one_name import ROOMS, ROOT

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS: list[dict[str, Any]] = PYPROJECT["tool"]["importlinter"]["contracts"]


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, those included that are not committed yet."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", *patterns]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def imported(file: Path, *, for_type_checkers: bool = True) -> Iterator[str]:
    """The absolute names that a file imports, wherever in it."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_type_checkers:
            waiting.extend(node.orelse)
        else:
            waiting.extend(ast.iter_child_nodes(node))


# One import name


def test_a_module_under_two_names_fails_the_suite(tmp_path: Path) -> None:
    (tmp_path / "test_twice.py").write_text(
        "import sys\n\n\ndef test_passes() -> None:\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    import harness.errors\n    import tailrace.harness.errors\n\n"
        "    assert harness.errors is not tailrace.harness.errors\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.one_name", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 1
    assert "1 passed, 1 error" in run.stdout
    assert "tailrace.harness.errors is imported as harness.errors too" in run.stdout


def test_nothing_imports_a_room_by_its_bare_name() -> None:
    bare = ROOMS - {"docker"}  # which is the SDK's name: a folder without __init__.py gives way to it
    wrong = [f"{file}: {name}" for file in tracked("*.py") for name in imported(file) if name.split(".")[0] in bare]
    assert not wrong


def test_every_folder_with_modules_is_a_room() -> None:
    folders = {file.relative_to(ROOT).parts[0] for file in tracked("*/__init__.py")}
    assert folders - {"tailrace", "tests"} == {name for name in ROOMS if (ROOT / name / "__init__.py").is_file()}
    for name in ROOMS:
        assert (ROOT / "tailrace" / name).readlink() == Path("..", name), (
            "a link is relative, to the folder of its name"
        )


# Rooms


def layers(contract: dict[str, Any]) -> set[str]:
    return {name for layer in contract["layers"] for name in re.split(r" *[|:] *", layer)}


def test_every_room_has_a_floor() -> None:
    """import-linter itself holds that for the harness (`exhaustive`), whose rooms stand between those at the top."""
    (whole,) = (contract for contract in CONTRACTS if contract["name"] == "Rooms look down")
    (harness,) = (contract for contract in CONTRACTS if contract.get("containers") == ["tailrace.harness"])
    assert harness["exhaustive"]
    at_the_top = {f"tailrace.{name}" for name in ROOMS if any((ROOT / name).rglob("*.py"))} - {"tailrace.harness"}
    assert layers(whole) == at_the_top | {f"tailrace.harness.{name}" for name in layers(harness)}
    assert not any("ignore_imports" in contract for contract in CONTRACTS)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources alone, to plant something in."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "tailrace", tmp_path / "tailrace", ignore=ignored)  # folders, where there were links
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(folder: Path) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "COLUMNS": "200"}
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120, env=environment)
    return run.returncode, run.stdout


def test_a_room_that_looks_up_is_found(copy: Path) -> None:
    with (copy / "tailrace" / "harness" / "errors.py").open("a", encoding="utf-8") as file:
        file.write("\nif TYPE_CHECKING:\n    from tailrace.reports.text import markdown_safe\n")
    code, said = lint_imports(copy)
    assert code == 1
    assert "Rooms look down BROKEN" in said
    assert "tailrace.harness.errors -> tailrace.reports.text" in said


def test_a_circle_within_a_room_is_found(copy: Path) -> None:
    room = copy / "tailrace" / "harness" / "plan"
    (room / "one.py").write_text("from tailrace.harness.plan import another\n", encoding="utf-8")
    (room / "another.py").write_text("def late():\n    from tailrace.harness.plan import one\n", encoding="utf-8")
    code, said = lint_imports(copy)
    assert code == 1
    assert "No circles BROKEN" in said
    assert "Rooms look down KEPT" in said


def test_nothing_is_found_where_nothing_is_planted(copy: Path) -> None:
    code, said = lint_imports(copy)
    assert code == 0, said


# Servers


PROVIDED = {"grpc": "grpcio", "ts": "torchserve", "triton_python_backend_utils": "nvidia-pytriton"}
"""Modules whose packages have another name."""
SERVED = [
    "adapters/*/server.py",
    "adapters/*/server/*.py",
    "adapters/torchserve/handler.py",
    "adapters/torchserve/torch_stand_in.py",
    "adapters/triton/shim.py",
    "adapters/triton/script.py",
    "workloads/*/model.py",
    "workloads/pipeline.py",
    "workloads/bare_model.py",
    "multiplexing/*.py",
]


@pytest.mark.parametrize("pattern", SERVED)
def test_what_servers_import_is_in_their_own_environment(pattern: str) -> None:
    """The standard library, numpy, what the lock file beside it holds, and files beside it, which import no more."""
    files = sorted(ROOT.glob(pattern))
    assert files
    for file in files:  # which grow by those beside them
        folder = file.parent.parent if file.parent.name == "server" else file.parent
        locked = {
            line.split("==")[0]
            for lock in folder.glob("*requirements.txt")
            for line in lock.read_text(encoding="utf-8").splitlines()
            if "==" in line and not line.startswith((" ", "#"))
        }
        for name in imported(file, for_type_checkers=False):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "numpy":
                continue
            # Of many models: the reference server has this one file on its path besides.
            beside = ROOT / "multiplexing" / "residency.py" if top == "residency" else file.with_name(f"{top}.py")
            if beside.is_file():
                files += [beside] if beside not in files else []
            else:
                assert PROVIDED.get(top, top).replace("_", "-") in locked, f"{file} imports {name}"


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imported(ROOT / "tailrace" / "__init__.py"))
    for name in ("harness", "adapters", "workloads", "multiplexing"):
        assert not list(imported(ROOT / name / "__init__.py")), name


# docs/architecture.md


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_drawing_has_the_floors_of_the_contract() -> None:
    """A floor of the drawing is a layer, with the rooms in it; the modules of ``harness`` itself are one room there."""
    (whole,) = (contract for contract in CONTRACTS if contract["name"] == "Rooms look down")
    floors = []
    for layer in whole["layers"]:
        rooms = [name.removeprefix("tailrace.").replace(".", "/") for name in re.split(r" *[|:] *", layer)]
        floors.append(list(dict.fromkeys(room if (ROOT / room).is_dir() else "harness" for room in rooms)))
    (drawing,) = re.findall(r"```mermaid\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)
    drawn = re.findall(r"subgraph (\w+) .*?\n(.*?)\n    end", drawing, flags=re.DOTALL)
    assert [re.findall(r'\["(?:\d · )?(.+?)"\]', rooms) for _, rooms in drawn] == floors
    assert " --> ".join(name for name, _ in drawn) in drawing, "the arrows go down, floor by floor"


def test_every_path_that_the_architecture_names_exists() -> None:
    paths = [name for name in re.findall(r"`([\w*./-]+)`", ARCHITECTURE) if "/" in name]
    assert len(paths) > 25
    for path in paths:
        assert list(ROOT.glob(path)), path


def test_the_architecture_tells_what_to_touch_for_each_thing_that_is_added() -> None:
    told = dict(re.findall(r"^\| ([a-z ]+) \| `([\w/]+)/` \|", ARCHITECTURE, flags=re.MULTILINE))
    things = {"adapter", "workload", "trace", "fault", "collector", "verdict", "figure", "command", "trial feature"}
    assert set(told) == things
