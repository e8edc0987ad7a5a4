"""A run: check the experiment, write the manifest, run the trials in their interleaved order, analyse.

A run that was cut off can be gone on with: what is done stays, what had begun is set aside, and the rest follows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tailrace import __version__
from tailrace.harness.analysis.summary import summarise_trial, write_summary
from tailrace.harness.contract.observations import observations_of
from tailrace.harness.differences import differences
from tailrace.harness.errors import InputError, StorageError, TailraceError
from tailrace.harness.machine import command_line, environment_variables, git_state, hardware, software
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.keys import explain
from tailrace.harness.plan.schedule import offered_rates
from tailrace.harness.records.store import RunFolder, ending, now
from tailrace.harness.records.summary import RunSummary
from tailrace.harness.run.features.load import load_workers
from tailrace.harness.run.observer import Observer
from tailrace.harness.run.preflight import Checked, check
from tailrace.harness.run.ruler import calibrate
from tailrace.harness.run.setup import TrialSetup, set_up
from tailrace.harness.run.trial import Trial
from tailrace.harness.servers.guardian import sweep
from tailrace.traces.trace import describe


def run_experiment(experiment: Experiment, folder: Path, observer: Observer) -> RunSummary:
    """Run a whole experiment into a new folder and return its summary (also written as ``summary.json``).

    A trial whose server fails is recorded as such and the others go on; afterwards :class:`TailraceError` tells of the
    first failure. :class:`KeyboardInterrupt` passes through once everything is stopped and what there is
    has been written.
    """
    if experiment.load is not None:
        raise InputError(
            "`load` asks for a search, and that is several runs", remedy="use `tailrace run` or `tailrace saturate`"
        )
    checked = check(experiment)
    cleaned = _clean(observer)
    # The manifest comes first, so that whatever stops the run leaves word of what it was to be.
    run = RunFolder.create(folder, _manifest(checked, cleaned))
    with run.held():
        return _carry_out(checked, run, observer)


def resume_run(folder: Path, observer: Observer) -> RunSummary:
    """Go on with a run that was killed, interrupted or cut off, and return the summary of the whole.

    Trials that are done stay as they are; those that had begun are moved to ``set-aside``, never deleted, and run again
    with their own seeds, as do those that never began. Raises :class:`InputError` when the run is complete or still
    going on, or when this is not the machine, the software or the experiment that it began with; otherwise ends as
    :func:`run_experiment` does.
    """
    run = RunFolder.open(folder)
    with run.held():
        run = RunFolder.open(folder)  # as it is now that nobody else writes to it
        if run.complete:
            raise InputError(
                f"{folder} is complete: all of its {len(run.manifest['trials'])} trials are done",
                remedy="make its report again with `tailrace report`, or start a new run",
            )
        checked = check(experiment_of(run))
        _refuse_other_conditions(run, checked)
        cleaned = _clean(observer)
        set_aside = _set_aside(run, observer)
        resumption = {"at": now(), "command": command_line(), "cleaned": cleaned, "set_aside": set_aside}
        run.amend_manifest(state="running", ended_at=None, resumed=[*run.manifest.get("resumed", []), resumption])
        return _carry_out(checked, run, observer)


def run_or_go_on(folder: Path, content: Mapping[str, Any], observer: Observer) -> RunFolder:
    """The run in ``folder``, to its end: as it is when it is complete, gone on with when it was cut off, and else a new one of
    the experiment ``content``. For what makes several runs and may itself be cut off between them. Raises
    :class:`InputError` when the run that is there was made of another experiment."""
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, Experiment, "the experiment"))) from error
    if not (folder / "manifest.json").is_file():
        run_experiment(experiment, folder, observer)
        return RunFolder.open(folder)
    run = RunFolder.open(folder)
    if run.manifest["experiment_sha256"] != experiment.sha256:
        raise InputError(
            f"{folder} holds a run of another experiment than the one that was asked for now",
            remedy="go on with the very command that it began with, or give --out another folder",
        )
    if not run.complete:
        resume_run(folder, observer)
    return RunFolder.open(folder)


def _clean(observer: Observer) -> list[str]:
    cleaned = sweep()
    for sentence in cleaned:
        observer.note(f"cleaned: {sentence}")
    return cleaned


def _carry_out(checked: Checked, run: RunFolder, observer: Observer) -> RunSummary:
    """Run what is not done yet, and analyse the whole."""
    for name, contestant in checked.contestants.items():
        if contestant.adapter.exposes:
            observer.note(f"{name}: {contestant.adapter.exposes}")
    for name, left_out in _left_out(checked).items():
        for reason in left_out.values():
            observer.note(f"{name} runs without it: {reason}")
    experiment = checked.experiment
    if experiment.nodes > 1 or experiment.supervision == "restart":
        after = (
            f"after {experiment.restart_backoff_s:g} s by the harness"
            if experiment.supervision == "restart"
            else "by nobody"
        )
        observer.note(f"nodes: {experiment.nodes}; one that dies is started again {after}")

    observer.note(size_in_words(checked))

    def tell(state: str) -> None:
        run.amend_manifest(ended_at=now(), state=state)
        if state != "done" and run.trials:
            write_summary(run)

    with ending(tell):
        setups = set_up(checked, observer.note)
        run.amend_manifest(**_provenance(run, setups))
        run.amend_manifest(ruler=_calibrate(checked, setups, run, observer))
        failures = []
        for position, setup in enumerate(setups, 1):
            if run.trial(setup.plan.id).settled:
                continue
            observer.trial_begins(setup.plan, position, len(setups), setup.duration_s)
            trial = Trial(setup, run.trial(setup.plan.id), observer)
            trial.run()
            if trial.facts.state == "failed" and trial.facts.error is not None:
                failures.append((setup.plan.id, trial.facts.error))
            observer.trial_ends(setup.plan, summarise_trial(run.trial(setup.plan.id), run.manifest["ruler"]))
    summary = write_summary(run)
    if failures:
        trial_id, first = failures[0]
        raise TailraceError(
            f"{len(failures)} of {len(setups)} trials failed; {trial_id}: {first.message}",
            remedy=first.remedy,
            detail=first.detail,
        )
    return summary


def size_in_words(checked: Checked) -> str:
    """How much an experiment is, for whoever is to wait for it."""
    trials, cells = len(checked.plans), len({plan.cell.id for plan in checked.plans})
    return (
        f"{trials} trials of {cells} cells: {checked.traffic_s / 60:.1f} min of traffic; "
        "starting and checking a server comes on top, for every trial"
    )


def experiment_of(run: RunFolder) -> Experiment:
    """The experiment of a run that began earlier, as its manifest holds it."""
    path, manifest = run.folder / "manifest.json", run.manifest
    try:
        experiment = Experiment.model_validate(manifest["experiment"])
    except ValidationError as error:
        raise InputError(
            "\n".join(explain(error, Experiment, f"{path}, `experiment`")),
            remedy=f"start a new run; this tailrace is {__version__}, that run began with {manifest['tailrace_version']}",
        ) from error
    if experiment.sha256 != manifest["experiment_sha256"]:
        raise InputError(
            f"{path}: the experiment is not the one that the run began with: its SHA-256 is {experiment.sha256:.12}…, "
            f"`experiment_sha256` is {manifest['experiment_sha256']:.12}…",
            remedy="restore the manifest, or start a new run; "
            f"this tailrace is {__version__}, that run began with {manifest['tailrace_version']}",
        )
    return experiment


def _conditions(manifest: dict[str, Any]) -> dict[str, Any]:
    """What all trials of a run must have in common, as far as it is known before environments and artifact are there."""
    return {
        "tailrace version": manifest["tailrace_version"],
        "git commit": (manifest["git"] or {}).get("commit"),
        "hardware": manifest["hardware"],
        "software": manifest["software"],
        "environment variable": manifest["environment_variables"],
        "workload": {key: value for key, value in manifest["workload"].items() if not key.endswith("_sha256")},
        "trace": manifest["trace"],
    }


def _refuse_other_conditions(run: RunFolder, checked: Checked) -> None:
    now = json.loads(json.dumps(_manifest(checked, [])))
    _refuse(run, _differences("", _conditions(run.manifest), _conditions(now)))


def _refuse(run: RunFolder, differences: list[str]) -> None:
    if differences:
        raise InputError(
            f"{run.folder} began under other conditions, and results of both must not mix in one run:\n"
            + "\n".join(differences),
            remedy="go on where and as it began (same machine, working directory, versions), or start a new run",
        )


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """One line for every fact that is not what it was when the run began, with both values."""
    return [f"{fact}: {_shown(a)} when it began, {_shown(b)} now" for fact, a, b in differences(name, then, now)]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _set_aside(run: RunFolder, observer: Observer) -> list[str]:
    """Move whatever had begun and is not done out of the way of what follows; returns where it is now."""
    begun = {trial["id"]: run.trial(trial["id"]) for trial in run.manifest["trials"]}
    unfinished = {name: trial.folder for name, trial in begun.items() if trial.folder.exists() and not trial.settled}
    for folder in sorted((run.folder / "calibration").glob("*")):
        if not _calibrated(run, folder.name):
            unfinished[f"calibration-{folder.name}"] = folder
    moved = []
    for name, folder in unfinished.items():
        moved.append(run.set_aside(folder, name))
        observer.note(f"set aside, for it had not ended: {folder.relative_to(run.folder)} is now {moved[-1]}")
    return moved


def _calibrated(run: RunFolder, protocol: str) -> bool:
    return "ceiling_rps" in run.manifest["ruler"].get(protocol, {})


def _calibrate(checked: Checked, setups: list[TrialSetup], run: RunFolder, observer: Observer) -> dict[str, Any]:
    """The generator's figures against the null server, by protocol. One that cannot be measured says why; its trials are
    UNKNOWN then, and not lost."""
    experiment, workload = checked.experiment, setups[0].workload
    rates = [offered_rates(trace.arrivals_ns, trace.span_s) for trace in checked.traces.values()]
    ruler: dict[str, Any] = {}
    for protocol in dict.fromkeys(setup.cell.protocol for setup in setups):
        if _calibrated(run, protocol):
            ruler[protocol] = run.manifest["ruler"][protocol]
            continue
        observer.note(f"calibrating the load generator ({protocol}) against the null server")
        try:
            ruler[protocol] = calibrate(
                run.folder / "calibration" / protocol,
                workload,
                protocol,
                mean_rate=max(mean for mean, _ in rates),
                peak_rate=max(peak for _, peak in rates),
                step_s=experiment.calibration.step_s,
                environment=experiment.own_interpreters,
                host=experiment.server_host,
                workers=load_workers(experiment.client),
                max_connections=experiment.client.max_connections,
                seed=experiment.seed,
                on_progress=observer.note,
            )
        except StorageError:
            raise
        except TailraceError as error:
            observer.note(f"the load generator could not be calibrated: {error.message}")
            ruler[protocol] = {"error": error.message}
    return ruler


def _left_out(checked: Checked) -> dict[str, dict[str, str]]:
    """Adapter → knob → why it runs without, over all scenarios; adapters that lack nothing are left out."""
    found: dict[str, dict[str, str]] = {}
    for cell in checked.cells.values():
        if cell.left_out:
            found.setdefault(cell.adapter, {}).update(cell.left_out)
    return found


def _manifest(checked: Checked, cleaned: list[str]) -> dict[str, Any]:
    experiment = checked.experiment
    first = checked.trace_of(checked.plans[0])
    return {
        "tailrace_version": __version__,
        "name": experiment.name,
        "state": "running",
        "started_at": now(),
        "ended_at": None,
        "command": command_line(),
        "experiment": experiment.model_dump(mode="json"),
        "experiment_sha256": experiment.sha256,
        "hardware": hardware(),
        "software": software(),
        "environment_variables": environment_variables(),
        "git": git_state(Path.cwd()),
        "adapters": {
            name: {
                **contestant.adapter.described(),
                "protocol": contestant.protocol,
                "options": contestant.options.model_dump(mode="json"),
                "left_out": _left_out(checked).get(name, {}),
                "observed": observations_of(contestant.adapter),
                "environment": experiment.environment,
                "packages": {},
            }
            for name, contestant in checked.contestants.items()
        },
        "workload": checked.workload.model_dump(mode="json"),
        "trace": {
            "name": first.name,
            "provenance": first.provenance,
            "description": describe(first).as_dict(),
        },
        "trials": [
            {
                "id": plan.id,
                "cell": plan.cell.id,
                "adapter": plan.cell.adapter,
                "scenario": plan.cell.scenario.name,
                "number": plan.number,
                "seed": plan.seed,
            }
            for plan in checked.plans
        ],
        "cleaned": cleaned,
        "resumed": [],
        "ruler": {},
    }


def _provenance(run: RunFolder, setups: list[TrialSetup]) -> dict[str, Any]:
    """What is known only once environments and artifact are there. Refuses others than the run began with."""
    adapters, workload = run.manifest["adapters"], run.manifest["workload"]
    packages = {setup.adapter.name: dict(setup.environment.packages) for setup in setups}
    pythons = {setup.adapter.name: setup.environment.interpreter for setup in setups}
    images = {setup.adapter.name: setup.environment.image for setup in setups}
    served = setups[0].workload
    with served.own_model_file.open("rb") as file:
        model_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    made = {"artifact_sha256": served.artifact_sha256, "model_sha256": model_sha256}
    if "artifact_sha256" in workload:
        then = {name: told["packages"] for name, told in adapters.items()}
        _refuse(
            run,
            _differences("packages of", then, packages)
            + _differences("image of", {name: told.get("image", "") for name, told in adapters.items()}, images)
            + _differences("artifact SHA-256", workload["artifact_sha256"], served.artifact_sha256)
            + _differences("SHA-256 of model.py", workload.get("model_sha256"), model_sha256),
        )
    return {
        "adapters": {
            name: {
                **told,
                "packages": packages[name],
                **({"python": pythons[name]} if pythons[name] else {}),
                **({"image": images[name]} if images[name] else {}),
            }
            for name, told in adapters.items()
        },
        "workload": {**workload, **made},
    }
