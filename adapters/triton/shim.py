"""What Triton's Python backend runs for each instance: the workload's model behind ``TritonPythonModel``.

Copied into the model repository as ``MODEL/1/model.py``. It runs inside the server's environment, so it imports
nothing of the harness.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the model. Triton calls ``execute`` with all requests of one batch, never concurrently."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the workload's ``Model``. Whatever it raises fails the load and ends up in the server's log."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        spec = importlib.util.spec_from_file_location("workload_model", parameters["model_file"])
        if spec is None or spec.loader is None:
            raise ImportError(f"{parameters['model_file']} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        device = parameters["device"]
        if device == "cuda":
            # Triton deals instances out, the backend does not see to it.
            device = f"cuda:{args['model_instance_device_id']}"
        # A stage of a pipeline that Triton composes is told whose it is; else the model is what Triton calls it.
        loaded = parameters["artifact"], parameters.get("name", args["model_name"]), device
        self._model = module.Stage(*loaded, parameters["stage"]) if "stage" in parameters else module.Model(*loaded)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One ``predict()`` over all requests, stacked along axis 0; one response per request, in order.

        What the model raises goes through: Triton answers every request of the batch with it and counts them as failed.
        Errors that are returned as responses it counts as successes.
        """
        columns = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self._inputs
        }
        rows = [len(array) for array in columns[self._inputs[0]]]
        answers = self._model.predict({name: np.concatenate(arrays) for name, arrays in columns.items()})
        for name in self._outputs:
            if len(answers[name]) != sum(rows):
                raise ValueError(f"output {name!r} has {len(answers[name])} rows for a batch of {sum(rows)}")
        ends = np.cumsum(rows)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, np.ascontiguousarray(answers[name][end - n : end])) for name in self._outputs]
            )
            for n, end in zip(rows, ends, strict=True)
        ]
