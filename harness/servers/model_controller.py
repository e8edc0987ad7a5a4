"""Says which of many models are in memory, for servers that do not say so themselves: an HTTP proxy before the server.

A request whose model is there is passed on. One whose model is not waits until it is: the controller has the server unload what
the policy names and load what is asked for, through its management interface, one model at a time. So nothing is asked of a model
that is being loaded or unloaded. The policy is :mod:`tailrace.multiplexing.residency`, the same for all servers.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

import aiohttp
from aiohttp import web

from tailrace.harness.contract.adapter import Deployment, Endpoint
from tailrace.harness.contract.multiplexing import MemoryPlan
from tailrace.harness.errors import TailraceError
from tailrace.multiplexing.residency import PAUSE_S, Pool, Residency

_BODY_BYTES = 64 << 20
_JOIN_S = 30.0
_UNLOAD_S = 30.0
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "host",
    "content-length",
    "date",
}
_NAME = re.compile(r"[\w.-]+")


class ModelController:
    """Stands before one deployment from :meth:`start` to :meth:`stop`; requests go to :attr:`endpoint`."""

    def __init__(self, deployment: Deployment, plan: MemoryPlan, capabilities: Collection[str]) -> None:
        """``capabilities`` are those of the deployment's adapter."""
        self._deployment = deployment
        self._capabilities = capabilities
        self._plan = plan
        self._listener = socket.socket()
        self._listener.bind((deployment.endpoint.host, 0))
        self._server = deployment.endpoint
        self.endpoint: Endpoint = replace(deployment.endpoint, port=self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="model-controller", daemon=True)
        self._in_flight: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, list[asyncio.Future[None]]] = defaultdict(list)
        self._idle: dict[str, asyncio.Event] = {}

    def start(self) -> None:
        """Returns when it takes requests. Raises :class:`TailraceError` when it cannot."""
        self._thread.start()
        if not self._up.wait(_JOIN_S):
            raise TailraceError("the controller of models did not come up", remedy="look for a traceback on stderr")

    def stop(self) -> None:
        """Take no more requests, and let the server's connections go."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(_JOIN_S)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        pool = Pool(self._plan.budget_bytes, self._plan.sizes, self._plan.policy, self._plan.pinned)
        self._residency = Residency(
            pool,
            load=self._load,
            unload=self._unload,
            busy=lambda: [model for model, count in self._in_flight.items() if count],
            waited_for=lambda model: not all(ready.done() for ready in self._waiting[model]),
            failed=self._failed,
            loaded=self._plan.at_start,
        )
        application = web.Application(client_max_size=_BODY_BYTES)
        application.router.add_route("*", "/{path:.*}", self._answer)
        front = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.0)
        await front.setup()
        await web.SockSite(front, self._listener, backlog=4096).start()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        ) as self._session:
            bringing = asyncio.create_task(self._residency.run())
            self._up.set()
            await self._ended.wait()
            bringing.cancel()
            await front.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        model = self._model_of(request.path)
        if model is None:
            return web.Response(status=404, text="there is no such model")
        body = await request.read()
        try:
            await self._admitted(model)
        except TailraceError as error:
            return web.Response(
                status=503,
                text=f"{model} cannot be loaded: {error.message}",
                headers={"Retry-After": str(round(PAUSE_S))},
            )
        try:
            url = f"http://{self._server.host}:{self._server.port}{request.path_qs}"
            async with self._session.request(request.method, url, data=body, headers=_kept(request.headers)) as answer:
                return web.Response(status=answer.status, body=await answer.read(), headers=_kept(answer.headers))
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=f"the server behind the controller: {error}")
        finally:
            self._release(model)

    def _model_of(self, path: str) -> str | None:
        """The one known model that is named in the path of a request, whatever else the framework puts there."""
        return next((part for part in _NAME.findall(path) if part in self._plan.sizes), None)

    async def _admitted(self, model: str) -> None:
        """Return when a model is in memory, and will be until :meth:`_release`. Raises :class:`TailraceError`."""
        ready = self._loop.create_future()
        self._waiting[model].append(ready)
        if self._residency.ask(model):
            self._admit(model)
        try:
            await ready
        except asyncio.CancelledError:  # the client has gone
            if ready.done() and not ready.cancelled() and ready.exception() is None:
                self._release(model)
            raise

    def _admit(self, model: str) -> None:
        for ready in self._waiting.pop(model, []):
            if not ready.done():
                self._in_flight[model] += 1
                ready.set_result(None)

    def _release(self, model: str) -> None:
        self._in_flight[model] -= 1
        if not self._in_flight[model] and model in self._idle:
            self._idle[model].set()

    async def _load(self, model: str) -> None:
        await asyncio.to_thread(self._deployment.load_model, model)
        self._admit(model)

    async def _unload(self, model: str) -> None:
        if self._in_flight[model]:
            idle = self._idle[model] = asyncio.Event()
            await idle.wait()
            del self._idle[model]
        await asyncio.to_thread(self._unload_wholly, model)

    def _unload_wholly(self, model: str) -> None:
        """A server may deny a model before the process that has it has given back its memory."""
        self._deployment.unload_model(model)
        if "replicas" in self._capabilities:
            self._deployment.wait_for(
                lambda: all(replica.model != model for replica in self._deployment.replicas()),
                f"end the replica of {model!r}",
                _UNLOAD_S,
            )

    def _failed(self, model: str, error: Exception) -> None:
        told = error if isinstance(error, TailraceError) else TailraceError(f"{type(error).__name__}: {error}")
        for ready in self._waiting.pop(model, []):
            if not ready.done():
                ready.set_exception(told)


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a message that belong to its content."""
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
