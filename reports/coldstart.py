"""Cold starts as one self-contained HTML page: bars stacked by phase, what the first request costs, and every trial."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailrace.harness.run.coldstart import MODES, PHASES, REQUEST_FIGURES, SETTLING_REQUESTS, WARM_FACTOR, WARM_REQUESTS
from tailrace.reports import svg
from tailrace.reports.figures.drawing import Figure, Key
from tailrace.reports.page import render, write_page
from tailrace.reports.text import (
    NOTHING,
    bytes_size,
    count,
    interval,
    listing,
    milliseconds,
    printable,
    quantity,
    seconds,
)

STRENGTHS = {1: (1.0,), 2: (0.4, 1.0), 3: (0.3, 0.6, 1.0)}
"""How full a bar's colour is from its first segment to its last, by their number."""
_REQUEST_SEGMENTS = ("a warm request", "what the first one takes beyond it")
_ROW = 46

FIGURE_WORDS: Mapping[str, tuple[str, str, str]] = {
    "first_request_ms": (
        "First request",
        "ms",
        "service time of the first correct answer's request, connection included",
    ),
    "warm_request_ms": (
        "Warm request",
        "ms",
        f"median of {WARM_REQUESTS} requests sent one after the other, after {SETTLING_REQUESTS} more; same payload",
    ),
    "first_request_penalty_ms": ("Penalty", "ms", "first request − warm request"),
    "first_request_ratio": ("Ratio", "×", "first request ÷ warm request"),
    "warm_after_requests": (
        "Warm after",
        "requests",
        f"requests before the first one that took at most {WARM_FACTOR} times as long as a warm one",
    ),
    "lied_s": ("Lied", "s", "how long requests failed after the framework had said that it is ready"),
}


def write(record: Mapping[str, Any], folder: Path) -> Path:
    """Write ``coldstart.html`` beside the record, by rename, and return its path. Raises :class:`StorageError`."""
    return write_page(build(record, folder), folder / "coldstart.html")


def build(record: Mapping[str, Any], folder: Path) -> str:
    """The page for the content of a ``coldstart.json`` that lies in ``folder``; the same bytes for the same record."""
    view = _View(record, folder)
    return render(
        "coldstart.html.j2",
        title=f"Cold starts: {listing([view.title(name) for name in view.names])}",
        kicker=view.kicker(),
        lede=view.lede(),
        support=view.support(),
        how=MODES[record["mode"]],
        emulated=record["emulated"],
        planned=view.planned,
        begun=len(record["trials"]),
        cut_short=record["state"] != "done",
        failures=view.failures(),
        notes=view.notes(),
        figures=view.figures(),
        headings=view.headings(),
        rows=view.rows(),
        trial_rows=view.trial_rows(),
        meanings=[(title, meaning) for title, _, meaning in FIGURE_WORDS.values()],
        command=view.portable(shlex.join(record["command"])),
        machine=view.machine(),
        versions=view.versions(),
    )


@dataclass(frozen=True)
class _Bar:
    """A framework's bar: where its segments end, and every trial's value."""

    label: str
    slot: int
    ends: tuple[float, ...]
    marks: tuple[tuple[float, str], ...]
    """Value, and the trial in words."""
    told: str
    """The whole bar in words."""


