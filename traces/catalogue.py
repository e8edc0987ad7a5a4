"""The catalogue: traces by name, those that come with tailrace and those that a user has added.

A built-in trace is one YAML file in ``traces/catalogue/``; an added one is ``NAME.yaml`` and ``NAME.parquet`` in the
``traces`` folder of :func:`data_folder`. The fields of the YAML are those of :class:`CatalogueEntry`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from tailrace.harness.errors import InputError, StorageError
from tailrace.harness.folders import data_folder
from tailrace.traces.generators import GENERATORS
from tailrace.traces.importers import ImportOptions, import_file
from tailrace.traces.trace import Trace, TraceDescription, describe

BUILT_IN = Path(__file__).parent / "catalogue"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_METADATA = b"tailrace"


class CatalogueEntry(BaseModel):
    """One trace as its YAML declares it; the name is that of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    description: str
    kind: Literal["generator", "file"]
    generator: str | None = None
    """For kind generator: one of :data:`GENERATORS`."""
    file: str | None = Field(default=None, pattern=r"^[^/]+$")
    """For kind file: the file beside the YAML; Parquet as :func:`add` writes it, or anything that can be imported."""
    params: dict[str, JsonValue] = {}
    """Parameters of the generator, or the :class:`ImportOptions` of the file."""
    transient: bool = False
    """Declares a surge or a flash crowd: exempt from checks for a steady state."""
    fault_at_s: float | None = Field(default=None, ge=0)
    """Where the trace suggests a fault, in seconds."""
    source: str
    licence: str

    @model_validator(mode="after")
    def _whole(self) -> CatalogueEntry:
        if self.kind == "generator" and (self.generator not in GENERATORS or self.file is not None):
            raise ValueError(f"kind generator needs `generator`, one of {', '.join(GENERATORS)}, and no `file`")
        if self.kind == "file" and (self.file is None or self.generator is not None):
            raise ValueError("kind file needs `file` and no `generator`")
        return self


def names() -> list[str]:
    """All traces that :func:`load` knows, sorted."""
    return sorted(path.stem for path in _declarations().values())


def entry(name: str) -> CatalogueEntry:
    """What the catalogue says about ``name``; raises :class:`InputError` for an unknown name or a broken YAML."""
    path = _declarations().get(name)
    if path is None:
        raise InputError(
            f"There is no trace {name!r}{_nearest(name, names())}.",
            remedy=f"use one of {', '.join(names())}, or add your own: tailrace traces add FILE --name NAME",
        )
    try:
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(declared, dict):
            raise InputError(
                f"{path}: does not hold the fields of a trace.", remedy="restore it, or add the trace again"
            )
        return CatalogueEntry.model_validate({**declared, "name": name})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {error}", remedy="restore it, or add the trace again") from error
    except ValidationError as error:
        raise InputError(f"{path}: {_first_fault(error)}", remedy="correct that field") from error


def load(name: str, *, seed: int, params: dict[str, Any] | None = None) -> Trace:
    """The trace of that name.

    A generated trace is drawn from ``seed``, with ``params`` in place of the catalogue's; ``fault_at_s`` is one of
    them. The arrivals of a file are what they are: they ignore the seed and take no parameters. Raises
    :class:`InputError` for an unknown name, unknown or impossible parameters, or a file that is gone or broken.
    """
    declared = entry(name)
    overrides = params or {}
    trace = _generated(declared, overrides, seed) if declared.kind == "generator" else _stored(declared, overrides)
    return replaced(trace, name=name, transient=declared.transient)


def _generated(declared: CatalogueEntry, overrides: dict[str, Any], seed: int) -> Trace:
    generator = GENERATORS[str(declared.generator)]
    known = list(generator.parameters.model_fields)
    for key in overrides:
        if key not in known:
            raise InputError(
                f"Trace {declared.name!r} has no parameter {key!r}{_nearest(key, known)}.",
                remedy=f"use {', '.join(known)}",
            )
    try:
        parameters = generator.parameters.model_validate(
            {"fault_at_s": declared.fault_at_s, **declared.params, **overrides}
        )
    except ValidationError as error:
        raise InputError(
            f"Trace {declared.name!r}, parameter {_first_fault(error)}", remedy="correct that parameter"
        ) from error
    return generator.draw(parameters, seed=seed)


