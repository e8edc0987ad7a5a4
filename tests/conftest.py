"""What all tests share: folders of their own for user data and crash evidence, waiting for conditions, the command line."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec

import psutil
import pytest
from hypothesis import settings

from tests.one_name import one_name as one_name  # noqa: PLC0414  # a fixture of the whole session

# No test says how long anything may take; hypothesis would, for every example.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here, for options are only read from the outermost conftest."""
    parser.addoption("--adapter", action="append", default=[], help="contract suite: this adapter; may be given again")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What starts real servers is asked once more when it fails, for they share two noisy cores with another test: the
    summary lists it as RERUN, and a promise that is broken every time still fails. Unit tests have no such excuse."""
    if config.pluginmanager.hasplugin("rerunfailures"):
        for item in items:
            if "unit" not in item.path.parts:
                item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither see nor change the user's traces and ledgers; the cache of environments is shared on purpose."""
    folder = tmp_path_factory.mktemp("user")
    monkeypatch.setenv("TAILRACE_HOME", str(folder / "home"))
    monkeypatch.setenv("TAILRACE_STATE", str(folder / "state"))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.05)


def tailrace(*arguments: str, cwd: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "tailrace.cli.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)


ATTEMPTS = 4
P = ParamSpec("P")


def measured_again(check: Callable[Concatenate[Path, P], None]) -> Callable[Concatenate[Path, P], None]:
    """Measure again what the machine may have spoilt: neighbours spoil one measurement, a ruler that is wrong all of them.
    The last attempt's assertion stands; what must hold on a busy machine too fails by ``pytest.fail``, and at once."""

    @functools.wraps(check)
    def attempts(tmp_path: Path, *args: P.args, **kwargs: P.kwargs) -> None:
        for attempt in range(1, ATTEMPTS):
            try:
                return check(tmp_path / f"attempt-{attempt}", *args, **kwargs)
            except AssertionError as error:
                warnings.warn(f"measured again after attempt {attempt}: {error}", stacklevel=2)
        return check(tmp_path / f"attempt-{ATTEMPTS}", *args, **kwargs)

    return attempts


@pytest.fixture
def leftovers() -> Iterator[Callable[[], list[str]]]:
    """What a test has left running: processes that carry this test's marker in their environment."""
    marker = f"TAILRACE_TEST_MARKER={os.getpid()}-{time.monotonic_ns()}"
    name, value = marker.split("=")
    os.environ[name] = value

    def marked() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(name) == value:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
        return found

    yield marked
    del os.environ[name]
