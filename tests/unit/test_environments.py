"""Environments: pip's configuration as uv understands it, building, reusing and mending them, without any network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tailrace
from tailrace.harness.errors import EnvironmentBuildError, InputError
from tailrace.harness.servers import environments, package_index

LISTING = """\
:env:.default-timeout='180'
:env:.find-links='/wheels'
:env:.index-url=''
global.cert='/etc/ssl/ca.pem'
global.extra-index-url='https://a.example/simple\\nfile:///nowhere/simple  https://b.example/simple'
global.find-links='/elsewhere'
global.index-url='https://global.example/simple'
install.index-url='https://install.example/simple'
download.no-index='true'
WARNING: something that pip says beside it
global.broken='unterminated
"""


def test_the_environment_beats_the_files_and_empty_settings_count_as_unset() -> None:
    settings = package_index.parse_pip_config(LISTING)
    assert settings == {
        "cert": "/etc/ssl/ca.pem",
        "extra-index-url": "https://a.example/simple\nfile:///nowhere/simple  https://b.example/simple",
        "find-links": "/wheels",
        "index-url": "https://install.example/simple",
        "timeout": "180",
    }


@given(st.dictionaries(st.from_regex(r"[a-z]+(-[a-z]+){0,2}", fullmatch=True), st.text(min_size=1)))
def test_every_value_survives_the_listing(values: dict[str, str]) -> None:
    listing = "\n".join(f"global.{name}={value!r}" for name, value in values.items())
    expected = {name: value.strip() for name, value in values.items() if value.strip()}
    expected = {("timeout" if name == "default-timeout" else name): value for name, value in expected.items()}
    assert package_index.parse_pip_config(listing) == expected


def test_indexes_become_arguments_and_missing_folders_are_left_out_with_a_reason(tmp_path: Path) -> None:
    spaced = tmp_path / "my%20index"
    (tmp_path / "my index").mkdir()
    settings = {
        "find-links": f"{tmp_path} /no/such/folder https://wheels.example/",
        "index-url": "https://main.example/simple",
        "extra-index-url": f"file:///nowhere/simple\nfile://{spaced} https://extra.example/simple",
        "trusted-host": "main.example extra.example:8080",
    }
    assert package_index.uv_arguments(settings) == [
        *("--find-links", str(tmp_path), "--find-links", "https://wheels.example/"),
        *("--default-index", "https://main.example/simple"),
        *("--index", f"file://{spaced}", "--index", "https://extra.example/simple"),
        *("--index-strategy", "unsafe-best-match"),
        *("--allow-insecure-host", "main.example", "--allow-insecure-host", "extra.example:8080"),
    ]
    assert [sentence.split(" names ")[1].split(",")[0] for sentence in package_index.left_out(settings)] == [
        "/no/such/folder",
        "file:///nowhere/simple",
    ]


def test_relative_folders_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert package_index.uv_arguments({"find-links": "wheels ~/wheels"}) == [
        *("--find-links", str(tmp_path / "wheels")),
        *("--find-links", str(tmp_path / "wheels")),
    ]


def test_without_indexes_only_folders_count(tmp_path: Path) -> None:
    settings = {"no-index": "true", "find-links": str(tmp_path), "index-url": "https://main.example/simple"}
    assert package_index.uv_arguments(settings) == ["--find-links", str(tmp_path), "--no-index"]
    assert package_index.uv_arguments({"no-index": "0"}) == []


def test_connections_follow_pip() -> None:
    settings = {"cert": "/etc/ssl/ca.pem", "client-cert": "/me.pem", "proxy": "http://proxy:3128", "timeout": "14.5"}
    assert package_index.uv_environment(settings) == {
        "SSL_CERT_FILE": "/etc/ssl/ca.pem",
        "SSL_CLIENT_CERT": "/me.pem",
        "HTTP_PROXY": "http://proxy:3128",
        "HTTPS_PROXY": "http://proxy:3128",
        "UV_HTTP_TIMEOUT": "15",
    }
    assert "SSL_CERT_FILE" not in package_index.uv_environment({})


def test_the_package_index_needs_nothing_installed() -> None:
    root = Path(tailrace.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import tailrace.harness.servers.package_index"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, timeout=60)


def _wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    """A pure-Python wheel with one module, written by hand."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"NAME = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return wheel


