"""The master of several load workers: ``python -m tailrace.harness.replay.master HOST:PORT LOCAL REMOTE``.

It starts ``LOCAL`` workers on this machine and waits for ``REMOTE`` others (``tailrace load-worker``), hosts them by
Locust's own master, measures their clocks before and after the replay, and hands frames on between them and the harness,
which it speaks to over its stdin and stdout. It ends when its stdin does; its own workers end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gevent
from gevent.event import AsyncResult, Event
from locust.env import Environment
from locust.runners import STATE_MISSING, MasterRunner

from tailrace import __version__
from tailrace.harness.replay import wire
from tailrace.harness.replay.clocks import SAME_CLOCK, ClockReading, clock_identity, read_clock, uncertainty_ns
from tailrace.harness.replay.worker import PipeOutbox, Replayer, current_p99_ms, watch_stdin

GATHER_S = 50.0
"""How long workers may take to come."""
ANSWER_S = 0.5
"""How long a worker may take to tell the time; one that has just come may not be listening yet, and is asked again."""
TRIES = 20
POLL_S = 0.1


@dataclass
class Worker:
    """One load worker as its master sees it."""

    index: int
    client: str
    """Locust's name for it."""
    host: str = ""
    clock: ClockReading = SAME_CLOCK
    child: subprocess.Popen[bytes] | None = None
    """Its process, where it runs on this machine."""
    ready: bool = False
    end: dict[str, Any] | None = None
    lost: str = ""
    """Why, where it is."""
    asked_ns: int = 0
    """When it was last asked for the time."""
    told: AsyncResult = field(default_factory=AsyncResult)

    @property
    def over(self) -> bool:
        return bool(self.lost) or self.end is not None


class WorkersError(Exception):
    """The workers cannot do what the replay needs."""