def _stored(declared: CatalogueEntry, overrides: dict[str, Any]) -> Trace:
    if overrides:
        raise InputError(
            f"Trace {declared.name!r} is a file and takes no parameters; {', '.join(map(repr, overrides))} given.",
            remedy="choose a window or a rate in the experiment instead",
        )
    path = _declarations()[declared.name].with_name(str(declared.file))
    if path.suffix == ".parquet":
        trace = _read_parquet(path, declared.name)
    else:
        options: Any = declared.params
        trace = import_file(path, name=declared.name, **options)
    return replaced(trace, fault_at_s=declared.fault_at_s)


def add(
    file: Path,
    *,
    name: str | None = None,
    replace: bool = False,
    transient: bool = False,
    fault_at_s: float | None = None,
    **options: Unpack[ImportOptions],
) -> tuple[Trace, TraceDescription]:
    """Import ``file``, check and describe it, and register it so that ``load(name)`` finds it.

    ``name`` is by default the file's stem. ``transient`` declares a surge or a flash crowd, ``fault_at_s`` where the
    trace suggests a fault. The trace is copied: the file is not needed afterwards. Raises :class:`InputError` for a
    name that is taken (unless ``replace``), built in, or unfit, and for all that can be wrong with the file;
    :class:`StorageError` where the user's folder cannot be written.
    """
    name = _checked_name(file, name, replace)
    trace = replaced(import_file(file, name=name, **options), transient=transient, fault_at_s=fault_at_s)
    declared = CatalogueEntry(
        name=name,
        title=f"Imported from {file.name}",
        description=f"{len(trace):,} arrivals in {trace.span_s:g} s.",
        kind="file",
        file=f"{name}.parquet",
        transient=transient,
        fault_at_s=fault_at_s,
        source=file.name,
        licence="as its source says",
    )
    text = yaml.safe_dump(declared.model_dump(mode="json", exclude={"name"}, exclude_none=True), sort_keys=False)
    folder = data_folder() / "traces"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _staged(folder / f"{name}.parquet", lambda path: _write_parquet(path, trace))
        # The YAML comes last: what is half written is in no catalogue.
        _staged(folder / f"{name}.yaml", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"Trace {name!r} cannot be stored in {folder}: {error.strerror or error}.",
            remedy="make room there, or point TAILRACE_HOME to another folder",
        ) from error
    return trace, describe(trace)


def _checked_name(file: Path, name: str | None, replace: bool) -> str:
    chosen = file.stem if name is None else name
    if not _NAME.fullmatch(chosen):
        raise InputError(
            f"{chosen!r} cannot be the name of a trace: use letters, digits, '.', '_' and '-', at most 100.",
            remedy="choose another with --name" if name is not None else "give it one with --name",
        )
    declarations = _declarations()
    if chosen in declarations and declarations[chosen].parent == BUILT_IN:
        raise InputError(
            f"The trace {chosen!r} is built in and cannot be replaced.", remedy="choose another with --name"
        )
    if chosen in declarations and not replace:
        raise InputError(
            f"There already is a trace {chosen!r}.", remedy="choose another with --name, or replace it with --replace"
        )
    return chosen


def _declarations() -> dict[str, Path]:
    """The YAML of every trace; a built-in one is never shadowed."""
    return {
        path.stem: path for folder in (data_folder() / "traces", BUILT_IN) for path in sorted(folder.glob("*.yaml"))
    }


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=3)
    return f"; the nearest are {', '.join(map(repr, matches))}" if matches else ""


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where!r} ({first['input']!r}): {message}" if where else message


def _write_parquet(path: Path, trace: Trace) -> None:
    columns = {"t_ns": pa.array(trace.arrivals_ns)}
    if trace.model_index is not None:
        columns["model"] = pa.array(trace.model_index)
    about = {"span_ns": trace.span_ns, "resolution_s": trace.resolution_s, "provenance": trace.provenance}
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about).encode()})
    pq.write_table(table, path, compression="zstd")


def _read_parquet(path: Path, name: str) -> Trace:
    try:
        # Opened here, so that a single file is read, whatever the folders around it are called.
        with path.open("rb") as file:
            table = pq.read_table(file)
        about = json.loads(table.schema.metadata[_METADATA])
        columns = {column: table[column].to_numpy().astype(np.int64) for column in table.column_names}
        return Trace(
            name=name,
            arrivals_ns=columns["t_ns"],
            span_ns=about["span_ns"],
            model_index=columns.get("model"),
            provenance=about["provenance"],
            resolution_s=about["resolution_s"],
        )
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: the stored trace {name!r} cannot be read: {error}", remedy="add the trace again, with --replace"
        ) from error


def _staged(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, then rename: ``path`` is always whole, old or new."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
