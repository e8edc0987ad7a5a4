"""The connections to nodes, led through a proxy of the harness's own so that faults can be done to them."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tailrace.harness.contract.adapter import ProcessHost
from tailrace.harness.contract.control import SOCKET_PATH_BYTES
from tailrace.harness.errors import DeployError, StorageError, TailraceError
from tailrace.harness.processes import ProcessRef, log_tail

_START_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 10.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Link:
    """One port of a node and the port that stands for it. Commands act on all links of a name."""

    name: str
    listen: tuple[str, int]
    target: tuple[str, int]


class Links:
    """A running link proxy (:mod:`.link_proxy` says what each effect does, and how that differs from a network).

    Effects add up and last until they are cleared. Every command returns how many connections it found open, and raises
    :class:`TailraceError` when the proxy refuses it or gives no answer. Commands may come from any thread.
    """

    process: ProcessRef
    """The proxy's process: what it costs is no part of the server's."""

    def __init__(self, host: ProcessHost, process: ProcessRef, control: Path, log: Path) -> None:
        self.process = process
        self._host = host
        self._control = control
        self._log = log

    @classmethod
    def start(cls, host: ProcessHost, links: Sequence[Link], folder: Path, log: Path) -> Links:
        """Start the proxy, and return when all links listen; their targets need not be up.

        ``folder`` gets its configuration and its control socket, and must be a short path. Raises :class:`StorageError`
        when it cannot be written, and :class:`DeployError` with the log's tail when the proxy does not come up.
        """
        control, config = folder / "links.sock", folder / "links.json"
        if len(os.fsencode(control)) > SOCKET_PATH_BYTES:
            raise DeployError(f"the path of the link proxy's control socket is too long: {control}")
        try:
            config.write_text(
                json.dumps({"control": str(control), "links": [asdict(link) for link in links]}), encoding="utf-8"
            )
        except OSError as error:
            raise StorageError.of(config, error) from error
        process = host.spawn(
            "link-proxy",
            [sys.executable, "-P", "-m", "tailrace.harness.servers.link_proxy", str(config)],
            env={"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd=folder,
            log=log,
        )
        started = cls(host, process, control, log)
        started._wait_until_it_listens()
        return started

    def latency(self, name: str, round_trip_ms: float) -> int:
        """Make every round trip take so much longer."""
        return self._command(name, "latency", round_trip_ms=round_trip_ms)

    def stalls(self, name: str, share: float, stall_ms: float, seed: int) -> int:
        """Hold a share (0..1) of the chunks, and what follows them in their direction, for ``stall_ms`` each."""
        return self._command(name, "stalls", share=share, stall_ms=stall_ms, seed=seed)

    def partition(self, name: str) -> int:
        """Let nothing pass; connections stay open."""
        return self._command(name, "partition")

    def reset(self, name: str, *, once: bool) -> int:
        """Reset all open connections, and without ``once`` new ones too until it is cleared."""
        return self._command(name, "reset", once=once)

    def clear(self, name: str, effect: str | None = None) -> int:
        """End one effect (``latency``, ``stalls``, ``partition`` or ``reset``), or all; what was held passes on."""
        return self._command(name, "clear", effect=effect)

    def stop(self) -> None:
        """End the proxy and with it every connection through it."""
        self._host.stop_tree(self.process, grace_s=2.0)

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._connect().close()  # the control socket is the last that it opens
                return
            except OSError:
                pass
            if not self.process.alive() or time.monotonic() > deadline:
                self._host.stop_tree(self.process, grace_s=0)
                raise DeployError("the link proxy did not come up", detail=log_tail(self._log))
            time.sleep(_POLL_S)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_ANSWER_TIMEOUT_S)
        try:
            connection.connect(str(self._control))
        except OSError:
            connection.close()
            raise
        return connection

    def _command(self, name: str, command: str, **parameters: object) -> int:
        try:
            with self._connect() as connection, connection.makefile("rb") as answers:
                connection.sendall(json.dumps({"link": name, "do": command, **parameters}).encode() + b"\n")
                answer = json.loads(answers.readline())
        except (OSError, ValueError) as error:
            raise TailraceError(f"the link proxy gives no answer: {error}", detail=log_tail(self._log)) from error
        if "error" in answer:
            raise TailraceError(f"the link proxy cannot do {command} to {name}: {answer['error']}")
        return int(answer["connections"])
