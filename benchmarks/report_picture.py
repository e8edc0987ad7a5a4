"""A picture of a real run's report: `python benchmarks/report_picture.py RUN [FILE.png]`, by headless Chromium."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from ending import leave
from tailrace.harness.errors import TailraceError
from tailrace.harness.records.store import RunFolder
from tailrace.reports.report import write

SIZE = (1180, 1560)
"""Width and height in pixels: from the question to the first figure."""
TIMEOUT_S = 120
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Write the report afresh, open it, and keep the top of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/report.png"))
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise TailraceError("there is no Chromium to open the report with", remedy="Debian: apt-get install chromium")
    picture = arguments.file.resolve()
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = write([RunFolder.open(arguments.run)], Path(folder) / "report.html")
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        command = [browser, *flags, f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if not picture.is_file():
        raise TailraceError(f"{browser} made no picture", detail=done.stderr[-2000:])
    print(picture)
    return 0


if __name__ == "__main__":
    leave(main)
