"""What is built from a clean clone holds ``tailrace`` and nothing else at the top, with all that its code reads, and runs.

The packages that tailrace and the building need are those of this environment; nothing is fetched.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.one_name import ROOMS, ROOT

UV = str(Path(sys.executable).with_name("uv"))


def done(*command: str, cwd: Path) -> str:
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, as of the last commit."""
    folder = tmp_path_factory.mktemp("clone")
    done("git", "clone", "--quiet", str(ROOT), str(folder), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def built(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel made of it."""
    folder = tmp_path_factory.mktemp("dist")
    done(UV, "build", "--no-build-isolation", "--python", sys.executable, "--out-dir", str(folder), cwd=clone)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def files_of(path: Path) -> set[str]:
    """Names in an sdist, below its one folder, or in a wheel."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(path) as sdist:
        return {member.name.partition("/")[2] for member in sdist.getmembers() if not member.isdir()}


def at_the_top(names: set[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


@pytest.mark.parametrize("form", ["wheel", "sdist"])
def test_all_of_the_package_is_in_it_and_nothing_else(form: str, clone: Path, built: dict[str, Path]) -> None:
    names = files_of(built[form])
    ours = {f"tailrace/{name}" for name in done("git", "ls-files", *sorted(ROOMS), cwd=clone).splitlines()}
    assert {name for name in names if name.startswith("tailrace/")} == ours | {"tailrace/__init__.py"}
    wheel = {"tailrace", f"{built['wheel'].name.partition('-py3')[0]}.dist-info"}
    sdist = {"tailrace", "tailrace.egg-info", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert at_the_top(names) == {"wheel": wheel, "sdist": sdist}[form]


@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_installed_it_runs_from_an_empty_folder(form: str, clone: Path, built: dict[str, Path], tmp_path: Path) -> None:
    done(UV, "venv", "--quiet", "--python", sys.executable, "env", cwd=tmp_path)
    python = str(tmp_path / "env" / "bin" / "python")
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # What is found in the second place: the packages of this environment, among them an editable tailrace.
    (packages / "this_environment.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", encoding="utf-8"
    )
    what = ["--editable", str(clone)] if form == "editable" else [str(built[form])]
    done(
        UV,
        "pip",
        "install",
        "--quiet",
        "--offline",
        "--no-deps",
        "--no-build-isolation",
        "--python",
        python,
        *what,
        cwd=tmp_path,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    at = done(python, "-c", "import tailrace.harness; print(tailrace.__file__)", cwd=empty).strip()
    assert Path(at).is_relative_to(clone if form == "editable" else packages)
    command = str(tmp_path / "env" / "bin" / "tailrace")
    assert "Races model-serving frameworks" in done(command, "--help", cwd=empty)
    assert "triton" in done(command, "adapters", cwd=empty)
    assert "trials of" in done(command, "run", "smoke", "--dry-run", cwd=empty)
    assert not list(empty.iterdir())
