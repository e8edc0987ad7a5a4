"""The run folder: staged writes, so that whatever ends a run leaves files that can be read.

The layout is documented for readers in ``docs/record.md``. Everything here is either a *source* (manifest,
trial facts, events, requests, samples, server configuration and logs) or *derived* (summary, report) and can be made
again from the sources.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from tailrace.harness.errors import InputError, StorageError, TailraceError
from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.schema import REQUEST_SCHEMA, SAMPLE_SCHEMA
from tailrace.harness.records.tables import read_table

SCHEMA_VERSION = 1


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old content or the new, never half of it."""
    staged = path.with_name(path.name + ".tmp")
    try:
        with staged.open("w", encoding="utf-8") as handle:
            json.dump(content, handle, indent=1, allow_nan=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        staged.replace(path)
    except OSError as error:
        raise StorageError.of(path, error) from error


class EventLog:
    """``events.jsonl`` of one trial: one JSON object a line, written through at once.

    ``mono_ns`` is the monotonic clock of this host, for the trial's epoch is not known yet while the server is coming
    up; readers subtract ``epoch_mono_ns`` of the trial's facts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: IO[str] = path.open("a", encoding="utf-8")

    def write(self, event: str, *, mono_ns: int | None = None, **details: Any) -> None:
        """Append one event; ``mono_ns`` defaults to now. Raises :class:`StorageError` when the disk refuses."""
        record = {"mono_ns": time.monotonic_ns() if mono_ns is None else mono_ns, "event": event, **details}
        with self._lock:
            try:
                self._handle.write(json.dumps(record, allow_nan=False) + "\n")
                self._handle.flush()
            except OSError as error:
                raise StorageError.of(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._handle.close()


@dataclass(frozen=True)
class TrialFolder:
    """One trial of a run; sources are read on first use and kept."""

    folder: Path

    @property
    def id(self) -> str:
        """The trial's name, ``ADAPTER--SCENARIO--NUMBER``."""
        return self.folder.name

    @property
    def facts_path(self) -> Path:
        """What the harness measured about the trial beside requests and samples."""
        return self.folder / "trial.json"

    @property
    def done(self) -> bool:
        """Whether the trial has run to its end; one that failed or was cut off has not."""
        return self.facts_path.is_file() and self.facts.state == "done"

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do: the trial is done, or whoever watched it had seen enough."""
        return self.facts_path.is_file() and self.facts.settled

    @property
    def server(self) -> Path:
        """The rendered configuration and the logs of the server."""
        return self.folder / "server"

    @cached_property
    def facts(self) -> TrialFacts:
        """``trial.json``. Raises :class:`StorageError` for a file that is damaged."""
        return TrialFacts.load(_read_json(self.facts_path), self.facts_path)

    def write(self, facts: TrialFacts) -> None:
        """Write ``trial.json``. Raises :class:`StorageError` when the disk refuses."""
        write_json(self.facts_path, facts.dump())

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events in order, each with ``t_ns`` from the trial's epoch (absent while no epoch was set).

        A last line cut short by a crash is left out.
        """
        path = self.folder / "events.jsonl"
        events: list[dict[str, Any]] = []
        epoch = self.facts.epoch_mono_ns
        if not path.exists():
            return events
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if epoch is not None:
                event["t_ns"] = event["mono_ns"] - epoch
            events.append(event)
        return sorted(events, key=lambda event: int(event["mono_ns"]))

    @cached_property
    def requests(self) -> pa.Table | None:
        """The run record (see :data:`REQUEST_SCHEMA`); ``None`` when no request was ever made."""
        return read_table(self.folder / "requests", REQUEST_SCHEMA)

    def request_columns(self, *columns: str) -> pa.Table | None:
        """Some columns of the run record, texts as dictionaries; read anew each time and not kept, for it may be large."""
        return read_table(self.folder / "requests", REQUEST_SCHEMA, columns)

    @cached_property
    def samples(self) -> pa.Table | None:
        """What the collectors read (see :data:`SAMPLE_SCHEMA`); ``None`` when there is nothing."""
        return read_table(self.folder / "samples", SAMPLE_SCHEMA)


def default_folder(name: str) -> Path:
    """``results/NAME-TIME`` below the working directory."""
    return Path("results") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def now() -> str:
    """The time of day for records, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_new_folder(folder: Path) -> None:
    """Make a folder for results. Raises :class:`InputError` for one that holds anything, and :class:`StorageError`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} already exists and is not an empty folder",
            remedy="runs are never overwritten: give --out another folder, or delete this one",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.of(folder, error) from error


