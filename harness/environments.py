"""Builds the interpreters that servers and workloads run in, apart from the harness's own."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import uv
from packaging.requirements import InvalidRequirement, Requirement

from harness import package_index
from harness.adapter import ServerEnvironment
from harness.errors import EnvironmentBuildError, InputError
from harness.folders import cache_folder

Kind = Literal["venv", "current"]
Progress = Callable[[str], None]

# Raised when environments are built differently from the same requirement files, so that old ones are not reused.
_FORMAT = 1
# Written last: an environment without it is an interrupted build.
_MARKER = "tailrace-packages.json"
_TAIL_LINES = 30


def build(
    kind: Kind,
    requirements: Sequence[Path],
    *,
    name: str,
    on_progress: Progress | None = None,
    compile_bytecode: bool = True,
) -> ServerEnvironment:
    """The environment that holds what these requirement files ask for, built if it is not there yet.

    ``venv`` is built with uv below the cache folder and reused while the files, the Python version and the platform
    stay the same. ``current`` is this interpreter, in which nothing is installed. ``compile_bytecode`` spares
    the first cold start the compilation of every module that it imports; an environment that is used once has no
    use for that.

    Raises :class:`EnvironmentBuildError` when the environment cannot be had, :class:`InputError` when a
    requirement file cannot be used.
    """
    progress = on_progress or _silent
    if kind == "current":
        return _current(requirements, name, progress)
    folder = cache_folder() / "envs" / f"{name}-{fingerprint(kind, requirements)}"
    if environment := _finished(folder):
        return environment
    with exclusive(folder.with_name(f"{folder.name}.lock"), lambda: progress(f"waiting for another build of {name}")) as lock:
        if environment := _finished(folder):
            return environment
        try:
            _build_venv(folder, requirements, name, progress, compile_bytecode, lock)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise EnvironmentBuildError(
                    f"the environment of {name} could not be built in {folder}: {error.strerror or error}",
                    remedy=_remedy(str(error)),
                ) from error
            raise
    environment = _finished(folder)
    if environment is None:
        raise EnvironmentBuildError(
            f"the environment of {name} vanished from {folder} while it was built",
            remedy="run again, and let nothing else clean the cache folder meanwhile",
        )
    return environment


def fingerprint(kind: Kind, requirements: Sequence[Path]) -> str:
    """What an environment of these requirement files is known by: whatever changes it changes this text."""
    facts: dict[str, object] = {
        "format": _FORMAT,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": sysconfig.get_platform(),
    }
    if kind == "venv":
        facts["requirements"] = [_text(path) for path in requirements]
    else:
        facts["packages"] = {name: _installed(name) for name in ["numpy", *(r.name for r in _parsed(requirements))]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold a lock file alone, among threads and processes; yields its descriptor. ``on_wait`` is called if it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _silent(message: str) -> None:
    """The progress callback of those who want none."""


def _finished(folder: Path) -> ServerEnvironment | None:
    python = folder / "bin" / "python"
    try:
        packages = json.loads((folder / _MARKER).read_text())
    except (OSError, ValueError):
        return None
    # A link to an interpreter that has been removed since is no environment.
    return ServerEnvironment(python, "venv", packages) if python.exists() else None


def _build_venv(
    folder: Path, requirements: Sequence[Path], name: str, progress: Progress, compile_bytecode: bool, lock: int
) -> None:
    progress(f"building the environment of {name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for sentence in package_index.left_out():
        progress(sentence)
    # uv finds the base interpreter behind a virtual environment by itself.
    _uv(["venv", "--no-project", "--python", sys.executable, str(folder)], folder.parent, name, progress, lock)
    files = [word for path in requirements for word in ("--requirements", str(path.absolute()))]
    if files:
        options = ["--python", str(folder / "bin" / "python"), "--link-mode", "hardlink"]
        options += ["--compile-bytecode"] if compile_bytecode else []
        arguments = ["pip", "install", *options, *package_index.uv_arguments(), *files]
        _uv(arguments, folder.parent, name, progress, lock)
    libraries = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    staged = folder / f"{_MARKER}.new"
    staged.write_text(json.dumps(_packages([str(libraries)]), indent=1))
    staged.replace(folder / _MARKER)


def _uv(arguments: Sequence[str], cwd: Path, name: str, progress: Progress, lock: int) -> None:
    """Run uv, passing on what it says; its last words go into the error when it fails.

    It runs in our own folder, so that no project file of the user's current folder has a say, and it holds the
    build's lock too, so that nobody builds beside a uv whose harness was killed.
    """
    environment = {**os.environ, **package_index.uv_environment(), "NO_COLOR": "1", "UV_PYTHON_DOWNLOADS": "never"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it would undo --compile-bytecode
    if not _same_disk(cwd, environment):
        environment["UV_CACHE_DIR"] = str(cache_folder() / "uv")
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    process = subprocess.Popen(
        [uv.find_uv_bin(), *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(lock,),
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            tail.append(line.rstrip())
            if line.startswith(("Resolved", "Downloading", "Prepared", "Installed", "Bytecode")):
                progress(f"{name}: {line.strip()}")
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if process.returncode != 0:
        said = "\n".join(tail)
        raise EnvironmentBuildError(
            f"the environment of {name} could not be built: uv ended with {process.returncode}",
            remedy=_remedy(said),
            detail=said,
        )


def _same_disk(folder: Path, environment: Mapping[str, str]) -> bool:
    """Whether uv's cache and ours can share files by hard links; where they cannot, every server copies its torch."""
    said = subprocess.run(
        [uv.find_uv_bin(), "cache", "dir"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    cache = Path(said.stdout.strip() or folder)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return existing.stat().st_dev == folder.stat().st_dev


def _remedy(said: str) -> str:
    if re.search(r"No space left on device|os error 28|Disk quota exceeded", said):
        return (
            f"free some space where {cache_folder()} lies (`tailrace clean` removes old environments, "
            "`uv cache prune` old packages), or set TAILRACE_CACHE to a folder on a larger disk"
        )
    if re.search(r"No solution found|unsatisfiable|no version of|not found in the (package registry|provided)", said):
        return (
            f"the configured package indexes (`pip config list`) cannot satisfy the requirements on Python "
            f"{platform.python_version()}: add an index or a wheel folder that can, or use another Python"
        )
    if re.search(r"Failed to fetch|error sending request|Connect|dns|certificate|timed out", said, re.IGNORECASE):
        return (
            "check the network, the proxy and the package index (`pip config list`), or install the requirements "
            "into this interpreter and choose `environment: current`"
        )
    return "read what uv says below"


def _current(requirements: Sequence[Path], name: str, progress: Progress) -> ServerEnvironment:
    installed = {requirement.name: _installed(requirement.name) for requirement in _parsed(requirements)}
    if missing := [distribution for distribution, version in installed.items() if version is None]:
        command = [sys.executable, "-m", "pip", "install", *(w for path in requirements for w in ("-r", str(path)))]
        raise EnvironmentBuildError(
            f"this interpreter lacks what {name} needs: {', '.join(missing)}",
            remedy=f"run `{shlex.join(command)}`, or choose `environment: venv`",
        )
    for requirement in _parsed(requirements):
        version = installed[requirement.name]
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            progress(f"{name} was locked with {requirement}, this interpreter has {version}")
    return ServerEnvironment(Path(sys.executable), "current", _packages(sys.path))


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(path: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=list(path)):
        found.setdefault(distribution.name, distribution.version)  # the first on the path is the one imported
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a requirement file ({error})") from error


def _parsed(requirements: Sequence[Path]) -> list[Requirement]:
    """The requirements that apply to this interpreter, in the order of the files."""
    parsed = []
    for path in requirements:
        for line in _text(path).replace("\\\n", " ").splitlines():
            # A lock file's comments and hashes say nothing about which distributions are meant.
            words = re.sub(r"(^|\s)#.*", "", line).split(" --hash", 1)[0].strip()
            if not words or words.startswith("--"):
                continue
            try:
                requirement = Requirement(words)
            except InvalidRequirement as error:
                raise InputError(
                    f"{path}: `{words}` is no requirement ({error})".replace("\n", " "),
                    remedy="write one `name==version` per line; other files cannot be included",
                ) from error
            if requirement.marker is None or requirement.marker.evaluate():
                parsed.append(requirement)
    return parsed
