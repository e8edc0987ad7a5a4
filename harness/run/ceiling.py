"""The bare model's ceiling on a device: the same model, the same batch, no server; and what a race reached of it."""

from __future__ import annotations

import glob
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailrace import workloads
from tailrace.harness.contract.adapter import ServerEnvironment
from tailrace.harness.contract.workload import Device, Precision, PreparedWorkload
from tailrace.harness.errors import InputError, TailraceError
from tailrace.harness.gpus import gpus
from tailrace.harness.processes import log_tail
from tailrace.harness.records.store import RunFolder
from tailrace.harness.records.summary import CellSummary, RunSummary
from tailrace.harness.run.prepare import prepare
from tailrace.harness.run.runner import experiment_of
from tailrace.harness.servers.devices import device_environment
from tailrace.harness.servers.environments import Kind, build
from tailrace.harness.servers.guardian import Guardian
from tailrace.workloads.catalogue import load_spec

_SCRIPTS = Path(workloads.__path__[0])
_LOAD_S = 600.0
"""How long a model may take to load, compilation included."""
_GRACE_S = 60.0
_POLL_S = 0.01


@dataclass(frozen=True)
class Ceiling:
    """So many copies of a model, each at work on one batch after the other at the same time."""

    batch: int
    instances: int
    items_per_s: float
    """Of all copies together."""
    p50_ms: float
    """One batch of the slowest copy, copies to and from the device included."""
    p99_ms: float


class BareModel:
    """A workload's model, ready to be measured without a server."""

    def __init__(
        self,
        workload: str,
        *,
        device: Device | None = None,
        devices: int = 1,
        precision: Precision | None = None,
        compiled: bool = False,
        options: Mapping[str, float] | None = None,
        environment: Kind = "venv",
        seed: int = 7,
        on_progress: Callable[[str], None],
    ) -> None:
        """Prepare it. Raises :class:`InputError` for what is unknown or not there, and what :func:`prepare` raises."""
        spec = load_spec(workload)
        chosen: Device = device or spec.devices[0]
        self._devices = devices
        self._gpus = gpus()[:devices] if chosen == "cuda" else []
        if chosen == "cuda" and len(self._gpus) < devices:
            raise InputError(
                f"`--device cuda`: {devices} GPUs are asked for, this machine has {len(self._gpus)}",
                remedy="use --device cpu; `tailrace doctor --gpu` says what is missing for `cuda`",
            )
        self.workload: PreparedWorkload = prepare(
            workload,
            models=[spec.name],
            device=chosen,
            seed=seed,
            options=options or {},
            environment_kind=environment,
            precision=precision,
            compiled=compiled,
            on_progress=on_progress,
        )
        requirements = [_SCRIPTS / "bare-requirements.txt"]
        if self.workload.requirements is not None:
            requirements.append(self.workload.requirements)
        self._environment = build(environment, requirements, name=f"{spec.name}-bare", on_progress=on_progress)

    def measure(self, batch: int, instances: int, duration_s: float) -> Ceiling:
        """Run copies in processes of their own, dealt out over the devices. Raises :class:`TailraceError` if one fails."""
        with tempfile.TemporaryDirectory(prefix="tailrace-ceiling-") as scratch, Guardian() as guardian:
            folder = Path(scratch)
            guardian.remove_later(glob.escape(scratch))
            (folder / "devices").mkdir()
            copies = [_Copy(self, guardian, folder, batch, number, duration_s) for number in range(instances)]
            for copy in copies:
                copy.wait("ready", _LOAD_S)
            (folder / "go").touch()
            results = [copy.result(duration_s + _GRACE_S) for copy in copies]
        return Ceiling(
            batch=batch,
            instances=instances,
            items_per_s=sum(batch * result["calls"] / result["seconds"] for result in results),
            p50_ms=max(result["p50_ms"] for result in results),
            p99_ms=max(result["p99_ms"] for result in results),
        )

    def described(self) -> dict[str, Any]:
        """Which model, and how it computes."""
        return {
            "workload": self.workload.spec.name,
            "device": self.workload.device,
            "precision": self.workload.precision,
            "compiled": self.workload.compiled,
        }

    @property
    def environment(self) -> ServerEnvironment:
        """Where it runs."""
        return self._environment

    def job(self, folder: Path, batch: int, number: int, duration_s: float) -> dict[str, Any]:
        """What ``workloads/bare_model.py`` is told for one copy."""
        workload = self.workload
        device = workload.device if workload.device != "cuda" else f"cuda:{number % self._devices}"
        return {
            "model_file": str(workload.model_file),
            "artifact": str(workload.artifact),
            "name": workload.spec.name,
            "device": device,
            "payloads": str(workload.artifact.parent / "payloads.npz"),
            "batch": batch,
            "duration_s": duration_s,
            "ready": str(folder / f"ready-{number}"),
            "go": str(folder / "go"),
            "result": str(folder / f"result-{number}"),
        }

    def variables(self, folder: Path) -> dict[str, str]:
        """The environment variables of a copy: as little as a server's."""
        inherited = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
        return {
            **inherited,
            "LANG": "C.UTF-8",
            "PATH": f"{self._environment.bin}:/usr/local/bin:/usr/bin:/bin",
            "TMPDIR": str(folder),
            **device_environment(self.workload.device, folder / "devices", self._gpus, self._devices),
        }


