"""Containers without an engine: what is asked of one, by what an image is known, and how a process host is made of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import docker
import psutil
import pytest
from docker.errors import APIError, ImageNotFound

from tailrace.harness.contract.adapter import Adapter
from tailrace.harness.errors import DeployError, EngineError, EnvironmentBuildError, InputError
from tailrace.harness.folders import state_folder
from tailrace.harness.processes import ProcessRef, inner_pid, port_open
from tailrace.harness.run.collectors import ContainerStatistics, Publishers
from tailrace.harness.run.registry import all_adapters, get_adapter
from tailrace.harness.servers import containers, images
from tailrace.harness.servers.containers import ContainerHost, Limits, describe_end
from tailrace.harness.servers.engine import RUN, ContainerSpec, Engine
from tailrace.harness.servers.guardian import Guardian, sweep
from tests.conftest import tailrace, wait_until

ROOT = Path(__file__).parents[2]
# The server ends at SIGTERM; its parent is what an engine runs as the first process of a container.
CONTAINER = "import subprocess, sys; sys.exit(subprocess.run(['sleep', '600']).returncode)"


class Answer:
    """Of the engine, to an error."""

    status_code = 409
    reason = "Conflict"


def end(container: subprocess.Popen[bytes]) -> None:
    """End a container's first process with what is below it, as an engine does."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(container.pid).children(recursive=True):
            child.kill()
    container.kill()
    container.wait(10)


class FakeApi(docker.APIClient):  # type: ignore[misc]  # the SDK has no types
    """Records what is asked of the engine. A container is a process with a child; what is asked for by name must be there."""

    def __init__(self) -> None:
        super().__init__(base_url="http://127.0.0.1:1", version="1.41")
        self.did: list[tuple[Any, ...]] = []
        self.fails: dict[str, Exception] = {}
        self.images_there = {"base:1": "sha256:" + "b" * 64}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.state: dict[str, dict[str, Any]] = {}
        self.built: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.left: dict[str, list[dict[str, Any]]] = {"containers": [], "networks": []}

    def _do(self, *what: Any) -> None:
        self.did.append(what)
        if error := self.fails.get(what[0]):
            raise error

    def create_container(self, image: str, command: list[str], **options: Any) -> dict[str, str]:
        self._do("create", image, command)
        self.created = {"image": image, "command": command, **options}
        return {"Id": f"{len(self.did):064}"}

    def start(self, container: str) -> None:
        self._do("start", container)
        self.processes[container] = subprocess.Popen([sys.executable, "-c", CONTAINER])
        self.state[container] = {"Running": True, "Pid": self.processes[container].pid, "ExitCode": 0}

    def inspect_container(self, container: str) -> dict[str, Any]:
        return {"State": self.state[container]}

    def _end(self, container: str, status: int) -> None:
        if self.state[container]["Running"]:
            end(self.processes[container])
            self.state[container] |= {"Running": False, "Pid": 0, "ExitCode": status}

    def stop(self, container: str, timeout: int) -> None:
        self._do("stop", container, timeout)
        self._end(container, 0)

    def kill(self, container: str) -> None:
        self._do("kill", container)
        self._end(container, 137)

    def wait(self, container: str, timeout: float) -> dict[str, int]:
        return {"StatusCode": 0}

    def logs(self, container: str, **_: Any) -> bytes:
        return b"said by the engine"

    def remove_container(self, container: str, force: bool, v: bool) -> None:
        self._do("remove", container)

    def pause(self, container: str) -> None:
        self._do("pause", container)

    def unpause(self, container: str) -> None:
        self._do("unpause", container)

    def update_container(self, container: str, **limits: int) -> None:
        self._do("update", container, limits)

    def disconnect_container_from_network(self, container: str, network: str) -> None:
        self._do("disconnect", container, network)

    def connect_container_to_network(self, container: str, network: str) -> None:
        self._do("connect", container, network)

    def containers(self, all: bool, filters: dict[str, str]) -> list[dict[str, Any]]:
        self._do("containers", filters)
        return self.left["containers"]

    def networks(self, filters: dict[str, str]) -> list[dict[str, Any]]:
        return self.left["networks"]

    def remove_network(self, network: str) -> None:
        self._do("remove network", network)

    def info(self) -> dict[str, str]:
        return {"KernelVersion": "5.10.0-of-another-machine"}

    def inspect_image(self, reference: str) -> dict[str, str]:
        if reference not in self.images_there:
            raise ImageNotFound(reference)
        return {"Id": self.images_there[reference]}

    def pull(self, reference: str, **_: Any) -> Iterator[dict[str, Any]]:
        self._do("pull", reference)
        yield {"id": "layer", "status": "Downloading"}
        yield {"id": "layer", "status": "Pull complete"}
        self.images_there[reference] = "sha256:" + "c" * 64

    def build(self, **options: Any) -> Iterator[dict[str, Any]]:
        self._do("build", options["tag"])
        with tarfile.open(fileobj=options["fileobj"]) as tar:
            self.built = {
                name: cast(io.BufferedReader, tar.extractfile(name)).read().decode() for name in tar.getnames()
            }
        self.options = options
        yield from self.lines
        if not any("error" in line for line in self.lines):
            self.images_there[options["tag"]] = "sha256:" + "d" * 64

    def remove_image(self, image: str) -> None:
        self._do("remove image", image)

    def done(self, *names: str) -> list[tuple[Any, ...]]:
        return [what for what in self.did if what[0] in names]


