"""The server: ``python -m server CONFIG.json HOST PORT``. One process answers HTTP, and each replica is a process of its own.

A request's way: :class:`http.Connection` reads it, :class:`Server` finds its :class:`model.Model`, whose
:class:`queueing.Dispatcher` queues it and gathers a batch, which a :class:`model.ReplicaProcess` hands to its process
(``replica.py``); the answer goes back the same way. SIGTERM ends it gracefully: what it holds is finished, what comes is refused.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .http import TENSORS, TEXT, Answer, Connection
from .model import LoadError, Model
from .pipeline import Pipeline

if TYPE_CHECKING or __package__ != "server":
    from tailrace.multiplexing.residency import Pool, Residency
else:  # as a server, which has this one module of the harness on its path and nothing else
    from residency import Pool, Residency

_PERIOD_S = 0.05
"""How often replicas, scalers and overdue requests are looked at."""
_CONTROL_BODY_BYTES = 64 << 10
_NAME = r"([\w.-]{1,128})"
"""Of a model: what needs no escape, in a path or on a page."""
_DRAIN_S = 30.0
"""How long what is in hand may take when the server is told to end."""

CallOff = Callable[[], None] | None
"""What is to be called when the client goes away before its answer."""


class Server:
    """Models by name, and what can be asked of them: the Open Inference Protocol's paths, bodies of raw tensors."""

    def __init__(self, config_file: str) -> None:
        self._config_file = config_file
        self._config: dict[str, Any] = json.loads(Path(config_file).read_text(encoding="utf-8"))
        self._models: dict[str, Model | Pipeline] = {}
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._started = self._closing = False
        self._residency: Residency | None = None
        """Who is in a memory that does not hold all models; ``None`` where it does."""
        pages: list[tuple[str, str, Callable[..., CallOff]]] = [
            ("POST", rf"/v2/models/{_NAME}/infer", self._infer),
            ("GET", r"/v2/health/ready", self._ready),
            ("GET", rf"/v2/models/{_NAME}/ready", self._model_ready),
            ("GET", r"/v2/config", self._configuration),
            ("GET", r"/metrics", self._metrics),
            ("POST", rf"/v2/repository/models/{_NAME}/load", self._load),
            ("POST", rf"/v2/repository/models/{_NAME}/unload", self._unload),
            ("POST", r"/v2/replicas/(\d{1,4})", self._scale),
        ]
        self._pages = [(method, re.compile(path), page) for method, path, page in pages]

    async def run(self, host: str, port: int) -> None:
        """Serve until SIGTERM. Raises :class:`LoadError` when a model cannot be loaded at the start."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        body_bytes = max(self._config["input_bytes"], _CONTROL_BODY_BYTES)
        listener = await loop.create_server(
            lambda: Connection(self.handle, body_bytes, self._connections), host, port, backlog=4096
        )
        looking = loop.create_task(self._look())
        ending: asyncio.Future[Any] = loop.create_task(ended.wait())
        try:
            # The port is open before the models are loaded: what comes early waits for them in their queues.
            loading: asyncio.Future[Any] = asyncio.gather(*map(self._load_model, self._begin_with()))
            await asyncio.wait((loading, ending), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                await loading
                self._started = True
                bringing = asyncio.gather(*([self._residency.run()] if self._residency else []))
                await ending
                bringing.cancel()
            else:
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)
            self._closing = True
            async with asyncio.timeout(_DRAIN_S):
                await asyncio.gather(*(model.close() for model in self._models.values()))
            listener.close()
        finally:
            looking.cancel()
            for model in self._models.values():
                model.abandon()

    def _begin_with(self) -> list[str]:
        """The models to load at the start; all others, where memory does not hold them, are there without a replica."""
        memory = self._config.get("memory")
        if memory is None:
            return list(self._config["models"])
        for name in self._config["models"]:
            self._models[name] = model = Model(name, self._config_file, self._config)
            model.target = 0
        self._residency = Residency(
            Pool(memory["budget_bytes"], memory["sizes"], memory["policy"], memory["pinned"]),
            load=self._bring,
            unload=self._put_out,
            busy=lambda: [name for name, model in self._models.items() if isinstance(model, Model) and model.busy],
            waited_for=lambda name: self._single(name).busy,
            failed=lambda name, error: self._single(name).refuse_waiting(f"{name} cannot be loaded: {error}"),
            loaded=memory["at_start"],
        )
        return list(memory["at_start"])

    def _single(self, name: str) -> Model:
        model = self._models[name]
        assert isinstance(model, Model)  # noqa: S101 - of a pipeline, memory is not limited
        return model

    async def _bring(self, name: str) -> None:
        model = self._single(name)
        try:
            await model.scale(1)
        except LoadError:
            await model.unload()
            raise

    async def _put_out(self, name: str) -> None:
        model = self._single(name)
        await model.unload()
        if model.busy and self._residency is not None:
            self._residency.want(name)  # there are requests that have come too late for the copy that has gone

    def handle(self, method: str, path: str, body: bytes, answer: Answer) -> CallOff:
        """Answer a request now, or see to it that it is answered; returns how to call it off."""
        for allowed, pattern, page in self._pages:
            if found := pattern.fullmatch(path):
                if method == allowed:
                    return page(*found.groups(), body=body, answer=answer)
                answer(405, f"only {allowed}".encode(), {**TEXT, "Allow": allowed})
                return None
        answer(404, b"there is no such page", TEXT)
        return None

    def _infer(self, name: str, *, body: bytes, answer: Answer) -> CallOff:
        model = self._models.get(name)
        if model is None:
            answer(404, b"there is no such model", TEXT)
            return None
        if len(body) != self._config["input_bytes"]:
            told = f"the inputs of one item are {self._config['input_bytes']} bytes, these are {len(body)}"
            answer(400, told.encode(), TEXT)
            return None

        def answered(status: int, said: bytes, retry_after_s: float) -> None:
            if status == 200:
                answer(status, said, TENSORS)
            elif status == 503:
                answer(status, said, {**TEXT, "Retry-After": str(max(1, math.ceil(retry_after_s)))})
            else:
                answer(status, said, TEXT)

        request: Any = model.infer(body, answered)
        if self._residency is not None and request is not None:
            self._residency.ask(name)
        return None if request is None else lambda: model.withdraw(request)

    def _ready(self, *, body: bytes, answer: Answer) -> None:
        """Whether it would be answered: what was to be loaded is, and no model that has none could not be given a replica."""
        whole = all(model.ready or not model.target for model in self._models.values())
        _tell(answer, self._started and not self._closing and whole)

    def _model_ready(self, name: str, *, body: bytes, answer: Answer) -> None:
        model = self._models.get(name)
        _tell(answer, not self._closing and model is not None and bool(model.ready or not model.target))

    def _configuration(self, *, body: bytes, answer: Answer) -> None:
        """What every model runs with at this moment, in the simulator's words."""
        told = {name: model.system() for name, model in self._models.items() if model.target}
        answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _metrics(self, *, body: bytes, answer: Answer) -> None:
        lines = []
        figures = {name: part.figures() for model in self._models.values() for name, part in model.parts.items()}
        for metric in dict.fromkeys(metric for told in figures.values() for metric in told):
            lines.append(f"# TYPE {metric} {'counter' if metric.endswith('_total') else 'gauge'}")
            told = {name: of_one[metric] for name, of_one in figures.items() if metric in of_one}
            lines += [f'{metric}{{model="{name}"}} {value:.9g}' for name, value in told.items()]
        if self._residency is not None:
            lines += [f"{metric} {value:.9g}" for metric, value in self._residency.counts.items()]
            lines.append(f"memory_free_bytes {self._residency.pool.free:.9g}")
        answer(200, ("\n".join(lines) + "\n").encode(), {"Content-Type": "text/plain; version=0.0.4"})

    def _load(self, name: str, *, body: bytes, answer: Answer) -> None:
        self._do(lambda: self._load_model(name), answer)

    def _unload(self, name: str, *, body: bytes, answer: Answer) -> None:
        async def unload() -> None:
            if (model := self._models.pop(name, None)) is not None:
                await model.close()

        self._do(unload, answer)

    def _scale(self, replicas: str, *, body: bytes, answer: Answer) -> None:
        async def scale() -> None:
            await asyncio.gather(*(model.scale(int(replicas)) for model in self._models.values()))

        self._do(scale, answer)

    async def _load_model(self, name: str) -> None:
        """Load a model that is not there yet. Raises :class:`LoadError`; then it is not there."""
        if self._residency is not None:
            await self._bring(name)
            return
        if name in self._models:
            return
        model = (Pipeline if "stages" in self._config else Model)(name, self._config_file, self._config)
        if not self._started:
            self._models[name] = model  # there are requests that wait for it already
        try:
            await model.scale(model.target)
        except (LoadError, asyncio.CancelledError):
            model.abandon()
            raise
        self._models[name] = model

    def _do(self, work: Callable[[], Awaitable[None]], answer: Answer) -> None:
        """Answer when some work is done, or why it was not; one such work after the other."""
        if self._residency is not None:  # whose view of the memory nobody may go behind
            answer(409, b"which models have replicas is decided by who is asked for", TEXT)
            return

        async def done() -> None:
            try:
                async with self._changing:
                    await work()
            except LoadError as error:
                answer(500, str(error).encode(), TEXT)
            else:
                answer(200, b"", TEXT)

        task = asyncio.get_running_loop().create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            for model in list(self._models.values()):
                model.look()
            for connection in list(self._connections):
                connection.overdue()


def _tell(answer: Answer, yes: bool) -> None:
    answer(200 if yes else 503, b"", {**TEXT, **({} if yes else {"Retry-After": "1"})})


def main() -> None:
    config_file, host, port = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asyncio.run(Server(config_file).run(host, int(port)))
    except LoadError as error:
        sys.exit(f"a model cannot be loaded: {error}")
    except TimeoutError:
        sys.exit(f"what was in hand was not done {_DRAIN_S:g} s after the server was told to end")


if __name__ == "__main__":
    main()
