"""Builds the images that servers run in: one for each adapter, from its ``Dockerfile``, lock file and base image.

What the adapters' images have in common is an image between the two, ``tailrace/base``, where a ``Dockerfile`` asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import ssl
import tarfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from docker.errors import APIError, ImageNotFound

from tailrace.harness.contract.adapter import Adapter, ServerEnvironment
from tailrace.harness.errors import EngineError, EnvironmentBuildError, InputError
from tailrace.harness.folders import cache_folder
from tailrace.harness.servers import package_index
from tailrace.harness.servers.engine import IMAGE, Engine, told
from tailrace.harness.servers.environments import Progress, exclusive, silent

PYTHON = Path("/opt/server/bin/python")
"""The server's interpreter in every image: what an adapter's ``Dockerfile`` has to make."""
USER_ID = 10001
"""The user that every image has, and as whom a server runs whose harness is root."""
SHARED = Path(__file__).parents[2] / "docker" / "base"
"""What ``tailrace/base`` is made of: ``docker/base`` of the repository, which is installed as package data."""

# Raised when images are built differently from the same files, so that old ones are not reused.
_FORMAT = 1
_TAIL_LINES = 30
_STEP = re.compile(r"Step \d+/\d+ : (?P<instruction>\w+).*")
_LAYER = re.compile(r" ---> (?P<id>[0-9a-f]{12})")
_BASE_ARGUMENT = re.compile(r"^ARG\s+BASE_IMAGE=(?P<image>\S+)\s*$", re.MULTILINE)
_ASKS_FOR_SHARED = re.compile(r"^ARG\s+TAILRACE_BASE\b", re.MULTILINE)
_SHARED_FILES = ("Dockerfile", "install-server")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
# Not what is on a path of this machine: the builder does not see it.
_HANDED_ON = ("index-url", "extra-index-url", "trusted-host", "timeout", "proxy", "no-index")
_PACKAGES = """
import importlib.metadata, json
print(json.dumps({d.name: d.version for d in reversed(list(importlib.metadata.distributions()))}))
"""


def build(
    engine: Engine,
    adapter: Adapter,
    requirements: Sequence[Path],
    *,
    base_image: str | None,
    on_progress: Progress | None = None,
) -> ServerEnvironment:
    """The image of an adapter with what these requirement files ask for, built if it is not there yet.

    It is known by a hash of the ``Dockerfile``, the requirement files and the base image; ``base_image`` is that of
    the experiment, ``None`` the one that the ``Dockerfile`` names. A base image that is not there is pulled. With the line
    ``ARG TAILRACE_BASE`` a ``Dockerfile`` asks for :data:`SHARED` on that base image: it is built first, and in the hash.

    Raises :class:`InputError` for an adapter without a ``Dockerfile``, and :class:`EnvironmentBuildError` when the
    base image or the image cannot be had, or the image has no interpreter at :data:`PYTHON`.
    """
    progress = on_progress or silent
    context = _context(adapter, requirements)
    dockerfile = context["Dockerfile"].decode()
    base = base_image or _default_base(adapter, dockerfile)
    shared = _read({name: SHARED / name for name in _SHARED_FILES}) if _ASKS_FOR_SHARED.search(dockerfile) else {}
    with _alone(adapter.name, progress):
        base_id = _present(engine, base) or _pull(engine, base, adapter.name, progress)
        known_by = {**context, **{f"{SHARED.name}/{name}": content for name, content in shared.items()}}
        tag = f"tailrace/{adapter.name}:{fingerprint(known_by, base_id)}"
        image = _present(engine, tag)
        if image is None:
            for sentence in _not_handed_on():
                progress(sentence)
            files = {**context, **_package_access()}
            recipe = _Recipe(adapter.name, f"the image of {adapter.name}", files, tag, base, base_id)
            if shared:
                recipe = _on_shared(engine, recipe, shared, progress)
            image = _build(engine, recipe, progress)
    packages = json.loads(ask(engine, image, _PACKAGES))
    return ImageEnvironment(PYTHON, "docker", dict(sorted(packages.items(), key=lambda p: str(p[0]).lower())), image)


@dataclass(frozen=True)
class ImageEnvironment(ServerEnvironment):
    """The interpreter of an image."""

    def ask(self, program: str) -> Any:
        """As every environment's; an image never changes, and is asked once."""
        return json.loads(_answer(self.image, program))


