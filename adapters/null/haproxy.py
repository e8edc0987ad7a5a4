"""The null server's fast engine: HAProxy gives fixed answers from memory, one thread, tens of thousands a second."""

from __future__ import annotations

import zlib

from tailrace.adapters.null import answers
from tailrace.adapters.null.server import PATH
from tailrace.harness.contract.adapter import DeployRequest
from tailrace.harness.contract.codecs import raw_bytes
from tailrace.harness.errors import InputError

CONFIG = "haproxy.cfg"

# Bodies of half a megabyte (a ResNet-50 image) must fit into one buffer: a longer one cannot be told from another.
_HEAD = """\
global
    nbthread 1
    tune.bufsize 1048576
defaults
    mode http
    timeout client 1h
    timeout http-request 10s
    timeout http-keep-alive 1h
frontend null
    bind "${TAILRACE_HOST}:${TAILRACE_PORT}"
    http-request return status 200 if { path /ready }
    http-request wait-for-body time 5s
"""
_PREFIX_BYTES = 4096
"""HAProxy takes 10 ms for the CRC-32 of half a megabyte: payloads that differ in the beginning are told apart by that."""


def config(request: DeployRequest) -> str:
    """HAProxy's configuration: one rule for each answer, chosen by the model's path and the CRC-32 of the body, or of its
    beginning where that tells the payloads apart.

    Raises :class:`InputError` when two payloads have the same CRC-32.
    """
    bodies = [raw_bytes(request.workload.spec.inputs, payload) for payload in request.workload.payloads]
    beginnings = {zlib.crc32(body[:_PREFIX_BYTES]) for body in bodies}
    told_apart = len(beginnings) == len(bodies) and all(len(body) > _PREFIX_BYTES for body in bodies)
    length = _PREFIX_BYTES if told_apart else None
    lines = [f"    http-request set-var(txn.payload) req.body,{f'bytes(0,{length}),' if length else ''}crc32\n"]
    for model in request.models:
        known: set[int] = set()
        for index, body in enumerate(bodies):
            checksum = zlib.crc32(body[:length])
            if checksum in known:
                raise InputError(
                    f"payload {index} of {request.workload.spec.name} has the CRC-32 of another one",
                    remedy="use `engine: scripted`, or another seed",
                )
            known.add(checksum)
            lines.append(
                "    http-request return status 200 content-type application/octet-stream "
                f"file {answers.path(model, index)} "
                f"if {{ path {PATH}{model} }} {{ var(txn.payload) -m int {checksum} }}\n"
            )
    return (
        _HEAD + "".join(lines) + '    http-request return status 404 content-type text/plain string "no such payload"\n'
    )