@pytest.fixture
def api() -> Iterator[FakeApi]:
    made = FakeApi()
    yield made
    for process in made.processes.values():
        end(process)


def spec(**changes: Any) -> ContainerSpec:
    values: dict[str, Any] = {
        "name": "server-0",
        "image": "sha256:1",
        "argv": ["python", "a b"],
        "env": {"A": "1"},
        "cwd": "/w",
        "log": "/w/log",
        "user": "10001:10001",
        "folders": {"/r": False, "/w": True},
        "network": "tailrace-x",
        "ports": [8000, 8001],
        "labels": {RUN: "x"},
    }
    return ContainerSpec(**{**values, **changes})


# -- what is asked of the engine -----------------------------------------------------------------------------------


def test_a_container_gets_what_a_process_would_have_and_no_rights(api: FakeApi) -> None:
    Engine(api).start(spec(cpus=0.5, memory_bytes=1 << 28, gpus=True))
    created, host = api.created, api.created["host_config"]
    assert created["command"] == ["sh", "-c", 'exec "$@" >>"$0" 2>&1', "/w/log", "python", "a b"]
    assert (created["user"], created["working_dir"], created["environment"]) == ("10001:10001", "/w", {"A": "1"})
    assert (created["name"], created["labels"]) == ("tailrace-x-server-0", {RUN: "x"})
    assert created["healthcheck"] == {"test": ["NONE"]}, "it would be measured too"
    assert [(m["Target"], m["Source"], m["ReadOnly"]) for m in host["Mounts"]] == [
        ("/r", "/r", True),
        ("/w", "/w", False),
    ]
    assert host["PortBindings"] == {
        "8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8000"}],
        "8001/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8001"}],
    }
    assert host["NetworkMode"] == "tailrace-x"
    assert (host["CpuPeriod"], host["CpuQuota"]) == (100_000, 50_000)
    assert host["Memory"] == host["MemorySwap"] == 1 << 28
    assert host["Init"] is True
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]


def test_without_limits_and_devices_none_are_asked_for(api: FakeApi) -> None:
    Engine(api).start(spec())
    assert not {"CpuQuota", "Memory", "DeviceRequests"} & set(api.created["host_config"])


def test_who_joins_another_containers_network_publishes_nothing(api: FakeApi) -> None:
    Engine(api).start(spec(network="container:abc"))
    assert api.created["host_config"]["NetworkMode"] == "container:abc"
    assert not api.created["ports"]
    assert not api.created["host_config"].get("PortBindings")


