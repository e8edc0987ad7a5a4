"""One GPU, the models ResNet-50 and MiniLM, every framework: `nox -s bench-gpu`.

For each model, in this order: the bare model's ceiling (no server); the saturation point under a p99 of 15 ms and of 100 ms;
a sweep of batch × window × instances at half of the highest load that any framework holds; the kill of one of two instances
at a fifth of it; cold starts. At last what each framework reached of the ceiling at its own batch and instances. Every step
is a `tailrace` command, which is printed; a step that is done is not done again, so that a session that was cut off goes on
with `--out`.

``--dry-run`` says how long each step takes at most, and with ``--price`` what the session costs; it needs no GPU. With
``--device cpu --quick`` the same steps run on a CPU with shorter traces and fewer settings, which shows that they work and
nothing about any GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tailrace.harness.plan.loading import load_experiment
from tailrace.harness.records.store import default_folder
from tailrace.harness.run.preflight import check

ADAPTERS = ("triton", "ray_serve", "torchserve", "kserve")
P99_MS = {"gpu": (15, 100), "quick": (1000,)}
BATCHES = {"gpu": "1,8,16,32,128", "quick": "1,4"}
LOADS = 9
"""So many rates a search for a saturation point tries of each cell, about."""
HIGHEST_START = 200.0
"""Arrivals/s at which a search begins at the most: below what any load generator sends."""
START_S = 30.0
"""What a server takes to start, be checked and stopped, about; the slowest of them more."""
QUICK = {
    "bench-gpu": (
        "trace.params={rate: 5, duration_s: 30}",
        "scenarios=[{name: batch-4, tuning: {max_batch: 4, batch_window_ms: 5, replicas: 1}}]",
        "warmup.duration_s=2",
    ),
    "bench-gpu-sweep": (
        "trace.params={rate: 5, duration_s: 30}",
        "tuning={max_batch: [1, 4], batch_window_ms: 5, replicas: 1}",
    ),
    "bench-gpu-kill": ("trace={name: steady, params: {rate: 5, duration_s: 20}, tail_s: 10}", "tuning.max_batch=4"),
}


@dataclass(frozen=True)
class Step:
    """One command, what it leaves when it is done, and how long it takes at most, about."""

    title: str
    command: list[str]
    result: Path
    """A folder that it makes; a file of JSON: what it prints."""
    seconds: float


class Session:
    """The steps of a session."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self._asked = asked
        self._kind = "quick" if asked.quick else "gpu"
        self._out: Path = asked.out

    def saturations(self, workload: str, items_per_s: float) -> Iterator[Step]:
        """The searches of a model whose bare ceiling, at its best batch, is this."""
        start = min(HIGHEST_START, 0.3 * items_per_s)
        for p99_ms in P99_MS[self._kind]:
            title, folder = f"saturation under {p99_ms} ms", self._out / f"{workload}-saturation-{p99_ms}ms"
            race = self._race("bench-gpu", title, workload, folder, [], LOADS)
            options = [f"--slo=p99={p99_ms}ms", f"--start={start:.4g}", "--format=json"]
            result = folder.with_suffix(".json")
            yield replace(race, command=["saturate", *race.command[1:], *options], result=result)

    def races(self, workload: str, saturated: float) -> Iterator[Step]:
        """The others, at shares of the highest load that any framework holds."""
        for name, share, title in (("sweep", 0.5, "batch × window × instances"), ("kill", 0.2, "replica kill")):
            settings = [f"trace.mean_rate={saturated * share:.4g}"]
            yield self._race(f"bench-gpu-{name}", title, workload, self._out / f"{workload}-{name}", settings, 1)
        yield self._cold_starts(workload)

    def saturated(self, workload: str) -> float | None:
        """The highest load that any framework holds under any of the objectives, arrivals/s, once those are searched."""
        found = []
        for p99_ms in P99_MS[self._kind]:
            path = self._out / f"{workload}-saturation-{p99_ms}ms.json"
            if path.exists():
                found += [point["holds"] for point in json.loads(path.read_text(encoding="utf-8")).values()]
        return max((rate for rate in found if rate is not None), default=None)

    def _race(
        self, experiment: str, title: str, workload: str, folder: Path, settings: Sequence[str], times: int
    ) -> Step:
        asked = self._asked
        chosen = [
            *(QUICK[experiment] if asked.quick else ()),
            *settings,
            f"workload={workload}",
            f"device={asked.device}",
            f"precision={asked.precision}",
            f"environment={asked.environment}",
        ]
        # Lengths are those of any device: a machine without the one that is meant can price the session too.
        overrides = {"adapters": list(asked.adapter)}
        checked = check(load_experiment(experiment, overrides=overrides, assignments=[*chosen, "device=cpu"]))
        seconds = times * (checked.traffic_s + START_S * len(checked.plans))
        command = ["run", experiment, "--out", str(folder), *(f"--set={one}" for one in chosen)]
        return Step(title, [*command, *(f"--adapter={name}" for name in asked.adapter)], folder, seconds)

    def _cold_starts(self, workload: str) -> Step:
        asked = self._asked
        trials, folder = 2 if asked.quick else 10, self._out / f"{workload}-coldstart"
        options = [f"--device={asked.device}", f"--precision={asked.precision}", f"--environment={asked.environment}"]
        command = ["coldstart", *asked.adapter, "--workload", workload, "--trials", str(trials), "--out", str(folder)]
        command += [*options, "--mode", asked.cold_start]
        return Step("cold starts", command, folder, START_S * trials * len(asked.adapter))

    def ceiling(self, workload: str) -> Step:
        """The bare model alone."""
        asked, folder = self._asked, self._out / f"{workload}-ceiling.json"
        options = [f"--device={asked.device}", f"--precision={asked.precision}", f"--environment={asked.environment}"]
        command = ["ceiling", workload, *options, f"--batch={BATCHES[self._kind]}", "--format=json"]
        return Step("bare model", command, folder, 12.0 * len(BATCHES[self._kind].split(",")))

    def of_ceiling(self, workload: str) -> Step:
        """What was reached of it, from every race of the model in which nothing was killed."""
        folder = self._out / f"{workload}-of-ceiling.json"
        races = [self._out / f"{workload}-saturation-{p99_ms}ms" for p99_ms in P99_MS[self._kind]]
        races.append(self._out / f"{workload}-sweep")
        command = ["ceiling", *(f"--run={race}" for race in races), "--format=json"]
        return Step("shares of the ceiling", command, folder, 12.0 * (2 if self._asked.quick else 10))


