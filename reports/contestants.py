"""Who raced: what each framework is said to be, what was seen of it on that machine, and which knobs it ran without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tailrace.harness.contract.observations import TOPICS
from tailrace.reports.evidence import RunView
from tailrace.reports.text import NOTHING, listing, printable

UNSEEN = "nothing: the contract suite has not run here"


def profiles(views: Sequence[RunView]) -> list[tuple[str, str, str, str]]:
    """Framework, topic, what its adapter claims, what was seen: one row for each topic of which there is anything to say."""
    rows: dict[tuple[str, str, str, str], None] = {}
    for run in views:
        for told in _adapters(run):
            observed = told.get("observed") or {}
            seen: dict[str, list[str]] = {}
            for observation in observed.get("observations") or []:
                seen.setdefault(str(observation["axis"]), []).append(str(observation["text"]))
            for axis, title in TOPICS.items():
                claim = str((told.get("traits") or {}).get(axis) or "")
                if claim or axis in seen:
                    shown = "; ".join(seen.get(axis, [])) or (NOTHING if observed else UNSEEN)
                    rows[(_title(told), title, claim or NOTHING, shown)] = None
    return list(rows)


def left_out(views: Sequence[RunView]) -> list[str]:
    """A sentence for each framework that ran without a knob that was asked for."""
    sentences: dict[str, None] = {}
    for run in views:
        for told in _adapters(run):
            if reasons := told.get("left_out"):
                knobs = listing([f"«{knob}»" for knob in reasons])
                why = "; ".join(
                    dict.fromkeys(str(reason).partition(": ")[2] or str(reason) for reason in reasons.values())
                )
                sentences[f"{_title(told)} ran without {knobs}, for which it has no place: {why}."] = None
    return list(sentences)


def _adapters(run: RunView) -> list[Mapping[str, Any]]:
    told = run.manifest.get("adapters") or {}
    return [{"title": name, **(told.get(name) or {})} for name in run.manifest["experiment"]["adapters"]]


def _title(told: Mapping[str, Any]) -> str:
    return printable(str(told["title"]))
