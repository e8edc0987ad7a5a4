"""Files that servers import have nothing of this project beside them there."""

from __future__ import annotations

import os
import subprocess
import sys


def answers_alone(model_file: str, artifact: str, name: str) -> None:
    """Load an emulated model by a file that defines ``Model``, where no package of this project is found, and ask it.

    The environment variables of the emulated device are the caller's.
    """
    code = (
        "import importlib.util, sys, numpy\n"
        f"spec = importlib.util.spec_from_file_location('m', {model_file!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"y = module.Model({artifact!r}, {name!r}, 'emulated').predict({{'x': numpy.ones((2, 16), 'int32')}})['y']\n"
        "assert y.shape == (2, 4) and not any(name.split('.')[0] == 'tailrace' for name in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=artifact, timeout=60)