def carry_out(step: Step) -> None:
    """Run a step unless it is done. A race that fails, or has INVALID trials, does not end the session."""
    print(f"\n== {step.title}: tailrace {' '.join(step.command)}", flush=True)
    command, prints = [sys.executable, "-m", "tailrace.cli.main", *step.command], step.result.suffix == ".json"
    if step.command[0] == "run" and (step.result / "manifest.json").exists():
        command[3:] = ["run", "--resume", str(step.result)]
    elif (
        step.result.exists() and step.command[0] != "saturate"
    ):  # a search goes on by itself, and is quick when it is done
        print(f"done already: {step.result}", flush=True)
        return
    step.result.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE if prints else None, text=True, check=False)
    if prints and done.stdout.startswith("{"):
        step.result.write_text(done.stdout, encoding="utf-8")
        print(done.stdout, flush=True)
    if done.returncode:
        print(f"== it ended with exit code {done.returncode}", flush=True)
    if done.returncode == 130:
        sys.exit(130)


def price(session: Session, asked: argparse.Namespace) -> None:
    """Print how long a session is at most, and what it costs."""
    total_s = 0.0
    for workload in asked.workload:
        # Rates follow from what is found on the way, but lengths do not follow from rates.
        steps = [session.ceiling(workload), *session.saturations(workload, 100.0), *session.races(workload, 100.0)]
        for step in [*steps, session.of_ceiling(workload)]:
            print(f"{step.seconds / 60:7.1f} min  {workload}: {step.title}")
            total_s += step.seconds
    costs = "" if asked.price is None else f", {total_s / 3600 * asked.price:.2f} US$ at {asked.price:g} an hour"
    print(f"{total_s / 60:7.1f} min in all, about{costs}")


def best(ceiling: Path) -> float:
    """Items/s at the best batch."""
    told: dict[str, Any] = json.loads(ceiling.read_text(encoding="utf-8"))
    return max(float(one["items_per_s"]) for one in told["ceilings"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Race every framework on one GPU, beside the bare model.")
    parser.add_argument("--workload", action="append", help="resnet50, minilm (both)")
    parser.add_argument("--adapter", action="append", help="this framework; may be given again (all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--environment", default="venv", choices=("venv", "current"))
    parser.add_argument("--cold-start", default="process", choices=("process", "page-cache"))
    parser.add_argument("--out", type=Path, help="the session's folder; one that was cut off goes on")
    parser.add_argument("--price", type=float, help="what an hour of the machine costs, US dollars: your own price")
    parser.add_argument("--quick", action="store_true", help="shorter traces, fewer settings: shows that it works")
    parser.add_argument("--dry-run", action="store_true", help="say how long it takes and what it costs, and stop")
    asked = parser.parse_args()
    asked.workload = asked.workload or ["resnet50", "minilm"]
    asked.adapter = asked.adapter or list(ADAPTERS)
    asked.out = asked.out or default_folder("bench-gpu")
    session = Session(asked)
    if asked.dry_run:
        price(session, asked)
        return
    for workload in asked.workload:
        ceiling = session.ceiling(workload)
        carry_out(ceiling)
        if not ceiling.result.exists():
            sys.exit(1)
        for step in session.saturations(workload, best(ceiling.result)):
            carry_out(step)
        saturated = session.saturated(workload)
        if saturated is None:
            print(f"no framework holds any load of {workload}: there is nothing to race it at", flush=True)
            continue
        for step in session.races(workload, saturated):
            carry_out(step)
        carry_out(session.of_ceiling(workload))
    print(asked.out.resolve())


if __name__ == "__main__":
    main()
