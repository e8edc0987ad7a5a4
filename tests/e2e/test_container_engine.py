"""Servers in containers of a real engine, which these tests start for themselves: images, faults, and what a crash leaves.

The base image is a Debian of debootstrap's making, so that no registry is needed. It and the images built on it stay in the
cache, with which a second run is done in a third of the time.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import uv

from tailrace.harness.analysis.metrics import measured
from tailrace.harness.cgroups import refusal as cgroup_refusal
from tailrace.harness.errors import EngineError
from tailrace.harness.folders import cache_folder
from tailrace.harness.records.schema import Outcome
from tailrace.harness.records.store import RunFolder, TrialFolder
from tailrace.harness.servers import images, package_index
from tailrace.harness.servers.engine import RUN, Engine
from tailrace.harness.servers.environments import exclusive
from tests.conftest import tailrace, wait_until

ROOT = Path(__file__).parents[2]
BASE = "tailrace-test-base:bookworm"
SHORT = ["--set", "warmup.duration_s=1", "--set", "calibration.step_s=0.1", "--set", "client.timeout_s=5"]
OWN_FAULT = ("noisy-host", "generator-saturated", "not-steady", "clock-uncertain", "not-calibrated")
"""The machine that runs the tests may be busy; everything else must be in order."""


@functools.cache
def no_engine() -> str | None:
    """Why no engine can be started here; ``None`` when one can."""
    if os.geteuid() != 0:
        return "an engine of the tests' own needs root"
    if missing := [program for program in ("dockerd", "debootstrap", "iptables") if shutil.which(program) is None]:
        return f"{', '.join(missing)} not found: apt-get install docker.io debootstrap iptables"
    probe = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "sh",
        "-c",
        "mount -t tmpfs none /mnt && iptables -t nat -nL",
    ]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "this root may not make namespaces and mounts, as inside of an unprivileged container"
    return cgroup_refusal()


pytestmark = [pytest.mark.e2e, pytest.mark.skipif(no_engine() is not None, reason=str(no_engine()))]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with a data folder and a socket of its own, which has the base image."""
    kept = cache_folder() / "test-engine"
    folder = tmp_path_factory.mktemp("engine")
    with exclusive(kept.with_name("test-engine.lock"), lambda: None), (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                *("dockerd", "--data-root", str(kept), "--exec-root", str(folder / "exec")),
                *("--host", f"unix://{folder}/docker.sock", "--pidfile", str(folder / "pid"), "--bridge=none"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_HOST", f"unix://{folder}/docker.sock")
            try:
                wait_until(lambda: daemon.poll() is not None or _answers(), f"dockerd answers, see {folder}/log")
                assert daemon.poll() is None, (folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
                made = Engine.connect()
                _have_base_image(made, folder)
                yield made
            finally:
                daemon.terminate()
                daemon.wait(60)
                # It leaves its own network namespace mounted, and a folder with a mount in it cannot be removed.
                for part in psutil.disk_partitions(all=True):
                    if Path(part.mountpoint).is_relative_to(folder):
                        subprocess.run([shutil.which("umount") or "umount", part.mountpoint], check=True)


def _answers() -> bool:
    try:
        return bool(Engine.connect().version())
    except EngineError:
        return False


def _have_base_image(engine: Engine, folder: Path) -> None:
    if engine.api.images(BASE):
        return
    packages = "python3,python3-venv,libpython3.11,ca-certificates"
    root = folder / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    archive = folder / "root.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root, arcname=".")
    engine.api.import_image_from_file(str(archive), *BASE.split(":"))
    shutil.rmtree(root)
    archive.unlink()


def contained(adapter: str, **limits: int) -> list[str]:
    """The one word in which a run in containers differs, and what this machine without a registry needs beside it."""
    chosen = {"base_images": {adapter: BASE}, **limits}
    return ["--adapter", adapter, "--set", "environment=docker", "--set", f"containers={json.dumps(chosen)}"]


def raced(folder: Path, adapter: str, faults: list[dict[str, Any]], *arguments: str) -> TrialFolder:
    scenarios = [{"name": "faults", "faults": faults}]
    done = tailrace(
        *("run", "smoke", *contained(adapter), *SHORT, "--set", f"scenarios={json.dumps(scenarios)}", *arguments),
        *("--out", "out"),
        cwd=folder,
        timeout_s=900,
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr
    (trial,) = RunFolder.open(folder / "out").trials
    (told,) = json.loads((folder / "out" / "summary.json").read_text())["trials"]
    assert [reason for reason in told["reasons"] if reason["code"] not in OWN_FAULT] == []
    assert told["accounting"]["closed"]
    assert trial.facts.outputs.mismatched == 0
    for fault in trial.facts.dump()["faults"]:
        assert fault["injected_s"] >= fault["at_s"], fault
        assert (fault["healed_s"] is not None) is ("duration_s" in fault), fault
    return trial


def happened(trial: TrialFolder, event: str, **fields: str) -> list[dict[str, Any]]:
    return [
        e for e in trial.events if e["event"] == event and all(e.get(key) == value for key, value in fields.items())
    ]


def left(engine: Engine) -> list[str]:
    """What carries a run's label."""
    chosen = {"label": RUN}
    return [*engine.api.containers(all=True, filters=chosen), *engine.api.networks(filters=chosen)]


def test_triton_on_two_containers(engine: Engine, tmp_path: Path) -> None:
    trial = raced(
        tmp_path,
        "triton",
        [
            {"kind": "slow_node", "at_s": 1, "duration_s": 1, "target": 0, "cpus": 0.5},
            {"kind": "memory_limit", "at_s": 1.5, "duration_s": 1, "target": 0, "memory_mb": 1500},
            {"kind": "pause_node", "at_s": 3, "duration_s": 3, "target": 0},
            {"kind": "disconnect_node", "at_s": 8, "duration_s": 3, "target": 1},
            {"kind": "kill_node", "at_s": 13, "target": 0},
        ],
        *("--set", "nodes=2", "--set", "devices=2", "--set", "supervision=restart", "--set", "restart_backoff_s=0.2"),
        *("--set", "trace={name: steady, params: {rate: 40, duration_s: 20}}"),
        *("--set", "tuning={max_batch: 8, replicas: 2}"),
    )
    for node in ("node-0", "node-1"):
        assert happened(trial, "balancer-down", node=node), f"{node} was paused, or off the network"
        assert happened(trial, "balancer-up", node=node)
    assert happened(trial, "node-died", node="node-0", how="ended by SIGKILL, exit status 137")
    assert happened(trial, "node-first-answer", node="node-0"), "started again by the harness"
    assert len(trial.facts.containers_ended) >= 3, "two at first, and one in place of the one that was killed"
    samples = trial.samples
    assert samples is not None
    told = {(row["source"], row["metric"]) for row in samples.to_pylist()}
    assert told >= {("container", "memory_bytes"), ("container", "cpu_s_total"), ("port-publisher", "cpu_s_total")}
    adapter = RunFolder.open(tmp_path / "out").manifest["adapters"]["triton"]
    assert adapter["environment"] == "docker"
    assert adapter["image"].startswith("sha256:")
    assert adapter["packages"]["nvidia-pytriton"]
    assert left(engine) == []


def test_ray_serve_in_one_container(engine: Engine, tmp_path: Path) -> None:
    trial = raced(
        tmp_path,
        "ray_serve",
        [
            {"kind": "pause_node", "at_s": 1, "duration_s": 1.5},
            {"kind": "disconnect_node", "at_s": 5, "duration_s": 2},
            {"kind": "kill_replica", "at_s": 9},
        ],
        # Ray looks after its replicas every ten seconds: so much may pass before it starts one in place of the dead.
        *("--set", "trace={name: steady, params: {rate: 30, duration_s: 30}}"),
        *("--set", "tuning={max_batch: 8, replicas: 2}"),
    )
    requests = trial.requests
    assert requests is not None
    trace = measured(requests)

    def outcomes(kind: str) -> Any:
        (fault,) = [one for one in trial.facts.dump()["faults"] if one["kind"] == kind]
        # Clear of both ends, by more than a busy machine needs to do as told.
        begin_ns, end_ns = (fault["injected_s"] + 0.3) * 1e9, (fault["healed_s"] - 0.3) * 1e9
        return trace.outcome[(trace.intended_ns > begin_ns) & (trace.intended_ns < end_ns)]

    assert np.all(outcomes("disconnect_node") == Outcome.CONNECTION), "there is nobody on the network"
    assert not np.any(outcomes("pause_node") == Outcome.CONNECTION), "it takes connections, and answers late"
    assert happened(trial, "replica-died")
    assert happened(trial, "replica-born")
    assert trace.ok[trace.intended_ns > 14e9].all()
    assert left(engine) == []


def test_a_container_without_enough_memory_is_told_of(engine: Engine, tmp_path: Path) -> None:
    done = tailrace(
        *("run", "smoke", *contained("ray_serve", memory_mb=64), *SHORT, "--out", "out"), cwd=tmp_path, timeout_s=600
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "main process has ended: the kernel killed what had no memory left (OOM)" in done.stderr
    assert left(engine) == []


@pytest.mark.parametrize("guardian_too", [False, True])
def test_a_killed_harness_leaves_no_container(engine: Engine, tmp_path: Path, guardian_too: bool) -> None:
    run = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "tailrace.cli.main",
                "run",
                "smoke",
                *contained("triton"),
                *SHORT,
                "--set",
                "nodes=2",
            ),
            *("--set", "devices=2", "--set", "trace={name: steady, params: {rate: 5, duration_s: 300}}"),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(engine.api.containers(filters={"label": RUN})) == 2, "both nodes are there", 300)
        (ledger,) = (Path(os.environ["TAILRACE_STATE"]) / "guardians").glob("*.json")
        (guardian, _) = json.loads(ledger.read_text())["guardian"]
        engine.api.pause(engine.api.containers(filters={"label": RUN})[0]["Id"])
        if guardian_too:
            os.kill(guardian, signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
    if not guardian_too:
        wait_until(lambda: left(engine) == [], "the guardian has removed everything", 60)
    cleaned = tailrace("clean", cwd=tmp_path).stdout
    assert cleaned.count("the container tailrace-") == 2
    assert cleaned.count("the network tailrace-") == 1
    assert left(engine) == []
    assert tailrace("clean", cwd=tmp_path).stdout.strip() == "nothing to clean"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This very tree, where an engine's containers may see it and a build may leave something."""
    folder = tmp_path_factory.mktemp("clone") / "tailrace"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "results", "*.egg-info")
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=left_out))


@pytest.fixture(scope="module")
def runner(engine: Engine, clone: Path) -> str:
    """An image of tailrace itself, with the null server for `environment: current`."""
    context = clone / "docker" / "runner"
    build = [uv.find_uv_bin(), "build", "--wheel", "--out-dir", str(context), *package_index.uv_arguments(), str(clone)]
    variables = {**os.environ, **package_index.uv_environment()}
    subprocess.run(build, check=True, capture_output=True, env=variables, timeout=600)
    for name, content in images._package_access().items():
        (context / name).write_bytes(content)
    arguments = {"BASE_IMAGE": BASE, "ADAPTER": "null"}
    said = list(
        engine.api.build(
            path=str(context), tag="tailrace-test", buildargs=arguments, network_mode="host", rm=True, decode=True
        )
    )
    assert not [line for line in said if "error" in line], said[-30:]
    return "tailrace-test"


def run_inside(engine: Engine, image: str, *arguments: str, ends: tuple[int, ...] = (0, 3), **options: Any) -> str:
    """What tailrace in a container says, which must end so: with 3 where the machine was busy."""
    host = engine.api.create_host_config(init=True, **options.pop("host", {"network_mode": "none"}))
    container = engine.api.create_container(image, list(arguments), host_config=host, **options)["Id"]
    try:
        engine.api.start(container)
        status = engine.api.wait(container, timeout=600)["StatusCode"]
        said: str = engine.api.logs(container).decode("utf-8", "replace")
    finally:
        engine.remove(container)
    assert status in ends, said
    return said


def test_tailrace_in_an_image_of_its_own(engine: Engine, runner: str, clone: Path, tmp_path: Path) -> None:
    assert "NVIDIA driver" in run_inside(engine, runner, ends=(1,)), "its command is `doctor --gpu`"

    race = [
        "run",
        "smoke",
        "--adapter",
        "null",
        *SHORT,
        "--set",
        "trace={name: steady, params: {rate: 20, duration_s: 3}}",
    ]
    mounted = {"network_mode": "none", "binds": [f"{tmp_path}:/runs"]}
    run_inside(engine, runner, *race, "--set", "environment=current", "--out", "out", host=mounted)
    assert all_answered(tmp_path / "out")

    socket = os.environ["DOCKER_HOST"].removeprefix("unix://")
    beside = {path: path for path in ("/tmp", str(clone), str(tmp_path))}  # noqa: S108
    # The machine that builds is the container: where packages come from is told to its pip.
    given = {name: f"/build/{name}" for name in images._package_access()}
    binds = {
        socket: "/var/run/docker.sock",
        **beside,
        **{f"{clone}/docker/runner/{name}": to for name, to in given.items()},
    }
    run_inside(
        engine,
        runner,
        *(*race, "--set", "environment=docker", "--set", f"containers={json.dumps({'base_images': {'null': BASE}})}"),
        *("--out", "contained"),
        working_dir=str(tmp_path),
        environment={
            "PYTHONPATH": str(clone),
            "PIP_CONFIG_FILE": given["pip.conf"],
            "TAILRACE_CACHE": f"{tmp_path}/cache",
            "TAILRACE_STATE": f"{tmp_path}/state",
        },
        host={
            "network_mode": "host",
            "pid_mode": "host",
            "binds": [f"{here}:{there}" for here, there in binds.items()],
        },
    )
    assert all_answered(tmp_path / "contained")
    assert left(engine) == []


def all_answered(folder: Path) -> bool:
    (trial,) = RunFolder.open(folder).trials
    requests = trial.requests
    assert requests is not None
    return requests.num_rows > 60 and set(requests["outcome"].to_pylist()) == {"ok"}
