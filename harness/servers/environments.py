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

from tailrace.harness.contract.adapter import ServerEnvironment
from tailrace.harness.errors import EnvironmentBuildError, InputError
from tailrace.harness.folders import cache_folder
from tailrace.harness.servers import package_index
from tailrace.harness.servers.interpreters import Interpreter, choose, declared

Kind = Literal["venv", "current"]
"""Interpreters of this machine; images are :mod:`tailrace.harness.servers.images`' business."""
Progress = Callable[[str], None]

# Raised when environments are built differently from the same requirement files, so that old ones are not reused.
_FORMAT = 1
# Written last: an environment without it is an interrupted build.
_MARKER = "tailrace-packages.json"
_TAIL_LINES = 30
# What uv says on its way that a waiting user wants to read.
_WORTH_TELLING = ("Resolved", "Downloading", "Prepared", "Installed", "Bytecode")


def build(
    kind: Kind,
    requirements: Sequence[Path],
    *,
    name: str,
    on_progress: Progress | None = None,
    compile_bytecode: bool = True,
) -> ServerEnvironment:
    """The environment that holds what these requirement files ask for, built if it is not there yet.

    ``venv`` is built with uv below the cache folder, with the Python that :mod:`.interpreters` chooses, and reused while the
    files, that Python's version and the platform stay the same. ``current`` is this interpreter, in which nothing is
    installed. ``compile_bytecode`` spares the first cold start the compilation of every module that it imports; an
    environment that is used once has no use for that.

    Raises :class:`EnvironmentBuildError` when the environment cannot be had, :class:`InputError` when a
    requirement file cannot be used.
    """
    progress = on_progress or silent
    if kind == "current":
        return _current(requirements, name, progress)
    interpreter = choose(requirements, name=name, on_progress=progress)
    folder = cache_folder() / "envs" / f"{name}-{_fingerprint(requirements, interpreter)}"
    if environment := _finished(folder, interpreter):
        return environment
    lock_file = folder.with_name(f"{folder.name}.lock")
    try:
        with exclusive(lock_file, lambda: progress(f"waiting for another build of the environment of {name}")) as lock:
            if environment := _finished(folder, interpreter):
                return environment
            try:
                return _build_venv(
                    folder,
                    requirements,
                    name,
                    interpreter=interpreter,
                    progress=progress,
                    compile_bytecode=compile_bytecode,
                    lock=lock,
                )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise EnvironmentBuildError(
            f"the environment of {name} could not be built in {folder}: {error.strerror or error}",
            remedy=_remedy(str(error)),
        ) from error


def fingerprint(
    kind: Kind, requirements: Sequence[Path], *, name: str = "", on_progress: Progress | None = None
) -> str:
    """What an environment of these requirement files is known by: whatever changes it changes this text. ``name`` and
    ``on_progress`` are for the choice of its interpreter. Raises as :func:`choose` does."""
    if kind == "venv":
        return _fingerprint(requirements, choose(requirements, name=name, on_progress=on_progress or silent))
    return _hashed(
        platform.python_version(),
        packages={name: _installed(name) for name in ["numpy", *(r.name for r in _parsed(requirements))]},
    )


def _fingerprint(requirements: Sequence[Path], interpreter: Interpreter) -> str:
    _parsed(requirements)  # a file that cannot be used is refused before anything is built
    return _hashed(interpreter.version, requirements=[_text(path) for path in requirements])


def _hashed(version: str, **facts: object) -> str:
    told = {
        "format": _FORMAT,
        "python": f"{platform.python_implementation()} {version}",
        "platform": sysconfig.get_platform(),
        **facts,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold a lock file alone, among threads and processes, and yield its descriptor.

    ``on_wait`` is called when somebody else holds it.
    """
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


def run_streamed(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    pass_fds: Sequence[int] = (),
) -> tuple[int, str]:
    """Run a program to its end, its lines (stdout and stderr together) to ``on_line`` as they come.

    Returns the exit status and the last lines. If this is interrupted, the program is ended.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=pass_fds,
    ) as process:
        try:
            for line in process.stdout or ():
                tail.append(line.rstrip())
                on_line(line.strip())
        except BaseException:
            process.kill()
            raise
    return process.returncode, "\n".join(tail)


def silent(message: str) -> None:
    """The progress callback of those who want none."""


def _finished(folder: Path, interpreter: Interpreter) -> ServerEnvironment | None:
    python = folder / "bin" / "python"
    try:
        packages = json.loads((folder / _MARKER).read_text())
    except (OSError, ValueError):
        return None
    # A link to an interpreter that has been removed since is no environment.
    return ServerEnvironment(python, "venv", packages, interpreter=str(interpreter)) if python.exists() else None


