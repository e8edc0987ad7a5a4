"""Keys that users write: what is said of a wrong one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Tag, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from tailrace.harness.contract.adapter import Adapter
from tailrace.harness.errors import InputError, nearest


class Strict(BaseModel):
    """Keys of which none is unknown, and numbers that are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def explain(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """A validation error as sentences that name file, key, what is wrong and the nearest known key."""
    sentences = []
    for problem in error.errors():
        written, place = _followed(problem["loc"], model)
        location = ".".join(map(str, written)) or "(the whole)"
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            known = list(problem.get("ctx", {}).get("known") or (place.model_fields if place is not None else ()))
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
            sentences.append(f"{where}: unknown key `{location}`; {hint}")
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            shown = "" if problem["type"] == "missing" else f" (got {problem['input']!r:.80})"
            sentences.append(f"{where}: `{location}`: {reason}{shown}")
    return sentences


def unknown_keys(unknown: Mapping[str, object], known: Iterable[str]) -> ValidationError:
    """The error for keys that a validator does not know, of a model whose class allows any."""
    kind = PydanticCustomError("extra_forbidden", "Extra inputs are not permitted", {"known": list(known)})
    errors = [InitErrorDetails(type=kind, loc=(key,), input=value) for key, value in unknown.items()]
    return ValidationError.from_exception_data("keys", errors)


def validated_options(adapter: Adapter, given: Mapping[str, Any]) -> BaseModel:
    """An adapter's own options. Raises :class:`InputError` that names the key and the nearest known one."""
    try:
        return adapter.Options.model_validate(given)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, adapter.Options, f"options.{adapter.name}"))) from error


def _followed(location: Sequence[int | str], model: type[BaseModel]) -> tuple[list[int | str], type[BaseModel] | None]:
    """What a user has written of a location inside ``model``, and the model that holds its last key. Pydantic tells errors
    also by the tags of a union, which nobody has written."""
    written: list[int | str] = []
    place: Any = model
    owner: type[BaseModel] | None = model
    for part in location:
        if (tagged := _tagged(place, part)) is not None:
            place = tagged
            continue
        written.append(part)
        if isinstance(part, str):
            owner = _model_in(place)
            field = owner.model_fields.get(part) if owner is not None else None
            place = field.annotation if field is not None else None
    return written, owner


def _tagged(annotation: Any, tag: int | str) -> Any:
    """The member of a union that has this tag."""
    for member in get_args(annotation):
        if any(isinstance(mark, Tag) and mark.tag == tag for mark in getattr(member, "__metadata__", ())):
            return member
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as ``tuple[Scenario, ...]`` or ``Slo | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for member in get_args(annotation) if (found := _model_in(member)) is not None), None)
