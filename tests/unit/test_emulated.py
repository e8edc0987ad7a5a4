"""The emulated accelerator: its answers, its seats, one batch at a time, and honest counters."""

from __future__ import annotations

import fcntl
import gc
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.servers.emulated_device import DeviceCounters, device_environment, read_counters
from tailrace.workloads.emulated import model as emulated
from tailrace.workloads.emulated.build import build_artifact, make_payloads
from tailrace.workloads.emulated.model import Model
from tests.standalone import answers_alone

PATIENCE_S = 60.0


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def artifact(tmp_path: Path) -> str:
    build_artifact(tmp_path, {"base_ms": 2, "per_item_ms": 1}, seed=7)
    return str(tmp_path)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One device's folder, in the environment of this process and of its children."""
    folder = tmp_path / "device"
    for name, value in device_environment(folder, 1).items():
        monkeypatch.setenv(name, value)
    return folder


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(artifact: str) -> Iterator[Start]:
    """Start a process that runs Python text in which ``Model`` and ``artifact`` are defined."""
    processes: list[subprocess.Popen[str]] = []

    def _start(text: str) -> subprocess.Popen[str]:
        folder = str(Path(emulated.__file__).parent)
        head = f"import sys; sys.path.insert(0, {folder!r}); from model import *; artifact = {artifact!r}\n"
        command = [sys.executable, "-c", head + text]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield _start
    for process in processes:
        process.kill()
        process.communicate()


