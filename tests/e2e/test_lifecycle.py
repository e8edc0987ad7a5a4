"""Whole runs on the null server: what a user sees and what stays on disk when things go well, and when they do not."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tailrace.harness.records.store import RunFolder
from tests.conftest import tailrace, wait_until

pytestmark = pytest.mark.e2e

SHORT = ["smoke", "--adapter", "null", "--set", "tuning=defaults", "--set", "warmup.duration_s=1"]
STEADY = ["--set", "trace={name: steady, params: {rate: 100, duration_s: 4}}"]


def script(**options: Any) -> list[str]:
    return ["--set", f"options.null={json.dumps(options)}"]


def summary_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def codes(folder: Path) -> list[str]:
    # The build machine is shared: other load is told by noisy-host, what it does to a few seconds' figures by not-steady, a
    # starved generator by generator-saturated.
    ignored = {"noisy-host", "not-steady", "generator-saturated"}
    return [r["code"] for trial in summary_of(folder)["trials"] for r in trial["reasons"] if r["code"] not in ignored]


def test_a_run_ends_with_the_path_of_its_report_and_every_command_reads_it(tmp_path: Path) -> None:
    done = tailrace("run", *SHORT, *STEADY, "--out", "out", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    report = Path(done.stdout.splitlines()[-1])
    assert report == tmp_path / "out" / "report.html"
    assert report.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert codes(tmp_path / "out") == []

    told = json.loads(tailrace("summary", "out", "--format", "json", cwd=tmp_path).stdout)
    (trial,) = told["trials"]
    promised = (
        "adapter, workload, trace, offered_rps, goodput_rps, goodput_rps_per_device, p50_ms, p99_ms, p99_ci_ms, "
        "slo_attainment, ok, errors, shed, timeouts, dropped, send_lag_p99_ms, utilization, cold_start_s, verdict, reasons"
    )
    for key in promised.split(", "):
        assert key in trial, key
        assert key in told["cells"][0], key
    assert trial["ok"] == trial["arrivals"] == trial["outputs"]["checked"] - warmups(tmp_path / "out")
    assert trial["outputs"]["mismatched"] == 0

    rows = list(csv.DictReader(io.StringIO(tailrace("summary", "out", "--format", "csv", cwd=tmp_path).stdout)))
    assert [row["adapter"] for row in rows] == ["null"]
    assert float(rows[0]["offered_rps"]) == pytest.approx(trial["offered_rps"])
    assert "null" in tailrace("summary", "out", cwd=tmp_path).stdout

    first = report.read_bytes()
    report.unlink()
    (tmp_path / "out" / "summary.json").unlink()
    again = tailrace("report", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert report.read_bytes() == first, "a report made again from the records is the same, byte for byte"

    twice = tailrace("run", *SHORT, *STEADY, "--out", "out", cwd=tmp_path)
    assert twice.returncode == 2
    assert "runs are never overwritten" in twice.stderr


def warmups(folder: Path) -> int:
    (trial,) = RunFolder.open(folder).trials
    assert trial.requests is not None
    return sum(phase == "warmup" for phase in trial.requests["phase"].to_pylist())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shed_share": 1.0}, 1),
        ({"wrong_share": 1.0}, 1),
        ({"fail_at_start": True}, 1),
    ],
    ids=["sheds everything", "answers wrongly", "does not start"],
)
def test_a_server_that_cannot_be_verified_fails_with_one_message_and_its_log(
    tmp_path: Path, options: dict[str, Any], expected: int
) -> None:
    done = tailrace("run", *SHORT, *STEADY, *script(**options), "--out", "out", cwd=tmp_path)
    assert done.returncode == expected, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    if options.get("fail_at_start"):
        assert "scripted failure at start: the accelerator's driver is missing" in done.stderr
    if options.get("wrong_share"):
        assert "does not compute what the reference computes" in done.stderr
    assert codes(tmp_path / "out") == ["incomplete"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_knob_without_a_place_may_be_left_out_and_is_told(tmp_path: Path) -> None:
    done = tailrace(
        "run", "smoke", "--adapter", "null", *STEADY, "--set", "warmup.duration_s=1", "--out", "out", cwd=tmp_path
    )
    assert done.returncode in (0, 3), done.stderr
    assert "null runs without it: null has no place for `max_batch`" in done.stderr
    (trial,) = summary_of(tmp_path / "out")["trials"]
    assert trial["tuning"] == {"replicas": 2}
    assert set(trial["left_out"]) == {"max_batch", "batch_window_ms"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Null server ran without «max_batch» and «batch_window_ms»" in page


def test_the_fast_engine_gives_the_right_answer_to_every_payload(tmp_path: Path) -> None:
    """Also to those of half a megabyte: HAProxy must have the whole body before it can tell which one it is."""
    for workload in ("emulated", str(large_workload(tmp_path))):
        out = tmp_path / f"out-{Path(workload).name}"
        engine = script(engine="haproxy")
        done = tailrace("run", *SHORT, *STEADY, *engine, "--workload", workload, "--out", str(out), cwd=tmp_path)
        assert done.returncode in (0, 3), done.stderr
        (trial,) = summary_of(out)["trials"]
        assert codes(out) == []
        assert trial["ok"] == trial["arrivals"]
        assert trial["outputs"]["mismatched"] == 0


def large_workload(folder: Path) -> Path:
    """A workload whose payloads are as large as an image of ResNet-50."""
    workload = folder / "large"
    workload.mkdir()
    (workload / "workload.yaml").write_text(
        "name: large\ntitle: Large\ndescription: Sums.\ndevices: [cpu]\nslo: {latency_ms: 100}\npayloads: 4\n"
        "inputs: [{name: x, dtype: float32, shape: [150528]}]\noutputs: [{name: y, dtype: float32, shape: [1]}]\n"
    )
    (workload / "model.py").write_text(
        "class Model:\n    def __init__(self, artifact, name, device):\n        pass\n"
        "    def predict(self, inputs):\n        return {'y': inputs['x'][:, :1] * 2}\n"
    )
    (workload / "build.py").write_text(
        "import numpy as np\n"
        "def build_artifact(folder, options, seed):\n    (folder / 'nothing').write_text('')\n"
        "def make_payloads(count, seed):\n"
        "    rows = np.random.default_rng(seed).random((count, 150528), dtype=np.float32)\n"
        "    return [{'x': row} for row in rows]\n"
    )
    return workload


def test_a_wedged_server_is_told_and_ended(tmp_path: Path, leftovers: Any) -> None:
    """Inference hangs from the third second on, and health goes on answering."""
    wedged = [*script(wedge_after_s=3), "--set", "client.timeout_s=2"]
    done = tailrace("run", *SHORT, *STEADY, *wedged, "--out", "out", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "wedged" in codes(tmp_path / "out")
    assert "in the end health answers but inference does not" in done.stdout
    assert leftovers() == []


def test_a_server_that_is_wedged_from_the_start_is_told_so(tmp_path: Path, leftovers: Any) -> None:
    """The other way round: inference answers, and health does not."""
    done = tailrace("run", *SHORT, *STEADY, *script(mute_after_s=0.001), "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "did not say that it is ready within 20 s, though it answers requests: it is wedged" in done.stderr
    assert leftovers() == []


def test_wrong_answers_during_the_run_make_it_invalid(tmp_path: Path) -> None:
    """A hundredth of the answers is wrong: verification of 16 payloads mostly misses it, the check during the run does not."""
    for seed in range(1, 20):
        out = tmp_path / f"out{seed}"
        done = tailrace("run", *SHORT, *STEADY, *script(wrong_share=0.02, seed=seed), "--out", str(out), cwd=tmp_path)
        if done.returncode == 3:
            break
        shutil.rmtree(out)
    assert "output-mismatch" in codes(out)
    (trial,) = summary_of(out)["trials"]
    assert 0 < trial["outputs"]["mismatched"] < trial["arrivals"] / 4


def test_failures_are_not_fast(tmp_path: Path) -> None:
    """A server that sheds a share of its load in a millisecond: its p99 is infinite, and its sheds stand beside it."""
    for seed in range(1, 20):
        out = tmp_path / f"out{seed}"
        done = tailrace("run", *SHORT, *STEADY, *script(shed_share=0.05, seed=seed), "--out", str(out), cwd=tmp_path)
        if done.returncode != 1:
            break
        shutil.rmtree(out)  # a verification request was shed
    (trial,) = summary_of(out)["trials"]
    assert trial["shed"] > 0
    assert trial["ok"] + trial["shed"] == trial["arrivals"]
    assert trial["p99_ms"] == "inf"
    assert trial["p99_ok_ms"] != "inf"
    assert trial["slo_attainment"] <= trial["ok"] / trial["arrivals"]


def test_a_server_that_dies_during_the_run_is_told_and_nothing_measured_is_lost(tmp_path: Path) -> None:
    trace = ["--set", "trace={name: steady, params: {rate: 100, duration_s: 12}}"]
    done = tailrace("run", *SHORT, *trace, *script(die_after_s=9), "--out", "out", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "server-died" in codes(tmp_path / "out")
    (trial,) = summary_of(tmp_path / "out")["trials"]
    assert trial["ok"] > 0
    assert trial["connection_errors"] + trial["timeouts"] > 0
    assert trial["ok"] + trial["connection_errors"] + trial["timeouts"] == trial["arrivals"]


def test_a_replica_kill_is_injected_on_the_trace_clock_and_told(tmp_path: Path) -> None:
    trace = ["--set", "trace={name: steady, params: {rate: 100, duration_s: 8}}", "--set", "tuning.replicas=2"]
    fault = ["--set", "scenarios=[{name: kill, faults: [{kind: kill_replica, at_s: 3}]}]"]
    done = tailrace("run", *SHORT, *trace, *fault, "--out", "out", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert codes(tmp_path / "out") == []
    (trial,) = summary_of(tmp_path / "out")["trials"]
    (injected,) = trial["faults"]
    assert 3 <= injected["injected_s"] < 4
    assert injected["recovery"]["baseline_attainment"] is not None
    (folder,) = RunFolder.open(tmp_path / "out").trials
    told = {event["event"]: event for event in folder.events}
    assert told["fault"]["pid"] == injected["pid"] == told["replica-died"]["pid"]


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tailrace.cli.main", "run", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LONG = ["--set", "trace={name: steady, params: {rate: 100, duration_s: 60}}"]


def stage_reached(folder: Path, stage: str) -> bool:
    events = folder / "trials" / "null--no-fault--1" / "events.jsonl"
    return events.exists() and f'"{stage}"' in events.read_text()


@pytest.mark.parametrize("stage", ["deploy", "verify", "warm up"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupts_leave_no_process_and_a_readable_run(
    tmp_path: Path, stage: str, sent: signal.Signals, leftovers: Any
) -> None:
    harness = start(tmp_path, *SHORT, *LONG, "--out", "out")
    try:
        wait_until(lambda: stage_reached(tmp_path / "out", stage) or harness.poll() is not None, f"{stage} is reached")
        if stage == "warm up":
            time.sleep(4)  # into the measured span
        servers = [child.pid for child in psutil.Process(harness.pid).children(recursive=True)]
        harness.send_signal(sent)
        _, told = harness.communicate(timeout=120)
    finally:
        harness.kill()
    assert servers
    wait_until(lambda: not any(alive(pid) for pid in servers), "every process of the run has ended", 60)
    wait_until(lambda: not leftovers(), "no process is left", 60)
    if sent != signal.SIGKILL:
        assert harness.returncode == 130, told
        assert "Traceback" not in told
        assert codes(tmp_path / "out") == ["incomplete"]
    again = tailrace("report", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    (trial,) = summary_of(tmp_path / "out")["trials"]
    assert trial["verdict"] == "INVALID"
    if stage == "warm up":
        assert trial["ok"] > 0, "what was measured before the interrupt is there"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_after_a_sigkill_the_next_command_says_what_was_cleaned(tmp_path: Path) -> None:
    harness = start(tmp_path, *SHORT, *LONG, "--out", "out")
    try:
        wait_until(lambda: stage_reached(tmp_path / "out", "warm up"), "the run is under way")
    finally:
        harness.kill()
        harness.communicate(timeout=60)
    told: list[str] = []

    def cleaned() -> bool:
        told.append(tailrace("clean", cwd=tmp_path).stdout)
        return "guardian ended" in told[-1]

    wait_until(cleaned, "the guardian has cleaned")
    assert "nothing to clean" in tailrace("clean", cwd=tmp_path).stdout


def test_a_full_disk_stops_the_run_with_one_message_and_keeps_what_was_written(tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the write fails in the middle of the replay."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); sys.argv[0] = 'tailrace';"
        "from tailrace.cli.main import main; main()"
    )
    # The calibration fits below the limit, the trial does not.
    trace = ["--set", "trace={name: steady, params: {rate: 700, duration_s: 30}}", "--set", "calibration.step_s=0.1"]
    command = [sys.executable, "-c", code, "run", *SHORT, *trace, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written" in done.stderr
    (trial,) = RunFolder.open(tmp_path / "out").trials
    assert trial.requests is not None
    assert trial.requests.num_rows > 100


def test_bad_usage_is_exit_code_2_with_the_remedy(tmp_path: Path) -> None:
    cases = [
        (["run", "smoke", "--adapter", "trition"], "did you mean 'triton'"),
        (["run", "smoke", "--adapter", "null", "--set", "when_refused=stop"], "has no place for `max_batch`"),
        (["run", "smoke", "--adapter", "null", "--set", "options.null={engine: haproxy, jitter_ms: 1}"], "jitter_ms"),
        (["run", "smoke", "--trace", "surg"], "'surge'"),
        (["run", "smoke", "--workload", "emulatd"], "emulated"),
        (["run", "smoke", "--set", "slo.latency_ms=0"], "greater than 0"),
        (["run", "smoke", "--set", "device=cuda"], "cannot run on 'cuda'"),
        (["run", "default", "--set", "tuning.replicas=1000000"], "replicas take at least"),
        (["run", "default", "--set", "scenarios.1.faults.0.at_s=51"], "comes after the trace"),
        (["run", "default", "--set", "client.max_connections=100"], "raise client.max_connections to"),
        (["run", "smoke", "--set", "trace.params.rate=0"], "rate"),
        (["report", "nowhere"], "holds no manifest.json"),
        (["summary", "nowhere"], "holds no manifest.json"),
        (["run"], "Missing argument"),
    ]
    for arguments, message in cases:
        done = tailrace(*arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert message in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing was written for what cannot run"


def test_other_commands(tmp_path: Path) -> None:
    assert "kill" not in tailrace("adapters", cwd=tmp_path).stderr
    adapters = tailrace("adapters", cwd=tmp_path).stdout
    for name in ("kserve", "null", "ray_serve", "reference", "torchserve", "triton"):
        assert name in adapters
    one = tailrace("adapters", "kserve", cwd=tmp_path).stdout
    assert "refused: the Python model server has no batcher" in " ".join(one.replace("│", " ").split())
    assert "nox -s contract -- --adapter kserve" in one
    assert json.loads(tailrace("adapters", "--format", "json", cwd=tmp_path).stdout)["triton"]["observed"] is None
    assert "surge" in tailrace("traces", "list", cwd=tmp_path).stdout
    assert "mean rate" in tailrace("traces", "show", "surge", cwd=tmp_path).stdout
    assert "open files" in tailrace("doctor", cwd=tmp_path).stdout
    (tmp_path / "mine.csv").write_text("timestamp\n0.0\n0.5\n0.5\n2.0\n")
    added = tailrace("traces", "add", "mine.csv", cwd=tmp_path)
    assert added.returncode == 0, added.stderr
    assert "use it with --trace mine" in added.stdout
    assert "mine" in tailrace("traces", "list", cwd=tmp_path).stdout
    (tmp_path / "bad.csv").write_text("timestamp\n0.0\n3.0\n1.0\n")
    refused = tailrace("traces", "add", "bad.csv", cwd=tmp_path)
    assert refused.returncode == 2
    assert "bad.csv" in refused.stderr
    assert "4" in refused.stderr, "the line is named"


def test_two_runs_at_once_do_not_collide(tmp_path: Path) -> None:
    runs = [start(tmp_path, *SHORT, *STEADY, "--out", f"out{i}") for i in range(2)]
    for i, run in enumerate(runs):
        _, told = run.communicate(timeout=200)
        assert run.returncode in (0, 3), told
        assert codes(tmp_path / f"out{i}") == []


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    """Ports are chosen free; should another program take one in between, the server's own message is shown."""
    from tailrace.adapters.null.adapter import ADAPTER

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = {"host": "127.0.0.1", "port": port, "fail_at_start": False}
        (tmp_path / "null.json").write_text(json.dumps(config))
        command = [sys.executable, str(ADAPTER.folder / "server.py"), str(tmp_path / "null.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ})
        assert "Address already in use" in done.stderr
