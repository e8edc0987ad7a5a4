"""The server: one request at a time to one copy of each model, raw tensors in and out; imports nothing of tailrace.

Run as ``python server.py CONFIG.json HOST PORT``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
MODELS: dict[str, Any] = {}
ONE_AT_A_TIME = threading.Lock()


def load_models() -> None:
    spec = importlib.util.spec_from_file_location("workload_model", CONFIG["model_file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in CONFIG["models"]:
        MODELS[f"/models/{name}"] = module.Model(CONFIG["artifact"], name, CONFIG["device"])


def predict(model: Any, body: bytes) -> bytes:
    inputs, offset = {}, 0
    for tensor in CONFIG["inputs"]:
        count = math.prod(tensor["shape"])
        inputs[tensor["name"]] = np.frombuffer(body, tensor["dtype"], count, offset).reshape(1, *tensor["shape"])
        offset += inputs[tensor["name"]].nbytes
    with ONE_AT_A_TIME:
        outputs = model.predict(inputs)
    return b"".join(np.ascontiguousarray(outputs[t["name"]][0], dtype=t["dtype"]).tobytes() for t in CONFIG["outputs"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/ready" else 404, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path not in MODELS:
            self._answer(404, b"no such model")
            return
        try:
            self._answer(200, predict(MODELS[self.path], body))
        except Exception as error:
            self._answer(500, f"{type(error).__name__}: {error}".encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Every request on the console would cost more than its answer."""


if __name__ == "__main__":
    load_models()
    ThreadingHTTPServer((sys.argv[2], int(sys.argv[3])), Handler).serve_forever()
