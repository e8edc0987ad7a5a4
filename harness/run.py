"""A run: check the experiment, write the manifest, run the trials in their interleaved order, analyse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import __version__
from harness.errors import TailraceError
from harness.guardian import sweep
from harness.machine import command_line, environment_variables, git_state, hardware, software
from harness.observer import Observer
from harness.preflight import Checked, check, set_up
from harness.spec import Experiment
from harness.store import RunFolder
from harness.summary import Summary, summarise_trial, write_summary
from harness.trial import Trial, TrialSetup
from traces.statistics import describe


def default_folder(experiment: Experiment) -> Path:
    """``results/NAME-TIME`` below the working directory."""
    return Path("results") / f"{experiment.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def run_experiment(experiment: Experiment, folder: Path, observer: Observer) -> Summary:
    """Run a whole experiment into a new folder and return its summary (also written as ``summary.json``).

    A trial whose server fails is recorded as such and the others go on; afterwards :class:`TailraceError` tells of the
    first failure. :class:`KeyboardInterrupt` passes through once everything is stopped and what there is
    has been written.
    """
    checked = check(experiment)
    cleaned = sweep()
    for sentence in cleaned:
        observer.note(f"cleaned: {sentence}")
    for name, contestant in checked.contestants.items():
        if contestant.adapter.exposes:
            observer.note(f"{name}: {contestant.adapter.exposes}")
    # The manifest comes first, so that whatever stops the run leaves word of what it was to be.
    run = RunFolder.create(folder, _manifest(checked, cleaned))
    with _closing(run):
        setups = set_up(checked, observer.note)
        run.amend_manifest(**_provenance(run.manifest, setups))
        failures = []
        for position, setup in enumerate(setups, 1):
            observer.trial_begins(setup.plan, position, len(setups), setup.duration_s)
            trial = Trial(setup, run.trial(setup.plan.id), observer)
            trial.run()
            if trial.facts["state"] == "failed":
                failures.append(trial.facts)
            observer.trial_ends(setup.plan, summarise_trial(run.trial(setup.plan.id)))
    summary = write_summary(run)
    if failures:
        first = failures[0]
        raise TailraceError(
            f"{len(failures)} of {len(setups)} trials failed; {first['id']}: {first['error']['message']}",
            remedy=first["error"]["remedy"],
            detail=first["error"]["detail"],
        )
    return summary


@contextlib.contextmanager
def _closing(run: RunFolder) -> Iterator[None]:
    """However the trials end, the manifest says when, and what there is gets a summary."""
    state = "failed"
    try:
        yield
        state = "done"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        # Whatever ended the run is being raised; a disk that is full now must not hide it.
        with contextlib.suppress(TailraceError):
            run.amend_manifest(ended_at=_now(), state=state)
            if state != "done" and run.trials:
                write_summary(run)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _manifest(checked: Checked, cleaned: list[str]) -> dict[str, Any]:
    experiment = checked.experiment
    first = checked.traces[checked.plans[0].seed]
    return {
        "tailrace_version": __version__,
        "name": experiment.name,
        "state": "running",
        "started_at": _now(),
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
                "title": contestant.adapter.title,
                "homepage": contestant.adapter.homepage,
                "protocol": contestant.protocol,
                "options": contestant.options.model_dump(mode="json"),
                "knobs": dict(contestant.adapter.knobs),
                "refused": dict(contestant.adapter.refused),
                "capabilities": contestant.adapter.capabilities(),
                "exposes": contestant.adapter.exposes,
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
    }


def _provenance(manifest: dict[str, Any], setups: list[TrialSetup]) -> dict[str, Any]:
    """What is known only once environments and artifact are there."""
    adapters, workload = manifest["adapters"], manifest["workload"]
    for setup in setups:
        adapters[setup.adapter.name]["packages"] = dict(setup.environment.packages)
    workload["artifact_sha256"] = setups[0].workload.artifact_sha256
    return {"adapters": adapters, "workload": workload}
