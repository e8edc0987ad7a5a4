"""What it takes to run it again: command, experiment, seeds, versions, machine, configuration, knobs, events."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import unified_diff
from pathlib import Path
from typing import Any

import yaml

from tailrace.harness.contract.adapter import NODE_NAME
from tailrace.harness.plan.matrix import spoken
from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.store import RunFolder, TrialFolder
from tailrace.reports.evidence import RunView
from tailrace.reports.text import NOTHING, bytes_size, listing, sources

MAX_FILE_CHARACTERS = 20_000
MAX_EVENTS = 100
"""Per trial; all of them are in ``events.jsonl``."""
Rows = list[tuple[str, ...]]
_UNREPORTED = "not reported"


@dataclass(frozen=True)
class ConfigFile:
    """A rendered configuration file, shown once for all trials that had the very same."""

    adapter: str
    name: str
    text: str
    """The whole of it; of one that other trials had otherwise, what is different (unified diff)."""
    trials: tuple[str, ...]
    against: str = ""
    """A trial that had the other one; empty where the text is whole."""


@dataclass(frozen=True)
class AdapterFacts:
    """How one framework was configured."""

    title: str
    homepage: str
    environment: str
    capabilities: str
    exports: str
    """What its servers ran in place of the workload's ``model.py``; empty: that."""
    packages: str
    knobs: Rows
    """Neutral knob, asked for, native key, as the server reports it; or the reason why there is no place for it. As in
    :attr:`scenario`."""
    scenario: str
    """As people say it; empty when nothing ran."""


@dataclass(frozen=True)
class Reproduce:
    """The section's content for one run; texts are plain and not yet escaped."""

    title: str
    command: str
    experiment: str
    machine: Rows
    versions: Rows
    trace: str
    workload: str
    adapters: list[AdapterFacts]
    knobs: Rows
    """Neutral knob, and for each framework where it lands and what the server then reports: what differs stands side by
    side. Empty with fewer than two frameworks."""
    configs: list[ConfigFile]
    trials: Rows
    """Trial, seed, state, outputs checked, mismatched, unchecked, raw files."""
    events: list[tuple[str, Rows, int]]
    """Trial, its events (time, event, details), and how many were left out."""
    cleaned: list[str]


def reproduce(run: RunView) -> Reproduce:
    """Collect it for one run; whatever a killed run lacks is left out."""
    manifest = run.manifest
    hardware = manifest.get("hardware") or {}
    software = manifest.get("software") or {}
    git = manifest.get("git") or {}
    trials = run.folder.trials
    portable = Portable(run.folder)
    machine: Rows = [
        ("CPU", str(hardware.get("cpu_model", NOTHING))),
        ("CPUs", str(hardware.get("cpu_count", NOTHING))),
        ("Memory", bytes_size(hardware.get("memory_bytes"))),
        ("GPUs", ", ".join(map(str, hardware.get("gpus") or [])) or "none"),
        ("Kernel", str(hardware.get("kernel", NOTHING))),
        ("System", str(hardware.get("os", NOTHING))),
        ("Started", str(manifest.get("started_at") or NOTHING)),
        ("Ended", str(manifest.get("ended_at") or "never: the run was cut short")),
        *(("Gone on with", str(again.get("at") or NOTHING)) for again in manifest.get("resumed") or []),
    ]
    commit = f"{git.get('commit', '')}{' with uncommitted changes' if git.get('dirty') else ''}"
    versions: Rows = [
        ("tailrace", str(manifest.get("tailrace_version", NOTHING))),
        ("commit", commit or NOTHING),
        *((str(name), str(version)) for name, version in software.items()),
        *((f"${name}", str(value)) for name, value in (manifest.get("environment_variables") or {}).items()),
        ("experiment SHA-256", str(manifest.get("experiment_sha256", NOTHING))),
    ]
    adapters = [_adapter(run, name, trials) for name in manifest["experiment"]["adapters"]]
    return Reproduce(
        title=run.title,
        command=portable(shlex.join(map(str, manifest.get("command") or []))),
        experiment=_yaml(manifest["experiment"]),
        machine=machine,
        versions=versions,
        trace=portable(_yaml(manifest.get("trace") or {})),
        workload=portable(_yaml(manifest.get("workload") or {})),
        adapters=adapters,
        knobs=_side_by_side(adapters),
        configs=_configs(trials, portable),
        trials=[_trial(trial) for trial in trials],
        events=[_events(trial, portable) for trial in trials],
        cleaned=[portable(str(what)) for what in manifest.get("cleaned") or []],
    )


class Portable:
    """Replaces the run's own folder by RUN, wherever it lay when it was written, and home folders by ``~``: a moved run
    gives the same report, and shows nobody's name."""

    def __init__(self, run: RunFolder) -> None:
        self._paths = sorted({str(run.folder.resolve()), str(run.folder.absolute())}, key=len, reverse=True)
        trials = "|".join(re.escape(str(trial["id"])) for trial in run.manifest["trials"])
        self._elsewhere = re.compile(rf"/[^\s\"'`=,;:<>()\[\]]*/trials/(?=(?:{trials})(?![\w.-]))")

    def __call__(self, text: str) -> str:
        for path in self._paths:
            text = text.replace(path, "RUN")
        return _HOME.sub("~", self._elsewhere.sub("RUN/trials/", text))


