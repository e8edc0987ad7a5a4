"""The server's main process: a Ray head on this machine, Ray Serve in it, one application per model, until SIGTERM.
Models that share a memory are one application.

It runs in the environment's interpreter and imports nothing of the harness. ``serve.json`` is a configuration in Ray
Serve's own schema (``ray.serve.schema.ServeDeploySchema``), ``ray.json`` holds the arguments of ``ray.init``. A control
socket opens once Serve says that all applications run; a line of JSON on it (``{"do": …}``) is answered with another.
Where ``ray.json`` speaks of several ``nodes``, the head holds no replicas: it tells its address in a file, and waits for
as many worker nodes (``node.py``) to join it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.responses import Response  # type: ignore[import-not-found]  # comes with ray[serve]

if TYPE_CHECKING:
    from tailrace.adapters.ray_serve import applications
else:
    import applications  # the file beside this one

_POLL_S = 0.05
_Item = dict[str, NDArray[Any]]


class _Replica(ABC):
    """One replica of a model or of a stage.

    ``predict`` runs on the event loop of the user's code, as in the documentation of ``@serve.batch``. Ray runs that
    loop in a thread of its own, so health checks and timeouts go on while the model is busy; and the model is
    exclusive. It is also what fills batches: requests that arrive during one batch form the next. Handing ``predict``
    to another thread halves the throughput, for then the loop goes on closing small batches that queue up behind the
    running one.
    """

    _batches = False

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray Serve's hook for ``user_config``, which exists when batching was asked for."""
        self._batches = True
        self._predict_batch.set_max_batch_size(user_config["max_batch_size"])
        if (window_s := user_config.get("batch_wait_timeout_s")) is not None:
            self._predict_batch.set_batch_wait_timeout_s(window_s)

    async def _answer(self, item: _Item) -> Any:
        return await self._predict_batch(item) if self._batches else self._predict([item])[0]

    @serve.batch  # type: ignore[untyped-decorator]
    async def _predict_batch(self, items: list[_Item]) -> list[Any]:
        return self._predict(items)

    @abstractmethod
    def _predict(self, items: list[_Item]) -> list[Any]:
        """The answers to a batch, one for each item, in order."""

    def batching(self) -> dict[str, Any]:
        """What this replica's batch queue is set to; nothing when it does not batch."""
        if not self._batches:
            return {}
        return {
            "max_batch_size": self._predict_batch._get_max_batch_size(),
            "batch_wait_timeout_s": self._predict_batch._get_batch_wait_timeout_s(),
        }


class Model(_Replica):
    """The workload's model behind HTTP, raw tensors in, raw tensors out."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._model = _module(arguments).Model(arguments["artifact"], arguments["name"], arguments["device"])
        self._wire = _Wire(arguments)

    async def __call__(self, request: Any) -> Response:
        return await self._wire.answer(request, self._answer)

    def _predict(self, items: list[_Item]) -> list[bytes]:
        return self._wire.encode(self._model.predict(_stacked(items, self._wire.inputs)), len(items))


class NotLoadedError(Exception):
    """A model that was asked for could not be loaded."""


class Resident:
    """A model in memory. Ray calls ``__del__`` in a thread when it evicts one, and loads the next after it has returned."""

    def __init__(self, arguments: dict[str, Any], name: str) -> None:
        self.model = _module(arguments).Model(arguments["artifact"], name, arguments["device"])
        self.asked = 0
        """Requests that have got hold of this model and are not answered yet."""

    def __del__(self) -> None:
        """Give back the memory, after the requests under way: to Ray they are none of its business, they would keep the model
        in memory beside the one that comes in its place."""
        while getattr(self, "asked", 0):
            time.sleep(_POLL_S / 10)
        self.model = None


class Multiplexed(ABC):
    """Many models behind one deployment, in a memory that does not hold them all.

    Loading goes on in a thread, so that models in memory are served meanwhile. Each model has a batch queue of its own: of one
    for all, Ray would cut batches at ``max_batch_size`` first and split them by model then.
    """

    _batching: dict[str, Any] | None = None

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._wire = _Wire(arguments)
        self._queues: dict[str, Any] = {}

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray Serve's hook for ``user_config``, which exists when batching was asked for."""
        self._batching = user_config

    async def __call__(self, request: Any) -> Response:
        try:
            return await self._wire.answer(request, self._answer)
        except NotLoadedError as error:
            return Response(str(error), 503, {"Retry-After": "1"})

    @abstractmethod
    async def resident(self, name: str) -> Resident:
        """The model, after it has been loaded if need be."""

    async def load(self, name: str) -> Resident:
        """Load a model. Raises what the model raises."""
        return await asyncio.to_thread(Resident, self._arguments, name)

    async def _answer(self, item: _Item) -> bytes:
        name = serve.get_multiplexed_model_id()
        try:
            resident = await self.resident(name)
        except Exception as error:  # whatever the model says: Ray would answer 500, as to a fault of this code
            raise NotLoadedError(f"{name} cannot be loaded: {error}") from error
        resident.asked += 1  # nothing has been awaited since Ray gave it out
        try:
            if self._batching is None:
                return self._predict(resident, [item])[0]
            if name not in self._queues:
                self._queues[name] = self._queue(name, self._batching)
            answer: bytes = await self._queues[name]((resident, item))
            return answer
        finally:
            resident.asked -= 1

    def _queue(self, name: str, settings: dict[str, Any]) -> Any:
        async def predict(asked: list[tuple[Resident, _Item]]) -> list[bytes]:
            # One model for all: it is gone only after it has answered all, and comes again only after that.
            return self._predict(asked[0][0], [item for _, item in asked])

        predict.__name__ = name  # by which Ray's metrics tell queues apart
        return serve.batch(**settings)(predict)

    def _predict(self, resident: Resident, items: list[_Item]) -> list[bytes]:
        return self._wire.encode(resident.model.predict(_stacked(items, self._wire.inputs)), len(items))

    def batching(self) -> dict[str, Any]:
        """What the batch queue of each model is set to; nothing when it does not batch."""
        return self._batching or {}