def test_a_container_that_does_not_start_is_removed_and_told_of(api: FakeApi) -> None:
    api.fails["start"] = APIError("500", Answer(), "port is already allocated")
    with pytest.raises(EngineError, match=r"start the container of server-0: port is already allocated"):
        Engine(api).start(spec())
    assert api.done("remove")


def test_all_that_a_run_has_made_is_found_by_its_label(api: FakeApi) -> None:
    api.left = {"containers": [{"Id": "c" * 64, "Names": ["/one"]}], "networks": [{"Id": "n", "Name": "net"}]}
    assert Engine(api).remove_all("x") == ["the container one", "the network net"]
    assert api.did == [("containers", {"label": "tailrace.run=x"}), ("remove", "c" * 64), ("remove network", "n")]


def test_an_engine_elsewhere_is_refused(api: FakeApi) -> None:
    with pytest.raises(EngineError, match=r"another machine: its kernel is 5\.10\.0-of-another-machine"):
        Engine(api).check_local()


def test_without_an_engine_the_run_ends_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    done = tailrace("run", "smoke", "--set", "environment=docker", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "`environment: docker` needs a container engine, and none answers" in done.stderr
    assert "no report could be written" not in done.stderr, "nothing had begun"
    assert "or choose `environment: venv`" in done.stderr
    assert not (tmp_path / "out").exists()
    assert "container engine" in tailrace("doctor", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"ExitCode": 0}, "exit status 0"),
        ({"ExitCode": 137, "OOMKilled": False}, "ended by SIGKILL, exit status 137"),
        ({"ExitCode": 137, "OOMKilled": True}, "the kernel killed what had no memory left (OOM), exit status 137"),
        ({"ExitCode": 127, "Error": "no such program"}, "exit status 127: no such program"),
        ({"ExitCode": 255}, "exit status 255"),
    ],
)
def test_how_a_container_ended_is_put_into_words(state: dict[str, object], words: str) -> None:
    assert describe_end(state) == words


# -- images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """One whose folder is the test's."""

    class Toy(type(get_adapter("null"))):  # type: ignore[misc]
        name = "toy"
        folder = tmp_path

    (tmp_path / "Dockerfile").write_text("ARG BASE_IMAGE=base:1\nFROM ${BASE_IMAGE}\n")
    (tmp_path / "requirements.txt").write_text("numpy==2.0\n")
    return Toy()


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAILRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Engine, "run_briefly", lambda _self, _image, _argv: json.dumps({"numpy": "2.0"}))


def built(api: FakeApi, adapter: Adapter, base: str | None = None, told: Callable[[str], None] | None = None) -> Any:
    return images.build(Engine(api), adapter, [adapter.requirements], base_image=base, on_progress=told)


def test_an_image_is_built_once_for_the_same_files_and_base(api: FakeApi, adapter: Adapter) -> None:
    environment = built(api, adapter)
    assert (environment.kind, environment.image) == ("docker", "sha256:" + "d" * 64)
    assert (str(environment.python), environment.packages) == ("/opt/server/bin/python", {"numpy": "2.0"})
    assert built(api, adapter) == environment
    assert len(api.done("build")) == 1
    assert api.options["buildargs"]["BASE_IMAGE"] == "base:1"
    for change in (
        lambda: adapter.requirements.write_text("numpy==2.1\n"),
        lambda: adapter.dockerfile.write_text("ARG BASE_IMAGE=base:1\nFROM ${BASE_IMAGE}\nRUN true\n"),
        lambda: api.images_there.update({"base:1": "sha256:" + "e" * 64}),
    ):
        change()
        built(api, adapter)
    assert len({tag for _, tag in api.done("build")}) == 4


def test_a_base_image_that_is_not_there_is_pulled(api: FakeApi, adapter: Adapter) -> None:
    said: list[str] = []
    built(api, adapter, "other:2", said.append)
    assert api.done("pull") == [("pull", "other:2")]
    assert "pulling other:2: 1 of 1 layers" in said


