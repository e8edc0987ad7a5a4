"""Collectors: what the kernel tells of its CPUs, where it tells it and where it does not."""

from __future__ import annotations

import time
from pathlib import Path

from tailrace.harness.run.collectors import CpuClock, Host


def _cpus(folder: Path, khz: list[int], throttled: list[int] | None = None) -> Path:
    for number, value in enumerate(khz):
        cpu = folder / f"cpu{number}"
        (cpu / "cpufreq").mkdir(parents=True)
        (cpu / "cpufreq" / "scaling_cur_freq").write_text(f"{value}\n")
        if throttled:
            (cpu / "thermal_throttle").mkdir()
            (cpu / "thermal_throttle" / "core_throttle_count").write_text(f"{throttled[number]}\n")
    return folder


def read(cpus: Path, cpuinfo: Path) -> dict[str, float]:
    return {reading.metric: reading.value for reading in CpuClock(cpus, cpuinfo).read()}


def test_frequency_is_the_mean_over_cpus_and_throttlings_are_summed(tmp_path: Path) -> None:
    cpus = _cpus(tmp_path / "cpu", [2_000_000, 3_000_000], [4, 5])
    assert read(cpus, tmp_path / "none") == {"frequency_mhz": 2500.0, "throttled_total": 9.0}


def test_without_a_driver_it_comes_from_cpuinfo_and_else_is_absent(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu MHz\t\t: 2400.500\nprocessor\t: 1\ncpu MHz\t\t: 2600.500\nmodel name: «é»\n")
    assert read(tmp_path, info) == {"frequency_mhz": 2500.5}
    info.write_text("processor : 0\nBogoMIPS : 50.00\n")
    assert read(tmp_path, info) == {}
    assert read(tmp_path, tmp_path / "none") == {}


def test_a_cpu_that_goes_off_line_is_left_out(tmp_path: Path) -> None:
    cpus = _cpus(tmp_path / "cpu", [2_000_000, 3_000_000])
    clock = CpuClock(cpus, tmp_path / "none")
    (cpus / "cpu1" / "cpufreq" / "scaling_cur_freq").unlink()
    assert [reading.value for reading in clock.read()] == [2000.0]


def test_of_many_cpus_sixteen_at_most_are_read(tmp_path: Path) -> None:
    cpus = _cpus(tmp_path / "cpu", [1_000_000 + number for number in range(130)])
    clock = CpuClock(cpus, tmp_path / "none")
    assert 8 <= len(clock._frequencies) <= 16


def test_the_host_of_this_machine_is_read_in_shares() -> None:
    host = Host()
    time.sleep(0.05)
    readings = {reading.metric: reading.value for reading in host.read()}
    assert 0 <= readings["cpu_busy"] <= 1
    assert readings.get("frequency_mhz", 1.0) > 0
