"""One replica: a process with one copy of a model, which computes a batch after the other until its socket closes.

``python -m server.replica MODEL CONFIG DESCRIPTOR``, or ``MODEL/STAGE`` of a pipeline; bytes in, bytes out, in the layout that
the configuration declares.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .frames import BEAT, FAILED, HEADER, OUTPUTS, READY, frame, part_of

PROCESS_NAME = "serving-replica"
"""What a replica that has loaded its model is called in the process table."""
BEATS_PER_TIMEOUT = 6
Tensors = dict[str, NDArray[np.generic]]


class Layout:
    """Named tensors as bytes: those of one item one after the other, items one after the other."""

    def __init__(self, tensors: list[tuple[str, str, list[int]]]) -> None:
        self._tensors = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in tensors]
        self.item_bytes = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self._tensors)

    def read(self, body: bytes) -> Tensors:
        """The batch, with the items as axis 0."""
        items = np.frombuffer(body, np.uint8).reshape(-1, self.item_bytes)
        tensors, offset = {}, 0
        for name, dtype, shape in self._tensors:
            width = dtype.itemsize * math.prod(shape)
            part = np.ascontiguousarray(items[:, offset : offset + width])
            tensors[name] = part.reshape(-1).view(dtype).reshape(len(items), *shape)
            offset += width
        return tensors

    def write(self, tensors: Tensors, count: int) -> bytes:
        """The bytes of a batch. Raises ``ValueError`` or ``KeyError`` for what is not declared so."""
        parts = []
        for name, dtype, shape in self._tensors:
            array = np.ascontiguousarray(tensors[name], dtype)
            if array.shape != (count, *shape):
                raise ValueError(f"output {name} has the shape {list(array.shape)} and not {[count, *shape]}")
            parts.append(array.reshape(-1).view(np.uint8).reshape(count, -1))
        return np.concatenate(parts, axis=1).tobytes()


def load_model(config: dict[str, Any], name: str) -> Any:
    """The workload's ``Model``, or one stage of it; whatever it raises is raised."""
    spec = importlib.util.spec_from_file_location("workload_model", config["model_file"])
    if spec is None or spec.loader is None:
        raise ImportError(f"{config['model_file']} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, _, stage = name.partition("/")
    loaded = config["artifact"], model, config["device"]
    return module.Stage(*loaded, stage) if stage else module.Model(*loaded)


def serve(connection: socket.socket, config: dict[str, Any], name: str) -> None:
    """Load, say so, and answer batch after batch."""
    sending = threading.Lock()

    def send(kind: int, body: bytes = b"") -> None:
        with sending:
            connection.sendall(frame(kind, body))

    try:
        model = load_model(config, name)
    except Exception:
        send(FAILED, traceback.format_exc().encode())
        raise
    Path("/proc/self/comm").write_text(PROCESS_NAME, encoding="ascii")
    send(READY)

    def beat() -> None:
        with contextlib.suppress(OSError):  # the server has gone
            while not ended.wait(config["health_timeout_s"] / BEATS_PER_TIMEOUT):
                send(BEAT)

    ended = threading.Event()
    # A thread of its own: a batch may take long, and is no illness. A process that is stopped, or a model that never lets go of
    # the interpreter, beats no more.
    threading.Thread(target=beat, daemon=True).start()
    inputs, outputs = Layout(config["inputs"]), Layout(config["outputs"])
    incoming = connection.makefile("rb")
    while header := incoming.read(HEADER.size):
        _, length = HEADER.unpack(header)
        try:
            batch = inputs.read(incoming.read(length))
            answers = outputs.write(model.predict(batch), length // inputs.item_bytes)
        except Exception as error:
            traceback.print_exc()
            send(FAILED, f"{type(error).__name__}: {error}".encode())
        else:
            send(OUTPUTS, answers)
    ended.set()


def main() -> None:
    # The server ends its replicas by closing their sockets, when they have nothing in hand; Ctrl-C reaches them, too.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name, config, descriptor = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as connection:
        serve(connection, part_of(json.loads(Path(config).read_text(encoding="utf-8")), name), name)


if __name__ == "__main__":
    main()
