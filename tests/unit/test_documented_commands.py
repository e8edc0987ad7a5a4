"""Every command that README and documentation show: executed, or, where it would take long, with ``--dry-run`` or read by the
command line's own parser."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from tailrace.cli.main import app
from tests.conftest import tailrace
from tests.synthetic import make_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = {
    "ceiling",
    "tune",
    "saturate",
    "pareto",
    "coldstart",
    "loadgen",
    "load-worker",
    "validate-sim",
    "clean",
    "fit",
}
"""These start servers, look for other runs of this user's, or need a run that a server made."""


def documented() -> list[str]:
    """Every line of every block of shell, comments left out, each once."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", "").splitlines():
                for command in re.split(r"\s+#\s", line)[0].split("&&"):
                    if command.strip():
                        found[command.strip()] = None
    return list(found)


COMMANDS = {" ".join(shlex.split(command)): shlex.split(command) for command in documented()}


def commands_of(program: str) -> list[list[str]]:
    return [words for words in COMMANDS.values() if words[0] == program]


def commands_in_containers() -> list[list[str]]:
    """What is run in an image of tailrace's own, where that is not its usual command; it needs GPUs, or an engine."""
    found = []
    for words in commands_of("docker"):
        image = next((place for place, word in enumerate(words) if re.fullmatch(r"tailrace(-\w+)?", word)), len(words))
        if words[1] == "run" and words[image + 1 :]:
            found.append(["tailrace", *words[image + 1 :]])
    return found


def test_there_is_no_command_of_another_kind() -> None:
    assert {words[0] for words in COMMANDS.values()} == {"tailrace", "nox", "pip", "docker"}
    assert len(commands_of("tailrace")) > 40
    assert len(commands_in_containers()) == 2


def test_every_image_that_is_built_has_a_dockerfile() -> None:
    """Docker itself need not be there."""
    for words in commands_of("docker"):
        assert words[1] in ("build", "run")
        assert words[1] == "run" or (ROOT / words[-1] / "Dockerfile").is_file(), " ".join(words)


def session_names() -> set[str]:
    """The names of the noxfile's sessions, read from its text, for nox need not be in this environment."""
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    named = re.findall(r'@nox\.session(?:\(name="([\w-]+)"\))?\ndef (\w+)', text)
    return {name or function for name, function in named}


def test_every_session_is_there() -> None:
    shown = {name for words in commands_of("nox") for name in _sessions_of(words)}
    text = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown |= {name for names in re.findall(r"`nox -s ([\w -]+?)(?: -- [^`]*)?`", text) for name in names.split()}
    assert shown <= session_names(), shown - session_names()


def _sessions_of(words: list[str]) -> Iterator[str]:
    assert words[1] == "-s"
    for word in words[2:]:
        if word == "--":
            return
        yield word


def test_every_run_is_a_possible_one(place: Path) -> None:
    """`--dry-run` expands, validates and prices it."""
    assert tailrace("traces", "add", "my.csv", cwd=place).returncode == 0
    checked = 0
    for words in commands_of("tailrace"):
        if words[1] != "run" or "--resume" in words:
            continue
        arguments = words[1:] if "--dry-run" in words else [*words[1:], "--dry-run"]
        done = tailrace(*arguments, cwd=place)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
        assert "min of traffic" in done.stdout
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    "words",
    [*(w for w in commands_of("tailrace") if w[1] != "run" or "--resume" in w), *commands_in_containers()],
    ids=" ".join,
)
def test_every_option_is_known(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    command = typer.main.get_command(app)
    arguments = words[1:]
    context = typer.Context(command, info_name="tailrace")
    while isinstance(commands := getattr(command, "commands", None), dict):
        assert arguments[0] in commands, f"there is no `tailrace {arguments[0]}`"
        command, arguments = commands[arguments[0]], arguments[1:]
        if not hasattr(command, "commands"):
            context = command.make_context(str(command.name), list(arguments), parent=context)
    assert context.command is command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which what the documentation speaks of exists."""
    folder = tmp_path_factory.mktemp("place")
    smoke = yaml.safe_load((ROOT / "experiments" / "smoke.yaml").read_text())
    (folder / "my-experiment.yaml").write_text(yaml.safe_dump({**smoke, "name": "mine"}))
    (folder / "my-system.yaml").write_text("replicas: 2\n")
    (folder / "triton.yaml").write_text("replicas: 3\n")
    (folder / "my.csv").write_text("timestamp\n" + "".join(f"{i / 20}\n" for i in range(400)))
    shutil.copytree(ROOT / "workloads" / "emulated", folder / "my-model")
    spec = folder / "my-model" / "workload.yaml"
    spec.write_text(spec.read_text().replace("name: emulated", "name: my-model", 1))
    for number, name in enumerate(("mine", "choice", "main", "new", "again", "ci")):
        make_run(folder / "results" / name, trials=3, seed=7 + number, span_s=30)
    return folder


def test_what_is_quick_does_what_it_says(place: Path) -> None:
    """In the order of the pages, for a baseline is saved before it is looked at."""
    saved: set[str] = set()
    for words in commands_of("tailrace"):
        name = words[1]
        if name == "run" or name in LONG or words[1:3] == ["tune", "--simulator"]:
            continue
        if words[1:3] == ["baseline", "save"]:
            if words[-1] in saved:
                shutil.rmtree(place / "baselines")
            saved.add(words[-1])
        done = tailrace(*words[1:], cwd=place)
        accepted = {"gate": (0, 4, 5), "doctor": (0, 1)}.get(name, (0,))
        assert done.returncode in accepted, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
