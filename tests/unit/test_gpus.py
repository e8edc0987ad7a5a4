"""GPUs by a fake of NVML: which there are, what is read of them, what is left out, and what makes a trial suspect."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.analysis.gpu_figures import gpu_figures, gpus_power_w
from tailrace.harness.analysis.metrics import Measured
from tailrace.harness.analysis.samples import Samples
from tailrace.harness.analysis.verdicts import judge
from tailrace.harness.errors import TailraceError
from tailrace.harness.gpus import Gpu, gpus
from tailrace.harness.machine import hardware
from tailrace.harness.records.facts import Memory
from tailrace.harness.records.schema import SAMPLE_SCHEMA, Outcome
from tailrace.harness.records.summary import Reason, ResourceUse
from tailrace.harness.records.tables import finish_table, read_table
from tailrace.harness.run.collectors import Reading, Sampler
from tailrace.harness.run.gpu_collectors import DcgmExporter, NvidiaGpus
from tailrace.harness.servers.devices import device_environment
from tests.fake_nvml import LOST, UNSUPPORTED, FakeGpu, FakeNvml, install
from tests.records import facts
from tests.synthetic import calibration

SPAN_S = 10.0


class Told(list[tuple[str, dict[str, Any]]]):
    """What a collector has told of events."""

    def __call__(self, event: str, **details: Any) -> None:
        self.append((event, details))


@pytest.fixture
def told() -> Told:
    return Told()


def values(readings: list[Reading], scope: str = "gpu-0") -> dict[str, float]:
    return {reading.metric: reading.value for reading in readings if reading.scope == scope}


def samples_of(rows: list[tuple[float, str, str, str, float]]) -> Samples:
    """Of (second, source, scope, metric, value)."""
    columns = {
        "t_ns": [int(second * 1e9) for second, *_ in rows],
        "source": [row[1] for row in rows],
        "scope": [row[2] for row in rows],
        "metric": [row[3] for row in rows],
        "value": [float(row[4]) for row in rows],
        "unit": ["1"] * len(rows),
    }
    return Samples(pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in SAMPLE_SCHEMA}))


# ---------------------------------------------------------------- which there are


def test_gpus_are_told_in_the_order_of_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeGpu("GPU-aa", "A"), FakeGpu("GPU-bb", "B"))
    assert [(gpu.scope, gpu.cuda_id, gpu.name) for gpu in gpus()] == [("gpu-0", "0", "A"), ("gpu-1", "1", "B")]
    assert hardware()["gpus"] == ["A", "B"]
    assert fake.initialised == 0, "NVML is let go"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["GPU-bb"]),
        ("1,0", ["GPU-bb", "GPU-aa"]),
        ("GPU-b", ["GPU-bb"]),
        ("", []),
        ("0,7,1", ["GPU-aa"]),
        ("GPU-", []),
        ("0,0", ["GPU-aa"]),
    ],
)
def test_only_those_that_cuda_may_see_are_used(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    """As CUDA reads the variable: what names nothing, or more than one, hides itself and what follows."""
    install(monkeypatch, FakeGpu("GPU-aa"), FakeGpu("GPU-bb"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.uuid for gpu in gpus()] == expected


def test_a_card_in_mig_mode_is_its_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [FakeGpu("MIG-x", instance=3, memory_bytes=10 << 30), FakeGpu("MIG-y", instance=5)]
    install(monkeypatch, FakeGpu("GPU-aa", mig=parts), FakeGpu("GPU-bb"))
    first, second, whole = gpus()
    assert (first.scope, first.cuda_id, first.memory_bytes) == ("gpu-0-mig-3", "MIG-x", 10 << 30)
    assert (second.instance, second.card_uuid) == (5, "GPU-aa")
    assert (whole.scope, whole.cuda_id) == ("gpu-1", "1")


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGpu()).has_driver = False
    assert gpus() == []


def test_a_server_sees_its_own_gpus_and_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, FakeGpu("GPU-aa"), FakeGpu("GPU-bb"), FakeGpu("GPU-cc"))
    own = device_environment("cuda", tmp_path, gpus()[1:3], 2)
    assert own["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert own["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID", "else CUDA's 0 need not be NVML's 0"
    for device in ("cpu", "emulated"):
        assert device_environment(device, tmp_path, gpus())["CUDA_VISIBLE_DEVICES"] == ""  # type: ignore[arg-type]
    assert device_environment("emulated", tmp_path, devices=3)["TAILRACE_DEVICES"] == "3"


# ---------------------------------------------------------------- what is read


def test_everything_is_read_of_every_gpu(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    install(monkeypatch, FakeGpu("GPU-aa", ecc=4), FakeGpu("GPU-bb", utilization=90))
    collector = NvidiaGpus(gpus(), told)
    readings = collector.read()
    first, second = values(readings), values(readings, "gpu-1")
    assert first | {"other_processes": 0.0} == first
    assert first["utilization"] == 0.5 and second["utilization"] == 0.9
    assert first["power_w"] == 300 and first["energy_j_total"] == 1000
    assert first["sm_clock_mhz"] == 1980 + pynvml.NVML_CLOCK_SM
    assert first["memory_clock_mhz"] == 1980 + pynvml.NVML_CLOCK_MEM
    assert first["temperature_c"] == 55 and first["memory_bytes"] == 3 << 30
    assert first["ecc_corrected_total"] == 4 + pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
    assert first["ecc_uncorrected_total"] == 4 + pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    assert first["throttled"] == 0
    assert told == []
    collector.close()


def test_it_is_read_ten_times_a_second_and_dear_queries_once(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    fake = install(monkeypatch, FakeGpu())
    assert NvidiaGpus.interval_s <= 0.1
    collector = NvidiaGpus(gpus(), told)
    fake.asked.clear()
    for _ in range(round(1 / NvidiaGpus.interval_s)):
        collector.read()
    assert fake.asked.count("UtilizationRates") >= 10
    assert fake.asked.count("ComputeRunningProcesses") <= 2
    assert fake.asked.count("TotalEccErrors") <= 4


@pytest.mark.parametrize(
    ("reasons", "kinds"),
    [
        (pynvml.nvmlClocksThrottleReasonSwPowerCap, {"power"}),
        (pynvml.nvmlClocksThrottleReasonSwThermalSlowdown, {"thermal"}),
        (pynvml.nvmlClocksThrottleReasonHwSlowdown | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
         {"hardware", "thermal"}),
        (pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown, {"power"}),
        (pynvml.nvmlClocksThrottleReasonGpuIdle, set()),
        (pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting, set()),
    ],
)  # fmt: skip
def test_throttling_is_what_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch, told: Told, reasons: int, kinds: set[str]
) -> None:
    install(monkeypatch, FakeGpu(reasons=reasons))
    read = values(NvidiaGpus(gpus(), told).read())
    assert {kind for kind in ("thermal", "power", "hardware") if read[f"throttled_{kind}"]} == kinds
    assert read["throttled"] == bool(kinds)


def test_what_a_card_does_not_support_is_left_out_and_told_once(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    refuses = {"TotalEnergyConsumption": UNSUPPORTED, "TotalEccErrors": UNSUPPORTED}
    fake = install(monkeypatch, FakeGpu("GPU-aa", refuses=refuses), FakeGpu("GPU-bb"))
    collector = NvidiaGpus(gpus(), told)
    for _ in range(30):
        readings = collector.read()
    assert "energy_j_total" not in values(readings) and "power_w" in values(readings)
    assert "energy_j_total" in values(readings, "gpu-1"), "the other card has a counter"
    assert [(event, details["gpu"], details["query"]) for event, details in told] == [
        ("gpu-query-left-out", "gpu-0", "energy"),
        ("gpu-query-left-out", "gpu-0", "ECC errors"),
    ]
    assert fake.asked.count("TotalEnergyConsumption") == 1 + 30


def test_what_fails_for_the_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    fake = install(monkeypatch, FakeGpu(refuses={"PowerUsage": pynvml.NVML_ERROR_TIMEOUT}))
    collector = NvidiaGpus(gpus(), told)
    assert "power_w" not in values(collector.read())
    fake.gpus[0].refuses.clear()
    assert values(collector.read())["power_w"] == 300
    assert told == []


def test_a_lost_gpu_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    fake = install(monkeypatch, FakeGpu("GPU-aa"), FakeGpu("GPU-bb"))
    collector = NvidiaGpus(gpus(), told)
    collector.read()
    fake.gpus[0].refuses["PowerUsage"] = LOST
    assert values(collector.read())["lost"] == 1
    later = collector.read()
    assert values(later) == {} and values(later, "gpu-1")["utilization"] == 0.5
    assert [event for event, _ in told] == ["gpu-lost"]


def _in_a_container(collector: NvidiaGpus) -> None:
    collector._same_pids = False


def test_memory_and_use_are_told_apart_by_process(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    card = FakeGpu(processes={11: 4 << 30, 12: 1 << 30, 99: 2 << 30}, busy={11: 60, 99: 25})
    install(monkeypatch, card)
    collector = NvidiaGpus(gpus(), told)
    collector._same_pids = True
    collector.serve(lambda: [11, 12])
    read = values(collector.read())
    assert read["server_memory_bytes"] == 5 << 30
    assert read["other_memory_bytes"] == 2 << 30
    assert read["other_processes"] == 1
    assert read["other_utilization"] == 0.25


def test_the_memory_of_a_replica_that_was_killed_is_nobody_elses(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    """NVML lists it for a moment yet, when it is no longer in the server's tree."""
    install(monkeypatch, FakeGpu(processes={11: 4 << 30}))
    collector = NvidiaGpus(gpus(), told)
    collector._same_pids = True
    tree = [11]
    collector.serve(lambda: tree)
    collector.read()
    tree.clear()
    for _ in range(NvidiaGpus._SELDOM_EVERY):
        last = values(collector.read())
        assert not last.get("other_memory_bytes")


