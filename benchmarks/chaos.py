"""The harness killed at random instants: whether anything is left, and whether the run goes on.

`python benchmarks/chaos.py`: a short run of the `default` experiment, with faults of every kind that stops, slows or cuts
something off, is begun again and again and its harness killed (SIGKILL, to its process alone). After each kill nothing of
it may be left, `tailrace report` must work on what there is, and `tailrace run --resume` must end the run. Exit code 1
when any of this fails. Nothing else of tailrace may run on this machine meanwhile, for its files would be taken for ours.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from ending import leave
from tailrace.harness.cgroups import cpu_root
from tailrace.harness.cgroups import refusal as cgroup_refusal
from tailrace.harness.errors import TailraceError
from tailrace.harness.processes import ProcessRef
from tailrace.harness.records.store import RunFolder

MARKER = "TAILRACE_CHAOS"
"""An environment variable that everything a run starts inherits."""
KINDS = ("kill_replica", "pause_replica", "pause_node", "partition")
PATIENCE_S = 60.0
"""How long what a kill leaves has time to go: a guardian waits for processes that the kernel ends slowly."""
SHARE = 0.9
"""Kills fall into this share of a run's length: in the rest one that is a little faster would have ended."""
_POLL_S = 0.1


@dataclass
class Kill:
    """One kill, and what came after it."""

    adapter: str
    at_s: float
    during: str
    cleaned_s: float
    """How long it took until nothing was left."""
    left: list[str]
    failures: list[str] = field(default_factory=list)
    resumed: str = "–"

    @property
    def ok(self) -> bool:
        """Whether nothing was left and the run went on."""
        return not self.left and not self.failures