@functools.cache
def _answer(image: str, program: str) -> str:
    return ask(Engine.connect(), image, program)


def ask(engine: Engine, image: str, program: str) -> str:
    """What a program prints in an image's interpreter, isolated from settings and folder. Raises :class:`EngineError`."""
    return engine.run_briefly(image, [str(PYTHON), "-I", "-c", program])


def fingerprint(context: Mapping[str, bytes], base_id: str) -> str:
    """What an image is known by. How packages are fetched does not change what they are, and has no part in it."""
    facts = {
        "format": _FORMAT,
        "base": base_id,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in context.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _context(adapter: Adapter, requirements: Sequence[Path]) -> dict[str, bytes]:
    """The files that an image is made of: ``requirements.txt`` is the adapter's, what the workload adds is numbered."""
    if not adapter.dockerfile.is_file():
        raise InputError(
            f"`environment: docker`: the adapter {adapter.name} has no image: there is no {adapter.dockerfile}",
            remedy="use `environment: venv`, or write one (docs/containers.md says what it has to make)",
        )
    files = {"Dockerfile": adapter.dockerfile}
    for index, path in enumerate(requirements):
        files["requirements.txt" if index == 0 else f"requirements-{index}.txt"] = path
    return _read(files)


def _read(files: Mapping[str, Path]) -> dict[str, bytes]:
    try:
        return {name: path.read_bytes() for name, path in files.items()}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _default_base(adapter: Adapter, dockerfile: str) -> str:
    found = _BASE_ARGUMENT.search(dockerfile)
    if found is None:
        raise InputError(
            f"{adapter.dockerfile}: has no line `ARG BASE_IMAGE=…` that names its base image",
            remedy="add one, or name the image in the experiment: `containers.base_images`",
        )
    return found["image"]


def _present(engine: Engine, reference: str) -> str | None:
    """The id of an image that the engine has; ``None`` when it has none of that name."""
    with told(f"look for the image {reference}"):
        try:
            return str(engine.api.inspect_image(reference)["Id"])
        except ImageNotFound:
            return None


def _pull(engine: Engine, reference: str, name: str, progress: Progress) -> str:
    progress(f"pulling {reference}, the base image of {name}")
    layers: dict[str, str] = {}
    complete = 0
    try:
        with told(f"pull {reference}"):
            for line in engine.api.pull(reference, stream=True, decode=True):
                if "error" in line:
                    raise EngineError(line["error"])
                if "id" in line:
                    layers[line["id"]] = line.get("status", "")
                done = sum(status in ("Pull complete", "Already exists") for status in layers.values())
                if done > complete:
                    complete = done
                    progress(f"pulling {reference}: {done} of {len(layers)} layers")
        image = _present(engine, reference)
    except EngineError as error:
        raise EnvironmentBuildError(
            f"the base image of {name} cannot be had: {error.message}",
            remedy="check the network and the registry, or name an image that is on this machine: "
            f"`containers.base_images.{name}` in the experiment",
        ) from error
    if image is None:
        raise EnvironmentBuildError(f"the engine pulled {reference} and does not have it")
    return image


@dataclass(frozen=True)
class _Recipe:
    """One image to be built."""

    adapter: str
    image: str
    """What it is, in words."""
    files: Mapping[str, bytes]
    tag: str
    base: str
    base_id: str
    """Of the image that the first stage begins with."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Of the ``Dockerfile``, beside its base image."""


def _on_shared(engine: Engine, recipe: _Recipe, shared: Mapping[str, bytes], progress: Progress) -> _Recipe:
    """The same on what the adapters' images have in common, built if it is not there yet."""
    tag = f"tailrace/base:{fingerprint(shared, recipe.base_id)}"
    with _alone("base-image", progress):
        below = replace(recipe, image=f"what {recipe.image} is built on", files=shared, tag=tag)
        base_id = _present(engine, tag) or _build(engine, below, progress)
    return replace(recipe, base_id=base_id, arguments={"TAILRACE_BASE": tag})


def _alone(name: str, progress: Progress) -> contextlib.AbstractContextManager[int]:
    """While no other process builds an image of that name."""
    lock = cache_folder() / "images" / f"{name}.lock"
    return exclusive(lock, lambda: progress(f"waiting for another build of the image of {name}"))


def _build(engine: Engine, recipe: _Recipe, progress: Progress) -> str:
    progress(f"building {recipe.image} on {recipe.base}")
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    stages: list[str] = []
    made = failure = None
    proxies = {key: os.environ[key] for key in _PROXIES if key in os.environ}
    with told(f"build {recipe.image}"):
        for line in engine.api.build(
            fileobj=_archive(recipe.files),
            custom_context=True,
            tag=recipe.tag,
            buildargs={"BASE_IMAGE": recipe.base, **recipe.arguments, **proxies},
            labels={IMAGE: recipe.adapter},
            # A proxy or an index on this machine's loopback is the builder's as well.
            network_mode="host",
            rm=True,
            forcerm=True,
            decode=True,
        ):
            failure = failure or line.get("error")
            for said in str(line.get("stream", "")).splitlines():
                tail.append(said)
                if step := _STEP.fullmatch(said):
                    progress(f"{recipe.adapter}: {said:.100}")
                    if step["instruction"] == "FROM" and made is not None:
                        stages.append(made)
                elif (layer := _LAYER.fullmatch(said)) and layer["id"] not in recipe.base_id:
                    made = layer["id"]
    # What a stage before the last has left is in the image already, and may hold what is no business of any image.
    for stage in stages:
        with contextlib.suppress(APIError):  # the engine may still need it
            engine.api.remove_image(stage)
    image = None if failure else _present(engine, recipe.tag)
    if image is None:
        raise EnvironmentBuildError(
            f"{recipe.image} could not be built on {recipe.base}: {failure or 'the engine does not say why'}",
            remedy="read what the build says below; another base image is chosen by "
            f"`containers.base_images.{recipe.adapter}` in the experiment",
            detail="\n".join(tail),
        )
    return image


def _package_access() -> dict[str, bytes]:
    """pip's configuration and the certificates that this machine trusts, for the stage that installs: what comes out of
    that stage holds neither."""
    settings = package_index.pip_settings()
    lines = ["[global]"]
    for option in _HANDED_ON:
        if entries := [entry for entry in settings.get(option, "").split() if not _local(option, entry)]:
            lines.append(f"{option} = {' '.join(entries)}")
    access = {}
    if certificates := _certificates(settings):
        lines.append("cert = /build/ca.crt")
        access["ca.crt"] = certificates
    return {**access, "pip.conf": "\n".join([*lines, ""]).encode()}


def _certificates(settings: package_index.Settings) -> bytes | None:
    trusted = settings.get("cert") or ssl.get_default_verify_paths().cafile
    try:
        return Path(trusted).expanduser().read_bytes() if trusted else None
    except OSError:
        return None


def _local(option: str, entry: str) -> bool:
    return option.endswith("index-url") and not entry.startswith(("http://", "https://"))


def _not_handed_on() -> list[str]:
    """What pip is configured with that the builder of an image cannot reach, one sentence each."""
    settings = package_index.pip_settings()
    return [
        f"pip's {option} names {entry}, which an image is built without: it is on this machine alone"
        for option in ("find-links", "index-url", "extra-index-url")
        for entry in settings.get(option, "").split()
        if _local(option, entry) or (option == "find-links" and "://" not in entry)
    ]


def _archive(files: Mapping[str, bytes]) -> io.BytesIO:
    """A build context. The same files make the same archive, so that the engine's own cache of steps is of use."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    archive.seek(0)
    return archive
