"""Servers beyond loopback: a run in one network namespace, its load from another, with nothing but a cable between them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailrace.harness.processes import free_ports
from tailrace.harness.records.store import RunFolder
from tailrace.harness.run.registry import get_adapter
from tailrace.harness.servers import environments

SERVING, SENDING = f"tailrace-serving-{os.getpid()}", f"tailrace-sending-{os.getpid()}"
ADDRESSES = {SERVING: "10.231.17.1", SENDING: "10.231.17.2"}


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([shutil.which("ip") or "ip", *arguments], capture_output=True, text=True, check=False)


@functools.cache
def no_namespaces() -> str | None:
    """Why no network namespaces can be made here; ``None`` when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [program for program in ("ip", "nsenter") if shutil.which(program) is None]:
        return f"{', '.join(missing)} not found: apt-get install iproute2 util-linux"
    made = ip("netns", "add", SERVING)
    ip("netns", "del", SERVING)
    return f"this root may not make network namespaces: {made.stderr.strip()}" if made.returncode else None


pytestmark = [pytest.mark.e2e, pytest.mark.skipif(no_namespaces() is not None, reason=str(no_namespaces()))]


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Two machines, as far as networks go."""
    try:
        for name in ADDRESSES:
            assert ip("netns", "add", name).returncode == 0
        cable = ip("link", "add", "cable", "netns", SERVING, "type", "veth", "peer", "name", "cable", "netns", SENDING)
        assert cable.returncode == 0, cable.stderr
        for name, address in ADDRESSES.items():
            for command in ("addr add {}/24 dev cable", "link set cable up", "link set lo up"):
                done = ip("-n", name, *command.format(address).split())
                assert done.returncode == 0, done.stderr
        yield
    finally:
        for name in ADDRESSES:  # the cable goes with its ends
            ip("netns", "del", name)


def inside(namespace: str, *arguments: str) -> list[str]:
    """The command line of tailrace there. Of that machine everything but the network is this one's."""
    return ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-m", "tailrace.cli.main", *arguments]


@pytest.mark.parametrize(("protocol", "nodes"), [("http", 1), ("http", 2), ("grpc", 1)])
def test_all_load_may_come_from_another_machine(namespaces: None, tmp_path: Path, protocol: str, nodes: int) -> None:
    adapter = get_adapter("null")
    environments.build("venv", [adapter.requirements], name=adapter.name)  # there is no package index over there
    master = f"{ADDRESSES[SERVING]}:{free_ports(1)[0]}"
    client = f"{{workers: 0, remote_workers: 1, listen: '{master}', protocol: {protocol}}}"
    worker = subprocess.Popen(inside(SENDING, "load-worker", "--master", master), cwd=tmp_path)
    try:
        run = subprocess.run(
            inside(
                *(SERVING, "run", "smoke", "--adapter", "null", "--set", f"server_host={ADDRESSES[SERVING]}"),
                *("--set", f"client={client}", "--set", "trace={name: steady, params: {rate: 50, duration_s: 3}}"),
                *("--set", f"nodes={nodes}", "--set", f"devices={nodes}"),
                *("--set", "warmup.duration_s=1", "--set", "calibration.step_s=0.1", "--out", "out"),
            ),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    finally:
        worker.kill()  # its own worker ends with it
        worker.wait(20)
    assert run.returncode in (0, 3), run.stdout + run.stderr
    (trial,) = RunFolder.open(tmp_path / "out").trials
    requests = trial.requests
    assert requests is not None
    assert requests.num_rows > 150
    assert set(requests["outcome"].to_pylist()) == {"ok"}
    assert trial.facts.outputs.mismatched == 0
