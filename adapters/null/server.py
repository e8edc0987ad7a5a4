"""The null server: right answers from memory, given the way a script says; standard library and the workload's model.

Run as ``python server.py CONFIG.json``. Each replica is a forked child that listens on the same port, so that the kernel
shares connections out among them, and is not replaced when it dies.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import importlib.util
import json
import os
import random
import selectors
import signal
import socket
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PATH = "/models/"
"""What precedes the model's name in the path of a request over HTTP."""
SERVICE = "tailrace.Null"
"""The service over gRPC: each model is a method of it."""
HEALTH_SERVICE = "grpc.health.v1.Health"
SERVING = b"\x08\x01"
"""A ``grpc.health.v1.HealthCheckResponse`` that says SERVING."""

_OK = 200
_REASONS = {_OK: "OK", 404: "Not Found", 500: "Internal Server Error", 503: "Service Unavailable"}
_GRPC_CODES = {404: "NOT_FOUND", 500: "INTERNAL", 503: "RESOURCE_EXHAUSTED"}

_CLOCK_MONOTONIC = 1
_libc = ctypes.PyDLL(None, use_errno=True)


class PreciseSelector(selectors.EpollSelector):
    """epoll rounds a wait up to whole milliseconds: here a kernel timer ends it, and asyncio's timers are punctual.

    Python offers ``os.timerfd_create`` from 3.13 on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._timer = int(_libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = (ctypes.c_long * 4)()  # struct itimerspec: interval (s, ns), then value (s, ns); 0 disarms
        self.register(self._timer, selectors.EVENT_READ)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            wait_ns = 0 if timeout is None else max(1, round(timeout * 1e9))
            self._spec[2], self._spec[3] = divmod(wait_ns, 1_000_000_000)
            _libc.timerfd_settime(self._timer, 0, ctypes.byref(self._spec), None)
            timeout = None
        return [event for event in super().select(timeout) if event[0].fd != self._timer]


def key(model: str, body: bytes) -> str:
    """What a request's answer is remembered by."""
    return hashlib.blake2b(model.encode() + b"\0" + body, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Request:
    """One request as the script has decided it. Times on ``time.monotonic_ns``."""

    body: bytes
    read_ns: int
    due_ns: int
    """When its answer is to be given."""
    status: int
    """In HTTP's numbers."""
    answer: bytes


class Script:
    """What the server does, decided request by request from a seed. ``began_ns``: when the server, with all its replicas,
    began to follow it."""

    def __init__(self, config: dict[str, Any], replica: int, began_ns: int) -> None:
        self._config = config
        self._began_ns = began_ns
        self._random = random.Random(f"{config['seed']}-{replica}")  # noqa: S311 - a script, not a secret
        self._taken = 0
        self._answers = {known: Path(path).read_bytes() for known, path in config["answers"].items()}
        self._models: dict[str, Any] = {}
        if not self._answers:
            self._load_models()
        self._log = None
        if config["log"]:
            # Unbuffered, so that nothing is lost with a server that is killed; a line costs two microseconds.
            self._log = (Path(config["log_folder"]) / f"requests-{replica}.csv").open("wb", buffering=0)
            self._log.write(b"body_crc32,read_ns,due_ns,written_ns,status\n")

    def _load_models(self) -> None:
        config = self._config
        specification = importlib.util.spec_from_file_location("workload_model", config["model_file"])
        if specification is None or specification.loader is None:
            sys.exit(f"{config['model_file']} cannot be imported")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        for name in config["models"]:
            self._models[name] = module.Model(config["artifact"], name, config["device"])

    def due_ns(self, read_ns: int) -> int:
        """When the answer to a request that was read at ``read_ns`` is to be given: after the latency and what is drawn
        on top of it, but not before the end of a stall."""
        config = self._config
        delay_ms: float = config["latency_ms"]
        if config["jitter_ms"] > 0:
            delay_ms += self._random.expovariate(1 / config["jitter_ms"])
        if config["pareto_ms"] > 0:
            delay_ms += config["pareto_ms"] * self._random.paretovariate(config["pareto_alpha"])
        if self._taken < config["cold_requests"]:
            delay_ms += config["cold_ms"]
        due_ns = read_ns + round(delay_ms * 1e6)
        if config["stall_every_s"] > 0:
            into_period_ns = (due_ns - self._began_ns) % round(config["stall_every_s"] * 1e9)
            due_ns += max(0, round(config["stall_ms"] * 1e6) - into_period_ns)
        return due_ns

    async def obey(self, model: str, body: bytes) -> Request:
        """Decide on a request that has just been read, and return when its answer is due."""
        read_ns = time.monotonic_ns()
        await self.silence("wedge_after_s")
        due_ns = self.due_ns(read_ns)
        request = Request(body, read_ns, due_ns, *self._answer(model, body))
        self._taken += 1
        wait_ns = due_ns - time.monotonic_ns()
        if wait_ns > 0:
            await asyncio.sleep(wait_ns / 1e9)
        return request

    def answered(self, request: Request, written_ns: int) -> None:
        """Log a request, the writing of whose answer began at ``written_ns``."""
        if self._log is not None:
            line = f"{zlib.crc32(request.body)},{request.read_ns},{request.due_ns},{written_ns},{request.status}\n"
            self._log.write(line.encode())

    async def silence(self, option: str) -> None:
        """Never return once the script says that such questions get no answer any more."""
        after_s: float = self._config[option]
        if 0 < after_s < (time.monotonic_ns() - self._began_ns) / 1e9:
            await asyncio.Event().wait()

    def _answer(self, model: str, body: bytes) -> tuple[int, bytes]:
        draw = self._random.random() if self._taken >= self._config["honest_requests"] else 1.0
        for share, status in ((self._config["shed_share"], 503), (self._config["error_share"], 500)):
            if draw < share:
                return status, f"scripted {status}".encode()
            draw -= share
        result = self._compute(model, body)
        if result is None:
            return 404, b"no such model"
        if draw < self._config["wrong_share"]:
            result = bytes([result[0] ^ 1]) + result[1:]
        return _OK, result

    def _compute(self, name: str, body: bytes) -> bytes | None:
        """The model's answer, where the harness has told none: computed once for every payload and then remembered."""
        known = key(name, body)
        if known not in self._answers:
            model = self._models.get(name)
            if model is None:
                return None
            inputs, offset = {}, 0
            for tensor, dtype, shape in self._config["inputs"]:
                count = int(np.prod(shape))
                inputs[tensor] = np.frombuffer(body, dtype, count, offset).reshape(1, *shape)
                offset += inputs[tensor].nbytes
            outputs = model.predict(inputs)
            self._answers[known] = b"".join(
                np.ascontiguousarray(outputs[tensor][0], dtype=dtype).tobytes()
                for tensor, dtype, _ in self._config["outputs"]
            )
        return self._answers[known]


def respond(status: int, body: bytes) -> bytes:
    """An HTTP/1.1 answer that keeps the connection."""
    return f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Length: {len(body)}\r\n\r\n".encode("ascii") + body


async def converse(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection over HTTP until the client closes it."""
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
            if path == "/ready":
                await script.silence("mute_after_s")
                writer.write(respond(_OK, b""))
            else:
                request = await script.obey(path.removeprefix(PATH), body)
                answer = respond(request.status, request.answer)
                written_ns = time.monotonic_ns()
                writer.write(answer)
                script.answered(request, written_ns)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def serve_http(script: Script, config: dict[str, Any]) -> None:
    """Serve the port over HTTP for ever, beside the other replicas."""
    server = await asyncio.start_server(
        lambda r, w: converse(script, r, w), config["host"], config["port"], reuse_port=True, backlog=4096
    )
    await server.serve_forever()


async def serve_grpc(script: Script, config: dict[str, Any]) -> None:
    """Serve the port over gRPC for ever, beside the other replicas."""
    import grpc

    def method(model: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def infer(message: bytes, context: Any) -> bytes:
            request = await script.obey(model, message)
            script.answered(request, time.monotonic_ns())
            if request.status == _OK:
                return request.answer
            await context.abort(grpc.StatusCode[_GRPC_CODES[request.status]], request.answer.decode())
            raise AssertionError  # abort has raised

        return infer

    async def check(message: bytes, context: Any) -> bytes:
        await script.silence("mute_after_s")
        return SERVING

    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1), *unlimited])
    for service, methods in (
        (SERVICE, {model: method(model) for model in config["models"]}),
        (HEALTH_SERVICE, {"Check": check}),
    ):
        # Without serialisers a message is its bytes.
        handlers = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"{config['host']}:{config['port']}")
    await server.start()
    await server.wait_for_termination()


async def replicate(config: dict[str, Any], replica: int, began_ns: int) -> None:
    """The body of one replica."""
    script = Script(config, replica, began_ns)
    if config["die_after_s"] > 0:
        loop, left_s = asyncio.get_running_loop(), config["die_after_s"] - (time.monotonic_ns() - began_ns) / 1e9
        loop.call_later(left_s, os.kill, os.getppid(), signal.SIGKILL)
        loop.call_later(left_s + 0.01, os._exit, 1)
    await (serve_http if config["protocol"] == "http" else serve_grpc)(script, config)


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that nobody connects to, and that leaves the port to this server's replicas alone: one that is bound before
    it learns to share its port refuses to be bound beside others."""
    holder = socket.socket()
    # Or the connections of a server before it would be in the way.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, port))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def main() -> None:
    """Start the replicas and wait for the end."""
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if config["fail_at_start"]:
        sys.exit("scripted failure at start: the accelerator's driver is missing")
    holder = hold_port(config["host"], config["port"])
    began_ns = time.monotonic_ns()
    children = []
    for replica in range(config["replicas"]):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            holder.close()
            with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PreciseSelector())) as runner:
                runner.run(replicate(config, replica, began_ns))
            os._exit(0)
        children.append(child)

    def end(_signal: int, _frame: object) -> None:
        for pid in children:
            os.kill(pid, signal.SIGTERM)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            signal.pause()
            continue
        children.remove(pid)
        if os.WIFEXITED(status):  # it could not load its model; one that was killed is gone, and the others go on
            for other in children:
                os.kill(other, signal.SIGTERM)
            sys.exit("a replica could not start")


if __name__ == "__main__":
    main()