def _x(*rows: int) -> dict[str, np.ndarray]:
    return {"x": np.tile(np.asarray(rows, dtype=np.int32)[:, np.newaxis], (1, 16))}


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=16, max_size=16), st.integers(0, 15), st.text(max_size=8))
def test_answers_are_exact_and_tell_every_input_apart(
    tmp_path_factory: pytest.TempPathFactory, row: list[int], index: int, name: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "answers"
    folder.mkdir(exist_ok=True)
    build_artifact(folder, {"base_ms": 1, "per_item_ms": 1}, seed=7)
    model = Model(str(folder), name, "cpu")
    changed = list(row)
    changed[index] ^= 1
    y = model.predict({"x": np.array([row, changed], dtype=np.int32)})["y"]
    assert y.shape == (2, 4)
    assert y.dtype == np.int64
    weights, bias = model._weights.tolist(), model._bias.tolist()  # the same sum in integers without bounds
    exact = [sum(x * w[column] for x, w in zip(row, weights, strict=True)) + bias[column] for column in range(4)]
    assert y[0].tolist() == exact
    assert y[0].tolist() != y[1].tolist()
    assert Model(str(folder), name + "'", "cpu").predict({"x": np.array([row], dtype=np.int32)})["y"].tolist() != [
        exact
    ]


def test_answers_do_not_depend_on_the_batch_and_are_pinned(artifact: str) -> None:
    model = Model(artifact, "m", "cpu")
    rows = np.stack([payload["x"] for payload in make_payloads(8, seed=3)])
    together = model.predict({"x": rows})["y"]
    assert len(np.unique(together)) == together.size
    for row, answer in zip(rows, together, strict=True):
        assert model.predict({"x": row[np.newaxis]})["y"][0].tolist() == answer.tolist()
    # Another Python or numpy must give the very same answers: servers bring their own.
    pinned = [261097421686426872, 571789025165375455, -290030352364552276, 82019807375285573]
    assert model.predict(_x(1))["y"][0].tolist() == pinned


def test_payloads_differ_and_follow_the_seed() -> None:
    first, again, other = make_payloads(64, 1), make_payloads(64, 1), make_payloads(64, 2)
    assert len({payload["x"].tobytes() for payload in first}) == 64
    assert all((a["x"] == b["x"]).all() for a, b in zip(first, again, strict=True))
    assert not (first[0]["x"] == other[0]["x"]).all()


def test_references_need_no_device(artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAILRACE_DEVICE_DIR", raising=False)
    Model(artifact, "m", "cpu").predict(_x(1))
    with pytest.raises(RuntimeError, match="TAILRACE_DEVICE_DIR"):
        Model(artifact, "m", "emulated")


def _held_seats(folder: Path) -> list[str]:
    held = []
    for path in sorted(folder.glob("*.seat-*.lock")):
        with path.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path.name.removesuffix(".lock"))
    return held


def test_copies_spread_over_devices_within_one_process(
    artifact: str, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILRACE_DEVICES", "2")
    models = []
    for expected in (
        ["device-0.seat-0"],
        ["device-0.seat-0", "device-1.seat-0"],
        ["device-0.seat-0", "device-0.seat-1", "device-1.seat-0"],
    ):
        models.append(Model(artifact, "m", "emulated"))
        assert _held_seats(device) == expected
    assert [counters.device for counters in read_counters(device)] == [0, 0, 1]
    del models[1]
    gc.collect()
    assert _held_seats(device) == ["device-0.seat-0", "device-0.seat-1"]
    models.append(Model(artifact, "m", "emulated"))
    assert _held_seats(device) == ["device-0.seat-0", "device-0.seat-1", "device-1.seat-0"]


def test_a_replacement_takes_the_seat_of_the_dead(artifact: str, device: Path, start: Start) -> None:
    text = "Model(artifact, 'm', 'emulated'); m = Model(artifact, 'm', 'emulated'); print('ready', flush=True); input()"
    process = start("kept = " + text)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    survivor = Model(artifact, "m", "emulated")
    assert _held_seats(device) == ["device-0.seat-0", "device-0.seat-1", "device-0.seat-2"]
    process.kill()
    process.wait()
    assert _held_seats(device) == ["device-0.seat-2"]
    replacement = Model(artifact, "m", "emulated")
    assert _held_seats(device) == ["device-0.seat-0", "device-0.seat-2"]
    del survivor, replacement


@pytest.mark.parametrize("copies", [1, 2], ids=["threads of one copy", "two copies"])
def test_a_device_does_one_batch_at_a_time(artifact: str, device: Path, copies: int) -> None:
    models = [Model(artifact, "m", "emulated") for _ in range(copies)]
    begun = time.monotonic_ns()

    def work(model: Model) -> None:
        for _ in range(10):
            model.predict(_x(1, 2, 3))

    threads = [threading.Thread(target=work, args=(models[index % copies],)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    elapsed = time.monotonic_ns() - begun
    counters = read_counters(device)
    assert len(counters) == copies
    assert sum(c.batches for c in counters) == 40
    assert sum(c.items for c in counters) == 120
    # 40 batches of 5 ms each, never two at once.
    assert 40 * 5_000_000 <= sum(c.busy_ns for c in counters) <= elapsed


def test_devices_work_side_by_side(artifact: str, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILRACE_DEVICES", "2")
    first, second = Model(artifact, "m", "emulated"), Model(artifact, "m", "emulated")
    with (device / "device-0.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second.predict(_x(1))
    first.predict(_x(1))
    assert [(c.device, c.batches) for c in read_counters(device)] == [(0, 1), (1, 1)]


def test_waiting_for_the_device_is_not_busy(artifact: str, device: Path) -> None:
    model = Model(artifact, "m", "emulated")
    thread = threading.Thread(target=model.predict, args=(_x(1),))
    with (device / "device-0.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread.start()
        begun = time.monotonic_ns()
        time.sleep(0.3)
        assert read_counters(device)[0].busy_ns == 0
        freed = time.monotonic_ns()
    thread.join(PATIENCE_S)
    (counters,) = read_counters(device)
    assert counters.batches == 1
    assert 3_000_000 <= counters.busy_ns <= time.monotonic_ns() - freed
    assert freed - begun >= 300_000_000


def test_who_waits_is_next(artifact: str, device: Path) -> None:
    """Whoever waits holds the turn, so that nobody who has just released the device can have it again before them."""
    model = Model(artifact, "m", "emulated")
    thread = threading.Thread(target=model.predict, args=(_x(1),))

    def turn_is_taken() -> bool:
        with (device / "device-0.next.lock").open("a") as turn:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with (device / "device-0.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread.start()
        _until(turn_is_taken)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not turn_is_taken()


def test_a_copy_that_dies_frees_the_device_and_counts_what_elapsed(artifact: str, device: Path, start: Start) -> None:
    config = Path(artifact) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_ms": 600_000}))
    begun = time.monotonic_ns()
    process = start("Model(artifact, 'm', 'emulated').predict({'x': np.zeros((1, 16), np.int32)})")

    def busy_ns() -> int:
        return sum(counters.busy_ns for counters in read_counters(device))

    _until(lambda: busy_ns() > 0)  # seen while its only batch is under way
    seen = busy_ns()
    _until(lambda: busy_ns() > seen)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lived = time.monotonic_ns() - begun
    (counters,) = read_counters(device)
    assert counters.pid == process.pid
    assert (counters.batches, counters.items) == (0, 0)
    assert seen < counters.busy_ns <= lived
    with (device / "device-0.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    time.sleep(0.05)
    assert read_counters(device) == [counters]


def test_a_server_that_forks_after_loading_has_two_copies(device: Path, start: Start) -> None:
    process = start(
        "m = Model(artifact, 'm', 'emulated')\n"
        "child = os.fork()\n"
        "m.predict({'x': np.zeros((1, 16), np.int32)})\n"
        "if child: os.waitpid(child, 0); print(child, flush=True)\n"
    )
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    counters = read_counters(device)
    assert {c.pid for c in counters} == {process.pid, int(said)}
    assert [c.batches for c in counters] == [1, 1]
    assert len(list(device.glob("device-0.seat-*.lock"))) == 2


def test_counters_are_read_beside_anything_else(device: Path) -> None:
    assert read_counters(device) == []
    device.mkdir()
    np.array([5, 2, 3], dtype="<u8").tofile(device / "device-12.345.00ff00ff.busy")
    (device / "device-1.2.abcd.busy").write_bytes(b"")  # as it is before its first write
    (device / "device-1.lock").touch()
    (device / "device-x.1.abcd.busy").write_bytes(bytes(24))
    assert read_counters(device) == [DeviceCounters(device=12, pid=345, busy_ns=5, batches=2, items=3)]


def test_the_model_file_stands_alone(artifact: str, device: Path) -> None:
    answers_alone(emulated.__file__, artifact, "m")
