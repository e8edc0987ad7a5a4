"""The control connection against a server that answers well, badly, late or not at all; ports; what the child may see."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.contract.adapter import MetricSample
from tailrace.harness.contract.control import (
    BatchCounts,
    ControlConnection,
    OpenInferenceControl,
    agreed,
    recognised,
)
from tailrace.harness.errors import ServerError
from tailrace.harness.processes import ProcessRef, free_ports


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers = {
            "/ok": (200, b'{"a": 1}'),
            "/words": (200, b"fine"),
            "/created": (201, b"{}"),
            "/metrics": (200, b'# TYPE n counter\nn{model="a"} 3\nn{model="b"} 4\n'),
            "/v2/models/a/ready": (200, b""),
        }
        status, body = answers.get(self.path, (404, b"<script>no such thing</script>"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "server.log"
    path.write_text("the last words\n")
    return path


@pytest.fixture
def control(log: Path) -> Iterator[ControlConnection]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ControlConnection("toy", "127.0.0.1", server.server_address[1], log)
        server.shutdown()


def test_answers(control: ControlConnection) -> None:
    assert control.ask("GET", "/ok") == (200, b'{"a": 1}')
    assert control.says_ok("/ok") is True
    assert control.says_ok("/nothing") is False
    assert control.page("/words") == "fine"
    assert control.json("/ok") == {"a": 1}
    assert control.command("GET", "/created") == b"{}", "every 2xx is success"


def test_what_goes_wrong_is_named(control: ControlConnection) -> None:
    with pytest.raises(ServerError, match="toy answers 404 to GET /nothing: <script>no such thing"):
        control.command("GET", "/nothing")
    with pytest.raises(ServerError, match="what is no JSON"):
        control.json("/words")
    with pytest.raises(OSError, match="/nothing answers 404"):
        control.page("/nothing")


def test_nobody_there(log: Path) -> None:
    control = ControlConnection("toy", "127.0.0.1", free_ports(1)[0], log)
    assert control.says_ok("/ok") is None
    with pytest.raises(ServerError, match="no answer to POST /load") as refused:
        control.command("POST", "/load")
    assert refused.value.detail == "the last words"


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", b"SSH-2.0-hello\r\n\r\n"])
def test_a_server_that_hangs_up_or_speaks_otherwise(log: Path, said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        control = ControlConnection("toy", "127.0.0.1", listener.getsockname()[1], log)
        assert control.says_ok("/ok") is None
        thread.join()


def test_a_server_that_says_nothing_is_not_waited_for(log: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        control = ControlConnection("toy", "127.0.0.1", listener.getsockname()[1], log)
        assert control.says_ok("/ok") is None


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), max_size=4))
def test_agreement_hides_no_disagreement(reports: list[dict[str, object]]) -> None:
    told = agreed(reports)
    for knob in {knob for report in reports for knob in report}:
        values = {report[knob] for report in reports if knob in report}
        said = told[knob]
        assert (set(said) if isinstance(said, list) else {said}) == values
        assert isinstance(said, list) is (len(values) > 1)
    assert set(told) == {knob for report in reports for knob in report}


def test_samples_come_with_the_names_of_their_families(control: ControlConnection) -> None:
    assert [(name, sample.name, sample.labels, sample.value) for name, sample in control.samples()] == [
        ("n", "n_total", {"model": "a"}, 3.0),
        ("n", "n_total", {"model": "b"}, 4.0),
    ]
    with pytest.raises(OSError, match="answers 404"):
        list(control.samples("/none"))


def test_what_is_managed_by_the_open_inference_protocol(control: ControlConnection) -> None:
    server = OpenInferenceControl(control.adapter, control.host, control.port, control.log)
    assert not server.ready()
    assert (server.model_ready("a"), server.model_ready("b")) == (True, False)
    with pytest.raises(ServerError, match="POST /v2/repository/models/b/unload"):
        server.unload("b", timeout_s=1)
    gone = OpenInferenceControl(control.adapter, control.host, free_ports(1)[0], control.log)
    assert gone.model_ready("a") is None


def test_the_size_of_batches_is_that_since_the_last_reading() -> None:
    counts = BatchCounts()

    def size(batches: float, items: float) -> list[float]:
        samples = counts.samples("m", batches=batches, items=items)
        assert samples[:2] == [MetricSample("batches_total", batches, "m"), MetricSample("items_total", items, "m")]
        return [sample.value for sample in samples[2:] if sample.metric == "batch_size"]

    assert size(2, 8) == [4]
    assert size(2, 8) == [], "it was idle"
    assert size(4, 14) == [3]
    assert size(6, 14) == [], "what failed does not count"
    assert size(1, 2) == [], "it counts anew"
    assert size(2, 7) == [5]


def test_processes_are_recognised_oldest_first_and_one_that_ends_meanwhile_is_none() -> None:
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(3)]
    refs = [ProcessRef.of(child.pid) for child in children]

    def told(reference: ProcessRef, process: psutil.Process) -> str | None:
        if reference == refs[1]:
            raise psutil.NoSuchProcess(process.pid)
        return str(refs.index(reference)) if reference in refs else None

    assert recognised([ProcessRef.of(os.getpid())], told) == sorted(
        ["0", "2"], key=lambda n: refs[int(n)].started_ticks
    )
    assert recognised([refs[2], refs[0]], told) == ["0", "2"] or refs[0].started_ticks == refs[2].started_ticks
    for child in children:
        child.communicate(b"\n")
    assert recognised(refs, told) == []
