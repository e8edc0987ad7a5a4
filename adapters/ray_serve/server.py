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
import re
import signal
import socketserver
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError
from starlette.responses import Response  # type: ignore[import-not-found]  # comes with ray[serve]

_DEPLOYMENT = "Model"
_REPLICA_ANSWER_S = 10.0
_POLL_S = 0.05
_Item = dict[str, NDArray[Any]]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


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
        name = serve.get_multiplexed_model_id()
        try:
            resident = await self.resident(name)
        except (
            Exception
        ) as error:  # whatever the model says; without this the client would be told of a fault in the server
            return Response(f"{name} cannot be loaded: {error}", 503, {"Retry-After": "1"})
        resident.asked += 1  # nothing has been awaited since Ray gave it out
        try:
            return await self._wire.answer(request, lambda item: self._answer(name, resident, item))
        finally:
            resident.asked -= 1

    @abstractmethod
    async def resident(self, name: str) -> Resident:
        """The model, after it has been loaded if need be."""

    async def load(self, name: str) -> Resident:
        """Load a model. Raises what the model raises."""
        return await asyncio.to_thread(Resident, self._arguments, name)

    async def _answer(self, name: str, resident: Resident, item: _Item) -> bytes:
        if self._batching is None:
            return self._predict(resident, [item])[0]
        if name not in self._queues:
            self._queues[name] = self._queue(name, self._batching)
        answer: bytes = await self._queues[name]((resident, item))
        return answer

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


_model: Any = serve.deployment(name=_DEPLOYMENT)(Model)
_pipeline: Any = serve.deployment(name=_DEPLOYMENT)(Pipeline)
_stage: Any = serve.deployment(Stage)


def application(args: dict[str, Any], options: Callable[[str], dict[str, Any]] = lambda name: {}) -> serve.Application:
    """Ray Serve's «application builder»: what the ``import_path`` of the rendered configuration names. ``options`` are those of
    each deployment by its name."""
    if "models_per_replica" in args:
        many: Any = serve.deployment(name=_DEPLOYMENT)(_multiplexed(args["models_per_replica"]))
        return many.options(**options(_DEPLOYMENT)).bind(args)
    if "stages" not in args:
        return _model.options(**options(_DEPLOYMENT)).bind(args)
    names = [stage["name"] for stage in args["stages"]]
    stages = [_stage.options(name=name, **options(name)).bind(args, name) for name in names]
    return _pipeline.options(**options(_DEPLOYMENT)).bind(args, *stages)


