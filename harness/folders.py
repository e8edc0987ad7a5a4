"""Where tailrace keeps what outlives a run: caches that may be deleted at any time, user data, and crash evidence."""

from __future__ import annotations

import os
from pathlib import Path


def _folder(override: str, xdg: str, fallback: str) -> Path:
    # Absolute, for servers run in folders of their own.
    if chosen := os.environ.get(override):
        return Path(chosen).absolute()
    return Path(os.environ.get(xdg) or Path.home() / fallback).absolute() / "tailrace"


def cache_folder() -> Path:
    """Server environments and model artifacts: ``$TAILRACE_CACHE``, else ``$XDG_CACHE_HOME/tailrace``."""
    return _folder("TAILRACE_CACHE", "XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """The user's registered traces: ``$TAILRACE_HOME``, else ``$XDG_DATA_HOME/tailrace``."""
    return _folder("TAILRACE_HOME", "XDG_DATA_HOME", ".local/share")


def state_folder() -> Path:
    """Ledgers of running guardians, by which a later run finds what a crash left: ``$TAILRACE_STATE``, else
    ``$XDG_STATE_HOME/tailrace``."""
    return _folder("TAILRACE_STATE", "XDG_STATE_HOME", ".local/state")
