"""The server's main process: KServe's ``ModelServer`` with the workload's models behind it, until SIGTERM.

It runs in the environment's interpreter and imports nothing of the harness. KServe's own options are those of
``kserve.model_server.parser``, which reads the command line when it is imported, here and again in each worker.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

import kserve.protocol.grpc.server
import kserve.protocol.rest.multiprocess.server
from grpc import aio
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelRepository, ModelServer, model_server
from kserve.protocol.rest.server import RESTServer
from kserve.utils.numpy_codec import from_np_dtype
from kserve.utils.utils import generate_uuid
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

_SERVING = "kserve-serving"
_CANNOT_START = signal.SIGUSR1


class WorkloadModel(Model):  # type: ignore[misc]
    """One of the workload's models behind KServe's interface.

    ``predict`` is a plain function, as in KServe's own example of a custom model and in its servers for scikit-learn
    and XGBoost. KServe calls it on the event loop: a worker does one ``predict`` at a time, which an exclusive model
    needs, and answers nothing else meanwhile, health checks included.
    """

    def __init__(self, name: str, arguments: dict[str, str]) -> None:
        super().__init__(name)
        self._arguments = arguments
        self._model: Any = None

    def load(self) -> bool:
        """Load the workload's ``Model``; whatever it raises is raised."""
        spec = importlib.util.spec_from_file_location("tailrace_model", self._arguments["model_file"])
        if spec is None or spec.loader is None:
            raise ImportError(f"{self._arguments['model_file']} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._model = module.Model(self._arguments["artifact"], self.name, self._arguments["device"])
        self.ready = True
        return True

    def stop(self) -> None:
        """KServe's hook for unloading: what the model holds is let go, whoever still has a hold of this object."""
        super().stop()
        self._model = None

    def predict(self, payload: InferRequest, headers: dict[str, str] | None = None) -> InferResponse:
        outputs = self._model.predict({tensor.name: tensor.as_numpy() for tensor in payload.inputs})
        return InferResponse(
            response_id=payload.id or generate_uuid(),
            model_name=self.name,
            infer_outputs=[_output(name, array) for name, array in outputs.items()],
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


def _output(name: str, array: NDArray[Any]) -> InferOutput:
    output = InferOutput(name, list(array.shape), from_np_dtype(array.dtype))
    # Raw bytes, which KServe turns into JSON where the request asks for that.
    output.set_data_from_numpy(array, binary_data=True)
    return output


class WorkloadModels(ModelRepository):  # type: ignore[misc]
    """The models that are served, loaded in the process that serves them and nowhere else.

    With several workers the main process only watches over them. A copy of the model there would be one too many on the
    device, and KServe would pickle it for every worker, for which a loaded model need not be fit.
    """

    def __init__(self, names: list[str], arguments: dict[str, str], workers: int) -> None:
        super().__init__()
        self._arguments = arguments
        self._workers = workers
        self._started = 0
        for name in names:
            self.update(WorkloadModel(name, arguments))

    def load(self, name: str) -> bool:
        """What ``POST /v2/repository/models/NAME/load`` calls."""
        model = WorkloadModel(name, self._arguments)
        model.load()
        self.update(model)
        return True

    def load_all(self) -> None:
        """Load every model; the process then bears a name in the process table by which the harness knows it."""
        for model in self.models.values():
            model.load()
        Path("/proc/self/comm").write_text(_SERVING, encoding="ascii")

    def __getstate__(self) -> dict[str, Any]:
        self._started += 1  # KServe pickles the repository once for each worker that it starts
        return self.__dict__.copy()

    @property
    def in_first_workers(self) -> bool:
        """Whether this worker is one of those that the server starts with, and stands in for none that has ended."""
        return self._started <= self._workers


class _RESTServer(RESTServer):  # type: ignore[misc]
    """KServe's REST server, on the address that ``host`` says: its own is 0.0.0.0, without an option for another."""

    host = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.config.host = self.host

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """The life of a worker, in which the models are to be loaded first.

        Not sooner: KServe ends a worker that does not answer its pings for five seconds, and until here none can.
        """
        models = self.dataplane.model_registry
        try:
            models.load_all()
        except Exception:
            if models.in_first_workers:
                traceback.print_exc()
                os.kill(os.getppid(), _CANNOT_START)
                sys.exit(1)
            raise
        super().run(sockets)


def _end_with_workers(*_: object) -> NoReturn:
    """End a server whose models cannot be loaded: KServe would start workers in place of those that end, for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


def _bind_to(host: str) -> None:
    """Have KServe's REST and gRPC servers listen on ``host`` alone."""
    _RESTServer.host = host
    model_server.RESTServer = kserve.protocol.rest.multiprocess.server.RESTServer = _RESTServer

    def grpc_server(*arguments: Any, **options: Any) -> Any:
        server = aio.server(*arguments, **options)
        add_port = server.add_insecure_port
        # KServe says "[::]:PORT", and goes on saying so in its log.
        server.add_insecure_port = lambda address: add_port(f"{host}:{address.rpartition(':')[2]}")
        return server

    kserve.protocol.grpc.server.aio = types.SimpleNamespace(server=grpc_server)


def _without_request_lines() -> None:
    """Have KServe write none of its lines for every request: an access line, latencies, two timings, gRPC's method.

    By filters, because KServe configures its loggers anew in each worker, and filters outlive that.
    """

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO

    logging.getLogger("kserve.trace").addFilter(passes)
    logging.getLogger("uvicorn.access").addFilter(passes)
    logging.getLogger("kserve").addFilter(lambda record: passes(record) or record.module != "interceptors")


def _serve_metrics(host: str, port: int) -> None:
    """The Prometheus client's own page for several processes (they share ``PROMETHEUS_MULTIPROC_DIR``), by a thread.

    KServe's ``/metrics`` is that of the one worker that happens to answer, and answers only between two ``predict``.
    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    start_http_server(port, host, registry)


if not model_server.args.enable_latency_logging:
    # Here, because a worker imports this file and does not come by main().
    _without_request_lines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[model_server.parser])
    parser.add_argument("--models", type=Path, required=True, help="models.json")
    parser.add_argument("--host", required=True, help="address to listen on")
    parser.add_argument("--metrics_port", type=int, required=True, help="port of the metrics of all workers")
    arguments = parser.parse_args()
    config = json.loads(arguments.models.read_text(encoding="utf-8"))
    _bind_to(arguments.host)
    _serve_metrics(arguments.host, arguments.metrics_port)
    models = WorkloadModels(config["names"], config["arguments"], arguments.workers)
    if arguments.workers == 1:
        models.load_all()
    else:
        signal.signal(_CANNOT_START, _end_with_workers)
        for model in models.get_models().values():
            model.ready = True  # or KServe would not register it
    ModelServer(registered_models=models).start(list(models.get_models().values()))


if __name__ == "__main__":
    main()
