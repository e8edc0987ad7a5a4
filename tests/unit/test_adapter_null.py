"""The null adapter: the script's times, answers laid down beforehand, and a fast engine that claims no script."""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tailrace.adapters.null import answers
from tailrace.adapters.null.adapter import ADAPTER, NullOptions
from tailrace.adapters.null.server import PreciseSelector, Script, key
from tailrace.harness.contract.adapter import DeployRequest, ServerEnvironment, Tuning
from tailrace.harness.contract.codecs import RawGRPC, RawHTTP, raw_bytes
from tailrace.harness.contract.workload import PreparedWorkload, Slo, Tensors, TensorSpec, WorkloadSpec
from tailrace.harness.errors import InputError

SPEC = WorkloadSpec(
    name="toy",
    title="Toy",
    description="",
    devices=("cpu",),
    inputs=(TensorSpec(name="x", dtype="int32", shape=(2,)),),
    outputs=(TensorSpec(name="y", dtype="int64", shape=(1,)), TensorSpec(name="z", dtype="uint8", shape=(3,))),
    slo=Slo(latency_ms=100),
)
PAYLOADS: tuple[Tensors, ...] = tuple({"x": np.array([number, 0], dtype=np.int32)} for number in range(4))
REFERENCES: tuple[Tensors, ...] = tuple({"y": np.array([number]), "z": np.array([number, 1, 2])} for number in range(4))


def request(payloads: tuple[Tensors, ...] = PAYLOADS) -> DeployRequest:
    references = {"alpha": REFERENCES, "beta": tuple(reversed(REFERENCES))}
    return DeployRequest(
        workload=PreparedWorkload(SPEC, "cpu", Path("model.py"), Path("artifact"), "", None, payloads, references),
        models=("alpha", "beta"),
        tuning=Tuning(),
        options=NullOptions(engine="haproxy"),
        protocol="http",
        environment=ServerEnvironment(Path("python"), "venv"),
        workdir=Path("run"),
        scratch=Path("scratch"),
        server_env={},
    )


def test_every_payload_of_every_model_has_its_rule() -> None:
    text = ADAPTER.render(request())["haproxy.cfg"]
    rules = re.findall(
        r"file answers/(\w+)-(\d)\.bin if \{ path /models/(\w+) \} \{ var\(txn.payload\) -m int (\d+) \}", text
    )
    expected = [
        (model, str(index), model, str(zlib.crc32(payload["x"].tobytes())))
        for model in ("alpha", "beta")
        for index, payload in enumerate(PAYLOADS)
    ]
    assert rules == expected
    assert text.rstrip().endswith('return status 404 content-type text/plain string "no such payload"')


def test_answers_are_the_references_as_the_codecs_read_them(tmp_path: Path) -> None:
    placed = answers.place(request(), tmp_path)
    for codec in (RawHTTP("127.0.0.1", 1, "/", SPEC.inputs, SPEC.outputs), RawGRPC("/", SPEC.inputs, SPEC.outputs)):
        for model, references in request().workload.references.items():
            for index, (payload, reference) in enumerate(zip(PAYLOADS, references, strict=True)):
                assert placed[key(model, raw_bytes(SPEC.inputs, payload))] == answers.path(model, index)
                decoded = codec.decode({}, (tmp_path / answers.path(model, index)).read_bytes())
                for name, values in reference.items():
                    np.testing.assert_array_equal(decoded[name], values)


def test_payloads_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(InputError, match="payload 2 of toy has the CRC-32 of another one"):
        ADAPTER.render(request((*PAYLOADS[:2], PAYLOADS[0], PAYLOADS[3])))


def test_a_script_needs_the_scripted_engine() -> None:
    with pytest.raises(ValidationError, match="latency_ms needs engine scripted"):
        NullOptions(engine="haproxy", latency_ms=1)
    options = NullOptions(engine="haproxy")
    assert "one process" in ADAPTER.refusals(Tuning(replicas=2), options, "http")["replicas"]
    assert ADAPTER.refusals(Tuning(replicas=2), NullOptions(), "http") == {}
    assert "haproxy.cfg" not in ADAPTER.render(replace(request(), options=NullOptions()))
    with pytest.raises(InputError, match="haproxy does not speak grpc"):
        ADAPTER.refusals(Tuning(), options, "grpc")
    assert ADAPTER.refusals(Tuning(), NullOptions(), "grpc") == {}


