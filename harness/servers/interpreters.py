"""Chooses the Python that a server's environment is built with, by what its requirements can run on.

Beside a requirement file may lie ``requires-python.txt``: one line, a version specifier such as ``>=3.11,<3.13``, with the reason
as a comment. Without it any Python that tailrace runs on will do.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uv
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from tailrace.harness.errors import EnvironmentBuildError, InputError
from tailrace.harness.servers import package_index

DECLARATION = "requires-python.txt"
Origin = Literal["harness", "machine", "uv"]
ORIGINS: Mapping[Origin, str] = {
    "harness": "the one that runs tailrace",
    "machine": "found on this machine",
    "uv": "fetched by uv",
}
_MINORS = range(14, 7, -1)
"""Of Python 3, newest first: those that are looked for, or fetched."""
_ASK = "import platform; print(platform.python_version())"
_ASK_TIMEOUT_S = 30.0
_FETCH_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Interpreter:
    """A Python to build an environment with."""

    python: Path
    version: str
    origin: Origin

    def __str__(self) -> str:
        return f"Python {self.version}, {ORIGINS[self.origin]} ({self.python})"


def declared(requirements: Sequence[Path]) -> SpecifierSet:
    """The versions on which all of these requirement files can be used. Raises :class:`InputError` for a line that is none."""
    wanted = SpecifierSet()
    for path in dict.fromkeys(file.parent / DECLARATION for file in requirements):
        try:
            line = path.read_text(encoding="utf-8").partition("#")[0].strip()
            wanted &= SpecifierSet(line)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, InvalidSpecifier) as error:
            raise InputError(
                f"{path}: {error}", remedy="write one line of version specifiers, for example >=3.11,<3.13"
            ) from error
    return wanted


def choose(requirements: Sequence[Path], *, name: str, on_progress: Callable[[str], None]) -> Interpreter:
    """The interpreter for these requirement files: the harness's own where it fits, else one that is found on this machine, else
    one that uv fetches.

    Raises :class:`InputError` as :func:`declared` does, and :class:`EnvironmentBuildError` when there is none.
    """
    wanted = declared(requirements)
    found = on_this_machine(wanted)
    if found is None:
        on_progress(f"{name} needs Python {wanted}, and this machine has none: fetching one with uv")
        found = _fetched(wanted)
    if found is None:
        raise EnvironmentBuildError(
            f"{name} needs Python {wanted}; this machine has none, and uv could not fetch one",
            remedy=f"install Python 3.{_newest(wanted)} (your distribution's package, pyenv, or "
            f"`uv python install 3.{_newest(wanted)}`), and run it again",
        )
    return found


def on_this_machine(wanted: SpecifierSet) -> Interpreter | None:
    """The harness's own interpreter where it fits, else the newest one that is found; ``None`` without any."""
    own = platform.python_version()
    if wanted.contains(own, prereleases=True):
        return Interpreter(Path(sys.executable), own, "harness")
    return _found(str(wanted), "machine")


@functools.cache
def _found(wanted: str, origin: Origin) -> Interpreter | None:
    """Looked for once: nothing that comes later in this process changes it, but a fetch, which has an origin of its own."""
    specifiers = SpecifierSet(wanted)
    for minor in _MINORS:
        if not any(specifiers.contains(f"3.{minor}.{micro}") for micro in (0, 99)):
            continue
        for python in _candidates(minor):
            version = _version(python)
            if version is not None and specifiers.contains(version, prereleases=True):
                return Interpreter(python, version, origin)
    return None


def _candidates(minor: int) -> Iterator[Path]:
    """Where Python 3.MINOR may be: where uv finds it (PATH, and what uv has fetched before), and the versions of pyenv, of whose
    names on PATH only the chosen one runs."""
    said = _uv("find", f"3.{minor}", timeout_s=_ASK_TIMEOUT_S)
    if said:
        yield Path(said)
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(root.glob(f"versions/3.{minor}.*/bin/python3.{minor}"), reverse=True)


def _fetched(wanted: SpecifierSet) -> Interpreter | None:
    if _uv("install", f"3.{_newest(wanted)}", timeout_s=_FETCH_TIMEOUT_S) is None:
        return None
    return _found(str(wanted), "uv")


def _newest(wanted: SpecifierSet) -> int:
    return next((m for m in _MINORS if wanted.contains(f"3.{m}.99")), sys.version_info.minor)


def _uv(command: str, request: str, *, timeout_s: float) -> str | None:
    """What ``uv python COMMAND`` prints; ``None`` where it fails."""
    variables = {**os.environ, **package_index.uv_environment(), "NO_COLOR": "1"}
    if command == "find":
        variables["UV_PYTHON_DOWNLOADS"] = "never"
    # Outside of any virtual environment or project of the user's, for neither has a say in what a server runs on.
    variables.pop("VIRTUAL_ENV", None)
    ask = [uv.find_uv_bin(), "python", command, "--no-config", request]
    try:
        done = subprocess.run(
            ask, env=variables, cwd="/", capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(python: Path) -> str | None:
    try:
        said = subprocess.run(
            [python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()