_HOME = re.compile(r"(?<![\w.~-])/(?:home/[^/\s]+|root)(?=/)")


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def _adapter(run: RunView, name: str, trials: list[TrialFolder]) -> AdapterFacts:
    told: Mapping[str, Any] = (run.manifest.get("adapters") or {}).get(name) or {}
    own = [trial.facts for trial in trials if trial.facts.adapter == name]
    # A scenario may run on the defaults: the first one with the most knobs tells where they land, for all frameworks alike.
    order = [scenario["name"] for scenario in run.manifest["experiment"]["scenarios"]]
    own.sort(key=lambda facts: (-_knobs_set(facts), order.index(facts.scenario)))
    asked = next((facts.tuning for facts in own if facts.tuning), None)
    if asked is None:
        asked = run.manifest["experiment"].get("tuning") or {}
    applied: Mapping[str, Any] = next((facts.applied for facts in own if facts.applied), {})
    knobs: Rows = [
        (knob, _chosen(asked.get(knob)), str(native), str(applied.get(knob, _UNREPORTED)))
        for knob, native in (told.get("knobs") or {}).items()
    ]
    knobs += [
        (knob, _chosen(asked.get(knob)), f"no place for it: {reason}", NOTHING)
        for knob, reason in (told.get("refused") or {}).items()
    ]
    homepage = str(told.get("homepage") or "")
    packages = told.get("packages") or {}
    return AdapterFacts(
        title=str(told.get("title") or name),
        homepage=homepage if homepage.startswith(("https://", "http://")) else "",
        environment=str(told.get("environment", NOTHING)),
        capabilities=", ".join(map(str, told.get("capabilities") or [])) or "none",
        exports=listing(sorted({str(kind) for facts in own if (kind := facts.artifact) != "python"})),
        packages=sources(dict(sorted(packages.items()))) if packages else "",
        knobs=knobs,
        scenario=spoken(order)[own[0].scenario] if own else "",
    )


def _knobs_set(facts: TrialFacts) -> int:
    return sum(value is not None for value in facts.tuning.values())


def _side_by_side(adapters: list[AdapterFacts]) -> Rows:
    if len(adapters) < 2:
        return []
    told = [{knob: (asked, native, applied) for knob, asked, native, applied in one.knobs} for one in adapters]
    rows: Rows = []
    for knob in dict.fromkeys(knob for own in told for knob in own):
        cells = []
        for own in told:
            asked, native, applied = own.get(knob, (NOTHING, NOTHING, NOTHING))
            reported = "" if applied in (_UNREPORTED, asked) else f", and the server reports {applied}"
            cells.append(native if applied == NOTHING else f"{native}: {asked}{reported}")
        rows.append((knob, *cells))
    return rows


def _chosen(value: Any) -> str:
    return "framework's default" if value is None else str(value)


def _configs(trials: list[TrialFolder], portable: Portable) -> list[ConfigFile]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for trial in trials:
        for name, path in _configured(trial.server):
            content = _read(path)
            if "\0" in content:
                continue  # what a server compiled or cached there is no configuration
            text = _own_names(portable(content), trial)
            found.setdefault((trial.facts.adapter, name, text), []).append(trial.id)
    return _as_differences([ConfigFile(*what, tuple(ids)) for what, ids in found.items()])


def _as_differences(configs: list[ConfigFile]) -> list[ConfigFile]:
    """The first of every file as it is, and the others by what they have otherwise."""
    first: dict[tuple[str, str], ConfigFile] = {}
    told = []
    for config in sorted(configs, key=lambda config: (config.adapter, config.name)):
        base = first.setdefault((config.adapter, config.name), config)
        told.append(config if config is base else _difference(base, config))
    return told


def _difference(base: ConfigFile, config: ConfigFile) -> ConfigFile:
    lines = unified_diff(
        base.text.splitlines(), config.text.splitlines(), base.trials[0], config.trials[0], n=1, lineterm=""
    )
    return replace(config, text="\n".join(lines), against=base.trials[0])


def _configured(server: Path) -> list[tuple[str, Path]]:
    """The files of a trial's configurations: of several nodes, which are configured alike, those of the first, and the load
    balancer's."""
    folders = {"": server / "config", "load-balancer/": server / "balancer"}
    if not folders[""].is_dir():
        folders[""] = server / NODE_NAME.format(index=0) / "config"
    return [
        (prefix + path.relative_to(folder).as_posix(), path)
        for prefix, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    ]


def _own_names(text: str, trial: TrialFolder) -> str:
    """Configurations of trials may differ in the path of their own folder alone; then they are shown as one."""
    return text.replace(f"RUN/trials/{trial.id}", "TRIAL")


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as handle:
            text = handle.read(MAX_FILE_CHARACTERS + 1)
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
    return (
        text if len(text) <= MAX_FILE_CHARACTERS else text[:MAX_FILE_CHARACTERS] + "\n… (the rest is in the run folder)"
    )


def _trial(trial: TrialFolder) -> tuple[str, ...]:
    facts = trial.facts
    compared = facts.outputs
    counts = (NOTHING,) * 3 if compared is None else (compared.checked, compared.mismatched, compared.unchecked)
    names = ("requests.parquet", "requests.arrow", "samples.parquet", "samples.arrow", "events.jsonl", "server")
    there = [name for name in names if (trial.folder / name).exists()]
    return (
        trial.id,
        str(facts.seed),
        facts.state,
        *map(str, counts),
        f"trials/{trial.id}/ {', '.join(there)}",
    )


def _events(trial: TrialFolder, portable: Portable) -> tuple[str, Rows, int]:
    rows: Rows = []
    for event in trial.events[:MAX_EVENTS]:
        details = {k: v for k, v in event.items() if k not in ("t_ns", "mono_ns", "event")}
        when = f"{event['t_ns'] / 1e9:.3f}" if "t_ns" in event else NOTHING
        rows.append((when, str(event.get("event", "")), portable(sources(details))))
    return trial.id, rows, max(0, len(trial.events) - MAX_EVENTS)
