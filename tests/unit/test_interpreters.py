"""Which Python a server is built with: the harness's own, one of this machine, one that uv fetches, or a clear word."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uv
from packaging.specifiers import SpecifierSet

from tailrace.harness.errors import EnvironmentBuildError, InputError
from tailrace.harness.run.registry import all_adapters
from tailrace.harness.servers import environments, interpreters

OWN = platform.python_version()


def never(message: str) -> None:
    pytest.fail(f"told: {message}")


def requirements(folder: Path, declaration: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if declaration is not None:
        (folder / "requires-python.txt").write_text(declaration)
    path = folder / "requirements.txt"
    path.write_text("")
    return path


@pytest.fixture(autouse=True)
def _looked_for_anew() -> Iterator[None]:
    interpreters._found.cache_clear()
    yield
    interpreters._found.cache_clear()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any other Python, and a uv that has none until it was told to install one; returns what it was told."""
    told, fetched = tmp_path / "told", tmp_path / "fetched-python"
    program = tmp_path / "uv"
    program.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {shlex.quote(str(told))}\n'
        'case "$2" in\n'
        f'  find) test -e {shlex.quote(str(fetched))} && [ "$4" = "3.12" ] && echo {shlex.quote(str(fetched))} ;;\n'
        '  install) [ -z "$NO_NETWORK" ] || exit 2\n'
        f"    printf '#!/bin/sh\\necho 3.12.9\\n' > {shlex.quote(str(fetched))}; chmod +x {shlex.quote(str(fetched))} ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(uv, "find_uv_bin", lambda: str(program))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "no-pyenv"))
    return told


# A version that is not the harness's own, so that another one has to be looked for.
OTHER = ">=3.12.2,<3.13" if sys.version_info[:2] != (3, 12) else ">=3.12.9,<3.13"


def test_the_harness_s_own_is_taken_where_it_fits(tmp_path: Path) -> None:
    for declaration in (None, f">=3.8,<={OWN}  # the reason"):
        chosen = interpreters.choose([requirements(tmp_path, declaration)], name="demo", on_progress=never)
        assert (chosen.python, chosen.version, chosen.origin) == (Path(sys.executable), OWN, "harness")


def test_all_requirement_files_have_a_say(tmp_path: Path) -> None:
    framework, workload = requirements(tmp_path / "a", ">=3.11"), requirements(tmp_path / "b", "<3.13")
    assert interpreters.declared([framework, workload]) == SpecifierSet(">=3.11,<3.13")
    assert not interpreters.declared([requirements(tmp_path / "c")])


def test_one_of_this_machine_is_taken_else(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python3.12"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 3.12.9\n")
    python.chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    chosen = interpreters.choose([requirements(tmp_path, OTHER)], name="demo", on_progress=never)
    assert (chosen.python, chosen.version, chosen.origin) == (python, "3.12.9", "machine")
    assert "install" not in stand_in.read_text()


def test_a_python_that_does_not_run_is_none(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python3.12"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 127\n")
    python.chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert interpreters.on_this_machine(SpecifierSet(OTHER)) is None


def test_else_uv_fetches_one(tmp_path: Path, stand_in: Path) -> None:
    messages: list[str] = []
    chosen = interpreters.choose([requirements(tmp_path, OTHER)], name="demo", on_progress=messages.append)
    assert (chosen.version, chosen.origin) == ("3.12.9", "uv")
    assert chosen.python == tmp_path / "fetched-python"
    assert "fetched by uv" in str(chosen)
    (message,) = messages
    assert "demo needs Python" in message and "fetching" in message
    assert "python install --no-config 3.12" in stand_in.read_text()


def test_else_one_message_says_what_to_do(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_NETWORK", "1")
    with pytest.raises(EnvironmentBuildError, match="demo needs Python") as caught:
        environments.build("venv", [requirements(tmp_path, OTHER)], name="demo")
    assert "uv python install 3.12" in (caught.value.remedy or "")


def test_a_line_that_is_no_specifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"requires-python\.txt") as caught:
        interpreters.choose([requirements(tmp_path, "3.11 or so")], name="demo", on_progress=never)
    assert ">=3.11,<3.13" in (caught.value.remedy or "")


def test_an_environment_says_which_python_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path / "cache"))
    built = environments.build("venv", [requirements(tmp_path)], name="demo")
    assert built.interpreter == f"Python {OWN}, the one that runs tailrace ({sys.executable})"
    assert environments.build("current", [requirements(tmp_path)], name="demo").interpreter == built.interpreter


def test_an_interpreter_that_was_not_asked_for_is_told(tmp_path: Path) -> None:
    messages: list[str] = []
    environments.build("current", [requirements(tmp_path, "<3.8")], name="demo", on_progress=messages.append)
    assert messages == [f"demo is made for Python <3.8, and this interpreter is {OWN}"]


def test_what_our_adapters_declare_can_be_read_and_is_there_for_some_python() -> None:
    for adapter in all_adapters().values():
        wanted = interpreters.declared([adapter.requirements])
        assert any(wanted.contains(f"3.{minor}.5") for minor in (11, 12, 13)), adapter.name


def test_another_environment_for_another_python(tmp_path: Path, stand_in: Path) -> None:
    own, other = requirements(tmp_path / "own"), requirements(tmp_path / "other", OTHER)
    messages: list[str] = []
    assert environments.fingerprint("venv", [own]) != environments.fingerprint(
        "venv", [other], name="demo", on_progress=messages.append
    )
    assert messages
