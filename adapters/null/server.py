"""The null server: right answers from memory, given the way a script says; standard library and the workload's model.

Run as ``python server.py CONFIG.json``. The parent holds the listening socket; each replica is a forked child that
serves it, and is not replaced when it dies.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 500: "Internal Server Error", 503: "Service Unavailable"}


def respond(status: int, body: bytes) -> bytes:
    """An HTTP/1.1 answer that keeps the connection."""
    return f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Length: {len(body)}\r\n\r\n".encode("ascii") + body


class Script:
    """What the server does, decided request by request from a seed."""

    def __init__(self, config: dict[str, Any], replica: int) -> None:
        self._config = config
        self._random = random.Random(f"{config['seed']}-{replica}")  # noqa: S311 - a script, not a secret
        self._answers: dict[bytes, bytes] = {}
        self._models: dict[str, Any] = {}
        specification = importlib.util.spec_from_file_location("workload_model", config["model_file"])
        if specification is None or specification.loader is None:
            sys.exit(f"{config['model_file']} cannot be imported")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        for name in config["models"]:
            self._models[name] = module.Model(config["artifact"], name, config["device"])
        self._started_s = time.monotonic()

    def delay_s(self) -> float:
        """How long to wait before answering: latency, exponential jitter, and the rest of a stall under way."""
        config = self._config
        delay: float = config["latency_ms"] / 1e3
        if config["jitter_ms"] > 0:
            delay += self._random.expovariate(1e3 / config["jitter_ms"])
        if config["stall_every_s"] > 0:
            into_period = (time.monotonic() - self._started_s) % config["stall_every_s"]
            if into_period < config["stall_ms"] / 1e3:
                delay += config["stall_ms"] / 1e3 - into_period
        return delay

    def answer(self, path: str, body: bytes) -> bytes:
        """The whole answer to one request."""
        if path == "/ready":
            return respond(200, b"")
        draw = self._random.random()
        for share, status in ((self._config["shed_share"], 503), (self._config["error_share"], 500)):
            if draw < share:
                return respond(status, f"scripted {status}".encode())
            draw -= share
        result = self._compute(path, body)
        if result is None:
            return respond(404, b"no such model")
        if draw < self._config["wrong_share"]:
            result = bytes([result[0] ^ 1]) + result[1:]
        return respond(200, result)

    def _compute(self, path: str, body: bytes) -> bytes | None:
        """The model's answer, computed once for every payload and then remembered."""
        key = hashlib.blake2b(path.encode() + b"\0" + body, digest_size=16).digest()
        if key not in self._answers:
            model = self._models.get(path.removeprefix("/models/"))
            if model is None:
                return None
            inputs, offset = {}, 0
            for name, dtype, shape in self._config["inputs"]:
                count = int(np.prod(shape))
                inputs[name] = np.frombuffer(body, dtype, count, offset).reshape(1, *shape)
                offset += inputs[name].nbytes
            outputs = model.predict(inputs)
            self._answers[key] = b"".join(
                np.ascontiguousarray(outputs[name][0], dtype=dtype).tobytes()
                for name, dtype, _ in self._config["outputs"]
            )
        return self._answers[key]


async def converse(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection until the client closes it."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = next(
                (
                    int(line.partition(":")[2])
                    for line in head.split("\r\n")
                    if line.lower().startswith("content-length:")
                ),
                0,
            )
            body = await reader.readexactly(length)
            path = head.split(" ", 2)[1]
            delay_s = 0.0 if path == "/ready" else script.delay_s()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            writer.write(script.answer(path, body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def replicate(config: dict[str, Any], listener: socket.socket, replica: int) -> None:
    """The body of one replica."""
    script = Script(config, replica)
    server = await asyncio.start_server(lambda r, w: converse(script, r, w), sock=listener, backlog=4096)
    if config["die_after_s"] > 0:
        asyncio.get_running_loop().call_later(config["die_after_s"], os.kill, os.getppid(), signal.SIGKILL)
        asyncio.get_running_loop().call_later(config["die_after_s"] + 0.01, os._exit, 1)
    await server.serve_forever()


def main() -> None:
    """Start the replicas and wait for the end."""
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if config["fail_at_start"]:
        sys.exit("scripted failure at start: the accelerator's driver is missing")
    listener = socket.create_server((config["host"], config["port"]), backlog=4096)
    children = []
    for replica in range(config["replicas"]):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            asyncio.run(replicate(config, listener, replica))
            os._exit(0)
        children.append(child)

    def end(_signal: int, _frame: object) -> None:
        for pid in children:
            os.kill(pid, signal.SIGTERM)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    listener.close()
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