class _View:
    """What the page says, by a record."""

    def __init__(self, record: Mapping[str, Any], folder: Path) -> None:
        self.record = record
        self.names = list(record["adapters"])
        self.planned = record["trials_per_adapter"] * len(self.names)
        self.phases = PHASES[record["mode"]]
        self._slots = svg.slots(self.names)
        self._folder = str(folder.absolute())

    def title(self, name: str) -> str:
        return printable(str(self.record["adapters"][name]["title"]))

    def portable(self, text: str) -> str:
        """Without what a moved folder, or its owner's name, would change."""
        return text.replace(self._folder, "RUN").replace(f"{Path.home()}/", "~/")

    def kicker(self) -> list[str]:
        workload, replicas = self.record["workload"], self.record["replicas"]
        return [workload["title"], count(replicas, "replica"), f"mode {self.record['mode']}"]

    def _known(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The frameworks of which a start succeeded, with their figures."""
        return [(name, self.record["summary"][name]) for name in self.names if self.record["summary"][name]["done"]]

    def lede(self) -> str:
        known = sorted(self._known(), key=lambda item: item[1]["since_start"]["first_answer_s"]["median"])
        if not known:
            return "No start came to its end."
        told = [f"{self.title(n)} {seconds(s['since_start']['first_answer_s']['median'])}" for n, s in known]
        since = "the model was to be loaded" if self.record["mode"] == "model" else "the process was started"
        return f"Until the first correct answer since {since}, in the median: {listing(told)}."

    def support(self) -> list[str]:
        known = self._known()
        told = [f"{self.title(name)} {quantity(s['first_request_ratio']['median'])}×" for name, s in known]
        sentences = [f"The first request took, against a warm one: {listing(told)}."] if told else []
        for name in self.names:
            starts = [trial for trial in self.record["trials"] if trial["adapter"] == name]
            lied = [trial for trial in starts if trial.get("failed_answers")]
            if lied:
                longest = seconds(max(trial["lied_s"] for trial in lied))
                sentences.append(
                    f"{self.title(name)} said that it was ready, and then failed requests, in {len(lied)} of "
                    f"{count(len(starts), 'start')}, for {longest} at the longest."
                )
        return sentences

    def notes(self) -> list[tuple[str, str]]:
        """What adapters say of their starts, once each: framework and sentence."""
        told = {(trial["adapter"], note): None for trial in self.record["trials"] for note in trial.get("notes", ())}
        return [(self.title(name), self.portable(note)) for name, note in told]

    def failures(self) -> list[tuple[str, str, str, str]]:
        """Trial, message, remedy and evidence."""
        told = []
        for trial in [*self.record["rehearsals"], *self.record["trials"]]:
            if error := trial["error"]:
                message, remedy, detail = (self.portable(error[key] or "") for key in ("message", "remedy", "detail"))
                told.append((f"{self.title(trial['adapter'])}, {_number(trial)}", message, remedy, detail))
        return told

    # ---- figures

    def figures(self) -> list[Figure]:
        known = self._known()
        if not known:
            return []
        note = "Bars: the median of the instants at which each phase ended. Thin marks: the first correct answer of each start."
        return [
            _drawn(
                "Time to the first correct answer",
                [self._start_bar(name, summary) for name, summary in known],
                list(self.phases.values()),
                seconds,
                "seconds since " + ("the load began" if self.record["mode"] == "model" else "the process was started"),
                emulated=self.record["emulated"],
                note=note,
                name="phases",
            ),
            _drawn(
                "The first request against a warm one",
                [self._request_bar(name, summary) for name, summary in known],
                _REQUEST_SEGMENTS,
                milliseconds,
                "milliseconds",
                emulated=self.record["emulated"],
                note="Bars: medians over the starts. Thin marks: the first request of each start.",
                name="requests",
            ),
        ]

    def _done(self, name: str) -> list[Mapping[str, Any]]:
        return [t for t in self.record["trials"] if t["adapter"] == name and t["state"] == "done"]

    def _start_bar(self, name: str, summary: Mapping[str, Any]) -> _Bar:
        since = summary["since_start"]
        marks = []
        for trial in self._done(name):
            took = ", ".join(f"{words} {seconds(trial['phases'][key])}" for key, words in self.phases.items())
            at_s = trial["since_start"]["first_answer_s"]
            marks.append((at_s, f"{self.title(name)}, {_number(trial)}: {seconds(at_s)} ({took})"))
        ends = tuple(since[key]["median"] for key in self.phases)
        steps = ", ".join(f"{words} at {seconds(end)}" for words, end in zip(self.phases.values(), ends, strict=True))
        return _Bar(self.title(name), self._slots[name], ends, tuple(marks), steps)

    def _request_bar(self, name: str, summary: Mapping[str, Any]) -> _Bar:
        warm, first = (summary[key]["median"] for key in ("warm_request_ms", "first_request_ms"))
        marks = [
            (t["first_request_ms"], f"{self.title(name)}, {_number(t)}: {milliseconds(t['first_request_ms'])}")
            for t in self._done(name)
        ]
        told = f"a warm request {milliseconds(warm)}, the first one {milliseconds(first)}"
        # A first request that was no slower has nothing to show beyond the warm one.
        return _Bar(self.title(name), self._slots[name], (warm, max(warm, first)), tuple(marks), told)

    # ---- tables

    def headings(self) -> list[tuple[str, str]]:
        """Title and unit of each column of the figures' table."""
        phases = [(words[0].upper() + words[1:], "s") for words in self.phases.values()]
        return [*phases, ("In all", "s"), *((title, unit) for title, unit, _ in FIGURE_WORDS.values())]

    def rows(self) -> list[tuple[str, int, str, list[tuple[str, str]]]]:
        """Framework, colour, starts, and each figure: the median, and what is known of its spread."""
        rows = []
        for name in self.names:
            summary = self.record["summary"][name]
            figures = [(NOTHING, "")] * len(self.headings())
            if summary["done"]:
                spreads = {**summary["phases"], "all": summary["since_start"]["first_answer_s"]}
                spreads |= {key: summary[key] for key in REQUEST_FIGURES}
                figures = [(_shown(key, told["median"]), _spread(key, told)) for key, told in spreads.items()]
            rows.append((self.title(name), self._slots[name], f"{summary['done']} of {summary['trials']}", figures))
        return rows

    def trial_rows(self) -> list[list[str]]:
        """Every trial, in the order in which they ran, rehearsals first."""
        rows = []
        for trial in [*self.record["rehearsals"], *self.record["trials"]]:
            phases, since = trial.get("phases", {}), trial.get("since_start", {})
            values = {key: phases.get(key) for key in self.phases} | {"all": since.get("first_answer_s")}
            values |= {key: trial.get(key) for key in REQUEST_FIGURES}
            rows.append(
                [
                    f"{self.title(trial['adapter'])}, {_number(trial)}",
                    trial["state"],
                    *(_shown(key, value) for key, value in values.items()),
                    bytes_size(trial.get("page_cache_bytes")),
                    quantity(trial.get("load_average_1m")),
                    trial["server"],
                ]
            )
        return rows

    def machine(self) -> list[tuple[str, str]]:
        told = self.record["hardware"]
        return [
            ("CPU", str(told["cpu_model"])),
            ("CPUs", str(told["cpu_count"])),
            ("Memory", bytes_size(told["memory_bytes"])),
            ("GPUs", ", ".join(told["gpus"]) or "none"),
            ("Kernel", str(told["kernel"])),
            ("System", str(told["os"])),
            ("Started", str(self.record["started_at"])),
            ("Ended", str(self.record["ended_at"])),
            ("Seed", str(self.record["seed"])),
        ]

    def versions(self) -> list[tuple[str, str]]:
        git = self.record["git"] or {}
        commit = f"{git.get('commit', NOTHING)}{' with uncommitted changes' if git.get('dirty') else ''}"
        return [
            ("tailrace", str(self.record["tailrace_version"])),
            ("commit", commit),
            *((name, str(version)) for name, version in self.record["software"].items()),
            *((f"${name}", value) for name, value in self.record["environment_variables"].items()),
        ]


def _number(trial: Mapping[str, Any]) -> str:
    return f"trial {trial['number']}" if trial["number"] else "not measured"


def _shown(key: str, value: float | None) -> str:
    return f"{value:g}" if key == "warm_after_requests" and value is not None else quantity(value)


def _spread(key: str, told: Mapping[str, Any]) -> str:
    ends = f"{_shown(key, told['min'])} to {_shown(key, told['max'])}"
    return f"{ends} {interval(told['interval'])}".strip()


def _drawn(
    title: str,
    bars: Sequence[_Bar],
    segments: Sequence[str],
    words: Callable[[float], str],
    axis: str,
    *,
    emulated: bool,
    note: str,
    name: str,
) -> Figure:
    """Horizontal bars in the frameworks' colours, pale to full by segment, with a thin mark for each trial."""
    height = 18 + _ROW * len(bars) + 34
    strengths = STRENGTHS[len(segments)]
    tips: dict[str, str] = {}
    with svg.style():
        canvas = svg.new_figure(height)
        ax = canvas.add_axes((0.02, 34 / height, 0.955, _ROW * len(bars) / height))
        ax.grid(False)
        ax.grid(True, axis="x")
        for row, bar in enumerate(bars):
            begin = 0.0
            for end, strength in zip(bar.ends, strengths, strict=True):
                ax.barh(row, end - begin, left=begin, height=0.34, color=svg.colour(bar.slot), alpha=strength, lw=0)
                begin = end
            for index, (value, told) in enumerate(bar.marks):
                (mark,) = ax.plot([value, value], [row + 0.08, row + 0.34], color=svg.INK, lw=1.1)
                mark.set_gid(f"tip-{name}-{row}-{index}")
                tips[f"tip-{name}-{row}-{index}"] = told
            ax.text(0, row - 0.27, f"{bar.label}  {words(bar.ends[-1])}", fontsize=12.5, va="bottom", ha="left")
        ax.set_ylim(len(bars) - 0.5, -0.72)
        ax.set_xlim(0, max(max(bar.ends[-1], *(value for value, _ in bar.marks)) for bar in bars) * 1.02)
        ax.set_yticks([])
        ax.set_xlabel(axis + (" (emulated)" if emulated else ""), labelpad=2)
        alt = f"{title}. " + " ".join(f"{bar.label}: {bar.told}." for bar in bars)
        drawn = svg.inline(canvas, name=name, alt=alt, tooltips=tips)
    keys = tuple(Key(word, None, "area", strength=strength) for word, strength in zip(segments, strengths, strict=True))
    return Figure(title, drawn, keys, note)