def test_raw_tensors_over_grpc_are_the_body_over_http() -> None:
    grpc = RawGRPC("/service/{model}", SPEC.inputs, SPEC.outputs).encode("alpha", PAYLOADS[1])
    http = RawHTTP("127.0.0.1", 1, "/", SPEC.inputs, SPEC.outputs).encode("alpha", PAYLOADS[1])
    assert grpc.method == "/service/alpha"
    assert http.data.endswith(b"\r\n\r\n" + grpc.data)


def script(folder: Path, **options: Any) -> Script:
    model = folder / "model.py"
    model.write_text("class Model:\n    def __init__(self, artifact, name, device):\n        pass\n")
    known = {"answers": {}, "model_file": str(model), "models": ["alpha"], "artifact": "", "device": "cpu"}
    config = {**NullOptions(**options).model_dump(), **known, "inputs": [], "outputs": []}
    return Script(config, replica=0, began_ns=0)


def delays_ms(follow: Script, count: int) -> list[float]:
    return [follow.due_ns(10**12) / 1e6 - 1e6 for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "median_ms", "p99_ms"),
    [
        ({"latency_ms": 5, "jitter_ms": 10}, 5 + 10 * np.log(2), 5 + 10 * np.log(100)),
        ({"pareto_ms": 4, "pareto_alpha": 2}, 4 * 2**0.5, 4 * 10),
        ({"latency_ms": 5, "pareto_ms": 4, "pareto_alpha": 1}, 5 + 8, 5 + 400),
    ],
)
def test_delays_have_the_distribution_that_was_asked_for(
    tmp_path: Path, options: dict[str, float], median_ms: float, p99_ms: float
) -> None:
    delays = np.array(delays_ms(script(tmp_path, **options), 20_000))
    # The shares beyond the true quantiles, within four standard errors.
    assert np.mean(delays > median_ms) == pytest.approx(0.5, abs=4 * (0.25 / 20_000) ** 0.5)
    assert np.mean(delays > p99_ms) == pytest.approx(0.01, abs=4 * (0.0099 / 20_000) ** 0.5)


def test_an_answer_due_within_a_stall_is_given_at_its_end(tmp_path: Path) -> None:
    follow = script(tmp_path, latency_ms=10, stall_every_s=5, stall_ms=500)
    due_ms = {read_ms: follow.due_ns(read_ms * 10**6) / 1e6 for read_ms in (0, 489, 490, 600, 4985, 4995, 5200)}
    assert due_ms == {0: 500, 489: 500, 490: 500, 600: 610, 4985: 4995, 4995: 5500, 5200: 5500}


def test_the_first_requests_are_slow(tmp_path: Path) -> None:
    follow = script(tmp_path, latency_ms=1, cold_requests=2, cold_ms=30)

    async def ask() -> float:
        asked = await follow.obey("nobody", b"")
        return (asked.due_ns - asked.read_ns) / 1e6

    async def three() -> list[float]:
        return [await ask() for _ in range(3)]

    assert asyncio.run(three()) == [31, 31, 1]


def test_the_first_requests_are_spared_the_shares(tmp_path: Path) -> None:
    follow = script(tmp_path, shed_share=1, honest_requests=2)

    async def three() -> list[int]:
        return [(await follow.obey("nobody", b"")).status for _ in range(3)]

    assert asyncio.run(three()) == [404, 404, 503]


def test_the_selector_keeps_time_to_less_than_a_millisecond() -> None:
    """epoll alone is late by half a millisecond on average; the least of a few, for the machine may be busy."""

    async def late_ms() -> float:
        begun_s = time.monotonic()
        await asyncio.sleep(0.0051)
        return (time.monotonic() - begun_s - 0.0051) * 1e3

    async def several() -> list[float]:
        return [await late_ms() for _ in range(50)]

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PreciseSelector())) as runner:
        late = sorted(runner.run(several()))
    assert late[0] >= 0
    assert late[len(late) // 4] < 0.4
