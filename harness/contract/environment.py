"""The interpreter that a server runs in, and how to ask it something."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailrace.harness.errors import DeployError

_INTERPRETER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ServerEnvironment:
    """The interpreter that a server runs in (built by :mod:`tailrace.harness.servers.environments`)."""

    python: Path
    kind: str
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed distributions and their versions, for the manifest."""
    image: str = ""
    """Of kind ``docker``: the id of the image, in which ``python`` is a path."""
    interpreter: str = ""
    """Which Python it is and where that came from, in words, for the manifest; empty for an image's."""

    @property
    def bin(self) -> Path:
        """The folder of the interpreter's scripts."""
        return self.python.parent

    def ask(self, program: str) -> Any:
        """What a program prints as JSON in this interpreter, isolated from the user's settings and folder.

        Raises :class:`DeployError` when the interpreter does not run, and :class:`EngineError` when that is one of an image.
        """
        try:
            answer = subprocess.run(
                [self.python, "-I", "-c", program],
                capture_output=True,
                text=True,
                timeout=_INTERPRETER_TIMEOUT_S,
                check=True,
            )
            return json.loads(answer.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise DeployError(
                f"{self.python} does not run: {error}",
                remedy="use an environment with a working Python interpreter",
                detail=str(getattr(error, "stderr", None) or "") or None,
            ) from error
