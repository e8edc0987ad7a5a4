"""Sessions: what people and CI type. Every session sets up all that it needs."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent))
from harness.package_index import uv_arguments, uv_environment

nox.needs_version = ">=2024.4"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


def _install(session: nox.Session, extra: str | None = None) -> None:
    """Install tailrace into the session with uv, which takes seconds where pip takes a minute."""
    session.install("--quiet", "uv>=0.5")
    target = f".[{extra}]" if extra else "."
    # Compiled now, in parallel, rather than module by module while the first trial is being set up.
    options = ["--quiet", "--compile-bytecode", *uv_arguments()]
    session.run_install("uv", "pip", "install", *options, "--editable", target, env=uv_environment(), silent=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite: unit, contract, end to end on real servers, the report in headless Chromium."""
    _install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    _install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    _install(session, "types")
    session.run("mypy")


@nox.session(name="bench-triton")
def bench_triton(session: nox.Session) -> None:
    """Race Triton through the default surge, with and without a replica kill. The last line is the report's path."""
    _install(session)
    session.run("tailrace", "run", "default", "--adapter", "triton", *session.posargs)


@nox.session(name="bench-ray-serve")
def bench_ray_serve(session: nox.Session) -> None:
    """Race Ray Serve through the default surge, with and without a replica kill. The last line is the report's path."""
    _install(session)
    session.run("tailrace", "run", "default", "--adapter", "ray_serve", *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """Race all frameworks on the same arrivals, trials interleaved. The last line is the report's path."""
    _install(session)
    session.run("tailrace", "run", "compare", *session.posargs)