class _Copy:
    """One process with one copy of the model."""

    def __init__(
        self, bare: BareModel, guardian: Guardian, folder: Path, batch: int, number: int, duration_s: float
    ) -> None:
        self._job = bare.job(folder, batch, number, duration_s)
        self._log = folder / f"log-{number}"
        job_file = folder / f"job-{number}.json"
        job_file.write_text(json.dumps(self._job), encoding="utf-8")
        self._process = guardian.spawn(
            f"bare-model-{number}",
            [str(bare.environment.python), "-P", str(_SCRIPTS / "bare_model.py"), str(job_file)],
            env=bare.variables(folder),
            cwd=folder,
            log=self._log,
        )

    def wait(self, what: str, timeout_s: float) -> None:
        """Until the file of that name is there."""
        deadline_s = time.monotonic() + timeout_s
        path = Path(self._job[what])
        while not path.exists():
            if not self._process.alive() and not path.exists():
                raise TailraceError(
                    f"the bare model ended at a batch of {self._job['batch']} without a result",
                    remedy="see what it said; a smaller --batch needs less memory",
                    detail=log_tail(self._log),
                )
            if time.monotonic() > deadline_s:
                raise TailraceError(f"the bare model was not done within {timeout_s:.0f} s", detail=log_tail(self._log))
            time.sleep(_POLL_S)

    def result(self, timeout_s: float) -> dict[str, Any]:
        """What it has measured."""
        self.wait("result", timeout_s)
        told: dict[str, Any] = json.loads(Path(self._job["result"]).read_text(encoding="utf-8"))
        return told


@dataclass(frozen=True)
class Reached:
    """What a cell of a race reached of the bare model's ceiling at the same batch and with as many copies."""

    run: str
    cell: str
    goodput_rps: float
    batch: int
    instances: int


def runs_below(folder: Path) -> list[RunFolder]:
    """The run in a folder, or all runs below it: a search for a saturation point leaves many. Raises :class:`InputError` where
    there is none."""
    return [
        RunFolder.open(found) for found in sorted(path.parent for path in folder.rglob("manifest.json")) or [folder]
    ]


def model_of(runs: Sequence[RunFolder], workload: str | None) -> dict[str, Any]:
    """The model of these runs, as :class:`BareModel` is told of it. Raises :class:`InputError` where they do not agree, or a
    ``workload`` was named beside them."""
    experiments = [experiment_of(run) for run in runs]
    first = experiments[0]
    models = [(e.workload, e.device, e.devices, e.precision, e.compile, e.workload_options) for e in experiments]
    if workload is not None or any(model != models[0] for model in models):
        raise InputError(
            "--run takes the workload, its device and its precision from the runs, which must agree on them",
            remedy="leave WORKLOAD out, and name runs of one workload on one device in one precision",
        )
    return {
        "workload": first.workload,
        "device": first.device,
        "devices": first.devices,
        "precision": first.precision,
        "compiled": first.compile,
        "environment": first.environment,
        "options": first.workload_options,
        "seed": first.seed,
    }


def settings(cell: CellSummary) -> tuple[int, int]:
    """The batch and the copies, of all nodes, of a cell: what it left to the framework is one."""
    tuning = cell.tuning
    replicas = (tuning.get("autoscale") or {}).get("max") or tuning.get("replicas") or 1
    return int(tuning.get("max_batch") or 1), int(replicas) * cell.nodes


def best_cells(summaries: Mapping[str, RunSummary]) -> list[Reached]:
    """Of summaries by run: of each framework at each batch and number of copies the cell with the most goodput, unless
    it is INVALID or a fault was injected into it."""
    best: dict[tuple[str, int, int], Reached] = {}
    for run, summary in summaries.items():
        faulty = {trial.cell for trial in summary.trials if trial.faults}
        for cell in summary.cells:
            if cell.verdict == "INVALID" or cell.cell in faulty:
                continue
            reached = Reached(run, cell.cell, cell.goodput_rps or 0.0, *settings(cell))
            key = (cell.adapter, reached.batch, reached.instances)
            if key not in best or reached.goodput_rps > best[key].goodput_rps:
                best[key] = reached
    return sorted(best.values(), key=lambda reached: (reached.batch, reached.instances, reached.cell))


def told(ceilings: Sequence[Ceiling], reached: Sequence[Reached]) -> dict[str, Any]:
    """Both as they are printed in JSON: ``of_ceiling`` is goodput ÷ the bare model's items/s, and what is missing to 1 is
    the framework's overhead (and what the traffic did not ask for)."""
    limits = {(one.batch, one.instances): one.items_per_s for one in ceilings}
    return {
        "ceilings": [asdict(one) for one in ceilings],
        "cells": [
            {**asdict(one), "of_ceiling": one.goodput_rps / limits[one.batch, one.instances]}
            for one in reached
            if (one.batch, one.instances) in limits
        ],
    }
