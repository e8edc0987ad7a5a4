"""What the gate knows of a run, and how it is saved: one small JSON file for each baseline, never changed, with its hash."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tailrace.gate.rules import FIGURES
from tailrace.harness.analysis.summary import jsonable, summarise
from tailrace.harness.errors import InputError, StorageError
from tailrace.harness.plan.keys import explain
from tailrace.harness.records.store import RunFolder, now, write_json
from tailrace.harness.records.summary import CellSummary, TrialSummary

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedTrial(_Strict):
    """One trial: what pairs it with another, how far it is to be trusted, and its figures."""

    number: int
    seed: int
    arrivals: int
    verdict: str
    reasons: tuple[str, ...]
    """Codes."""
    figures: dict[str, float | None]
    """All of :data:`FIGURES`, in the units of the summary; ``None``: not claimed, or not known."""


class SavedCell(_Strict):
    """One cell: what must be the same before it may be compared, what may be the change under test, and its trials."""

    conditions: dict[str, Any]
    subject: dict[str, Any]
    trials: tuple[SavedTrial, ...]


class Baseline(_Strict):
    """What the gate needs of a run; a candidate is read as one too."""

    schema_version: int
    run: str
    """The experiment's name."""
    started_at: str
    saved_at: str
    cells: dict[str, SavedCell]

    def content(self) -> dict[str, Any]:
        """As JSON takes it, ∞ as ``"inf"``."""
        return dict(jsonable(self.model_dump(mode="python")))


def _sha256(content: Mapping[str, Any]) -> str:
    """Of the content, whatever its whitespace and the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def of_run(run: RunFolder) -> Baseline:
    """What the gate needs of a run, from its records. Raises :class:`InputError` for a run that has not ended: whoever
    looks before the end, and again later, finds by chance what an interval over all trials would not show."""
    begun, planned = len(run.trials), len(run.manifest["trials"])
    if begun < planned:
        raise InputError(
            f"{run.folder} has not ended: {begun} of {planned} trials have begun",
            remedy=f"go on with it: tailrace run --resume {run.folder}",
        )
    summary, manifest = summarise(run), run.manifest
    seeds = {trial["id"]: trial["seed"] for trial in manifest["trials"]}
    cells: dict[str, SavedCell] = {}
    for cell in summary.cells:
        members = [trial for trial in summary.trials if trial.cell == cell.cell]
        cells[cell.cell] = SavedCell(
            conditions=_conditions(manifest, cell),
            subject=_subject(manifest, cell),
            trials=tuple(_trial(trial, seeds[trial.trial]) for trial in members),
        )
    return Baseline(
        schema_version=SCHEMA_VERSION,
        run=summary.run,
        started_at=manifest["started_at"],
        saved_at=now(),
        cells=cells,
    )


def _trial(trial: TrialSummary, seed: int) -> SavedTrial:
    return SavedTrial(
        number=trial.number,
        seed=seed,
        arrivals=trial.arrivals,
        verdict=trial.verdict,
        reasons=tuple(reason.code for reason in trial.reasons),
        figures={name: _known(trial.figure(name)) for name in FIGURES},
    )


def _known(value: float | None) -> float | None:
    """NaN has nothing to say."""
    return None if value is None or math.isnan(value) else value


CONDITIONS = ("hardware", "version", "workload", "trace", "client", "devices", "nodes", "slo", "faults")
"""What must be the same in both runs, by the names that ``--allow-different`` takes."""


def _conditions(manifest: Mapping[str, Any], cell: CellSummary) -> dict[str, Any]:
    experiment, hardware, workload = manifest["experiment"], manifest["hardware"], manifest["workload"]
    models = experiment.get("models") or {"count": 1}
    rate = cell.mean_rate or experiment["rate_by_workload"].get(cell.workload)
    return {
        "hardware": {key: hardware.get(key) for key in ("cpu_model", "cpu_count", "memory_bytes", "gpus")},
        "version": manifest["tailrace_version"],
        "workload": {
            "name": cell.workload,
            "artifact_sha256": workload.get("artifact_sha256"),
            "options": experiment["workload_options"],
            **({"models": models} if models["count"] > 1 else {}),
        },
        "trace": {
            **experiment["trace"],
            **({"mean_rate": rate} if rate else {}),
            "file_sha256": manifest["trace"]["provenance"].get("sha256"),
        },
        "client": {
            **{key: value for key, value in experiment["client"].items() if key not in ("protocol", "listen")},
            "warmup": experiment["warmup"],
        },
        "devices": {"device": cell.device, "count": cell.devices},
        "nodes": {
            "count": cell.nodes,
            "supervision": cell.supervision,
            "restart_backoff_s": experiment["restart_backoff_s"],
        },
        "slo": {"latency_ms": cell.slo_ms},
        "faults": _scenario(experiment, cell)["faults"],
    }


def _subject(manifest: Mapping[str, Any], cell: CellSummary) -> dict[str, Any]:
    """What a change under test may have changed; told where it differs, and never refused."""
    adapter = manifest["adapters"].get(cell.adapter) or {}
    return {
        "tuning": cell.tuning,
        "scaler": _scenario(manifest["experiment"], cell)["scaler"],
        "packages": adapter.get("packages"),
        "options": adapter.get("options"),
        "protocol": cell.protocol,
        "environment": manifest["experiment"]["environment"],
        "environment_variables": manifest["environment_variables"],
        "software": manifest["software"],
        "git": manifest["git"],
    }


def _scenario(experiment: Mapping[str, Any], cell: CellSummary) -> dict[str, Any]:
    return next(dict(told) for told in experiment["scenarios"] if told["name"] == cell.scenario)


def path_of(name: str, folder: Path) -> Path:
    """Where a baseline of that name lies. Raises :class:`InputError` for what is no name."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is no name for a baseline", remedy="letters, digits, `.`, `_` and `-`, a letter or digit first"
        )
    return folder / f"{name}.json"


