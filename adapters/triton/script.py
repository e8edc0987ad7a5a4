"""What Triton's Python backend runs where a pipeline has a rule: Business Logic Scripting, Triton's own name for it.

Copied into the model repository as ``MODEL/1/model.py``. An ensemble cannot send some items another way; a script asks the
stages, which are models of the same server, one after the other.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the script. Triton calls ``execute`` with all requests that it took together, never concurrently."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._stages = json.loads(config["parameters"]["stages"]["string_value"])

    async def execute(self, requests: list[Any]) -> list[Any]:
        """All requests at once, each on its own way through the stages; what a stage refuses fails that request alone."""
        return list(await asyncio.gather(*map(self._answer, requests)))

    async def _answer(self, request: Any) -> Any:
        """Requests hold one item each, so a rule has one answer for a request."""
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        for stage in self._stages:
            if stage["when"] and not tensors[stage["when"]].as_numpy().any():
                continue
            answer = await pb_utils.InferenceRequest(
                model_name=stage["model"],
                requested_output_names=stage["outputs"],
                inputs=[tensors[name] for name in stage["inputs"]],
            ).async_exec()
            if answer.has_error():
                return pb_utils.InferenceResponse(output_tensors=[], error=answer.error())
            tensors |= {tensor.name(): tensor for tensor in answer.output_tensors()}
        return pb_utils.InferenceResponse([tensors[name] for name in self._outputs])
