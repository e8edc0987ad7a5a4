"""Finds workloads, and reads what they declare."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from pydantic import ValidationError

from tailrace.harness.contract.workload import (
    ArtifactKind,
    Precision,
    WorkloadSpec,
)
from tailrace.harness.errors import InputError

_HERE = Path(__file__).parent


def names() -> list[str]:
    """The built-in workloads."""
    return sorted(folder.name for folder in _HERE.iterdir() if (folder / "workload.yaml").is_file())


def load_spec(name_or_folder: str) -> WorkloadSpec:
    """The declaration of a built-in workload or of a user's folder. Raises :class:`InputError`."""
    return _read_spec(folder_of(name_or_folder))


def folder_of(name_or_folder: str) -> Path:
    """Where a built-in workload lies, or a user's folder made absolute. Raises :class:`InputError` for what is neither."""
    if name_or_folder in names():
        return _HERE / name_or_folder
    folder = Path(name_or_folder).expanduser()
    if not folder.is_dir():
        near = difflib.get_close_matches(name_or_folder, names(), n=1)
        raise InputError(
            f"there is no workload `{name_or_folder}`" + (f"; did you mean `{near[0]}`?" if near else ""),
            remedy=f"choose one of {', '.join(names())}, or give the path of a workload folder",
        )
    for needed in ("workload.yaml", "model.py", "build.py"):
        if not (folder / needed).is_file():
            raise InputError(
                f"{folder} is no workload folder: it has no {needed}", remedy="see docs/extend.md, «add a workload»"
            )
    return folder.resolve()


def _read_spec(folder: Path) -> WorkloadSpec:
    path = folder / "workload.yaml"
    try:
        return WorkloadSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}", remedy="see docs/extend.md, «add a workload»") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        near = difflib.get_close_matches(field, WorkloadSpec.model_fields, n=1)
        hint = f"; did you mean `{near[0]}`?" if first["type"] == "extra_forbidden" and near else ""
        raise InputError(
            f"{path}: `{field}`: {first['msg']}{hint}", remedy="see docs/extend.md, «add a workload»"
        ) from error


def check_arithmetic(spec: WorkloadSpec, precision: Precision | None, compiled: bool) -> None:
    """Raises :class:`InputError` for a precision or a compilation that a workload does not offer."""
    offered = ["fp32", *spec.lower_precisions] if spec.lower_precisions else []
    if precision is not None and precision not in offered:
        raise InputError(
            f"`precision`: the workload {spec.name} does not offer {precision}; it offers "
            + (f"{', '.join(offered)}" if offered else "no choice of precision"),
            remedy="choose one of these" if offered else "leave `precision` out",
        )
    if compiled and not spec.compiles:
        raise InputError(
            f"`compile`: the workload {spec.name} does not offer to be compiled", remedy="leave `compile` out"
        )


def check_export(spec: WorkloadSpec, artifact: ArtifactKind, precision: Precision | None, compiled: bool) -> None:
    """Raises :class:`InputError` for an export that a workload does not offer, at all or in that precision."""
    if artifact == "python":
        return
    python = "use `artifact: python`"
    if artifact not in spec.exports:
        offered = ", ".join(spec.exports)
        raise InputError(
            f"`artifact`: the workload {spec.name} has no export to {artifact}"
            + (f", only to {offered}" if offered else ": there is nothing of it but its Python code"),
            remedy=python,
        )
    if (precision or "fp32") not in spec.exports[artifact]:
        raise InputError(
            f"`artifact`: the workload {spec.name} has no export to {artifact} in {precision or 'fp32'}, only in "
            + ", ".join(spec.exports[artifact]),
            remedy=f"choose one of these for `precision`, or {python}",
        )
    if compiled:
        raise InputError(
            "`compile`: an export is not compiled by torch: whoever runs it optimises it in its own way",
            remedy=f"leave `compile` out, or {python}",
        )