@contextlib.contextmanager
def ending(tell: Callable[[str], None]) -> Iterator[None]:
    """However the block ends, ``tell`` is given the state: ``done``, ``interrupted`` or ``failed``. What ended it is raised,
    and a disk that is full now does not hide it."""
    state = "failed"
    try:
        yield
        state = "done"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        with contextlib.suppress(TailraceError) if state != "done" else contextlib.nullcontext():
            tell(state)


class RunFolder:
    """One run: a manifest and its trials."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # servers run in folders of their own

    @classmethod
    def create(cls, folder: Path, manifest: Mapping[str, Any]) -> RunFolder:
        """Make a new run folder, the manifest first. Refuses a folder that holds anything: runs are immutable."""
        make_new_folder(folder)
        run = cls(folder)
        try:
            (folder / "trials").mkdir()
        except OSError as error:
            raise StorageError.of(folder, error) from error
        write_json(folder / "manifest.json", {"schema_version": SCHEMA_VERSION, **manifest})
        return run

    @classmethod
    def open(cls, folder: Path) -> RunFolder:
        """A run to read. Raises :class:`InputError` when there is none, or when a newer tailrace wrote it."""
        if not (folder / "manifest.json").is_file():
            raise InputError(
                f"{folder} is no run folder: it holds no manifest.json",
                remedy="give the folder that `tailrace run` printed (--out, or results/NAME-TIME)",
            )
        run = cls(folder)
        version = run.manifest.get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise InputError(
                f"{folder}/manifest.json: schema_version {version!r} is not one that this tailrace reads "
                f"(up to {SCHEMA_VERSION})",
                remedy="upgrade tailrace",
            )
        return run

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """``manifest.json``."""
        return _read_json(self.folder / "manifest.json")

    def amend_manifest(self, **changes: Any) -> None:
        """Add facts that were not known when the run began."""
        content = {**_read_json(self.folder / "manifest.json"), **changes}
        write_json(self.folder / "manifest.json", content)
        self.__dict__.pop("manifest", None)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run, so that nobody else writes to it meanwhile.

        The kernel lets go of it when this process ends, however that comes, and tells processes of other containers and
        of machines that share the folder as well. Raises :class:`InputError` when another process holds the run.
        """
        path = self.folder / "lock"
        try:
            lock = path.open("a+", encoding="ascii")
        except OSError as error:
            raise StorageError.of(path, error) from error
        with lock:
            # Some network file systems know no locks; a run on one of them cannot be guarded.
            with contextlib.suppress(OSError):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    lock.seek(0)
                    raise InputError(
                        f"{self.folder} is still going on: process {lock.read().strip()} works on it",
                        remedy="let it end, or interrupt it first (Ctrl-C or SIGTERM)",
                    ) from error
            try:
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n")
                lock.flush()
            except OSError as error:
                raise StorageError.of(path, error) from error
            yield

    def set_aside(self, folder: Path, name: str) -> str:
        """Move a folder to ``set-aside/NAME-K``, with the first ``K`` that is free; returns that path within the run."""
        try:
            (self.folder / "set-aside").mkdir(exist_ok=True)
            number = 1
            while (target := self.folder / "set-aside" / f"{name}-{number}").exists():
                number += 1
            folder.rename(target)
        except OSError as error:
            raise StorageError.of(folder, error) from error
        return str(target.relative_to(self.folder))

    def trial(self, trial_id: str) -> TrialFolder:
        """The trial of that name, whether it has run or not."""
        return TrialFolder(self.folder / "trials" / trial_id)

    @property
    def trials(self) -> list[TrialFolder]:
        """The trials that have begun, in the order in which they were planned."""
        planned = [self.trial(trial["id"]) for trial in self.manifest["trials"]]
        return [trial for trial in planned if trial.facts_path.is_file()]

    @property
    def complete(self) -> bool:
        """Whether the run has ended with every planned trial settled."""
        return self.manifest["state"] == "done" and all(
            self.trial(trial["id"]).settled for trial in self.manifest["trials"]
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StorageError(
            f"{path} is not valid JSON: {error}", remedy="the file is damaged; delete the run"
        ) from error
    if not isinstance(content, dict):
        raise StorageError(f"{path}: expected an object, found a {type(content).__name__}")
    return content
