"""The control connection against a server that answers well, badly, late or not at all; ports; what the child may see."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.contract.control import ControlConnection, agreed
from tailrace.harness.errors import ServerError
from tailrace.harness.processes import free_ports


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers = {"/ok": (200, b'{"a": 1}'), "/words": (200, b"fine"), "/created": (201, b"{}")}
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
