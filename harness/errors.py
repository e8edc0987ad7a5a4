"""What can go wrong, each with the exit code that the command line documents for it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

EXIT_INVALID = 3
"""A trial is INVALID, or whatever else the user takes as severely."""
EXIT_INTERRUPTED = 130


class TailraceError(Exception):
    """A failure that the user should read as one message: what happened, where, and what to do about it.

    ``message`` names the file, field or server; ``remedy`` says what to do; ``detail`` is evidence
    printed below both (the tail of a server's log, say).
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.detail = detail

    def __str__(self) -> str:
        parts = [self.message]
        if self.remedy:
            parts.append(f"Remedy: {self.remedy}")
        if self.detail:
            parts.append(self.detail)
        return "\n".join(parts)


class InputError(TailraceError):
    """The user's input cannot be used: an experiment, a trace, an option, a run folder."""

    exit_code = 2


class EnvironmentBuildError(TailraceError):
    """The interpreter that a server or a workload runs in could not be built."""


class EngineError(TailraceError):
    """The container engine cannot be reached, or refuses what it was asked for."""


class TrialPrunedError(TailraceError):
    """Whoever watches a trial has seen enough of it. What it recorded is kept, and it is no measurement."""


class DeployError(TailraceError):
    """A server did not come up, or did not become able to answer; ``detail`` holds the tail of its log."""


class ServerError(TailraceError):
    """A running server answered something that its interface does not allow."""


class StorageError(TailraceError):
    """A run folder could not be written or read (no space, truncated file, newer schema)."""

    @classmethod
    def of(cls, path: Path, error: OSError) -> StorageError:
        """A failed write, with the remedy that fits."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return cls(
            f"{path} could not be written: {error.strerror or error}",
            remedy="free some disk space, or choose another folder with --out; what was measured so far is kept"
            if full
            else "check that the folder exists and is writable",
        )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
