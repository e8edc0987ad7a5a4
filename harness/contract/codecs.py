"""Tensors to the bytes of a whole request, and answers back to tensors: requests are serialised before the clock starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tailrace.harness.contract.workload import Tensors, TensorSpec
from tailrace.harness.errors import ServerError

WireProtocol = Literal["http", "grpc"]
"""What requests and answers travel in."""


@dataclass(frozen=True)
class PreparedRequest:
    """One request, ready to be sent. For HTTP ``data`` is the whole request, head and body; for gRPC the message
    alone, to be called under ``method``."""

    data: bytes
    method: str = ""


class Codec(Protocol):
    """How one endpoint wants its requests and gives its answers. Must be stateless."""

    def encode(self, model: str, inputs: Tensors) -> PreparedRequest:
        """One payload (tensors without batch axis) as a request to ``model``."""

    def decode(self, headers: Mapping[str, str], body: bytes) -> Tensors:
        """The tensors of an answer, without batch axis. ``headers`` have lower-case names (empty for gRPC).

        Raises :class:`ServerError` when the answer is not what the interface promises.
        """


def http_request(host: str, port: int, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """The bytes of an HTTP/1.1 POST that keeps its connection."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


def raw_bytes(specs: tuple[TensorSpec, ...], tensors: Tensors) -> bytes:
    """The tensors of one item as little-endian bytes, one after the other in the declared order."""
    return b"".join(np.ascontiguousarray(tensors[spec.name], dtype=spec.dtype).tobytes() for spec in specs)


def _from_raw_bytes(specs: tuple[TensorSpec, ...], body: bytes) -> Tensors:
    expected = sum(_item_bytes(spec) for spec in specs)
    if len(body) != expected:
        raise ServerError(f"the answer has {len(body)} bytes, the declared outputs have {expected}: {body[:120]!r}")
    tensors: Tensors = {}
    offset = 0
    for spec in specs:
        flat = np.frombuffer(body, dtype=spec.dtype, count=math.prod(spec.shape), offset=offset)
        tensors[spec.name] = flat.reshape(spec.shape)
        offset += _item_bytes(spec)
    return tensors


def _item_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


@dataclass(frozen=True)
class RawHTTP:
    """Raw tensors over HTTP: the body is the inputs' :func:`raw_bytes`.

    For frameworks that leave the wire format to the user (Ray Serve, TorchServe): no parsing on either side, so that
    the framework is measured and not a JSON library. ``path``, and the values of ``headers`` that go beside the usual ones,
    may hold ``{model}``.
    """

    host: str
    port: int
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, model: str, inputs: Tensors) -> PreparedRequest:
        body = raw_bytes(self.inputs, inputs)
        named = {name: value.format(model=model) for name, value in self.headers.items()}
        headers = {"Content-Type": "application/octet-stream", **named}
        return PreparedRequest(http_request(self.host, self.port, self.path.format(model=model), body, headers))

    def decode(self, headers: Mapping[str, str], body: bytes) -> Tensors:
        return _from_raw_bytes(self.outputs, body)


@dataclass(frozen=True)
class RawGRPC:
    """Raw tensors over gRPC: the message is what :class:`RawHTTP` has as its body. ``method`` may hold ``{model}``."""

    method: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def encode(self, model: str, inputs: Tensors) -> PreparedRequest:
        return PreparedRequest(raw_bytes(self.inputs, inputs), self.method.format(model=model))

    def decode(self, headers: Mapping[str, str], body: bytes) -> Tensors:
        return _from_raw_bytes(self.outputs, body)


def _without_batch_axis(
    name: str, array: NDArray[np.generic] | None, specs: tuple[TensorSpec, ...]
) -> NDArray[np.generic]:
    if array is None:
        raise ServerError(f"the answer has no output `{name}`")
    shape = next(spec.shape for spec in specs if spec.name == name)
    if array.shape != (1, *shape):
        raise ServerError(f"output `{name}` has the shape {list(array.shape)} instead of {[1, *shape]}")
    item: NDArray[np.generic] = array[0]
    return item


@dataclass(frozen=True)
class OpenInferenceHTTP:
    """The Open Inference Protocol (v2) over HTTP with its binary tensor extension: a JSON header, then raw tensors."""

    host: str
    port: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def encode(self, model: str, inputs: Tensors) -> PreparedRequest:
        from tritonclient import http as v2
        from tritonclient.utils import np_to_triton_dtype

        tensors = []
        for spec in self.inputs:
            array = np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype)[np.newaxis]
            tensor = v2.InferInput(spec.name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array, binary_data=True)
            tensors.append(tensor)
        outputs = [v2.InferRequestedOutput(spec.name, binary_data=True) for spec in self.outputs]
        body, json_bytes = v2.InferenceServerClient.generate_request_body(tensors, outputs=outputs)
        headers = {"Content-Type": "application/octet-stream"}
        if json_bytes is not None:
            headers["Inference-Header-Content-Length"] = str(json_bytes)
        return PreparedRequest(http_request(self.host, self.port, f"/v2/models/{model}/infer", bytes(body), headers))

    def decode(self, headers: Mapping[str, str], body: bytes) -> Tensors:
        from tritonclient import http as v2

        json_bytes = headers.get("inference-header-content-length")
        try:
            answer = v2.InferenceServerClient.parse_response_body(
                body, header_length=int(json_bytes) if json_bytes is not None else None
            )
            arrays = {spec.name: answer.as_numpy(spec.name) for spec in self.outputs}
        except ServerError:
            raise
        except Exception as error:  # the parser lets KeyError, ValueError, struct.error … through
            raise ServerError(f"the answer is no Open Inference Protocol response ({error}): {body[:120]!r}") from error
        return {name: _without_batch_axis(name, array, self.outputs) for name, array in arrays.items()}


@dataclass(frozen=True)
class OpenInferenceGRPC:
    """The Open Inference Protocol (v2) over gRPC, tensors as raw contents."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    METHOD = "/inference.GRPCInferenceService/ModelInfer"

    def encode(self, model: str, inputs: Tensors) -> PreparedRequest:
        from tritonclient.grpc import service_pb2
        from tritonclient.utils import np_to_triton_dtype

        message = service_pb2.ModelInferRequest(model_name=model)
        for spec in self.inputs:
            array = np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype)[np.newaxis]
            message.inputs.add(name=spec.name, shape=array.shape, datatype=np_to_triton_dtype(array.dtype))
            message.raw_input_contents.append(array.tobytes())
        for spec in self.outputs:
            message.outputs.add(name=spec.name)
        return PreparedRequest(message.SerializeToString(), self.METHOD)

    def decode(self, headers: Mapping[str, str], body: bytes) -> Tensors:
        from tritonclient.grpc import InferResult, service_pb2

        try:
            answer = InferResult(service_pb2.ModelInferResponse.FromString(body))
            arrays = {spec.name: answer.as_numpy(spec.name) for spec in self.outputs}
        except Exception as error:  # protobuf and numpy raise what they like on hostile bytes
            raise ServerError(f"the answer is no ModelInferResponse ({error}): {body[:120]!r}") from error
        return {name: _without_batch_axis(name, array, self.outputs) for name, array in arrays.items()}
