"""What a server imports in place of the ``model.py`` of a pipeline: :class:`Model` is all stages in one process, :class:`Stage`
one of them, for frameworks that compose them.

It needs numpy alone. The environment variable ``TAILRACE_PIPELINE`` names a JSON file: ``model_file`` (with the classes of
the stages), ``outputs`` (of the whole, names), ``clocks`` (a folder, or null) and ``stages``, as ``workload.yaml`` has them.

Every copy of a stage keeps a clock, ``STAGE.KIND.PID.NONCE.clock`` in the folder ``clocks``: three little-endian unsigned
64-bit integers. Of the kind ``computed`` these are the nanoseconds within ``predict``, batches and items; of the kind
``answered``, which whoever calls a stage may keep, the nanoseconds from the calls to the answers, answers, and items again.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.generic]]


class Clock:
    """Counts what goes through one stage, for whoever reads its file meanwhile; without a folder it counts for nobody."""

    def __init__(self, stage: str, kind: str) -> None:
        self._name = f"{stage}.{kind}"
        self._open()

    def count(self, elapsed_ns: int, items: int) -> None:
        """One batch, or one answer, of so many items."""
        if self._pid != os.getpid():
            self._open()  # a server that forks after loading has made another copy
        self._counters += np.array([elapsed_ns, 1, items], dtype="<u8")

    def _open(self) -> None:
        self._pid = os.getpid()
        folder = _description()["clocks"]
        if folder is None:
            self._counters: NDArray[np.uint64] = np.zeros(3, dtype="<u8")
        else:
            path = Path(folder) / f"{self._name}.{self._pid}.{os.urandom(4).hex()}.clock"
            self._counters = np.memmap(path, dtype="<u8", mode="w+", shape=(3,))


class Stage:
    """One stage: the class of the workload's ``model.py`` with its clock, and its answers held to what is declared.

    ``device`` is the workload's; a stage that is not on the device gets ``cpu``.
    """

    def __init__(self, artifact: str, name: str, device: str, stage: str) -> None:
        description = _description()
        told = next(one for one in description["stages"] if one["name"] == stage)
        self.name, self.inputs, self.when = stage, told["inputs"], told["when"]
        self._outputs = [(one["name"], np.dtype(one["dtype"]), tuple(one["shape"])) for one in told["outputs"]]
        stages = _load(description["model_file"])
        made = getattr(stages, told["class_name"], None)
        if made is None:
            raise AttributeError(f"stage {stage}: {description['model_file']} has no class {told['class_name']}")
        self._model = made(artifact, name, device if told["on_device"] else "cpu")
        self._clock = Clock(stage, "computed")

    def predict(self, inputs: Tensors) -> Tensors:
        """Over a batch. Raises ``ValueError`` when the class gives other tensors than the stage declares."""
        begun_ns = time.monotonic_ns()
        answers = self._model.predict(inputs)
        items = len(next(iter(inputs.values())))
        self._clock.count(time.monotonic_ns() - begun_ns, items)
        for name, dtype, shape in self._outputs:
            given = answers.get(name)
            if given is None or given.dtype != dtype or given.shape != (items, *shape):
                told = "nothing" if given is None else f"{given.dtype}{list(given.shape)}"
                raise ValueError(f"stage {self.name} gives {name} as {told} and not as {dtype}{[items, *shape]}")
        return {name: answers[name] for name, _, _ in self._outputs}

    def through(self, tensors: Tensors) -> Tensors:
        """All tensors of a batch as they are behind the stage: with a rule it computes for the items that the rule chooses, and
        the others keep what they have."""
        taken = {name: tensors[name] for name in self.inputs}
        if self.when is None:
            return tensors | self.predict(taken)
        chosen = np.flatnonzero(tensors[self.when])
        if not len(chosen):
            return tensors
        behind = dict(tensors)
        for name, array in self.predict({key: value[chosen] for key, value in taken.items()}).items():
            behind[name] = tensors[name].copy()
            behind[name][chosen] = array
        return behind


class Model:
    """All stages, one after the other: a batch goes through them together, those with a rule get the items that it chooses."""

    def __init__(self, artifact: str, name: str, device: str) -> None:
        description = _description()
        self._outputs = description["outputs"]
        self._stages = [Stage(artifact, name, device, told["name"]) for told in description["stages"]]

    def predict(self, inputs: Tensors) -> Tensors:
        """Over a batch."""
        tensors = dict(inputs)
        for stage in self._stages:
            tensors = stage.through(tensors)
        return {name: tensors[name] for name in self._outputs}


@functools.cache
def _description() -> dict[str, Any]:
    if "TAILRACE_PIPELINE" not in os.environ:
        raise RuntimeError("a pipeline needs the environment variable TAILRACE_PIPELINE")
    told: dict[str, Any] = json.loads(Path(os.environ["TAILRACE_PIPELINE"]).read_text(encoding="utf-8"))
    return told


@functools.cache
def _load(path: str) -> Any:
    """The workload's own module, once for all stages of a process."""
    spec = importlib.util.spec_from_file_location("workload_stages", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
