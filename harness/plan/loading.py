"""Reads experiments: built-in ones by name, files by path, with what the command line changes in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tailrace.harness.errors import InputError, nearest
from tailrace.harness.plan.experiment import Experiment
from tailrace.harness.plan.keys import explain
from tailrace.harness.plan.matrix import multiplied_out


def load_experiment(
    source: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    trace: str | None = None,
    assignments: Sequence[str] = (),
) -> Experiment:
    """Read a built-in experiment by name, or a YAML file by path.

    ``overrides`` replace top-level keys (command-line options); ``trace`` replaces the trace's name and leaves behind
    what belongs to the former trace (``params``, ``window_s``); ``assignments`` are ``key.sub=value`` texts (``--set``),
    values in YAML. Raises :class:`InputError` that names the file, the key and the remedy.
    """
    path = find_experiment(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: an experiment is a mapping of keys, this is a {type(content).__name__}")
    content.update(overrides or {})
    if overrides and "adapters" in overrides and isinstance(content.get("options"), dict):
        # Options of an adapter that was not chosen have nothing to say.
        content["options"] = {k: v for k, v in content["options"].items() if k in overrides["adapters"]}
    if overrides and "adapters" in overrides and isinstance(content.get("scenarios"), list):
        content["scenarios"] = list(_narrowed(content["scenarios"], overrides["adapters"]))
    if trace is not None:
        former = content.get("trace")
        kept = {k: v for k, v in former.items() if k not in ("params", "window_s")} if isinstance(former, dict) else {}
        content["trace"] = {**kept, "name": trace}
    for assignment in assignments:
        assign(content, assignment)
    content = multiplied_out(content, str(path))
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, Experiment, str(path)))) from error


def _narrowed(scenarios: Sequence[Any], chosen: Sequence[str]) -> Iterator[Any]:
    """The scenarios without the adapters that were not chosen, and without those that were for none of the chosen."""
    for scenario in scenarios:
        named = scenario.get("adapters") if isinstance(scenario, dict) else None
        if not isinstance(named, list):
            yield scenario
        elif kept := [name for name in named if name in chosen]:
            yield {**scenario, "adapters": kept}


def builtin_experiments() -> dict[str, Path]:
    """The experiments that come with tailrace, by name."""
    from tailrace import experiments

    folder = Path(experiments.__path__[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_experiment(source: str) -> Path:
    """The file of a built-in name or a path."""
    builtin = builtin_experiments()
    if source in builtin:
        return builtin[source]
    path = Path(source)
    if path.is_file():
        return path
    near = nearest(source, builtin)
    raise InputError(
        f"there is no experiment {source!r}: neither a file nor one of {', '.join(builtin)}",
        remedy=f"did you mean {near!r}?" if near else "give the path of a YAML file, or one of the names above",
    )


def assign(content: dict[str, Any], assignment: str) -> None:
    """Set one key, ``key.sub=value``, in what was read from YAML. Raises :class:`InputError` that quotes the assignment."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise InputError(f"--set {assignment!r}: write it as key=value, for example --set trials=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {assignment!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    place: Any = content
    for depth, parent in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(place, list):
            place = place[_index(place, parent, assignment)]
            continue
        if not isinstance(place, dict):
            raise InputError(
                f"--set {assignment!r}: {'.'.join(parents[:depth])} is {place!r}, which has no keys of its own"
            )
        inner = place.get(parent)
        if parent == "trace" and isinstance(inner, str):
            inner = {"name": inner}
        if parent == "tuning" and inner == "defaults":
            inner = {}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict | list):
            raise InputError(f"--set {assignment!r}: {where} is {inner!r}, which has no keys of its own")
        place[parent] = inner
        place = inner
    if isinstance(place, list):
        place[_index(place, last, assignment)] = value
    elif not isinstance(place, dict):
        raise InputError(f"--set {assignment!r}: {'.'.join(parents)} is {place!r}, which has no keys of its own")
    else:
        place[last] = value


def _index(place: list[Any], text: str, assignment: str) -> int:
    if not text.isdigit() or int(text) >= len(place):
        raise InputError(f"--set {assignment!r}: {text!r} is no index of a list of {len(place)} (they count from 0)")
    return int(text)
