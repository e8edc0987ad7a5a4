"""CSV read by Arrow, fast: the same as the row reader gives where all is well, and nothing else."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from tailrace.traces.stamps import NS_PER_UNIT, Unit
from tailrace.traces.tables import MAX_MODELS, Fingerprint, Read, Table
from tailrace.traces.trace import MAX_NS


def read_csv_with_arrow(table: Table, header: list[str], fingerprint: Fingerprint) -> Read | None:
    """The same as the row reader where all is well; ``None`` where it is not, or not surely."""
    if table.column == table.second or len(set(header)) < len(header):
        return None
    columns = _arrow_columns(table)
    # A stray quote swallows what follows, and Arrow lets it: every row must be one line, and the quotes must pair.
    if columns is None or len(columns) + 1 != fingerprint.lines or fingerprint.quotes % 2:
        return None
    stamps_ns = _whole_nanoseconds(columns[table.column], table.unit)
    if stamps_ns is None:
        return None
    if table.second is None:
        return Read(stamps_ns, None, [])
    coded = pc.dictionary_encode(columns[table.second].combine_chunks())
    models = coded.dictionary.to_pylist()
    if "" in models or len(models) > MAX_MODELS:
        return None
    return Read(stamps_ns, coded.indices.to_numpy().astype(np.int64), models)


def _arrow_columns(table: Table) -> pa.Table | None:
    """The wanted columns, the stamps as the first type that fits all of them."""
    types = {
        "s": [pa.float64()],
        "datetime": [pa.timestamp("ns"), pa.timestamp("ns", tz="UTC")],
    }.get(table.unit, [pa.int64(), pa.float64()])
    wanted = [name for name in (table.column, table.second) if name is not None]
    for stamp_type in types:
        convert = pa_csv.ConvertOptions(
            column_types={wanted[-1]: pa.string(), table.column: stamp_type},
            include_columns=wanted,
            null_values=[],
        )
        try:
            return pa_csv.read_csv(table.path, convert_options=convert)
        except pa.ArrowException:
            continue
    return None


def _whole_nanoseconds(column: pa.ChunkedArray, unit: Unit) -> NDArray[np.int64] | None:
    """Absolute stamps in ns; ``None`` unless all are finite, not negative, sorted and small enough."""
    if len(column) == 0:
        return None
    if unit == "datetime":
        moments: NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
        return None if bool(np.any(moments[1:] < moments[:-1])) else moments
    values: NDArray[np.int64] | NDArray[np.float64] = column.to_numpy()
    scale = NS_PER_UNIT[unit]
    ordered = not bool(np.any(values[1:] < values[:-1]))
    # NaN makes every comparison false, so a NaN in between is looked for by itself.
    if not ordered or bool(np.isnan(values).any()) or not (values[0] >= 0 and values[-1] <= MAX_NS // scale - 1):
        return None
    if values.dtype == np.int64:
        return values.astype(np.int64) * scale
    # The first stamp is taken off before scaling: 1.7·10⁹ s in nanoseconds would lose what the difference still has.
    origin = values[0]
    offsets: NDArray[np.int64] = np.rint((values - origin) * scale).astype(np.int64)
    return offsets + round(float(origin) * scale)
