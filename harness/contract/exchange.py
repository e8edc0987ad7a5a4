"""One request at a time, blocking: for readiness, for verification, for probes; never for load."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tailrace.harness.contract.codecs import PreparedRequest
from tailrace.harness.contract.deployment import Endpoint
from tailrace.harness.contract.workload import PreparedWorkload, Tensors
from tailrace.harness.contract.workload import mismatch as tensor_mismatch
from tailrace.harness.errors import ServerError

_BODY_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Answer:
    """An answer: ``ok`` for HTTP 200 or gRPC OK; ``text`` says what it was otherwise."""

    ok: bool
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""


def exchange(endpoint: Endpoint, request: PreparedRequest, timeout_s: float) -> Answer:
    """Send one prepared request over a connection of its own. Never raises for what a server does: see ``Answer.ok``."""
    if endpoint.protocol == "grpc":
        return _exchange_grpc(endpoint, request, timeout_s)
    return _exchange_http(endpoint, request, timeout_s)


def _exchange_http(endpoint: Endpoint, request: PreparedRequest, timeout_s: float) -> Answer:
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s) as connection:
            connection.sendall(request.data)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            body = response.read(_BODY_LIMIT_BYTES)
            if response.length:  # reading up to a limit says nothing of a body that ends too early
                raise ValueError(f"the answer lacks {response.length} bytes")
            headers = {name.lower(): value for name, value in response.getheaders()}
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(False, text=f"{type(error).__name__}: {error}")
    if response.status != http.client.OK:
        return Answer(False, body, headers, f"HTTP {response.status}: {body[:200].decode('utf-8', 'replace')}")
    return Answer(True, body, headers)


def _exchange_grpc(endpoint: Endpoint, request: PreparedRequest, timeout_s: float) -> Answer:
    import grpc

    with grpc.insecure_channel(f"{endpoint.host}:{endpoint.port}") as channel:
        try:
            body = channel.unary_unary(request.method)(request.data, timeout=timeout_s)
        except grpc.RpcError as error:
            return Answer(False, text=f"gRPC {error.code().name}: {str(error.details())[:200]}")
    return Answer(True, bytes(body))


def check_answer(
    endpoint: Endpoint, workload: PreparedWorkload, model: str, payload_id: int, headers: Mapping[str, str], body: bytes
) -> str | None:
    """``None`` when an answer equals the reference of its payload within the workload's tolerance, else what differs."""
    try:
        outputs: Tensors = endpoint.codec.decode(headers, body)
    except ServerError as error:
        return f"{model}, payload {payload_id}: {error.message}"
    difference = tensor_mismatch(outputs, workload.references[model][payload_id], workload.tolerance)
    return None if difference is None else f"{model}, payload {payload_id}: {difference}"