def test_nvml_that_does_not_answer_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    fake = install(monkeypatch, FakeGpu())
    found = gpus()
    fake.has_driver = False
    with pytest.raises(TailraceError, match=r"NVML does not tell of gpu-0.*\n.*doctor --gpu"):
        NvidiaGpus(found, told)
    assert fake.initialised == 0


def test_in_a_container_what_was_there_before_the_server_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    card = FakeGpu(processes={99: 2 << 30})
    install(monkeypatch, card)
    collector = NvidiaGpus(gpus(), told)
    _in_a_container(collector)
    card.processes |= {31011: 4 << 30}
    collector.serve(lambda: [11])  # as it is called in here
    read = values(collector.read())
    assert (read["server_memory_bytes"], read["other_memory_bytes"]) == (4 << 30, 2 << 30)


def test_memory_that_is_not_told_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    install(monkeypatch, FakeGpu(processes={99: None}))
    collector = NvidiaGpus(gpus(), told)
    collector._same_pids = True
    read = values(collector.read())
    assert read["other_processes"] == 1 and "other_memory_bytes" not in read


def test_a_mig_instance_is_read_as_far_as_nvml_tells(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    refuses = {"UtilizationRates": UNSUPPORTED, "PowerUsage": UNSUPPORTED, "TotalEnergyConsumption": UNSUPPORTED}
    install(monkeypatch, FakeGpu("GPU-aa", mig=[FakeGpu("MIG-x", instance=3, used_bytes=7, refuses=refuses)]))
    collector = NvidiaGpus(gpus(), told)
    read = values(collector.read(), "gpu-0-mig-3")
    assert read["memory_bytes"] == 7 and not {"utilization", "power_w"} & set(read)
    assert {details["query"] for _, details in told} == {"utilization", "power", "energy"}


def test_readings_reach_the_samples(monkeypatch: pytest.MonkeyPatch, told: Told, tmp_path: Path) -> None:
    install(monkeypatch, FakeGpu("GPU-aa"), FakeGpu("GPU-bb"))
    collector = NvidiaGpus(gpus(), told)
    errors: list[BaseException] = []
    sampler = Sampler([collector], tmp_path / "samples", epoch_ns=0, on_error=errors.append)
    sampler.start()
    sampler.stop()
    finish_table(tmp_path / "samples", sort_by="t_ns")
    table = read_table(tmp_path / "samples", SAMPLE_SCHEMA)
    assert table is not None and not errors
    assert Samples(table).scopes("gpu", "energy_j_total") == ["gpu-0", "gpu-1"]


# ---------------------------------------------------------------- the DCGM exporter

PAGE = """\
# HELP DCGM_FI_PROF_SM_ACTIVE The ratio of cycles an SM has at least 1 warp assigned.
# TYPE DCGM_FI_PROF_SM_ACTIVE gauge
DCGM_FI_PROF_SM_ACTIVE{gpu="0",UUID="GPU-aa",device="nvidia0",modelName="H100"} 0.75
DCGM_FI_PROF_SM_ACTIVE{gpu="1",UUID="GPU-bb",device="nvidia1",modelName="H100"} 0.10
DCGM_FI_PROF_SM_ACTIVE{gpu="2",UUID="GPU-cc",device="nvidia2",GPU_I_PROFILE="1g.10gb",GPU_I_ID="3"} 0.33
# TYPE DCGM_FI_PROF_PIPE_TENSOR_ACTIVE gauge
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{gpu="0",UUID="GPU-aa",device="nvidia0"} 0.5
# TYPE DCGM_FI_DEV_GPU_TEMP gauge
DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-aa"} 55
"""


@pytest.fixture
def exporter() -> Iterator[str]:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *_: object) -> None:
            """Into a test's output nothing is written."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_exporters_gpus_are_matched_by_uuid(exporter: str) -> None:
    in_use = [
        Gpu(5, "H100", "GPU-aa", 1, "GPU-aa"),  # whatever the exporter counts as its number
        Gpu(2, "H100", "MIG-x", 1, "GPU-cc", instance=3),
    ]
    collector = DcgmExporter(exporter, in_use)
    assert collector.answers()
    assert [(r.scope, r.metric, r.value) for r in collector.read()] == [
        ("gpu-5", "sm_active", 0.75),
        ("gpu-2-mig-3", "sm_active", 0.33),
        ("gpu-5", "tensor_active", 0.5),
    ]


def test_where_no_exporter_is_none_answers(exporter: str) -> None:
    port = int(exporter.rpartition(":")[2])
    assert not DcgmExporter(f"127.0.0.2:{port}", []).answers()


# ---------------------------------------------------------------- figures and verdicts


@given(st.floats(50, 700), st.floats(50, 700))
def test_the_energy_counter_is_believed_before_the_power_gauge(counted_w: float, gauge_w: float) -> None:
    rows = [(float(t), "gpu", "gpu-0", "power_w", gauge_w) for t in range(-1, 12)]
    counter = [(float(t), "gpu", "gpu-0", "energy_j_total", 5e4 + counted_w * t) for t in range(-1, 12)]
    (both,) = gpu_figures(samples_of(rows + counter), SPAN_S)
    assert both.energy_j == pytest.approx(counted_w * SPAN_S)
    assert both.energy_from == "counter"
    (gauge,) = gpu_figures(samples_of(rows), SPAN_S)
    assert gauge.energy_j == pytest.approx(gauge_w * SPAN_S)
    assert gauge.energy_from == "power"
    assert gpus_power_w([both, gauge], 2, SPAN_S) == pytest.approx(counted_w + gauge_w)
    (silent,) = gpu_figures(samples_of([(1.0, "gpu", "gpu-0", "utilization", 0.5)]), SPAN_S)
    assert silent.energy_j is silent.energy_from is None


def _verdict(rows: list[tuple[float, str, str, str, float]], **told: Any) -> tuple[str, list[Reason]]:
    """Of a trial in which nothing else is amiss."""
    intended_ns = np.arange(500, dtype=np.int64) * 1_000_000
    sent_ns = intended_ns + 100_000
    outcome = np.full(500, Outcome.OK, np.uint8)
    trace = Measured(intended_ns, sent_ns, sent_ns, intended_ns + 50_000_000, outcome)
    nothing = Measured(*(array[:0] for array in (intended_ns, sent_ns, sent_ns, sent_ns, outcome)))
    figures = gpu_figures(samples_of(rows), SPAN_S)
    return judge(facts(**told), trace, nothing, ResourceUse(steal=0.0), ruler=calibration(1000.0), gpus=figures)


def _gauge(metric: str, readings: list[float], scope: str = "gpu-0") -> list[tuple[float, str, str, str, float]]:
    times = np.linspace(0, SPAN_S, len(readings))
    return [(float(t), "gpu", scope, metric, value) for t, value in zip(times, readings, strict=True)]


def _throttled(share: float, kind: str) -> list[tuple[float, str, str, str, float]]:
    on = [1.0] * round(100 * share) + [0.0] * round(100 * (1 - share))
    never = [0.0] * 100
    kinds = ("thermal", "power", "hardware")
    return _gauge("throttled", on) + [
        row for each in kinds for row in _gauge(f"throttled_{each}", on if each == kind else never)
    ]


def test_a_throttled_gpu_makes_the_trial_suspect_with_the_share_of_time() -> None:
    verdict, reasons = _verdict(_throttled(0.37, "power"))
    assert (verdict, [reason.code for reason in reasons]) == ("UNKNOWN", ["gpu-throttled"])
    assert "gpu-0 for 37% of the trace (power 37%)" in reasons[0].text
    assert "power limit" in reasons[0].remedy and "cool" not in reasons[0].remedy
    assert _verdict(_throttled(0.04, "thermal")) == ("VALID", [])


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (_gauge("other_memory_bytes", [2.5 * 2**30]), "held 2.5 GiB of gpu-0"),
        (_gauge("other_utilization", [0.0, 0.5]), "used 25% of gpu-0"),
        (_gauge("other_processes", [1.0, 2.0]), "were 2 on gpu-0"),
    ],
)
def test_a_shared_gpu_makes_the_trial_suspect(rows: list[tuple[float, str, str, str, float]], text: str) -> None:
    verdict, (reason,) = _verdict(rows)
    assert (verdict, reason.code) == ("UNKNOWN", "gpu-shared")
    assert text in reason.text


def _sharing(budget_mib: int) -> Memory:
    return Memory(
        budget_bytes=budget_mib << 20, sizes={"a": 1}, policy="lru", pinned=[], at_start=["a"], controlled=True
    )


def test_models_that_take_more_than_the_memory_that_they_share_make_it_suspect() -> None:
    rows = _gauge("server_memory_bytes", [900.0 * 2**20, 1100.0 * 2**20, 1000.0 * 2**20])
    verdict, (reason,) = _verdict(rows, memory=_sharing(1024))
    assert (verdict, reason.code) == ("UNKNOWN", "memory-exceeded")
    assert "up to 1,100 MiB of the GPU, not 1,024 MiB" in reason.text
    assert "models.size_mb" in reason.remedy
    assert _verdict(rows, memory=_sharing(1101)) == ("VALID", [])
    verdict, (reason,) = _verdict(_gauge("utilization", [0.5]), memory=_sharing(1024))
    assert (verdict, reason.code) == ("UNKNOWN", "memory-untold")
    assert _verdict(rows, memory=None) == ("VALID", []), "where no memory is shared there is nothing to exceed"


def test_a_desktop_beside_the_server_is_no_neighbour() -> None:
    quiet = _gauge("other_processes", [1.0]) + _gauge("other_memory_bytes", [2e8]) + _gauge("other_utilization", [0.01])
    assert _verdict(quiet) == ("VALID", [])


def test_a_lost_gpu_makes_the_trial_invalid_whenever_it_was() -> None:
    verdict, (reason,) = _verdict([(-1.0, "gpu", "gpu-1", "lost", 1.0)])
    assert (verdict, reason.code) == ("INVALID", "gpu-lost")
    assert "gpu-1" in reason.text


def test_the_fake_is_asked_as_nvml_itself_would_be(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    """Every query that the fake answers is a function of the real module: a name that is spelt wrong is found here."""
    fake = install(monkeypatch, FakeGpu(processes={os.getpid(): 1}))
    assert isinstance(fake, FakeNvml)
    NvidiaGpus(gpus(), told).read()
    for name in set(fake.asked):
        assert callable(getattr(pynvml, f"nvmlDeviceGet{name}"))
