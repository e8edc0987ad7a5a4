"""Hands pip's own package-index configuration to uv, so that whoever set up pip has set up tailrace.

Standard library only: ``python -m tailrace.harness.servers.package_index ARGUMENTS`` is ``uv pip install ARGUMENTS`` into the
interpreter that runs it, and nox runs it from a clone, before anything is installed.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

Settings = Mapping[str, str]
"""pip's effective settings for ``pip install``: option name without dashes in front (``find-links``) → text."""

# pip reads its sections in this order, later ones override; settings of other commands do not concern an install.
_SECTIONS = ("global", "install", ":env:")
# pip knows one option under two names.
_ALIASES = {"default-timeout": "timeout"}
_TRUE = {"1", "true", "yes", "on", "y", "t"}


def parse_pip_config(listing: str) -> dict[str, str]:
    """The effective settings in the output of ``pip config list``; lines that are no settings are passed over."""
    sections: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in listing.splitlines():
        key, separator, literal = line.strip().partition("=")
        section, dot, option = key.rpartition(".")
        if not (separator and dot and section in sections):
            continue
        try:
            value = str(ast.literal_eval(literal))
        except (SyntaxError, ValueError):
            continue
        if value.strip():  # pip ignores empty settings, so that an empty variable does not hide a file
            sections[section][_ALIASES.get(option, option)] = value.strip()
    return {option: value for section in _SECTIONS for option, value in sections[section].items()}


@functools.cache
def pip_settings() -> Settings:
    """What pip is configured with here: that of this interpreter, else the ``pip`` on PATH; empty without any pip."""
    commands = [[sys.executable, "-m", "pip"]]
    if on_path := shutil.which("pip"):
        commands.append([on_path])
    for command in commands:
        try:
            listing = subprocess.run(
                [*command, "config", "list"], capture_output=True, text=True, timeout=60, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return parse_pip_config(listing)
    return {}


def _missing_folder(entry: str) -> str | None:
    """Why a local entry cannot be used; ``None`` when it can, or is remote and cannot be told from here."""
    url = urlsplit(entry)
    if url.scheme in ("", "file"):
        path = Path(unquote(url.path) if url.scheme else entry)
        if not path.exists():
            return f"{path} does not exist"
    return None


def _entries(settings: Settings, option: str) -> list[str]:
    entries = settings.get(option, "").split()
    # Relative folders and "~" mean here what they mean to pip; uv runs elsewhere.
    return [entry if "://" in entry else str(Path(entry).expanduser().absolute()) for entry in entries]


def left_out(settings: Settings | None = None) -> list[str]:
    """Configured folders that uv would refuse where pip only warns, one sentence each."""
    settings = pip_settings() if settings is None else settings
    return [
        f"pip's {option} names {entry}, which is left out: {reason}"
        for option in ("find-links", "index-url", "extra-index-url")
        for entry in _entries(settings, option)
        if (reason := _missing_folder(entry))
    ]


def uv_arguments(settings: Settings | None = None) -> list[str]:
    """The arguments that make ``uv pip install`` look where ``pip install`` looks."""
    settings = pip_settings() if settings is None else settings

    def usable(option: str) -> list[str]:
        return [entry for entry in _entries(settings, option) if not _missing_folder(entry)]

    arguments = [word for entry in usable("find-links") for word in ("--find-links", entry)]
    if settings.get("no-index", "").lower() in _TRUE:
        return [*arguments, "--no-index"]
    arguments += [word for entry in usable("index-url")[:1] for word in ("--default-index", entry)]
    if extra := usable("extra-index-url"):
        arguments += [word for entry in extra for word in ("--index", entry)]
        # To pip all indexes are equal and the best version wins; uv would stop at the first index that has the name.
        arguments += ["--index-strategy", "unsafe-best-match"]
    return arguments + [
        word for host in settings.get("trusted-host", "").split() for word in ("--allow-insecure-host", host)
    ]


def uv_environment(settings: Settings | None = None) -> dict[str, str]:
    """The environment variables that make uv connect as pip does: certificates, proxy, patience."""
    settings = pip_settings() if settings is None else settings
    variables: dict[str, str] = {}
    if certificates := settings.get("cert"):
        variables["SSL_CERT_FILE"] = str(Path(certificates).expanduser())
    else:
        system = ssl.get_default_verify_paths()
        if system.cafile or system.capath:
            # pip trusts the system's certificates, uv its own unless told; the second name is that of older versions.
            variables.update(UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1")
    if client_certificate := settings.get("client-cert"):
        variables["SSL_CLIENT_CERT"] = str(Path(client_certificate).expanduser())
    if proxy := settings.get("proxy"):
        variables.update(HTTP_PROXY=proxy, HTTPS_PROXY=proxy)
    if timeout := settings.get("timeout"):
        variables["UV_HTTP_TIMEOUT"] = str(math.ceil(float(timeout)))
    return variables


def main() -> None:
    """``uv pip install`` with the arguments of this process, as pip would look for packages."""
    install = ["pip", "install", "--python", sys.executable, *uv_arguments(), *sys.argv[1:]]
    done = subprocess.run([sys.executable, "-m", "uv", *install], env={**os.environ, **uv_environment()}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