def _multiplexed(most: int) -> type[Multiplexed]:
    """The deployment's class: Ray wants to know how many models a replica may hold where the class is made."""

    class Model(Multiplexed):
        @serve.multiplexed(max_num_models_per_replica=most)  # type: ignore[untyped-decorator]
        async def resident(self, name: str) -> Resident:
            return await self.load(name)

    return Model


class Stage(_Replica):
    """One stage of a pipeline, called by another deployment with the tensors of an item."""

    def __init__(self, arguments: dict[str, Any], stage: str) -> None:
        loaded = arguments["artifact"], arguments["name"], arguments["device"]
        self._stage = _module(arguments).Stage(*loaded, stage)

    async def __call__(self, item: _Item) -> _Item:
        return dict(await self._answer(item))

    def _predict(self, items: list[_Item]) -> list[_Item]:
        answers = self._stage.predict(_stacked(items, self._stage.inputs))
        return [{name: array[index] for name, array in answers.items()} for index in range(len(items))]


class Pipeline:
    """What calls the stages of a pipeline, one after the other, for every request; each is a deployment of its own."""

    def __init__(self, arguments: dict[str, Any], *handles: Any) -> None:
        clock = _module(arguments).Clock
        self._stages = [
            (stage, handle, clock(stage["name"], "answered"))
            for stage, handle in zip(arguments["stages"], handles, strict=True)
        ]
        self._wire = _Wire(arguments)

    async def __call__(self, request: Any) -> Response:
        try:
            return await self._wire.answer(request, self._answer)
        except BackPressureError as error:
            return Response(str(error), 503)  # of a stage; Serve answers so itself when it comes from the ingress

    async def _answer(self, item: _Item) -> bytes:
        tensors = dict(item)
        for stage, handle, clock in self._stages:
            if stage["when"] and not tensors[stage["when"]].any():
                continue
            asked_ns = time.monotonic_ns()
            tensors |= await handle.remote({name: tensors[name] for name in stage["inputs"]})
            clock.count(time.monotonic_ns() - asked_ns, 1)
        return self._wire.encode({name: tensors[name][np.newaxis] for name in self._wire.outputs}, 1)[0]

    async def batching(self) -> Any:
        """What the batch queue of the first stage on the device is set to."""
        handles = [handle for stage, handle, _ in self._stages if stage["on_device"]]
        return await handles[0].batching.remote() if handles else {}


