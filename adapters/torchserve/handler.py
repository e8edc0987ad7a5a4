"""What TorchServe's Python worker runs: the workload's model behind a custom handler, raw tensors in, raw tensors out.

Copied into the model's folder. It runs inside the server's environment, so it imports nothing of the harness. It holds
one class, for TorchServe takes a module's only class as its handler.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from ts.metrics.metric_type_enum import MetricTypes  # type: ignore[import-not-found]  # of the server's environment


class Handler:
    """One worker's copy of the model. TorchServe calls ``handle`` with all requests of one batch, one batch at a time."""

    def initialize(self, context: Any) -> None:
        """Load the workload's ``Model``. Whatever it raises ends the worker, and TorchServe starts another."""
        options = context.model_yaml_config["tailrace"]
        self._inputs = [(tensor["name"], np.dtype(tensor["dtype"]), tensor["shape"]) for tensor in options["inputs"]]
        self._outputs = [(tensor["name"], np.dtype(tensor["dtype"])) for tensor in options["outputs"]]
        self._input_bytes = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self._inputs)
        device = options["device"]
        if device == "cuda":
            device = f"cuda:{context.system_properties['gpu_id']}"  # TorchServe deals workers out over the GPUs
        spec = importlib.util.spec_from_file_location("tailrace_model", options["model_file"])
        if spec is None or spec.loader is None:
            raise ImportError(f"{options['model_file']} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        loaded = options["artifact"], options.get("name", context.model_name), device
        self._of_a_workflow = "stage" in options
        self._model = module.Stage(*loaded, options["stage"]) if self._of_a_workflow else module.Model(*loaded)

    def handle(self, requests: Sequence[dict[str, Any]], context: Any) -> list[bytes | str]:
        """One ``predict()`` over all bodies of the right size; one answer per request, in order, each with its status.

        A body of another size fails alone. An exception of the model fails the others: raised, TorchServe would
        answer it with 503, which is what a full queue says. A workflow knows no status, and would take what is said of an
        error for the answer; there all of them are raised.
        """
        answers: list[bytes | str] = [b""] * len(requests)
        bodies: dict[int, bytes | bytearray] = {}
        for index, request in enumerate(requests):
            body = request.get("body")
            # TorchServe has decoded what was sent as text or as JSON.
            if isinstance(body, bytes | bytearray) and len(body) == self._input_bytes:
                bodies[index] = body
            elif self._of_a_workflow:
                raise ValueError(f"the body must be the {self._input_bytes} bytes of the declared inputs, and no text")
            else:
                answers[index] = f"the body must be the {self._input_bytes} bytes of the declared inputs, and no text"
                context.set_response_status(400, "Bad Request", index)
        if not bodies:
            return answers
        try:
            results = self._predict(list(bodies.values()))
        except Exception as error:  # whatever the model raises is the answer to every request of the batch
            logging.exception("predict() failed")
            if self._of_a_workflow:
                raise
            for index in bodies:
                answers[index] = f"{type(error).__name__}: {error}"
                context.set_response_status(500, "Internal Server Error", index)
            return answers
        for index, result in zip(bodies, results, strict=True):
            answers[index] = result
            context.set_response_content_type(index, "application/octet-stream")
        # The only count of batches and of what is in them: TorchServe has none of its own.
        context.metrics.add_metric("BatchSize", len(bodies), "count", 0, [], MetricTypes.HISTOGRAM)
        return answers

    def _predict(self, bodies: Sequence[bytes | bytearray]) -> list[bytes]:
        columns, offset = {}, 0
        for name, dtype, shape in self._inputs:
            count = math.prod(shape)
            items = [np.frombuffer(body, dtype, count, offset).reshape(shape) for body in bodies]
            columns[name] = np.stack(items)
            offset += count * dtype.itemsize
        # A node gets nothing but the bytes of the node before it: what comes in goes out again, with what the stage gives.
        answers = self._model.through(columns) if self._of_a_workflow else self._model.predict(columns)
        outputs = [np.ascontiguousarray(answers[name], dtype=dtype) for name, dtype in self._outputs]
        for (name, _), output in zip(self._outputs, outputs, strict=True):
            if len(output) != len(bodies):
                raise ValueError(f"output {name!r} has {len(output)} rows for a batch of {len(bodies)}")
        return [b"".join(output[index].tobytes() for output in outputs) for index in range(len(bodies))]