def _build_venv(
    folder: Path,
    requirements: Sequence[Path],
    name: str,
    *,
    interpreter: Interpreter,
    progress: Progress,
    compile_bytecode: bool,
    lock: int,
) -> ServerEnvironment:
    progress(
        f"building the environment of {name}" + ("" if interpreter.origin == "harness" else f" with {interpreter}")
    )
    shutil.rmtree(folder, ignore_errors=True)
    for sentence in package_index.left_out():
        progress(sentence)
    variables = _uv_variables(folder.parent)

    def run_uv(*arguments: str) -> None:
        # In our own folder, so that no project file of the user's current folder has a say; holding the build's lock
        # too, so that nobody builds beside a uv whose harness was killed.
        code, said = run_streamed(
            [uv.find_uv_bin(), *arguments],
            cwd=folder.parent,
            env=variables,
            on_line=lambda line: progress(f"{name}: {line}") if line.startswith(_WORTH_TELLING) else None,
            pass_fds=(lock,),
        )
        if code != 0:
            raise EnvironmentBuildError(
                f"the environment of {name} could not be built: uv ended with {code}",
                remedy=_remedy(said),
                detail=said,
            )

    # uv finds the base interpreter behind a virtual environment by itself.
    run_uv("venv", "--no-project", "--python", str(interpreter.python), str(folder))
    if requirements:
        files = [word for path in requirements for word in ("--requirements", str(path.absolute()))]
        options = ["--compile-bytecode"] if compile_bytecode else []
        python = str(folder / "bin" / "python")
        where = package_index.uv_arguments()
        run_uv("pip", "install", "--python", python, "--link-mode", "hardlink", *options, *where, *files)
    minor = ".".join(interpreter.version.split(".")[:2])
    packages = _packages([str(folder / "lib" / f"python{minor}" / "site-packages")])
    staged = folder / f"{_MARKER}.new"
    staged.write_text(json.dumps(packages, indent=1))
    staged.replace(folder / _MARKER)
    return ServerEnvironment(folder / "bin" / "python", "venv", packages, interpreter=str(interpreter))


def _uv_variables(folder: Path) -> dict[str, str]:
    """The whole environment of a uv that builds below ``folder``."""
    variables = {**os.environ, **package_index.uv_environment(), "NO_COLOR": "1", "UV_PYTHON_DOWNLOADS": "never"}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # it would undo --compile-bytecode
    command = [uv.find_uv_bin(), "cache", "dir"]
    said = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False).stdout
    shared = Path(said.strip() or folder)
    existing = next(path for path in (shared, *shared.parents) if path.exists())
    if existing.stat().st_dev != folder.stat().st_dev:
        # Hard links do not cross disks: with uv's usual cache every server would hold a copy of its torch.
        variables["UV_CACHE_DIR"] = str(cache_folder().absolute() / "uv")
    return variables


def _remedy(said: str) -> str:
    if re.search(r"No space left on device|os error 28|Disk quota exceeded", said):
        return (
            f"free some space where {cache_folder()} lies (everything below it can be deleted, "
            "`uv cache prune` removes old packages), or set TAILRACE_CACHE to a folder on a larger disk"
        )
    if re.search(r"No solution found|unsatisfiable|no version of|not found in the (package registry|provided)", said):
        return (
            "the configured package indexes (`pip config list`) cannot satisfy the requirements on this Python: add an index "
            "or a wheel folder that can, or run tailrace with another Python"
        )
    if re.search(r"Failed to fetch|error sending request|Connect|dns|certificate|timed out", said, re.IGNORECASE):
        return (
            "check the network, the proxy and the package index (`pip config list`), or install the requirements "
            "into this interpreter and choose `environment: current`"
        )
    if re.search(r"Permission denied|Not a directory|Read-only", said):
        return f"make {cache_folder()} a folder that you can write to, or set TAILRACE_CACHE to one"
    return "read what uv says below"


def _current(requirements: Sequence[Path], name: str, progress: Progress) -> ServerEnvironment:
    installed = {requirement.name: _installed(requirement.name) for requirement in _parsed(requirements)}
    if missing := [distribution for distribution, version in installed.items() if version is None]:
        command = [sys.executable, "-m", "pip", "install", *(w for path in requirements for w in ("-r", str(path)))]
        raise EnvironmentBuildError(
            f"this interpreter lacks what {name} needs: {', '.join(missing)}",
            remedy=f"run `{shlex.join(command)}`, or choose `environment: venv`",
        )
    own = Interpreter(Path(sys.executable), platform.python_version(), "harness")
    if not (wanted := declared(requirements)).contains(own.version, prereleases=True):
        progress(f"{name} is made for Python {wanted}, and this interpreter is {own.version}")
    for requirement in _parsed(requirements):
        version = installed[requirement.name]
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            progress(f"{name} was locked with {requirement}, this interpreter has {version}")
    return ServerEnvironment(own.python, "current", _packages(sys.path), interpreter=str(own))


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