def test_a_base_image_that_cannot_be_had_is_named_with_the_key_to_change(api: FakeApi, adapter: Adapter) -> None:
    api.fails["pull"] = APIError("404", Answer(), "no such manifest")
    with pytest.raises(EnvironmentBuildError, match="pull other:2: no such manifest") as caught:
        built(api, adapter, "other:2")
    assert "containers.base_images.toy" in (caught.value.remedy or "")


def test_a_build_that_fails_tells_why_and_what_it_said(api: FakeApi, adapter: Adapter) -> None:
    api.lines = [{"stream": "Step 1/2 : RUN false\n"}, {"stream": "oh no\n"}, {"error": "returned a non-zero code: 1"}]
    said: list[str] = []
    with pytest.raises(EnvironmentBuildError, match="returned a non-zero code: 1") as caught:
        built(api, adapter, told=said.append)
    assert "oh no" in (caught.value.detail or "")
    assert "toy: Step 1/2 : RUN false" in said


def test_an_adapter_without_a_dockerfile_is_named(api: FakeApi, adapter: Adapter) -> None:
    adapter.dockerfile.unlink()
    with pytest.raises(InputError, match=r"the adapter toy has no image: there is no .*Dockerfile"):
        built(api, adapter)


def test_how_packages_are_fetched_stays_in_the_stage_that_fetches(
    api: FakeApi, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text("certificates")
    settings = {
        "cert": str(tmp_path / "ca.pem"),
        "index-url": "https://index.test/simple",
        "extra-index-url": "file:///local https://more.test/simple",
        "find-links": "/wheels",
    }
    monkeypatch.setattr(images.package_index, "pip_settings", lambda: settings)
    api.lines = [
        {"stream": "Step 1/4 : FROM ${BASE_IMAGE} AS build\n"},
        {"stream": f" ---> {'b' * 12}\n"},
        {"stream": "Step 2/4 : RUN true\n"},
        {"stream": " ---> 0123456789ab\n"},
        {"stream": "Step 3/4 : FROM ${BASE_IMAGE}\n"},
        {"stream": f" ---> {'b' * 12}\n"},
        {"stream": "Step 4/4 : RUN true\n"},
        {"stream": " ---> ba9876543210\n"},
    ]
    said: list[str] = []
    built(api, adapter, told=said.append)
    assert api.built["pip.conf"] == (
        "[global]\nindex-url = https://index.test/simple\nextra-index-url = https://more.test/simple\n"
        "cert = /build/ca.crt\n"
    )
    assert api.built["ca.crt"] == "certificates"
    assert [sentence for sentence in said if "/wheels" in sentence]
    assert api.done("remove image") == [("remove image", "0123456789ab")]
    tag = api.done("build")[0][1]
    monkeypatch.setattr(images.package_index, "pip_settings", dict)
    built(api, adapter)
    assert [one for _, one in api.done("build")] == [tag], "it is the same image wherever the packages came from"


@pytest.fixture
def on_shared(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what images have in common, which the adapter's asks for."""
    adapter.dockerfile.write_text("ARG BASE_IMAGE=base:1\nARG TAILRACE_BASE=tailrace/base\nFROM ${TAILRACE_BASE}\n")
    shared = tmp_path / "base"
    shared.mkdir()
    (shared / "Dockerfile").write_text("FROM base:1\n")
    (shared / "install-server").write_text("#!/bin/sh\n")
    monkeypatch.setattr(images, "SHARED", shared)
    return shared


def tags(api: FakeApi) -> list[str]:
    return [tag for _, tag in api.done("build")]


def test_what_images_have_in_common_is_built_first_where_it_is_asked_for(
    api: FakeApi, adapter: Adapter, on_shared: Path
) -> None:
    said: list[str] = []
    built(api, adapter, told=said.append)
    below, image = tags(api)
    assert below.startswith("tailrace/base:") and image.startswith("tailrace/toy:")
    assert api.options["buildargs"] == {"BASE_IMAGE": "base:1", "TAILRACE_BASE": below}
    assert said[-2:] == ["building what the image of toy is built on on base:1", "building the image of toy on base:1"]
    built(api, adapter)
    assert len(tags(api)) == 2, "both are there"

    adapter.requirements.write_text("numpy==2.1\n")
    built(api, adapter)
    assert len(tags(api)) == 3 and tags(api)[2].startswith("tailrace/toy:"), "what they have in common has not changed"

    (on_shared / "install-server").write_text("#!/bin/sh\nset -e\n")
    built(api, adapter)
    assert len(set(tags(api))) == 5, "both are others"

    adapter.dockerfile.write_text("ARG BASE_IMAGE=base:1\nFROM ${BASE_IMAGE}\n")
    built(api, adapter)
    assert len(tags(api)) == 6 and "TAILRACE_BASE" not in api.options["buildargs"], "nobody has to ask for it"


def test_when_what_images_have_in_common_cannot_be_built_it_is_said_in_one_message(
    api: FakeApi, adapter: Adapter, on_shared: Path
) -> None:
    api.lines = [{"stream": "Step 1/2 : RUN useradd\n"}, {"stream": "no useradd\n"}, {"error": "returned 127"}]
    failure = "what the image of toy is built on could not be built on base:1: returned 127"
    with pytest.raises(EnvironmentBuildError, match=failure) as caught:
        built(api, adapter)
    assert "no useradd" in (caught.value.detail or "")
    assert "containers.base_images.toy" in (caught.value.remedy or "")
    assert len(tags(api)) == 1


def test_what_is_installed_has_what_images_have_in_common() -> None:
    """A wheel holds the folder below `tailrace`, for the link there: under the name that the package data has."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    (pattern,) = settings["package-data"]["tailrace"]
    assert sorted((ROOT / "tailrace").glob(pattern)) == [images.SHARED / name for name in images._SHARED_FILES]
    assert (ROOT / "tailrace" / "docker").samefile(ROOT / "docker")


def test_the_folder_docker_does_not_stand_before_the_sdk() -> None:
    """With the root of the repository on the path, as under pytest: a package comes before a folder that is none."""
    assert (ROOT / "docker").is_dir() and not (ROOT / "docker" / "__init__.py").exists()
    code = "import sys, docker; assert sys.path[0] == '', sys.path; docker.from_env; print(docker.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not Path(found.strip()).is_relative_to(ROOT / "docker")
    assert hasattr(docker, "from_env")


def test_what_images_have_in_common_is_an_interpreter_and_a_user_without_rights() -> None:
    text = (images.SHARED / "Dockerfile").read_text(encoding="utf-8")
    assert "\nFROM ${BASE_IMAGE}\n" in text
    assert f"useradd --uid {images.USER_ID} " in text
    assert f"venv --system-site-packages {images.PYTHON.parents[1]}\n" in (images.SHARED / "install-server").read_text()


@pytest.mark.parametrize("name", sorted(all_adapters()))
def test_every_image_has_a_pinned_base_a_user_without_rights_and_a_health_check(name: str) -> None:
    if not (path := get_adapter(name).dockerfile).is_file():
        assert name not in ("triton", "ray_serve", "torchserve", "kserve", "null")
        return
    text = path.read_text(encoding="utf-8")
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    assert re.search(r":[^/]*\d+\.\d+[^/]*$", base), f"{base} is not pinned by an exact tag"
    assert text.count("\nFROM ${TAILRACE_BASE}") == 2
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == f"{images.USER_ID}:{images.USER_ID}"
    assert f"{images.PYTHON}" in text.rpartition("HEALTHCHECK")[2]
    # The last stage takes the interpreter and nothing else from the one that knows how packages are fetched.
    assert re.findall(r"COPY --from=build (.*)", text) == ["/opt/server /opt/server"]


# -- a process host ------------------------------------------------------------------------------------------------


class FakeGuardian:
    """Starts what a guardian would, in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.specs: list[ContainerSpec] = []
        self.removals: list[str] = []

    def make_network(self) -> str:
        return "tailrace-x"

    def start_container(self, spec: ContainerSpec) -> str:
        spec.labels[RUN] = "x"
        self.specs.append(spec)
        return self.engine.start(spec)

    def remove_later(self, path: Path | str) -> None:
        self.removals.append(str(path))


@pytest.fixture
def host(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ContainerHost:
    return hosted(api, tmp_path, monkeypatch)


def hosted(api: FakeApi, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ContainerHost:
    monkeypatch.setattr(containers, "_control_groups", lambda _pid: "".join(f"/docker/{one}\n" for one in api.state))
    monkeypatch.setattr(containers.os, "chown", lambda *_arguments, **_named: None)
    for name in ("reads", "writes"):
        (folder / name).mkdir(exist_ok=True)
    return ContainerHost(
        cast(Guardian, FakeGuardian(Engine(api))),
        Engine(api),
        "sha256:1",
        reads=[folder / "reads"],
        writes=[folder / "writes"],
        limits=options.pop("limits", Limits(memory_bytes=1 << 30)),
        address="127.0.0.1",
        **options,
    )


def specs(host: ContainerHost) -> list[ContainerSpec]:
    return cast(FakeGuardian, host._guardian).specs


def spawned(host: ContainerHost, folder: Path, **options: Any) -> ProcessRef:
    log = folder / "writes" / "logs" / "log"
    return host.spawn("server", ["sleep", "600"], env={"A": "1"}, cwd=folder / "writes", log=log, **options)


def test_what_is_spawned_is_the_process_below_the_containers_first(
    host: ContainerHost, api: FakeApi, tmp_path: Path
) -> None:
    before = time.monotonic_ns()
    process = spawned(host, tmp_path, ports=(8000,))
    (container,) = api.processes.values()
    assert process.alive()
    assert container.pid != process.pid
    assert Path(f"/proc/{process.pid}/stat").read_text().split()[3] == str(container.pid)
    assert before <= host.spawned_ns(process) <= time.monotonic_ns()
    (asked,) = specs(host)
    assert asked.folders == {f"{tmp_path}/reads": False, f"{tmp_path}/writes": True}
    assert asked.env == {"A": "1", "HOME": "/tmp", "USER": "tailrace"}  # noqa: S108 - in the container
    assert (asked.ports, asked.network, asked.memory_bytes) == ([8000], "tailrace-x", 1 << 30)
    assert (tmp_path / "writes" / "logs" / "log").is_file(), "the server's own user may only write what is there"


@pytest.mark.parametrize(("harness", "server"), [(0, "10001:10001"), (1234, f"1234:{os.getgid()}")])
def test_a_server_runs_as_the_harness_does_but_never_as_root(
    harness: int, server: str, host: ContainerHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers.os, "getuid", lambda: harness)
    spawned(host, tmp_path)
    assert specs(host)[0].user == server


def test_a_folder_that_is_to_be_removed_is_the_servers_too(host: ContainerHost, tmp_path: Path) -> None:
    (tmp_path / "sockets").mkdir()
    host.remove_later(tmp_path / "sockets")
    host.remove_later(f"{tmp_path}/prefix_*")
    spawned(host, tmp_path)
    assert specs(host)[0].folders[f"{tmp_path}/sockets"] is True
    assert cast(FakeGuardian, host._guardian).removals == [f"{tmp_path}/sockets", f"{tmp_path}/prefix_*"]


def test_nodes_of_one_network_join_the_first(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = hosted(api, tmp_path, monkeypatch, one_network=True)
    spawned(host, tmp_path)
    spawned(host, tmp_path)
    (first, _) = api.processes
    assert [one.network for one in specs(host)] == ["tailrace-x", f"container:{first}"]


def test_signals_reach_processes_of_the_containers_and_nobody_else(host: ContainerHost, tmp_path: Path) -> None:
    process = spawned(host, tmp_path)
    assert not host.signal(ProcessRef.of(os.getpid()), signal.SIGKILL)
    assert host.signal(process, signal.SIGKILL)
    wait_until(lambda: not process.alive(), "it has gone", 10)
    assert not host.signal(process, signal.SIGKILL)


def test_a_stop_signal_to_all_is_the_engines_pause(host: ContainerHost, api: FakeApi, tmp_path: Path) -> None:
    process = spawned(host, tmp_path)
    assert host.signal_tree(process, signal.SIGSTOP) == 1
    assert host.signal_tree(process, signal.SIGSTOP) == 1
    assert host.signal_tree(process, signal.SIGCONT) == 1
    assert host.signal_tree(process, signal.SIGCONT) == 1
    assert [what[0] for what in api.done("pause", "unpause")] == ["pause", "unpause"]


def test_a_killed_container_is_there_until_it_is_stopped(host: ContainerHost, api: FakeApi, tmp_path: Path) -> None:
    process = spawned(host, tmp_path)
    host.signal_tree(process, signal.SIGSTOP)
    assert host.ending(process) is None
    assert host.kill_tree(process)
    assert not host.kill_tree(process)
    assert host.ending(process) == "ended by SIGKILL, exit status 137"
    assert host.signal_tree(process, signal.SIGCONT) == 0, "what has gone by itself is not healed"
    assert not api.done("remove", "unpause")
    host.stop_tree(process, 0.0)
    host.stop_tree(process, 0.0)
    assert len(api.done("remove")) == 1
    assert host.endings() == [{"container": "server-0", "how": "ended by SIGKILL, exit status 137"}]


def test_a_paused_container_goes_on_to_be_stopped(host: ContainerHost, api: FakeApi, tmp_path: Path) -> None:
    process = spawned(host, tmp_path)
    host.signal_tree(process, signal.SIGSTOP)
    host.stop_tree(process, 9.6)
    assert [(what[0], *what[2:]) for what in api.done("pause", "unpause", "stop", "remove")] == [
        ("pause",),
        ("unpause",),
        ("stop", 10),
        ("remove",),
    ]


def test_limits_are_changed_and_given_back(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = hosted(api, tmp_path, monkeypatch, limits=Limits(cpus=1.5))
    process = spawned(host, tmp_path)
    host.limit_cpus(process, 0.2)
    host.limit_cpus(process, None)
    host.limit_memory(process, 1 << 28)
    host.limit_memory(process, None)
    cpus, cpus_again, memory, memory_again = (what[2] for what in api.done("update"))
    assert (cpus["cpu_quota"], cpus_again["cpu_quota"]) == (20_000, 150_000)
    assert memory == {"mem_limit": 1 << 28, "memswap_limit": 1 << 28}
    assert memory_again["mem_limit"] > 1 << 28, "no limit but the machine's"


def test_a_cpu_limit_that_was_none_is_none_again(host: ContainerHost, api: FakeApi, tmp_path: Path) -> None:
    process = spawned(host, tmp_path)
    host.limit_cpus(process, None)
    assert api.done("update")[0][2] == {"cpu_quota": -1}


def test_a_container_leaves_its_network_and_comes_back(host: ContainerHost, api: FakeApi, tmp_path: Path) -> None:
    process = spawned(host, tmp_path)
    for change in (host.disconnect, host.disconnect, host.reconnect, host.reconnect):
        change(process)
    assert [(what[0], what[2]) for what in api.done("disconnect", "connect")] == [
        ("disconnect", "tailrace-x"),
        ("connect", "tailrace-x"),
    ]


def test_a_process_that_ends_at_once_is_told_of_with_what_the_engine_caught(
    host: ContainerHost, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(_self: FakeApi, container: str) -> None:
        api.state[container] = {"Running": False, "Pid": 0, "ExitCode": 127}

    monkeypatch.setattr(FakeApi, "start", ended)
    with pytest.raises(DeployError, match="server-0 ended at once: exit status 127") as caught:
        spawned(host, tmp_path)
    assert "said by the engine" in (caught.value.detail or "")
    assert api.done("remove")


def test_a_container_whose_process_is_on_another_machine_is_refused(
    host: ContainerHost, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_control_groups", lambda _pid: "/user.slice")
    monkeypatch.setattr(containers, "_START_PATIENCE_S", 0.1)
    with pytest.raises(DeployError, match="cannot be seen from here"):
        spawned(host, tmp_path)
    assert api.done("remove")


# -- what is collected ---------------------------------------------------------------------------------------------


def test_statistics_of_both_versions_of_control_groups_are_read() -> None:
    cpu = {"cpu_usage": {"total_usage": 2e9}, "throttling_data": {"throttled_time": 5e8}}
    told: dict[str, Any] = {
        "one": {
            "cpu_stats": cpu,
            "memory_stats": {"usage": 100, "stats": {"total_inactive_file": 30, "inactive_file": 1}},
            "pids_stats": {"current": 3},
        },
        "two": {"cpu_stats": cpu, "memory_stats": {"usage": 100, "stats": {"inactive_file": 40}}, "pids_stats": {}},
        "gone": {"cpu_stats": {}, "memory_stats": {}},
    }
    read = {(one.scope, one.metric): one.value for one in ContainerStatistics(lambda: told).read()}
    assert read["one", "memory_bytes"] == 70
    assert read["two", "memory_bytes"] == 60
    assert read["one", "cpu_s_total"] == 2
    assert read["one", "throttled_s_total"] == 0.5
    assert read["one", "processes"] == 3
    assert not [scope for scope, _ in read if scope == "gone"]


def test_what_hands_connections_on_is_found_by_its_port(tmp_path: Path) -> None:
    program = tmp_path / "docker-proxy"
    program.write_text("#!/bin/sh\nwhile true; do :; done\n")
    program.chmod(0o755)
    with (
        subprocess.Popen([program, "-host-ip", "127.0.0.1", "-host-port", "18123"]) as ours,
        subprocess.Popen([program, "-host-ip", "127.0.0.1", "-host-port", "18124"]) as other,
    ):
        try:
            wait_until(lambda: containers._publishers({18123}) == [ProcessRef.of(ours.pid)], "it is found", 10)
            publishers = Publishers(lambda: [ProcessRef.of(ours.pid)])
            wait_until(lambda: publishers.read()[0].value > 0, "its CPU time is counted", 10)
        finally:
            ours.kill()
            other.kill()


def test_a_published_port_is_open_when_somebody_listens_behind_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port_open("127.0.0.1", port, published=True)
        stopped = threading.Event()

        def close_at_once() -> None:
            while not stopped.is_set():
                listener.accept()[0].close()

        thread = threading.Thread(target=close_at_once, daemon=True)
        thread.start()
        wait_until(lambda: not port_open("127.0.0.1", port, published=True), "its emptiness is seen", 10)
        assert port_open("127.0.0.1", port)
        stopped.set()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join(10)
    assert not port_open("127.0.0.1", port, published=True)


def test_a_process_of_this_machine_has_one_pid() -> None:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    assert inner_pid(ProcessRef.of(os.getpid())) == int(status.partition("NSpid:")[2].split("\n")[0].split()[-1])
    assert inner_pid(ProcessRef(1 << 30, 1)) == 1 << 30


# -- what a crash leaves -------------------------------------------------------------------------------------------


def crashed() -> Path:
    """The ledger of a run with containers whose guardian is no more."""
    folder = state_folder() / "guardians"
    folder.mkdir(parents=True)
    ledger = folder / "1-2.json"
    namespace = str(Path("/proc/self/ns/pid").readlink())
    content = {
        "namespace": namespace,
        "guardian": [1 << 30, 1],
        "processes": [],
        "paths": [],
        "containers": True,
        "cleaned": None,
    }
    ledger.write_text(json.dumps(content))
    return ledger


def test_containers_of_a_crashed_run_are_removed(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = crashed()
    api.left["containers"] = [{"Id": "c" * 64, "Names": ["/tailrace-1-2-server-0"]}]
    monkeypatch.setattr(Engine, "connect", lambda: Engine(api))
    assert sweep() == ["removed the container tailrace-1-2-server-0, left by a crashed run"]
    assert api.did[0] == ("containers", {"label": "tailrace.run=1-2"})
    assert not ledger.exists()


def test_while_the_engine_is_down_they_are_kept_in_mind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ledger = crashed()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    (told,) = sweep()
    assert told.startswith("a crashed run may have left containers, and they cannot be looked for")
    assert ledger.exists()
