"""What every typed record is: a model whose fields know their unit and whose dump holds what was told, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tailrace.harness.errors import StorageError


@dataclass(frozen=True)
class Unit:
    """The unit of a field, for documentation."""

    name: str


Seconds = Annotated[float, Unit("s")]
Milliseconds = Annotated[float, Unit("ms")]
Microseconds = Annotated[float, Unit("µs")]
PerSecond = Annotated[float, Unit("1/s")]
Proportion = Annotated[float, Unit("0..1")]
Change = Annotated[float, Unit("share")]
Bytes = Annotated[float, Unit("B")]
Mebibytes = Annotated[float, Unit("MiB")]
Megahertz = Annotated[float, Unit("MHz")]
Watts = Annotated[float, Unit("W")]
Joules = Annotated[float, Unit("J")]
Celsius = Annotated[float, Unit("°C")]
Cores = Annotated[float, Unit("cores")]
Ends = tuple[float, float]
"""Of an interval: its lower and its upper end."""


class Record(BaseModel):
    """A part of a record. A docstring below a field says what it means, also of the fields right above it that have none;
    ``docs/record.md`` is made of them (:mod:`tailrace.harness.records.document`).

    What was never set is not written: a key that is absent says that nothing came to it, ``null`` that it is not known.
    """

    model_config = ConfigDict(extra="forbid")

    def dump(self) -> dict[str, Any]:
        """As plain data, what was set alone, in the order of the fields; infinite and undefined floats as they are."""
        return self.model_dump(exclude_unset=True)


class Source(Record):
    """A part of a record that is read from a file: of one that an older tailrace wrote, what it lacks has a default, and what
    is not known any more is left aside."""

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def load(cls, content: Mapping[str, Any], where: object) -> Self:
        """The record of what a file held. Raises :class:`StorageError`, which names ``where``, for anything else."""
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise StorageError(
                f"{where}: {place}: {first['msg']}", remedy="the file is damaged, or another program wrote it"
            ) from error