class Victim:
    """Short runs of one adapter, each in a folder of its own below ``folder``."""

    def __init__(self, adapter: str, folder: Path) -> None:
        self.adapter = adapter
        self._folder = folder
        self._state = folder / "state"
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)
        self._marker = secrets.token_hex(8)
        self._environment = {
            **os.environ,
            MARKER: self._marker,
            "TAILRACE_STATE": str(self._state),
            "TMPDIR": str(self._temporary),
        }
        kinds = [*KINDS, *([] if cgroup_refusal() else ["slow_node"])]
        faults = {"name": "faults", "faults": {"rate": "1/s", "kinds": kinds, "duration_s": 1}}
        trace = {"name": "steady", "params": {"rate": 60, "duration_s": 6}}
        self._experiment = [
            *("default", "--adapter", adapter, "--set", "warmup.duration_s=1", "--set", "calibration.step_s=0.1"),
            *(
                "--set",
                f"trace={json.dumps(trace)}",
                "--set",
                f"scenarios={json.dumps([{'name': 'no-fault'}, faults])}",
            ),
        ]
        self._before = set(self._paths())

    def undisturbed_s(self) -> float:
        """How long a run takes that nobody kills; it also builds what later runs find built."""
        self._checked("run", *self._experiment, "--out", "first", codes=(0, 3))
        began_s = time.monotonic()
        self._checked("run", *self._experiment, "--out", "undisturbed", codes=(0, 3))
        return time.monotonic() - began_s

    def kill(self, number: int, at_s: float) -> Kill:
        """Begin a run, kill it after so many seconds, look for what is left, and go on with it."""
        run = self._folder / f"run-{number}"
        command = [sys.executable, "-m", "tailrace.cli.main", "run", *self._experiment, "--out", str(run)]
        with (self._folder / f"run-{number}.log").open("wb") as log:
            harness = subprocess.Popen(
                command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                time.sleep(at_s)
            finally:
                harness.kill()
                harness.wait()
        killed_s = time.monotonic()
        left = self._left_in_the_end()
        kill = Kill(self.adapter, at_s, _doing(run), time.monotonic() - killed_s, left)
        if harness.returncode != -signal.SIGKILL:
            kill.during = f"it had ended with exit code {harness.returncode}"
        if (run / "manifest.json").exists():
            self._go_on(run, kill)
        return kill

    def _go_on(self, run: Path, kill: Kill) -> None:
        self._tried(kill, "report", str(run), codes=(0,))
        if RunFolder.open(run).complete:
            kill.resumed = "was complete"
            return
        self._tried(kill, "run", "--resume", str(run), codes=(0, 3))
        if not RunFolder.open(run).complete:
            kill.failures.append("the resumed run is not complete")
        kill.left += self._left_in_the_end()
        kill.resumed = ", ".join(sorted(path.name for path in run.glob("set-aside/*"))) or "nothing set aside"

    def _tried(self, kill: Kill, *arguments: str, codes: tuple[int, ...]) -> None:
        try:
            self._checked(*arguments, codes=codes)
        except TailraceError as error:
            kill.failures.append(str(error))

    def _checked(self, *arguments: str, codes: tuple[int, ...]) -> None:
        command = [sys.executable, "-m", "tailrace.cli.main", *arguments]
        done = subprocess.run(
            command, cwd=self._folder, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in codes:
            raise TailraceError(
                f"tailrace {' '.join(arguments)} ended with exit code {done.returncode}", detail=done.stderr[-2000:]
            )

    def _left_in_the_end(self) -> list[str]:
        deadline_s = time.monotonic() + PATIENCE_S
        while (left := self._left()) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        return left

    def _left(self) -> list[str]:
        paths = sorted(set(self._paths()) - self._before)
        return [*self._marked_processes(), *self._recorded_processes(), *map(str, paths)]

    def _marked_processes(self) -> list[str]:
        """By their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == self._marker:
                    found.append(f"process {process.pid} ({process.status()}): {' '.join(process.cmdline())}")
            except (psutil.Error, OSError):
                continue
        return found

    def _recorded_processes(self) -> list[str]:
        """By the guardians' ledgers, for a server may have changed its environment."""
        found = []
        for ledger in self._state.glob("guardians/*.json"):
            content = json.loads(ledger.read_text(encoding="utf-8"))
            for pid, ticks in [content["guardian"], *content["processes"]]:
                if ProcessRef(pid, ticks).alive():
                    found.append(f"process {pid} of {ledger.name}")
        return found

    def _paths(self) -> list[Path]:
        """Temporary folders and sockets, shared memory, control groups: all that there are, whosever they be."""
        temporary, shared = Path("/tmp"), Path("/dev/shm")  # noqa: S108 - looked at, not written to
        groups = cpu_root()
        return [
            *self._temporary.iterdir(),
            *temporary.glob("tailrace-*"),
            *shared.glob("tailrace*"),
            *(groups.glob("tailrace-*") if groups is not None else ()),
        ]


def _doing(run: Path) -> str:
    """What a run was at when it was cut off."""
    if not (run / "manifest.json").exists():
        return "starting"
    begun = RunFolder.open(run).trials
    if not begun:
        return "before the trials"
    stages = [event["stage"] for event in begun[-1].events if event["event"] == "stage"]
    return f"{begun[-1].facts.scenario}: {'done' if begun[-1].done else stages[-1] if stages else 'beginning'}"


def race(adapter: str, kills: int, seed: int, folder: Path, tell: Callable[[str], None]) -> list[Kill]:
    """All kills of one adapter, at instants spread evenly over its run."""
    victim = Victim(adapter, folder)
    tell(f"{adapter}: two runs that nobody disturbs")
    whole_s = victim.undisturbed_s()
    instants = np.random.default_rng(seed).uniform(0, SHARE * whole_s, kills)
    done = []
    for number, at_s in enumerate(instants.tolist(), 1):
        done.append(victim.kill(number, at_s))
        tell(f"{adapter}: kill {number} of {kills} after {at_s:.1f} s of {whole_s:.1f} s: {done[-1].during}")
    return done


def print_table(kills: list[Kill], console: Console) -> None:
    """One line for each kill; what went wrong below, in full."""
    table = Table()
    for heading in ("adapter", "killed after s", "during", "clean after s", "left", "set aside", "went on"):
        table.add_column(heading)
    for kill in kills:
        went_on = "; ".join(kill.failures).splitlines()[0] if kill.failures else "yes"
        table.add_row(
            kill.adapter,
            f"{kill.at_s:.1f}",
            kill.during,
            f"{kill.cleaned_s:.1f}",
            str(len(kill.left)) if kill.left else "nothing",
            kill.resumed,
            went_on,
        )
    console.print(table)
    for kill in kills:
        for line in (*kill.left, *kill.failures):
            console.print(f"{kill.adapter} after {kill.at_s:.1f} s: {line}", soft_wrap=True)


def main() -> int:
    """Kill, look, go on, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many, of each adapter")
    parser.add_argument("--seed", type=int, default=7, help="the instants follow from it")
    parser.add_argument("--adapter", action="append", help="default: null and triton; may be given again")
    arguments = parser.parse_args()
    progress = Console(stderr=True, highlight=False)
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for adapter in arguments.adapter or ["null", "triton"]:
            kills += race(adapter, arguments.kills, arguments.seed, Path(folder) / adapter, progress.print)
    print_table(kills, Console(highlight=False, width=None if sys.stdout.isatty() else 170))
    return 0 if all(kill.ok for kill in kills) else 1


if __name__ == "__main__":
    leave(main)
