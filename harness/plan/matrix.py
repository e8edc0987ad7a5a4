"""Knobs and loads that are given as several values: the scenarios of an experiment, multiplied out before it is validated.

Whatever comes after sees scenarios with one value for each knob, so that a sweep is run, resumed, compared and reported
like any other experiment.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tailrace.harness.contract.adapter import Tuning
from tailrace.harness.errors import InputError

MAX_SCENARIOS = 2_000
MAX_VALUES = 1_000
"""Of one range."""
_RANGE = {"from", "to", "step", "factor"}


def multiplied_out(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The experiment ``content`` (as YAML gives it) with one scenario for each combination of the values that its knobs
    and loads have. A knob's values are a list, or a range: ``{from: 1, to: 16, factor: 2}``, ``{from: 0, to: 20, step: 5}``.
    ``load: {rates: […]}`` is the mean rate of every scenario. Raises :class:`InputError` that names file, key and remedy.
    """
    content = dict(content)
    load = content.get("load")
    searched = isinstance(load, dict) and "find" in load
    rates: list[float | None] = [] if searched else [*_rates(content.pop("load", None), where)]
    tuning = content.get("tuning")
    scenarios = content.get("scenarios", [{"name": "no-fault"}])
    if not isinstance(scenarios, list) or not all(isinstance(s, dict) and "name" in s for s in scenarios):
        return content  # what is wrong there is told by validation
    if not rates and not any(_swept(given) for given in (tuning, *(s.get("tuning") for s in scenarios))):
        return content
    expanded: list[dict[str, Any]] = []
    for number, scenario in enumerate(scenarios):
        own = scenario.get("tuning")
        knobs = (tuning if own is None else own) or {}
        key = "tuning" if own is None else f"scenarios.{number}.tuning"
        for chosen in _combinations(knobs, f"{where}: `{key}`"):
            for rate in rates or [None]:
                varied = {name: chosen[name] for name in chosen if _is_several(knobs[name])}
                name = ".".join([str(scenario["name"]), *words(varied, rate)])
                expanded.append({**scenario, "name": name})
                if chosen or isinstance(knobs, dict):
                    expanded[-1]["tuning"] = chosen
                if rate is not None:
                    expanded[-1]["mean_rate"] = rate
                if len(expanded) > MAX_SCENARIOS:
                    raise InputError(
                        f"{where}: the values of its knobs and loads multiply to more than {MAX_SCENARIOS:,} scenarios",
                        remedy="give fewer values, or let `tailrace tune` search",
                    )
    content["scenarios"] = expanded
    if isinstance(tuning, dict):
        content["tuning"] = {name: value for name, value in tuning.items() if not _is_several(value)}
    return content


def _swept(tuning: Any) -> bool:
    return isinstance(tuning, dict) and any(_is_several(value) for value in tuning.values())


def _is_several(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and bool(value) and value.keys() <= _RANGE)


def _combinations(tuning: Any, where: str) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each knob; one empty choice for a tuning that is a word or nothing."""
    if not isinstance(tuning, dict):
        yield {}
        return
    unknown = [knob for knob in tuning if knob not in Tuning.model_fields and _is_several(tuning[knob])]
    if unknown:
        raise InputError(f"{where}: there is no knob {unknown[0]!r}; known: {', '.join(Tuning.model_fields)}")
    values = [_values(value, f"{where}.{knob}") if _is_several(value) else [value] for knob, value in tuning.items()]
    for chosen in itertools.product(*values):
        yield dict(zip(tuning, chosen, strict=True))


def _values(several: Any, where: str) -> list[Any]:
    if isinstance(several, dict):
        return _range(several, where)
    if not several:
        raise InputError(f"{where} is an empty list", remedy="give at least one value, or leave the knob out")
    texts = [json.dumps(value, sort_keys=True, default=str) for value in several]
    if len(set(texts)) < len(texts):
        raise InputError(f"{where} holds a value twice", remedy="use `trials` to repeat")
    return list(several)


def _range(told: Mapping[str, Any], where: str) -> list[int | float]:
    example = "for example {from: 1, to: 16, factor: 2} or {from: 0, to: 20, step: 5}"
    numbers = [told.get(key) for key in ("from", "to", "step", "factor")]
    if any(value is not None and (isinstance(value, bool) or not isinstance(value, int | float)) for value in numbers):
        raise InputError(f"{where}: a range is made of numbers", remedy=example)
    first, last, step, factor = numbers
    if first is None or last is None or (step is not None and factor is not None):
        raise InputError(f"{where}: a range has `from` and `to`, and one of `step` and `factor`", remedy=example)
    if last < first or (step is not None and step <= 0) or (factor is not None and (factor <= 1 or first <= 0)):
        raise InputError(f"{where}: the range {dict(told)} never gets from its first value to its last", remedy=example)
    values = [first]
    while True:
        following = values[-1] * factor if factor is not None else first + len(values) * (1 if step is None else step)
        if following > last * (1 + 1e-12):
            return values
        values.append(following)
        if len(values) > MAX_VALUES:
            raise InputError(f"{where}: the range has more than {MAX_VALUES:,} values", remedy=example)


def _rates(load: Any, where: str) -> list[float]:
    if load is None:
        return []
    if not isinstance(load, dict) or load.keys() != {"rates"}:
        raise InputError(
            f"{where}: `load` has one key, `rates`, or `find` with its `slo`",
            remedy="for example load: {rates: [100, 200, 400]} or load: {find: saturation, slo: {p99_ms: 120}}",
        )
    rates = load["rates"]
    rates = _values(rates, f"{where}: `load.rates`") if _is_several(rates) else rates
    if not isinstance(rates, list) or not all(
        isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0 for rate in rates
    ):
        raise InputError(
            f"{where}: `load.rates` is {rates!r}: give arrivals/s above 0",
            remedy="for example load: {rates: [100, 200]}",
        )
    return [float(rate) for rate in rates]


def words(varied: Mapping[str, Any], rate: float | None) -> list[str]:
    """What tells a scenario from its siblings, fit for a folder's name: ``max_batch-16``, ``rate-40``."""
    told = [f"{knob}-{_word(value)}" for knob, value in varied.items()]
    return told if rate is None else [*told, f"rate-{rate:g}"]


def spoken(names: Iterable[str]) -> dict[str, str]:
    """The scenarios of one experiment by name, as people say them: ``no-fault.max_batch-16.rate-40`` is «max batch 16, 40/s»,
    after the name that was multiplied out where not all have the same."""
    parts = {name: _PART.split(name) for name in names}
    several = len({base for base, *_ in parts.values()}) > 1
    told = {}
    for name, (base, *settings) in parts.items():
        shown = [base] if base and (several or not settings) else []
        told[name] = ", ".join([*shown, *map(_spoken_setting, settings)])
    return told


_PART = re.compile(rf"(?:^|\.)(?=(?:{'|'.join([*Tuning.model_fields, 'target_ongoing', 'rate'])})-)")


def _spoken_setting(setting: str) -> str:
    name, _, value = setting.partition("-")
    return f"{value}/s" if name == "rate" else f"{name} {value}".replace("_", " ").replace("-", " ")


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}-{_word(inner)}" for key, inner in value.items())
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{value:g}" if isinstance(value, float) else str(value))
