"""The controller before a server without a policy of its own: what passes, what waits, and what is told."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from tailrace.harness.contract.adapter import Deployment, Endpoint
from tailrace.harness.contract.multiplexing import MemoryPlan
from tailrace.harness.errors import ServerError
from tailrace.harness.servers.model_controller import ModelController

PLAN = MemoryPlan(2, {"a": 1, "b": 1, "c": 1}, "lru", (), ("a", "b"))
PATIENCE_S = 30.0


class Upstream:
    """A server that answers for the models that it has, and counts what it should never see."""

    def __init__(self) -> None:
        self.loaded = {"a", "b"}
        self.log: list[str] = []
        self.broken: set[str] = set()
        self.unknown = 0
        self.counting = threading.Lock()
        self.slow_s = 0.0
        self.under_way: Counter[str] = Counter()
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                model = self.path.split("/")[3]
                upstream.count(model, 1)
                time.sleep(upstream.slow_s)
                upstream.count(model, -1)
                known = model in upstream.loaded
                upstream.unknown += not known
                said = f"{model}:{body.decode()}:{self.headers.get('Accept-Encoding')}".encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Length", str(len(said)))
                self.send_header("X-Told", self.headers.get("X-Asked", ""))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = Endpoint("http", "127.0.0.1", self.server.server_address[1], cast(Any, None))

    def count(self, model: str, change: int) -> None:
        with self.counting:
            self.under_way[model] += change

    def load_model(self, model: str) -> None:
        self.log.append(f"load {model}")
        if model in self.broken:
            raise ServerError(f"{model} is broken")
        assert len(self.loaded) < 2, "there is no room for it"
        self.loaded.add(model)

    def unload_model(self, model: str) -> None:
        self.log.append(f"unload {model}")
        assert not self.under_way[model], "somebody is being answered"
        self.loaded.discard(model)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    thread = threading.Thread(target=upstream.server.serve_forever, daemon=True)
    thread.start()
    yield upstream
    upstream.server.shutdown()
    upstream.server.server_close()
    thread.join()


@pytest.fixture
def controller(upstream: Upstream) -> Iterator[ModelController]:
    controller = ModelController(cast(Deployment, upstream), PLAN, ["load_model", "unload_model"])
    controller.start()
    yield controller
    controller.stop()


def ask(controller: ModelController, model: str, timeout_s: float = PATIENCE_S) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", controller.endpoint.port, timeout=timeout_s)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", b"x", {"X-Asked": "yes"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def test_what_is_there_is_passed_on_as_it_came(controller: ModelController, upstream: Upstream) -> None:
    status, text, headers = ask(controller, "a")
    assert (status, text, headers["X-Told"]) == (200, "a:x:identity", "yes")
    assert not upstream.log


def test_what_is_not_there_is_fetched_for_the_one_that_was_asked_for_longest_ago(
    controller: ModelController, upstream: Upstream
) -> None:
    ask(controller, "a")
    assert ask(controller, "c")[:2] == (200, "c:x:identity")
    assert upstream.log == ["unload b", "load c"]
    assert upstream.loaded == {"a", "c"}


def test_all_at_once_get_their_answers_and_nothing_is_asked_of_a_model_that_is_away(
    controller: ModelController, upstream: Upstream
) -> None:
    upstream.slow_s = 0.005
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda i: ask(controller, "abc"[i % 3]), range(90)))
    assert {status for status, _, _ in answers} == {200}
    assert [text[0] for _, text, _ in answers] == ["abc"[i % 3] for i in range(90)]
    assert upstream.unknown == 0
    assert len(upstream.log) >= 4, "three models have taken turns in the room of two"


def test_a_model_that_cannot_be_loaded_is_told_with_its_own_words(
    controller: ModelController, upstream: Upstream
) -> None:
    upstream.broken.add("c")
    status, text, headers = ask(controller, "c")
    assert (status, text) == (503, "c cannot be loaded: c is broken")
    assert headers["Retry-After"] == "1"
    assert ask(controller, "a")[0] == 200
    assert ask(controller, "b")[0] == 200
    assert upstream.log.count("load c") == 2, "one more try, and then others"


def test_an_unknown_model_is_not_found(controller: ModelController) -> None:
    assert ask(controller, "d")[0] == 404


def test_a_server_that_has_gone_is_told_as_a_bad_gateway(controller: ModelController, upstream: Upstream) -> None:
    upstream.server.shutdown()
    upstream.server.server_close()
    status, text, _ = ask(controller, "a")
    assert status == 502
    assert "the server behind the controller" in text


def test_whoever_gives_up_is_forgotten(controller: ModelController, upstream: Upstream) -> None:
    upstream.slow_s = 0.5
    with pytest.raises(TimeoutError):
        ask(controller, "b", timeout_s=0.05)
    upstream.slow_s = 0.0
    deadline = time.monotonic() + PATIENCE_S
    while upstream.under_way.total():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for model in "acbacb":
        assert ask(controller, model)[0] == 200, "a model whose client has left can be unloaded"


def test_once_stopped_it_is_gone(upstream: Upstream) -> None:
    controller = ModelController(cast(Deployment, upstream), PLAN, [])
    controller.start()
    assert ask(controller, "a")[0] == 200
    controller.stop()
    with pytest.raises(OSError):
        ask(controller, "a")