class Master:
    """One replay by several workers, from their plans to their ends."""

    def __init__(self, outbox: PipeOutbox, plans: list[bytes], *, host: str, port: int, remote: int) -> None:
        self._outbox = outbox
        self._plans = plans
        self._address = f"{host}:{port}"
        self._remote = remote
        self._children: list[subprocess.Popen[bytes]] = []
        self._workers: dict[str, Worker] = {}
        self._changed = Event()
        self._environment = Environment(user_classes=[Replayer])
        self._runner: MasterRunner = self._environment.create_master_runner(host, port)
        self._runner.register_message(wire.MESSAGE, self._told)

    def run(self) -> None:
        """Raises :class:`WorkersError` when they do not come, or do not fit."""
        self._spawn(len(self._plans) - self._remote)
        self._gather()
        for worker in self._workers.values():
            self._meet(worker)
            self._tell(worker, wire.PLAN, self._plans[worker.index])
        self._plans.clear()
        gevent.spawn(self._runner.start, len(self._workers), spawn_rate=len(self._workers))
        self._wait(lambda worker: worker.ready)
        if lost := [worker.lost for worker in self._ordered() if worker.lost]:
            raise WorkersError("; ".join(lost))
        self._outbox.put(wire.READY, json.dumps([worker.clock.offset_ns for worker in self._ordered()]).encode())
        self._outbox.flush()
        self._wait(lambda worker: worker.over)
        for worker in self._ordered():
            if worker.end is not None:
                self._outbox.put(
                    wire.END, json.dumps({**worker.end, **self._clock_facts(worker)}).encode(), worker.index
                )
        self._runner.quit()

    def obey(self, frame: wire.Frame) -> None:
        """Hand a command of the harness to every worker, instants on its own clock."""
        for worker in self._ordered():
            payload = frame.payload
            if frame.kind == wire.GO:
                payload = str(int(frame.payload) + worker.clock.offset_ns).encode()
            if not worker.over:
                self._tell(worker, frame.kind, payload)

    def _spawn(self, count: int) -> None:
        for _ in range(count):
            command = [sys.executable, "-P", "-m", "tailrace.harness.replay.worker", self._address]
            # Its stdin is a pipe that nobody writes to: it closes when this process ends, and then the worker does.
            self._children.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))

    def _gather(self) -> None:
        needed = len(self._plans)
        deadline_s = time.monotonic() + GATHER_S
        while len(clients := list(self._runner.clients)) < needed:
            self._check_children()
            if time.monotonic() > deadline_s:
                raise WorkersError(
                    f"{len(clients)} of {needed} load workers came within {GATHER_S:.0f} s; on the {self._remote} other "
                    f"machines, run: tailrace load-worker --master {self._address}"
                )
            gevent.sleep(0.02)
        if len(clients) > needed:
            raise WorkersError(f"{len(clients)} load workers came to {self._address}, {needed} were expected")
        self._workers = {client: Worker(index, client) for index, client in enumerate(clients)}

    def _meet(self, worker: Worker) -> None:
        about = self._ask(worker)[1]
        worker.host = about["host"]
        if about["version"] != __version__:
            raise WorkersError(
                f"the load worker on {worker.host} is tailrace {about['version']}, this is {__version__}: install the same"
            )
        if about["clock"] == clock_identity():
            worker.child = next((child for child in self._children if child.pid == about["pid"]), None)
        else:
            worker.clock = read_clock(lambda: self._read(worker))

    def _read(self, worker: Worker) -> tuple[int, int, int]:
        asked_ns, about, answered_ns = self._ask(worker)
        return asked_ns, about["mono_ns"], answered_ns

    def _ask(self, worker: Worker) -> tuple[int, dict[str, Any], int]:
        for _ in range(TRIES):
            worker.told = AsyncResult()
            worker.asked_ns = asked_ns = time.monotonic_ns()
            self._tell(worker, wire.CLOCK, str(asked_ns).encode())
            try:
                about, answered_ns = worker.told.get(timeout=ANSWER_S)
                return asked_ns, about, answered_ns
            except gevent.Timeout:
                self._check_children()
        raise WorkersError(f"load worker {worker.index} does not tell the time")

    def _clock_facts(self, worker: Worker) -> dict[str, Any]:
        """Host and clock of a worker; a clock that cannot be read again is of unknown uncertainty."""
        uncertain_ns: int | None = 0
        if worker.clock != SAME_CLOCK:
            try:
                uncertain_ns = uncertainty_ns(worker.clock, read_clock(lambda: self._read(worker)))
            except WorkersError:
                uncertain_ns = None
        return {
            "host": worker.host,
            "clock_offset_ns": worker.clock.offset_ns,
            "clock_uncertainty_ns": uncertain_ns,
        }

    def _ordered(self) -> list[Worker]:
        return sorted(self._workers.values(), key=lambda worker: worker.index)

    def _tell(self, worker: Worker, kind: bytes, payload: bytes = b"") -> None:
        message = {"frame": wire.Frame(kind, payload).pack()}
        self._runner.send_message(wire.MESSAGE, message, client_id=worker.client)

    def _told(self, msg: Any, **_: Any) -> None:
        """Whatever a worker has to say."""
        now_ns = time.monotonic_ns()
        worker = self._workers.get(msg.node_id)
        if worker is None or worker.lost:  # one that comes back has been written off already
            return
        frame = wire.Frame.unpack(msg.data["frame"])
        if frame.kind == wire.CLOCK:
            about = json.loads(frame.payload)
            if about["asked"] == str(worker.asked_ns):  # not a late answer to an earlier question
                worker.told.set((about, now_ns))
        elif frame.kind == wire.READY:
            worker.ready = True
        elif frame.kind == wire.END:
            worker.end = json.loads(frame.payload)
        elif frame.kind == wire.FAILED:
            self._lose(worker, frame.payload.decode())
        elif frame.kind == wire.PROGRESS:
            figures = {**json.loads(frame.payload), "p99_ms": current_p99_ms(self._environment.stats)}
            self._outbox.put(wire.PROGRESS, json.dumps(figures).encode(), worker.index)
        else:
            self._outbox.put(frame.kind, frame.payload, worker.index)
        self._outbox.flush()
        self._changed.set()

    def _wait(self, reached: Callable[[Worker], bool]) -> None:
        """Until every worker has got there, or is lost."""
        while not all(bool(worker.lost) or reached(worker) for worker in self._workers.values()):
            self._look_for_lost()
            self._outbox.flush()  # what a full pipe did not take, if anything
            self._changed.wait(POLL_S)
            self._changed.clear()

    def _look_for_lost(self) -> None:
        clients = self._runner.clients
        for worker in self._workers.values():
            if worker.over:
                continue
            if worker.child is not None and worker.child.poll() is not None:
                self._lose(worker, f"it ended (exit code {worker.child.returncode})")
            elif worker.client not in clients or clients[worker.client].state == STATE_MISSING:
                self._lose(worker, "it is not heard of any more")

    def _check_children(self) -> None:
        for child in self._children:
            if child.poll() is not None:
                raise WorkersError(f"a load worker on this machine ended at once (exit code {child.returncode})")

    def _lose(self, worker: Worker, why: str) -> None:
        worker.lost = f"load worker {worker.index} on {worker.host}: {why}"
        if worker.child is not None:
            worker.child.kill()  # one that is frozen would outlive everybody
        self._outbox.put(wire.LOST, worker.lost.encode(), worker.index)


def main() -> None:
    """Run one replay, then leave; whatever goes wrong is told to the harness."""
    outbox = PipeOutbox(os.dup(1))
    os.dup2(2, 1)
    host, _, port = sys.argv[1].rpartition(":")
    local, remote = int(sys.argv[2]), int(sys.argv[3])
    plans = []
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: commands follow
        for _ in range(local + remote):
            if (frame := wire.read_frame(stdin)) is None:
                return
            plans.append(frame.payload)
    code = 0
    try:
        master = Master(outbox, plans, host=host, port=int(port), remote=remote)
        watch_stdin(master.obey)
        master.run()
    except BaseException as error:
        if not isinstance(error, WorkersError):
            traceback.print_exc()
        outbox.put(wire.FAILED, str(error).encode() if isinstance(error, WorkersError) else repr(error).encode())
        code = 1
    outbox.drain()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
