"""A pipeline: every stage is a :class:`model.Model` with a queue, a batcher and replicas of its own, and requests are passed
on from one to the next. Tensors stay the bytes that they are; only the stages know what they mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

from .frames import part_of
from .model import Model

Sizes = Sequence[tuple[str, int]]
"""Names and bytes of one item's tensors, in the order in which they are sent."""


@dataclass(eq=False, slots=True)
class Journey:
    """One request on its way through the stages."""

    tensors: dict[str, bytes]
    answer: Callable[[int, bytes, float], None]
    passed: int = 0
    """How many stages it has behind it."""
    called_off: Callable[[], None] | None = None
    """Takes it out of the stage where it is."""


class Pipeline:
    """What is served under one name; to the server it is like a :class:`model.Model`."""

    def __init__(self, name: str, config_file: str, config: dict[str, Any]) -> None:
        self._stages = [
            (told, Model(f"{name}/{stage}", config_file, part_of(config, f"{name}/{stage}")))
            for stage, told in config["stages"].items()
        ]
        self._inputs: Sizes = config["input_sizes"]
        self._outputs: list[str] = [tensor for tensor, _, _ in config["outputs"]]
        self._counts = dict.fromkeys(("requests_ok_total", "requests_failed_total", "requests_shed_total"), 0)
        self._under_way: set[Journey] = set()
        self.parts: dict[str, Model | Pipeline] = {name: self, **{model.name: model for _, model in self._stages}}
        self.target: int = config["system"]["replicas"]

    def infer(self, body: bytes, answer: Callable[[int, bytes, float], None]) -> Journey | None:
        """As a model does: ``answer`` is called once, and what is returned can be withdrawn."""
        journey = Journey(_split(body, self._inputs), answer)
        self._under_way.add(journey)
        self._go_on(journey)
        return journey if journey in self._under_way else None

    def withdraw(self, journey: Journey) -> None:
        """Whoever asked has gone."""
        if journey in self._under_way:
            self._end(journey, 0, b"", 0.0)
            if journey.called_off is not None:
                journey.called_off()

    def _go_on(self, journey: Journey) -> None:
        """To the next stage that is for it, or back with the answer."""
        tensors = journey.tensors
        for told, model in self._stages[journey.passed :]:
            journey.passed += 1
            if told["when"] is None or any(tensors[told["when"]]):
                body = b"".join(tensors[name] for name, _, _ in told["inputs"])
                request = model.infer(body, partial(self._answered, journey, told["output_sizes"]))
                journey.called_off = None if request is None else partial(model.withdraw, request)
                return
        self._end(journey, HTTPStatus.OK, b"".join(tensors[name] for name in self._outputs), 0.0)

    def _answered(self, journey: Journey, sizes: Sizes, status: int, said: bytes, retry_after_s: float) -> None:
        """A stage has answered. Of a request that was withdrawn nobody wants to know."""
        if journey not in self._under_way:
            return
        if status == HTTPStatus.OK:
            journey.tensors |= _split(said, sizes)
            self._go_on(journey)
        else:
            self._end(journey, status, said, retry_after_s)

    def _end(self, journey: Journey, status: int, said: bytes, retry_after_s: float) -> None:
        self._under_way.discard(journey)
        outcome = {int(HTTPStatus.OK): "ok", int(HTTPStatus.SERVICE_UNAVAILABLE): "shed"}.get(status, "failed")
        self._counts[f"requests_{outcome}_total"] += 1
        journey.answer(status, said, retry_after_s)

    # ------------------------------------------------------------------------------------------- all stages as one

    @property
    def _models(self) -> list[Model]:
        return [model for _, model in self._stages]

    @property
    def ready(self) -> int:
        """As many as the stage with the fewest has."""
        return min(model.ready for model in self._models)

    def look(self) -> None:
        """Look after the replicas of every stage."""
        for model in self._models:
            model.look()

    def figures(self) -> dict[str, float]:
        """The metrics of the whole; every stage has its own."""
        waiting = sum(model.figures()["queue_depth"] for model in self._models)
        return {"queue_depth": waiting, "in_flight": len(self._under_way), "replicas": self.ready, **self._counts}

    def system(self) -> dict[str, Any]:
        """What the stages on the device run with, of which the first one speaks."""
        return next((model for told, model in self._stages if told["on_device"]), self._models[0]).system()

    async def scale(self, replicas: int) -> None:
        """So many replicas for every stage."""
        self.target = replicas
        await asyncio.gather(*(model.scale(replicas) for model in self._models))

    async def close(self) -> None:
        """Finish what is under way, stage by stage, for what leaves one enters the next."""
        for model in self._models:
            await model.close()

    def abandon(self) -> None:
        """End the replicas of every stage, whatever they do."""
        for model in self._models:
            model.abandon()


def _split(body: bytes, sizes: Sizes) -> dict[str, bytes]:
    """The tensors of one item by name."""
    tensors, offset = {}, 0
    for name, size in sizes:
        tensors[name] = body[offset : offset + size]
        offset += size
    return tensors
