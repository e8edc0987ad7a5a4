"""Traces from files: what is read, what is refused and in which words, and the public traces' published figures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.harness.errors import InputError
from tailrace.traces import fast_csv, importers, tables
from tailrace.traces.importers import FORMATS, import_csv, import_file, import_mooncake, import_worldcup98
from tailrace.traces.statistics import NS_PER_S
from tailrace.traces.trace import Trace, TraceDescription, compress_time, describe, rescale

PUBLIC = Path(__file__).parents[3] / "shared" / "traces"


def public(name: str) -> Path:
    path = PUBLIC / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def written(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def seconds(trace: Trace) -> list[float]:
    return [stamp / NS_PER_S for stamp in trace.arrivals_ns.tolist()]


@pytest.mark.parametrize(
    ("content", "options", "stamps_s", "span_s"),
    [
        ("timestamp\n0\n1.5\n1.5\n4\n", {}, [0, 1.5, 1.5, 4], 4.000000001),
        ("timestamp\n7\n", {}, [0], 1),
        ("timestamp\n7\n7\n7\n", {}, [0, 0, 0], 1),
        ("timestamp\n7.5\n7.7", {}, [0, 0.2], 1),
        ("\ufefftimestamp\r\n1e0\r\n+2.\r\n", {}, [0, 1], 1.000000001),
        ("timestamp\n\n1\n\n2\n\n", {}, [0, 1], 1.000000001),
        ('id,"timestamp"\n"a,\nb",1\nc,3\n', {}, [0, 2], 2.000000001),
        ("t\n1000\n2500\n", {"column": "t", "unit": "ms"}, [0, 1.5], 1.500000001),
        ("t\n1000\n2500.5\n", {"column": "t", "unit": "us"}, [0, 0.001500500], 1),
        (
            "t\n1700000000000000001\n1700000002000000003\n",
            {"column": "t", "unit": "ns"},
            [0, 2.000000002],
            2.000000003,
        ),
        (
            "t\n2023-11-16 18:17:03.9799600\n2023-11-16 18:17:04.9799601\n",
            {"column": "t", "unit": "datetime"},
            [0, 1.0000001],
            1.000000101,
        ),
        (
            "t\n2023-11-16T18:17:03Z\n2023-11-16T20:17:05+02:00\n",
            {"column": "t", "unit": "datetime"},
            [0, 2],
            2.000000001,
        ),
        ("t\n2023-11-16\n2023-11-16 00:01Z\n", {"column": "t", "unit": "datetime"}, [0, 60], 60.000000001),
        ("t\n1969-12-31 23:59:59\n1970-01-01\n", {"column": "t", "unit": "datetime"}, [0, 1], 1.000000001),
        ('{"timestamp": 1}\n\n{"x": [1], "timestamp": 2.5}\n', {"format": "jsonl"}, [0, 1.5], 1.500000001),
        ('{"t": 3000}\n{"t": "4000"}', {"format": "jsonl", "column": "t", "unit": "ms"}, [0, 1], 1.000000001),
    ],
)
def test_what_is_legal_is_read(
    tmp_path: Path, content: str, options: dict[str, Any], stamps_s: list[float], span_s: float
) -> None:
    trace = import_file(written(tmp_path, content, "my.trace.csv"), **options)
    assert seconds(trace) == stamps_s
    assert trace.span_s == span_s
    assert (trace.name, trace.transient, trace.fault_at_s) == ("my.trace", False, None)


@pytest.mark.parametrize("fmt", ["csv", "jsonl"])
def test_models_are_indexed_in_order_of_appearance(tmp_path: Path, fmt: str) -> None:
    rows = [(0, "b"), (1, "a"), (2, "b"), (3, "7")]
    lines = {
        "csv": "timestamp,model\n" + "".join(f"{t},{m}\n" for t, m in rows),
        "jsonl": "".join(json.dumps({"timestamp": t, "model": int(m) if m == "7" else m}) + "\n" for t, m in rows),
    }
    trace = import_file(written(tmp_path, lines[fmt]), format=fmt, model_column="model")
    assert trace.model_index is not None
    assert trace.model_index.tolist() == [0, 1, 0, 2]
    assert trace.provenance["models"] == ["b", "a", "7"]


def test_the_provenance_names_the_file_by_its_digest(tmp_path: Path) -> None:
    trace = import_file(written(tmp_path, "timestamp\n3\n4.5\n"))
    assert trace.provenance == {
        "kind": "file",
        "file": "t.csv",
        "sha256": hashlib.sha256(b"timestamp\n3\n4.5\n").hexdigest(),
        "format": "csv",
        "column": "timestamp",
        "unit": "s",
        "rows": 2,
        "begins": "3 s",
        "transformations": [],
    }


BAD_ROWS = [
    ("3\n1\n", "line 3, column 'timestamp': '1' is earlier than the row before it"),
    ("0\n-1\n", "line 3, column 'timestamp': '-1' is negative"),
    ("-1\n0\n", "line 2, column 'timestamp': '-1' is negative"),
    ("0\nnan\n1\n", "line 3, column 'timestamp': 'nan' is not a number .NaN."),
    ("NaN\n", "line 2, .* is not a number .NaN."),
    ("0\n1\ninf\n", "line 4, .*'inf' is infinite"),
    ("-Infinity\n0\n", "line 2, .*'-Infinity' is infinite"),
    ("0\nsoon\n", "line 3, .*'soon' is not a number"),
    ("0\n0x10\n", "line 3, .* is not a number"),
    ("0\n1_000\n", "line 3, .* is not a number"),
    ("0\n٣\n", "line 3, .* is not a number"),
    ("0\n''\n", "line 3, .* is not a number"),
    ('0\n""\n', "line 3, .* is missing"),
    ("0\n2023-11-16 18:17:03\n", "line 3, .*declare the unit datetime"),
    ("0\n1e300\n", "line 3, .*'1e300' s is more than the 292 years .*check the unit"),
    ("0\n1700000000000\n", "line 3, .*is more than the 292 years"),
    ("0\n1e999999999999\n", "line 3, .*is more than the 292 years"),
    ("0\n1,5\n", "line 3: has 2 columns, the header 1"),
    ('0\n"1\n2\n3\n', "line 5: is no CSV .unexpected end"),
    ('0\n1"\n"2\n3\n', "line 3, .* is not a number"),
    ("", "holds no rows"),
    ("0\n" + "9" * 200_000 + "\n", "line 3: is no CSV .field larger"),
]


@pytest.mark.parametrize(("rows", "says"), BAD_ROWS, ids=[rows[:20] for rows, _ in BAD_ROWS])
def test_a_bad_row_is_named(tmp_path: Path, rows: str, says: str) -> None:
    path = written(tmp_path, "timestamp\n" + rows)
    with pytest.raises(InputError, match=f"(?s)t.csv.*{says}") as caught:
        import_file(path)
    assert caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"", {}, "is empty"),
        (b"\n\n", {}, "the header has no column 'timestamp'; it names nothing"),
        (b"time,x\n1,2\n", {}, "line 1: the header has no column 'timestamp'; it names 'time', 'x'"),
        (b"0\n1\n", {}, "the header has no column 'timestamp'; it names '0'"),
        (b"timestamp,timestamp\n1,2\n", {}, "more than one column 'timestamp'"),
        (b"timestamp\n1\n", {"model_column": "model"}, "no column 'model'"),
        (b"timestamp,m\n1,a\n2\n", {"model_column": "m"}, "line 3: has 1 columns, the header 2"),
        (b"timestamp,m\n1,a\n2,b,c\n", {}, "line 3: has 3 columns, the header 2"),
        (b"timestamp,m\n1,a\n2,\n", {"model_column": "m"}, "line 3, column 'm': '' names no model"),
        (b'timestamp,m\n1,a\n2,"b\n3,c\n4,d\n', {}, "line 5: is no CSV"),
        (b'timestamp,m\n1,a\n2,"b', {}, "line 3: is no CSV"),
        (b"timestamp\n1\n\xff\n", {}, "line 3: is no UTF-8 .byte 0xff"),
        ("timestamp\n1\n".encode("utf-16"), {}, "line 1: is no UTF-8"),
        (b"timestamp,m\n1,\xc3", {}, "line 2: ends inside a UTF-8 character"),
        (b"\x1f\x8b\x08\x00", {}, "line 1: is no UTF-8"),
        (b"timestamp\n1e10\n", {"unit": "ms", "format": "csv", "column": "timestamp"}, None),
        (b"timestamp\n1e19\n", {"unit": "ns"}, "line 2, .*'1e19' ns is more than"),
        (b"timestamp\n99999999999999999999\n", {"unit": "ns"}, "line 2, .* is more than"),
        (b"timestamp\n3023-01-01\n", {"unit": "datetime"}, "line 2, .* outside the years"),
        (b"timestamp\n2023-02-30\n", {"unit": "datetime"}, "line 2, .* is not a date and time .day"),
        (b"timestamp\n12\n", {"unit": "datetime"}, "line 2, .* is not a date and time"),
        (b"timestamp\n2023-01-02\n2023-01-01\n", {"unit": "datetime"}, "line 3, .* is earlier"),
        (b"timestamp\n1700-01-01\n2200-01-01\n", {"unit": "datetime"}, "spans more than 292 years"),
        (b'{"timestamp": 1}\n{"timestamp": NaN}\n', {"format": "jsonl"}, "line 2, .* is not a number .NaN."),
        (b'{"timestamp": 1}\n{"timestamp": -Infinity}\n', {"format": "jsonl"}, "line 2, .* is infinite"),
        (b'{"timestamp": 2}\n{"timestamp": 1}\n', {"format": "jsonl"}, "line 2, .* is earlier"),
        (b'{"timestamp": -2}\n', {"format": "jsonl"}, "line 1, .* is negative"),
        (b'{"timestamp": 1e400}\n', {"format": "jsonl"}, "line 1, .* is more than"),
        (b'{"timestamp": true}\n', {"format": "jsonl"}, "line 1, .*'true' is neither a number nor text"),
        (b'{"timestamp": null}\n', {"format": "jsonl"}, "line 1, .*'null' is neither"),
        (b'{"timestamp": 1}\n{"t": 1}\n', {"format": "jsonl"}, "line 2: has no field 'timestamp'; it names 't'"),
        (b'{"timestamp": 1}\n[1]\n', {"format": "jsonl"}, "line 2: is no JSON object"),
        (b'{"timestamp": 1}\n{"timest', {"format": "jsonl"}, "line 2: is no JSON"),
        (b"[" * 100_000 + b"\n", {"format": "jsonl"}, "line 1: is no JSON"),
        (b"\n\n", {"format": "jsonl"}, "holds no rows"),
        (b"timestamp\n1\n", {"format": "xml"}, "format 'xml' does not exist.*use one of csv, jsonl"),
        (b"timestamp\n1\n", {"unit": "minutes"}, "Unit 'minutes' does not exist"),
        (b"timestamp\n1\n", {"count_column": "n"}, "has no use for 'count_column'"),
        (b"timestamp\n1\n", {"format": "azure_llm_2023", "column": "t"}, "has no use for 'column'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, options: dict[str, Any], says: str | None) -> None:
    path = written(tmp_path, content)
    if says is None:
        assert len(import_file(path, **options)) == 1
        return
    with pytest.raises(InputError, match=f"(?s){says}") as caught:
        import_file(path, **options)
    assert caught.value.remedy


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.csv: cannot be read: No such file"):
        import_file(tmp_path / "gone.csv")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        import_file(tmp_path)


def test_a_column_of_request_ids_is_no_column_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tables, fast_csv):
        monkeypatch.setattr(module, "MAX_MODELS", 3)
    path = written(tmp_path, "timestamp,id\n" + "".join(f"{i},{i}\n" for i in range(5)))
    with pytest.raises(InputError, match="line 5, column 'id': '3' is the 4th different model"):
        import_file(path, model_column="id")


@given(
    st.lists(st.tuples(st.integers(0, 10**15), st.sampled_from("abc")), min_size=1, max_size=40),
    st.sampled_from("smun"),
)
def test_the_fast_and_the_exact_reader_agree(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str]], first_letter: str
) -> None:
    unit: Any = {"s": "s", "m": "ms", "u": "us", "n": "ns"}[first_letter]
    places = {"s": 9, "ms": 6, "us": 3, "ns": 0}[unit]
    folder = tmp_path_factory.mktemp("agree")
    lines = [
        (f"{stamp // 10**places}.{stamp % 10**places:0{places}d}" if places else str(stamp), model)
        for stamp, model in sorted(rows)
    ]
    fast = import_csv(
        written(folder, "timestamp,m\n" + "".join(f"{t},{m}\n" for t, m in lines)), unit=unit, model_column="m"
    )
    exact = import_file(
        written(folder, "".join(f'{{"timestamp": "{t}", "m": "{m}"}}\n' for t, m in lines), "t.jsonl"),
        format="jsonl",
        unit=unit,
        model_column="m",
    )
    assert exact.arrivals_ns.tolist() == [stamp - min(rows)[0] for stamp, _ in sorted(rows)]
    assert np.abs(fast.arrivals_ns - exact.arrivals_ns).max() <= 256  # 64-bit floats, 10⁶ s from the origin
    assert fast.model_index is not None
    assert exact.model_index is not None
    assert fast.model_index.tolist() == exact.model_index.tolist()


@given(
    st.lists(
        st.lists(
            st.sampled_from(["0", "1", "2.5", "1e3", " 4", "-1", "nan", "inf", "", "a", '"5"', '"', "\r", "2024-01-02"])
        ),
        max_size=6,
    ),
    st.sampled_from(["s", "ns", "datetime"]),
    st.sampled_from([None, "m"]),
)
def test_the_fast_reader_accepts_only_what_the_row_reader_reads_alike(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], unit: Any, model_column: str | None
) -> None:
    path = written(tmp_path_factory.mktemp("alike"), "timestamp,m\n" + "".join(",".join(row) + "\n" for row in rows))

    def outcome() -> object:
        try:
            trace = import_csv(path, unit=unit, model_column=model_column)
        except InputError as error:
            return str(error)
        models = None if trace.model_index is None else trace.model_index.tolist()
        return trace.arrivals_ns.tolist(), models, trace.provenance

    fast = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importers, "read_csv_with_arrow", lambda *_: None)
        assert fast == outcome()


def test_a_cell_of_several_lines_is_one_row_even_where_arrow_cuts_its_blocks(tmp_path: Path) -> None:
    # Arrow cuts a file into blocks of 1 MiB at the ends of lines, and there takes a quoted line for a row.
    head, row = "timestamp,m\n", "0,a\n"
    rows = (1_048_570 - len(head)) // len(row) - 1
    padding = 1_048_570 - len(head) - (rows + 1) * len(row)
    tail = "0,a" + "x" * padding + '\n1,"q\n2,w\n3,e"\n' + "4,z\n" * 10
    trace = import_csv(written(tmp_path, head + row * rows + tail))
    assert len(trace) == rows + 12


def test_ten_million_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    stamps = np.arange(10_000_000, dtype=np.int64) // 3 * 7
    pa_csv.write_csv(pa.table({"timestamp": stamps}), path)
    trace = import_csv(path, unit="ms")
    assert bool(np.array_equal(trace.arrivals_ns, stamps * 1_000_000))
    assert describe(trace).rows == 10_000_000


def test_a_fault_after_a_million_rows_is_found(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    pa_csv.write_csv(pa.table({"timestamp": np.arange(1_000_000, dtype=np.int64)}), path)
    with path.open("a") as file:
        file.write("5\n")
    with pytest.raises(InputError, match="line 1000002, column 'timestamp': '5' is earlier"):
        import_csv(path)


# --- counts -----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(0, 30), st.integers(0, 50), min_size=1), st.integers(0, 2**32))
def test_every_count_stays_in_its_interval(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[int, int], seed: int
) -> None:
    path = written(
        tmp_path_factory.mktemp("counts"),
        "timestamp,count\n" + "".join(f"{1000 + 10 * i},{n}\n" for i, n in sorted(counts.items())),
    )
    trace = import_file(path, format="counts", interval_s=10, seed=seed)
    first, last = min(counts), max(counts)
    placed = np.bincount(trace.arrivals_ns // (10 * NS_PER_S), minlength=last - first + 1)
    assert placed.tolist() == [counts.get(i, 0) for i in range(first, last + 1)]
    assert (trace.span_s, trace.resolution_s) == (10 * (last - first + 1), 10)
    again = import_file(path, format="counts", interval_s=10, seed=seed)
    assert trace.arrivals_ns.tolist() == again.arrivals_ns.tolist()


def test_counts_a_century_apart_are_read_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "timestamp,count\n0,1\n3200000000,1\n")
    done = import_file(path, format="counts", interval_s=1).provenance["transformations"]
    assert isinstance(done, list)
    assert isinstance(done[0], dict)
    assert done[0]["missing_intervals"] == 3_199_999_999
    assert done[0]["missing_at"] == [f"{second} s" for second in range(1, 21)]


def test_a_window_of_counts_begins_at_its_start_and_names_what_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path, "minute,n\n2024-01-01 00:00,5\n2024-01-01 00:01,7\n2024-01-01 00:04,9\n")
    options: dict[str, Any] = {"format": "counts", "column": "minute", "unit": "datetime", "count_column": "n"}
    trace = import_file(path, start="2024-01-01 00:01", end="2024-01-01 00:04", **options)
    assert (len(trace), trace.span_s) == (7, 180)
    assert trace.arrivals_ns[-1] < 60 * NS_PER_S
    done = trace.provenance["transformations"]
    assert isinstance(done, list)
    assert isinstance(done[0], dict)
    assert done[0]["missing_at"] == ["2024-01-01T00:02:00", "2024-01-01T00:03:00"]
    assert (done[0]["intervals"], done[0]["missing_intervals"], done[0]["missing_read_as"]) == (3, 2, 0)
    assert (trace.provenance["begins"], trace.provenance["until"]) == ("2024-01-01T00:01:00", "2024-01-01T00:04:00")


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ("0,1\n60,-2\n", {}, "line 3, column 'count': '-2' is not a count"),
        ("0,1\n60,2.5\n", {}, "line 3, column 'count': '2.5' is not a count"),
        ("0,1\n60,\n", {}, "line 3, column 'count': '' is not a count"),
        ("0,1\n60,nan\n", {}, "line 3, column 'count': 'nan' is not a count"),
        ("0,1\n60," + "9" * 5000 + "\n", {}, "line 3, column 'count': .* is more than 10"),
        ("0,1\n60,100000001\n", {}, "holds 100,000,002 arrivals.*window"),
        ("0,1\n70,2\n", {}, "line 3, .*'70 s' is not a whole number of intervals of 60 s"),
        ("0,1\n0,2\n", {}, "line 3, .* starts the same interval"),
        ("60,1\n0,2\n", {}, "line 3, .* is earlier"),
        ("0,1\n60,2\n", {"start": 30}, "start 30 is not on an interval"),
        ("0,1\n60,2\n", {"start": 60, "end": 60}, "is empty or leaves"),
        ("0,1\n60,2\n", {"end": 180}, "is empty or leaves.*covers 0 s to 120 s"),
        ("0,1\n60,2\n", {"start": "noon"}, "start 'noon' is not a number"),
        ("0,1\n60,2\n", {"interval_s": 0.0}, "interval_s is 0"),
        ("0,1\n60,2\n", {"interval_s": float("nan")}, "interval_s is nan"),
        ("0,1\n60,2\n", {"seed": -1}, "seed is -1"),
        ("", {}, "holds no rows"),
    ],
)
def test_bad_counts_are_named(tmp_path: Path, rows: str, options: dict[str, Any], says: str) -> None:
    path = written(tmp_path, "timestamp,count\n" + rows)
    with pytest.raises(InputError, match=f"(?s){says}") as caught:
        import_file(path, format="counts", **options)
    assert caught.value.remedy


# --- formats by name --------------------------------------------------------------------------------------------------


def test_every_format_has_its_importer() -> None:
    assert FORMATS == ("csv", "jsonl", "counts", "azure_llm_2023", "mooncake", "worldcup98")


def test_mooncake_stamps_are_spread_over_their_quantum(tmp_path: Path) -> None:
    stamps = [0] * 40 + [3001] * 40 + [9000] * 40
    path = written(tmp_path, "".join(f'{{"timestamp": {t}, "hash_ids": [1, 2]}}\n' for t in stamps), "m.jsonl")
    trace = import_file(path, format="mooncake", seed=3)
    again, other = import_mooncake(path, seed=3), import_mooncake(path, seed=4)
    assert trace.arrivals_ns.tolist() == again.arrivals_ns.tolist() != other.arrivals_ns.tolist()
    assert np.histogram(seconds(trace), [0, 3.0005, 6.001, 9, 12])[0].tolist()[2:] == [0, 40]
    assert len(set(trace.arrivals_ns.tolist())) == 120
    assert (trace.span_s, trace.resolution_s, trace.provenance["format"]) == (12, 3, "mooncake")
    assert trace.provenance["transformations"] == [
        {"kind": "dequantise", "quantum_s": 3.0, "jitter": "uniform", "seed": 3}
    ]


def test_a_mooncake_file_that_is_not_quantised_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, '{"timestamp": 0}\n{"timestamp": 250}\n', "m.jsonl")
    with pytest.raises(InputError, match=r"(?s)0\.25 s apart.*format jsonl"):
        import_mooncake(path)


def figures(described: TraceDescription) -> tuple[float | None, ...]:
    return (
        described.mean_rate,
        described.peak_to_mean_1s,
        described.peak_to_mean_60s,
        described.index_of_dispersion_1s,
        described.index_of_dispersion_60s,
        described.cv,
    )


AZURE = {
    "code": (8819, 3435.948, (2.567, 26.10, 4.10, 13.19, 163.96, 13.15)),
    "conv": (19366, 3501.722, (5.530, 2.89, 1.53, 1.39, 16.13, 1.09)),
}


@pytest.mark.parametrize("kind", AZURE)
def test_azure_figures(kind: str) -> None:
    rows, span_s, published = AZURE[kind]
    trace = import_file(public(f"azure-llm-2023/AzureLLMInferenceTrace_{kind}.csv"), format="azure_llm_2023")
    described = describe(trace)
    assert (described.rows, round(described.span_s, 3)) == (rows, span_s)
    assert figures(described) == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(
    ("kind", "published"),
    [("code", (10.27, 26.20, 4.10, 52.04, 654.66, 13.15)), ("conv", (22.12, 2.85, 1.53, 5.17, 64.50, 1.09))],
)
def test_azure_four_times_up(kind: str, published: tuple[float, ...]) -> None:
    trace = import_file(public(f"azure-llm-2023/AzureLLMInferenceTrace_{kind}.csv"), format="azure_llm_2023")
    assert figures(describe(rescale(trace, 4 * trace.mean_rate, seed=1))) == pytest.approx(
        published, rel=2e-3, abs=0.006
    )


@pytest.mark.parametrize("kind", AZURE)
def test_azure_a_quarter_down(kind: str) -> None:
    trace = import_file(public(f"azure-llm-2023/AzureLLMInferenceTrace_{kind}.csv"), format="azure_llm_2023")
    before, after = describe(trace), describe(rescale(trace, trace.mean_rate / 4, seed=1))
    assert after.mean_rate == pytest.approx(before.mean_rate / 4, rel=0.06)
    assert before.index_of_dispersion_1s is not None
    assert before.index_of_dispersion_60s is not None
    assert after.index_of_dispersion_1s == pytest.approx(1 + (before.index_of_dispersion_1s - 1) / 4, rel=0.15)
    assert after.index_of_dispersion_60s == pytest.approx(1 + (before.index_of_dispersion_60s - 1) / 4, rel=0.15)


def test_azure_time_compressed() -> None:
    trace = import_file(public("azure-llm-2023/AzureLLMInferenceTrace_code.csv"), format="azure_llm_2023")
    faster, slower = describe(compress_time(trace, 4)), describe(compress_time(trace, 0.25))
    assert figures(faster)[:5] == pytest.approx((10.27, 22.99, 1.62, 40.41, 137.20), abs=0.006)
    assert figures(slower)[:5] == pytest.approx((0.64, 43.64, 11.69, 4.66, 99.29), abs=0.006)


def test_mooncake_figures() -> None:
    path = public("mooncake-fast25/conversation_trace.jsonl")
    raw = describe(import_file(path, format="jsonl", unit="ms"))
    assert (raw.rows, round(raw.span_s, 3)) == (12_031, 3536.999)
    assert figures(raw) == pytest.approx((3.402, 8.23, 1.21, 7.90, 2.89, 3.03), abs=0.006)
    trace = import_mooncake(path, seed=1)
    assert (describe(trace).peak_to_mean_1s, describe(trace).cv) == (None, None)
    spread = describe(replace(trace, resolution_s=0.0))
    assert spread.index_of_dispersion_1s == pytest.approx(1.05, abs=0.06)
    assert spread.cv == pytest.approx(1.01, abs=0.03)


def test_worldcup_figures() -> None:
    path = public("worldcup98/invocation_count.csv")
    trace = import_worldcup98(path, start="1998-05-19 20:30", end="1998-05-19 21:30", seed=2)
    described = describe(trace)
    assert (described.rows, described.span_s, round(described.mean_rate, 1)) == (252_630, 3600, 70.2)
    assert described.peak_to_mean_60s == pytest.approx(29_364 * 60 / 252_630)
    assert (described.peak_to_mean_1s, described.cv) == (None, None)
    with pytest.raises(InputError, match=r"(?s)holds 1,352,804,107 arrivals.*window"):
        import_worldcup98(path)