def _on_device(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The deployments of an application whose replicas compute on its device."""
    if "stages" not in one["args"]:
        return list(one["deployments"])
    names = {stage["name"] for stage in one["args"]["stages"] if stage["on_device"]}
    return [deployment for deployment in one["deployments"] if deployment["name"] in names]


class _Server:
    """What the control socket can ask for."""

    def __init__(self, config: dict[str, Any], nodes: int) -> None:
        self._nodes = nodes
        self._applications = config["applications"]
        self._logging = config["logging_config"]

    def run_all(self) -> None:
        """Deploy every application; returns when Serve says that all run. Raises ``RuntimeError`` when one cannot."""
        _run(
            [
                serve.RunTarget(self._target(one), name=one["name"], route_prefix=one["route_prefix"])
                for one in self._applications
            ]
        )

    def load(self, request: dict[str, Any]) -> None:
        one = request["application"]
        try:
            _run([serve.RunTarget(self._target(one), name=one["name"], route_prefix=one["route_prefix"])])
        except RuntimeError:
            serve.delete(one["name"], _blocking=False)  # or Serve would go on trying
            raise
        self._applications = [*(other for other in self._applications if other["name"] != one["name"]), one]

    def scale(self, request: dict[str, Any]) -> None:
        """Deploy all that runs with another number of replicas, and no autoscaler to change it."""
        deployments = [deployment for one in self._applications for deployment in one["deployments"]]
        if self._nodes > 1:
            self._limit_per_node(deployments, request["replicas"])
        for deployment in deployments:
            deployment.pop("autoscaling_config", None)
            deployment["num_replicas"] = request["replicas"] * self._nodes
        self.run_all()

    def _limit_per_node(self, deployments: list[dict[str, Any]], most: int) -> None:
        """Set how many replicas a node may hold, for which Serve replaces all replicas, one after the other."""
        raised = any(most > deployment["max_replicas_per_node"] for deployment in deployments)
        for deployment in deployments:
            deployment["max_replicas_per_node"] = most
        if raised:
            # Before there are more: those find no room beside replicas that fill a node by the old limit, and Serve
            # replaces none of these while others are missing.
            self.run_all()

    def unload(self, request: dict[str, Any]) -> None:
        self._applications = [one for one in self._applications if one["name"] != request["model"]]
        serve.delete(request["model"], _blocking=False)  # blocking waits for the connections to drain, 30 s and more

    def whole(self, request: dict[str, Any]) -> list[int] | None:
        """The pids of all replicas, if by what Ray knows no node is missing, and by what Serve knows no replica."""
        if _joined() != self._nodes:
            return None
        details = _get_global_client().get_serve_details()["applications"]
        deployments = [
            details[one["name"]]["deployments"][deployment["name"]]
            for one in self._applications
            for deployment in one["deployments"]
        ]
        if any(deployment["status"] != "HEALTHY" for deployment in deployments):
            return None
        return [
            replica["pid"]
            for deployment in deployments
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        ]

    def report(self, request: dict[str, Any]) -> dict[str, Any]:
        """What Serve's controller and the replicas say of themselves."""
        details = _get_global_client().get_serve_details()
        applications = {}
        tuned = {one["name"]: [deployment["name"] for deployment in _on_device(one)] for one in self._applications}
        for name, one in details["applications"].items():
            deployment = one["deployments"][next(iter(tuned.get(name, [])), _DEPLOYMENT)]
            applications[name] = {
                "deployment_config": deployment["deployment_config"],
                "running": sum(replica["state"] == "RUNNING" for replica in deployment["replicas"]),
                "batching": serve.get_app_handle(name).batching.remote().result(timeout_s=_REPLICA_ANSWER_S),
            }
        return {"http_options": details["http_options"], "applications": applications}

    def _target(self, one: dict[str, Any]) -> serve.Application:
        deployments = {deployment["name"]: deployment for deployment in one["deployments"]}
        return application(one["args"], lambda name: self._options(deployments[name]))

    def _options(self, deployment: dict[str, Any]) -> dict[str, Any]:
        options = {key: value for key, value in deployment.items() if key != "name"}
        # One version for good, as `serve deploy` has it: by serve.run() alone every deployment would be of another version,
        # and a change of num_replicas replace all replicas, one after the other. But a change of the limit per node, which
        # does so in any case, Serve takes no notice of if the version stays.
        options |= {"version": str(options.get("max_replicas_per_node", 1)), "_internal": True}
        return {**options, "logging_config": self._logging}


def _run(targets: list[serve.RunTarget]) -> None:
    """Deploy and wait; a failure is told with what the model said, which Serve's own error leaves out."""
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        names = {target.name for target in targets}
        said = [
            f"{name}: {deployment.message}"
            for name, status in serve.status().applications.items()
            for deployment in status.deployments.values()
            if name in names and deployment.message
        ]
        raise RuntimeError("\n".join([str(error).strip(), *said])) from error


def _joined() -> int:
    """How many worker nodes live, by what the head knows."""
    return len([node for node in ray.nodes() if node["Alive"]]) - 1


def _answer(server: _Server, request: dict[str, Any]) -> dict[str, Any]:
    actions = {
        "load": server.load,
        "unload": server.unload,
        "scale": server.scale,
        "report": server.report,
        "whole": server.whole,
    }
    try:
        return {"answer": actions[request["do"]](request)}
    except Exception as error:
        return {"error": _COLOUR.sub("", str(error) or repr(error))}


def _control(path: str, server: _Server) -> socketserver.ThreadingUnixStreamServer:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            answer = _answer(server, json.loads(self.rfile.readline()))
            self.wfile.write(json.dumps(answer, default=str).encode() + b"\n")

    control = socketserver.ThreadingUnixStreamServer(path, Handler)
    control.daemon_threads = True
    return control


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
            while _joined() < nodes:
                time.sleep(_POLL_S)
        server = _Server(config, nodes)
        server.run_all()
        with _control(arguments.control, server) as control:
            threading.Thread(target=control.serve_forever, daemon=True).start()
            print("all applications run", flush=True)  # noqa: T201 - stdout is the server's log
            threading.Event().wait()  # until Ray's own handler of SIGTERM raises SystemExit
    except Exception:
        print(_COLOUR.sub("", traceback.format_exc()), flush=True)  # noqa: T201 - stdout is the server's log
        status = 1
    except SystemExit:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not serve.shutdown(): it waits for replicas to drain, half a minute behind HAProxy.
    ray.shutdown()
    sys.exit(status)


if __name__ == "__main__":
    main()