def save(run: RunFolder, name: str, folder: Path) -> Path:
    """Save what the gate needs of a run under a name that is not taken; returns the file.

    Raises :class:`InputError` for a name that is taken, and for a run that is INVALID or has not ended: it would decide
    nothing, and it could not be corrected.
    """
    path = path_of(name, folder)
    if path.exists():
        raise InputError(
            f"{path} exists, and a baseline never changes", remedy="save under another name, or delete that file first"
        )
    baseline = of_run(run)
    if bad := [
        f"{cell} {trial.number}"
        for cell, saved in baseline.cells.items()
        for trial in saved.trials
        if trial.verdict == "INVALID"
    ]:
        raise InputError(
            f"{run.folder} holds INVALID trials: {', '.join(bad)}",
            remedy=f"`tailrace summary {run.folder}` says why; measure again",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.of(folder, error) from error
    content = baseline.content()
    write_json(path, {"sha256": _sha256(content), **content})
    return path


def load(path: Path) -> Baseline:
    """Read a saved baseline. Raises :class:`InputError` for a file that is none, that was changed, or that a newer tailrace
    wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(
            f"{path} is no baseline: it is not valid JSON: {error}", remedy="restore it, or save it again"
        ) from error
    if not isinstance(content, dict) or not {"sha256", "schema_version"} <= content.keys():
        raise InputError(
            f"{path} is no baseline: it has no `sha256` and `schema_version`",
            remedy="save one: tailrace baseline save RUN NAME",
        )
    claimed = content.pop("sha256")
    if (actual := _sha256(content)) != claimed:
        raise InputError(
            f"{path} was changed after it had been saved: its SHA-256 is {actual:.12}…, `sha256` says {claimed!s:.12}…",
            remedy="restore it from version control, or save the run again under another name",
        )
    if content["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {content['schema_version']!r} is not one that this tailrace reads "
            f"({SCHEMA_VERSION})",
            remedy="use the tailrace that wrote it, or save the run again",
        )
    try:
        return Baseline.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, Baseline, str(path)))) from error


def saved(folder: Path) -> dict[str, Path]:
    """The baselines of a folder, by name."""
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find(given: str, folder: Path) -> Baseline:
    """A run folder, the file of a baseline, or the name of one in ``folder``. Raises :class:`InputError` for anything else."""
    path = Path(given)
    if path.is_file():
        return load(path)
    known = saved(folder)
    if given in known and not (path / "manifest.json").is_file():
        return load(known[given])
    if path.is_dir():
        return of_run(RunFolder.open(path))
    raise InputError(
        f"there is no run folder and no baseline {given!r}",
        remedy=f"saved in {folder}: {', '.join(known)}"
        if known
        else f"nothing is saved in {folder}; --folder names another",
    )
