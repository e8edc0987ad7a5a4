"""Tables survive whatever ends their writer: cut at any byte, refused by the disk, or finished properly."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.harness.errors import StorageError
from tailrace.harness.records.schema import SAMPLE_SCHEMA
from tailrace.harness.records.tables import TableWriter, finish_table, read_table


def batch(start: int, rows: int) -> pa.RecordBatch:
    columns = [
        range(start, start + rows),
        ["host"] * rows,
        ["host"] * rows,
        ["steal"] * rows,
        [0.5] * rows,
        ["1"] * rows,
    ]
    arrays = [pa.array(list(c), type=field.type) for c, field in zip(columns, SAMPLE_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SAMPLE_SCHEMA)


def write(stem: Path, sizes: list[int]) -> None:
    with TableWriter(stem, SAMPLE_SCHEMA) as writer:
        for start, rows in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
            writer.append(batch(int(start), rows))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0, 1))
def test_a_stream_cut_at_any_byte_gives_back_every_whole_batch(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], share: float
) -> None:
    stem = tmp_path_factory.mktemp("cut") / "samples"
    write(stem, sizes)
    path = stem.with_name("samples.arrow")
    whole = path.read_bytes()
    header = len(SAMPLE_SCHEMA.serialize())
    cut = header + int(share * (len(whole) - header))
    path.write_bytes(whole[:cut])
    table = read_table(stem, SAMPLE_SCHEMA)
    assert table is not None
    assert table["t_ns"].to_pylist() == list(range(table.num_rows))
    assert table.num_rows in np.cumsum([0, *sizes])
    if cut == len(whole):
        assert table.num_rows == sum(sizes)


def test_finishing_sorts_and_replaces_the_stream(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "samples", SAMPLE_SCHEMA) as writer:
        writer.append(batch(10, 5))
        writer.append(batch(0, 5))
    finish_table(tmp_path / "samples", sort_by="t_ns")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.parquet"]
    table = read_table(tmp_path / "samples", SAMPLE_SCHEMA)
    assert table is not None
    assert table["t_ns"].to_pylist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_what_was_never_written_is_none_and_needs_no_finishing(tmp_path: Path) -> None:
    finish_table(tmp_path / "samples", sort_by="t_ns")
    assert read_table(tmp_path / "samples", SAMPLE_SCHEMA) is None


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(StorageError, match=r"samples\.parquet is damaged"):
        read_table(tmp_path / "samples", SAMPLE_SCHEMA)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff\xff", b"no stream at all"])
def test_a_stream_that_ended_before_it_began_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "samples.arrow").write_bytes(content)
    assert read_table(tmp_path / "samples", SAMPLE_SCHEMA) is None
    finish_table(tmp_path / "samples", sort_by="t_ns")
    assert (tmp_path / "samples.arrow").exists(), "evidence is not thrown away"


def test_other_columns_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"t_ns": [1], "colour": ["red"]}), tmp_path / "samples.parquet")
    with pytest.raises(StorageError, match="colour"):
        read_table(tmp_path / "samples", SAMPLE_SCHEMA)


def test_parquet_that_cannot_be_written_leaves_the_stream(tmp_path: Path) -> None:
    write(tmp_path / "samples", [5])
    (tmp_path / "samples.parquet.tmp").mkdir()
    with pytest.raises(StorageError, match=r"samples\.parquet could not be written"):
        finish_table(tmp_path / "samples", sort_by="t_ns")
    table = read_table(tmp_path / "samples", SAMPLE_SCHEMA)
    assert table is not None
    assert table.num_rows == 5


def test_a_full_disk_is_one_clear_message_and_loses_nothing_written() -> None:
    """/dev/full accepts being opened and refuses every byte, as a full disk does."""
    error = StorageError.of(Path("results/x/requests.arrow"), OSError(errno.ENOSPC, "No space left on device"))
    assert "No space left" in str(error)
    assert "free some disk space" in str(error)
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        full.write(b"x")