class _Wire:
    """The bytes of requests and answers: raw tensors in the declared order."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._inputs = [(tensor["name"], np.dtype(tensor["dtype"]), tensor["shape"]) for tensor in arguments["inputs"]]
        self._outputs = [(tensor["name"], np.dtype(tensor["dtype"])) for tensor in arguments["outputs"]]
        self._input_bytes = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self._inputs)
        self.inputs = [name for name, _, _ in self._inputs]
        self.outputs = [name for name, _ in self._outputs]

    async def answer(self, request: Any, predict: Callable[[_Item], Awaitable[bytes]]) -> Response:
        """The HTTP answer to a request, by what gives the bytes of one item's outputs."""
        body = await request.body()
        if len(body) != self._input_bytes:
            return Response(f"the body has {len(body)} bytes, the declared inputs have {self._input_bytes}", 400)
        # Returned as plain bytes it would be sent in chunks.
        return Response(await predict(self._decode(body)), media_type="application/octet-stream")

    def encode(self, answers: _Item, count: int) -> list[bytes]:
        """The bytes of each item of a batch."""
        outputs = [np.ascontiguousarray(answers[name], dtype=dtype) for name, dtype in self._outputs]
        return [b"".join(output[index].tobytes() for output in outputs) for index in range(count)]

    def _decode(self, body: bytes) -> _Item:
        tensors: _Item = {}
        offset = 0
        for name, dtype, shape in self._inputs:
            count = math.prod(shape)
            tensors[name] = np.frombuffer(body, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
        return tensors


def _module(arguments: dict[str, Any]) -> Any:
    """The model's file as a module."""
    spec = importlib.util.spec_from_file_location("tailrace_model", arguments["model_file"])
    if spec is None or spec.loader is None:
        raise ImportError(f"{arguments['model_file']} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _stacked(items: list[_Item], names: list[str]) -> _Item:
    """The tensors of a batch."""
    return {name: np.stack([item[name] for item in items]) for name in names}


_model: Any = serve.deployment(name=applications.DEPLOYMENT)(Model)
_pipeline: Any = serve.deployment(name=applications.DEPLOYMENT)(Pipeline)
_stage: Any = serve.deployment(Stage)


def application(args: dict[str, Any], options: applications.Options = lambda name: {}) -> serve.Application:
    """Ray Serve's «application builder»: what the ``import_path`` of the rendered configuration names. ``options`` are those of
    each deployment by its name."""
    if "models_per_replica" in args:
        many: Any = serve.deployment(name=applications.DEPLOYMENT)(_multiplexed(args["models_per_replica"]))
        return many.options(**options(applications.DEPLOYMENT)).bind(args)
    if "stages" not in args:
        return _model.options(**options(applications.DEPLOYMENT)).bind(args)
    names = [stage["name"] for stage in args["stages"]]
    stages = [_stage.options(name=name, **options(name)).bind(args, name) for name in names]
    return _pipeline.options(**options(applications.DEPLOYMENT)).bind(args, *stages)


def _tell_address(path: Path) -> None:
    staged = path.with_suffix(".tmp")
    staged.write_text(ray.get_runtime_context().gcs_address, encoding="ascii")
    staged.replace(path)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="folder of serve.json and ray.json")
    parser.add_argument("--temp-dir", required=True, help="where Ray keeps its session")
    parser.add_argument("--head", type=Path, required=True, help="file to write the head's address to")
    parser.add_argument("--control", required=True, help="path of the control socket")
    parser.add_argument("--port", type=int, required=True, help="HTTP port of Serve's proxy")
    parser.add_argument("--metrics-port", type=int, required=True, help="port of Ray's Prometheus metrics")
    arguments = parser.parse_args()
    config = json.loads((arguments.config / "serve.json").read_text(encoding="utf-8"))
    ray_config = json.loads((arguments.config / "ray.json").read_text(encoding="utf-8"))
    nodes = ray_config.get("nodes", 1)
    status = 0
    try:
        ray.init(
            address="local",
            _temp_dir=arguments.temp_dir,
            _metrics_export_port=arguments.metrics_port,
            **ray_config["init"],
        )
        serve.start(
            proxy_location=config.get("proxy_location"),
            http_options={**config["http_options"], "port": arguments.port},
            logging_config=config["logging_config"],
        )
        if nodes > 1:
            # Not before Serve's proxy is up: Serve kills and restarts one that is not within seconds, as it would not be
            # beside nodes that start.
            _tell_address(arguments.head)
            while applications.joined() < nodes:
                time.sleep(_POLL_S)
        running = applications.Applications(config, nodes, application)
        running.run_all()
        with applications.control_socket(arguments.control, running) as control:
            threading.Thread(target=control.serve_forever, daemon=True).start()
            print("all applications run", flush=True)  # noqa: T201 - stdout is the server's log
            threading.Event().wait()  # until Ray's own handler of SIGTERM raises SystemExit
    except Exception:
        print(applications.without_colour(traceback.format_exc()), flush=True)  # noqa: T201 - stdout is the server's log
        status = 1
    except SystemExit:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not serve.shutdown(): it waits for replicas to drain, half a minute behind HAProxy.
    ray.shutdown()
    sys.exit(status)


if __name__ == "__main__":
    main()