def _index(folder: Path, wheel: Path) -> str:
    """A package index on disk that holds one wheel; returns its address."""
    project = folder / wheel.name.split("-")[0]
    project.mkdir(parents=True)
    shutil.copy(wheel, project)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (project / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    return folder.as_uri()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of our own, and a pip that is configured with a folder of two wheels and nothing else."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    wheels = tmp_path / "wheels"
    _wheel(wheels, "alpha")
    _wheel(wheels, "beta")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    package_index.pip_settings.cache_clear()
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_pip_settings(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(package_index.pip_settings.cache_clear)


def _requirements(folder: Path, text: str, name: str = "requirements.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _site_packages(python: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return python.parent.parent / "lib" / version / "site-packages"


def test_a_venv_is_built_once(offline: Path) -> None:
    requirements = _requirements(offline, "# what it needs\nalpha==1.0  # from the folder\n")
    messages: list[str] = []
    built = environments.build("venv", [requirements], name="demo", on_progress=messages.append)
    assert built.packages == {"alpha": "1.0"}
    assert any("building the environment of demo" in message for message in messages)
    code = "import alpha, sys; print(alpha.NAME, sys.prefix != sys.base_prefix, sys.version_info[:2])"
    said = subprocess.run([built.python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == ["alpha", "True", f"({sys.version_info.major},", f"{sys.version_info.minor})"]
    assert list(_site_packages(built.python).glob("__pycache__/alpha.*.pyc"))

    messages.clear()
    assert environments.build("venv", [requirements], name="demo", on_progress=messages.append) == built
    assert messages == []


def test_a_build_environment_need_not_be_compiled(offline: Path) -> None:
    requirements = _requirements(offline, "alpha\n")
    built = environments.build("venv", [requirements], name="once", compile_bytecode=False)
    assert not list(_site_packages(built.python).glob("__pycache__"))


def test_other_requirements_are_another_environment(offline: Path) -> None:
    lock = _requirements(offline, "alpha\n")
    more = _requirements(offline, "beta\n", "more.txt")
    first = environments.build("venv", [lock], name="demo")
    second = environments.build("venv", [lock, more], name="demo")
    assert first.python != second.python
    assert second.packages == {"alpha": "1.0", "beta": "1.0"}
    more.write_text("beta==1.0\n")
    assert environments.build("venv", [lock, more], name="demo").python != second.python


def test_packages_come_from_any_of_pips_indexes_on_disk(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gamma = _index(offline / "index", _wheel(offline / "made", "gamma"))
    delta = _index(offline / "more", _wheel(offline / "made", "delta", "2.0"))
    old = _index(offline / "old", _wheel(offline / "made", "delta", "1.0"))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", gamma)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{old} {delta} {(offline / 'gone').as_uri()}")
    package_index.pip_settings.cache_clear()
    messages: list[str] = []
    requirements = _requirements(offline, "alpha\ngamma\ndelta\n")
    built = environments.build("venv", [requirements], name="indexes", on_progress=messages.append)
    assert built.packages == {"alpha": "1.0", "delta": "2.0", "gamma": "1.0"}
    assert any("gone" in message and "left out" in message for message in messages)


@pytest.mark.parametrize("damage", ["marker", "interpreter"])
def test_what_an_interrupted_build_left_is_built_again(offline: Path, damage: str) -> None:
    requirements = _requirements(offline, "alpha\n")
    built = environments.build("venv", [requirements], name="demo")
    folder = built.python.parent.parent
    (folder / "leftover").write_text("from before")
    if damage == "marker":
        next(folder.glob("tailrace-*.json")).unlink()
    else:
        built.python.unlink()
        built.python.symlink_to(offline / "python-that-was-removed")
    again = environments.build("venv", [requirements], name="demo")
    assert again == built
    assert not (folder / "leftover").exists()
    subprocess.run([again.python, "-c", "import alpha"], check=True, timeout=60)


def test_a_failed_build_says_why_and_leaves_nothing(offline: Path) -> None:
    requirements = _requirements(offline, "alpha==9.9\n")
    with pytest.raises(EnvironmentBuildError) as caught:
        environments.build("venv", [requirements], name="demo")
    assert "environment of demo" in caught.value.message
    assert "pip config list" in (caught.value.remedy or "")
    assert "alpha==9.9" in (caught.value.detail or "")
    assert [path.suffix for path in (offline / "cache" / "envs").iterdir()] == [".lock"]


def test_an_interrupted_build_leaves_nothing(offline: Path) -> None:
    def interrupt(message: str) -> None:
        if "Installed" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environments.build("venv", [_requirements(offline, "alpha\n")], name="demo", on_progress=interrupt)
    assert [path.suffix for path in (offline / "cache" / "envs").iterdir()] == [".lock"]


def test_two_builds_of_one_environment_wait_for_each_other(offline: Path) -> None:
    requirements = _requirements(offline, "alpha\n")
    folder = offline / "cache" / "envs" / f"demo-{environments.fingerprint('venv', [requirements])}"
    messages: list[str] = []
    waiting = threading.Event()
    results: list[environments.ServerEnvironment] = []

    def on_progress(message: str) -> None:
        messages.append(message)
        if "waiting for another build of the environment of demo" in message:
            waiting.set()

    def build() -> None:
        results.append(environments.build("venv", [requirements], name="demo", on_progress=on_progress))

    threads = [threading.Thread(target=build) for _ in range(2)]
    with environments.exclusive(folder.with_name(f"{folder.name}.lock"), lambda: None):
        for thread in threads:
            thread.start()
        assert waiting.wait(60)
        assert not folder.exists()
    for thread in threads:
        thread.join(120)
    assert len(results) == 2
    assert results[0] == results[1]
    assert sum("building the environment" in message for message in messages) == 1


def test_a_file_in_the_way_is_one_clear_error(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = offline / "file"
    in_the_way.write_text("no folder")
    monkeypatch.setenv("TAILRACE_CACHE", str(in_the_way))
    with pytest.raises(EnvironmentBuildError, match="could not be built in") as caught:
        environments.build("venv", [_requirements(offline, "alpha\n")], name="demo")
    assert "TAILRACE_CACHE" in (caught.value.remedy or "")


def test_the_current_interpreter_installs_nothing_and_names_what_is_missing(tmp_path: Path) -> None:
    requirements = _requirements(tmp_path, "numpy\nno-such-package-a==1\nno-such-package-b ; python_version > '3'\n")
    with pytest.raises(EnvironmentBuildError) as caught:
        environments.build("current", [requirements], name="demo")
    assert "no-such-package-a, no-such-package-b" in caught.value.message
    assert f"{sys.executable} -m pip install -r {requirements}" in (caught.value.remedy or "")


def test_the_current_interpreter_tells_of_other_versions(tmp_path: Path) -> None:
    lock = "--no-binary :none:\nnumpy==0.1 \\\n    --hash=sha256:00\n    # via demo\nabsent ; python_version < '3'\n"
    messages: list[str] = []
    requirements = _requirements(tmp_path, lock)
    environment = environments.build("current", [requirements], name="demo", on_progress=messages.append)
    assert environment.python == Path(sys.executable)
    assert environment.kind == "current"
    numpy_version = environment.packages["numpy"]
    assert messages == [f"demo was locked with numpy==0.1, this interpreter has {numpy_version}"]


def test_requirement_files_that_include_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"requirements.txt: `-r other.txt` is no requirement"):
        environments.fingerprint("venv", [_requirements(tmp_path, "-r other.txt\n")])
    with pytest.raises(InputError, match=r"absent\.txt"):
        environments.fingerprint("venv", [tmp_path / "absent.txt"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("cause: failed to copy file: No space left on device (os error 28)", "TAILRACE_CACHE"),
        ("cause: Because there is no version of a==99, we can conclude that …", "cannot satisfy"),
        ("cause: Because nonesuch was not found in the package registry", "cannot satisfy"),
        (
            "Failed to fetch: https://…\n cause: client error (Connect)\n cause: tcp connect error",
            "environment: current",
        ),
        ("cause: invalid peer certificate: UnknownIssuer", "network"),
        ("a failure of a new kind", "read what uv says"),
    ],
)
def test_remedies(said: str, expected: str) -> None:
    assert expected in environments._remedy(said)


def test_progress_lines_arrive_and_the_last_ones_are_returned(tmp_path: Path) -> None:
    lines: list[str] = []
    code, said = environments.run_streamed(
        [sys.executable, "-c", "import sys; [print(i) for i in range(100)]; sys.exit(3)"],
        cwd=tmp_path,
        env=os.environ,
        on_line=lines.append,
    )
    assert code == 3
    assert lines == [str(i) for i in range(100)]
    assert said.splitlines() == [str(i) for i in range(70, 100)]


def test_the_marker_is_plain_json(offline: Path) -> None:
    built = environments.build("venv", [_requirements(offline, "alpha\n")], name="demo")
    marker = next(built.python.parent.parent.glob("tailrace-*.json"))
    assert json.loads(marker.read_text()) == {"alpha": "1.0"}
