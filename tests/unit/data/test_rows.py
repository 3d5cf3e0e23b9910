"""Rows: JSON lines, CSV and Parquet read one way, each fault with its line."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import random
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainway.config.schema import DataConfig
from trainway.data.csvfile import AFTER_QUOTE, NEVER_CLOSED, csv_line
from trainway.data.formats import read_rows
from trainway.data.rows import KEPT_BYTES, BadRow, Row
from trainway.data.sources import Document, read_documents
from trainway.errors import DataError


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(path: Path, max_mib: int = 1, **options: Any) -> list[Any]:
    """(line, row) of good rows, "line: field: reason" of bad ones."""
    found: list[Any] = []
    for row in read_rows(path, max_mib, **options):
        if isinstance(row, Row):
            found.append((row.line, row.value))
        else:
            found.append(f"{row.record.line}: {row.record.field}: {row.record.reason}")
    return found


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"a": {"b": [{"x y": 1, "x y": 2}]}}', "a.b[0]['x y']: the key occurs twice in one object"),
        (b'{"a": {"b": 1, "b": 1}} {', "b: the key occurs twice in one object"),
        (b'{"a": 1e999}', ": the number 1e999 is out of range"),
        (b'{"a": [{"b": "\\uDC00"}]}', "a[0].b: holds a lone surrogate U+DC00 at character 0"),
        (b'{"a": {"\\uD800": 1}}', "a: holds a lone surrogate U+D800 at character 0"),
        (b'\xef\xbb\xbf{"a": 1}', ": begins with a byte order mark"),
        (b'{"a": 1} {"a": 2}', ": not valid JSON: Extra data at column 10"),
        (nested(129), ": JSON nested too deeply: more than 128 levels"),
        (nested(3000), ": JSON nested too deeply"),
    ],
)
def test_json_lines_that_are_refused(tmp_path: Path, line: bytes, fault: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 3}\n')
    assert read(path) == [(1, {"a": 0}), f"2: {fault}", (3, {"a": 3})]


@pytest.mark.parametrize(
    "line",
    [
        nested(128),
        b'{"a": "\\ud83d\\ude00 \xf0\x9f\x98\x80 \xef\xbb\xbf NaN [[[[ {{{{", "b": [1, -0.5e-3, 12345678901234567890]}',
        b'{"a": "' + b"[{" * 500 + b'"}',
        b'\t{"a": 1} \r',
    ],
)
def test_json_lines_that_are_fine(tmp_path: Path, line: bytes) -> None:
    ((number, row),) = read(write(tmp_path / "a.jsonl", line + b"\n"))
    assert number == 1
    assert "a" in row


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE = st.recursive(LEAF, lambda child: st.lists(child) | st.dictionaries(TEXT, child), max_leaves=10)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXT, VALUE), st.booleans(), st.sampled_from([(",", ":"), (" , ", " : ")]))
def test_any_json_object_is_a_good_row(
    value: dict[str, Any], escape: bool, separators: tuple[str, str]
) -> None:
    line = json.dumps(value, ensure_ascii=escape, separators=separators).encode()
    with tempfile.TemporaryDirectory() as folder:
        (row,) = read_rows(write(Path(folder, "a.jsonl"), line + b"\r\n"), 1)
    assert row == Row(value, 1, line)


PIECES = st.lists(
    st.sampled_from(["\\ud83d", "\\uDE00", "\\u00e9", "\\\\", "u", "d83d", "\\n", "x"]), max_size=8
)


@settings(max_examples=200, deadline=None)
@given(PIECES)
def test_a_lone_surrogate_is_found_wherever_it_stands(pieces: list[str]) -> None:
    line = b'{"a": {"b": "%b"}}' % "".join(pieces).encode()
    with tempfile.TemporaryDirectory() as folder:
        (row,) = read_rows(write(Path(folder, "a.jsonl"), line + b"\n"), 1)
    assert isinstance(row, BadRow) == any(0xD800 <= ord(char) < 0xE000 for char in json.loads(line)["a"]["b"])


def test_rows_keep_their_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": \xff}\n' + b"x" * (1 << 20) + b"yz\n")
    good, bad, long = read_rows(path, 1)
    assert good == Row({"a": 1}, 1, b'{"a": 1}')
    assert isinstance(bad, BadRow) and bad.raw == b'{"a": \xff}'
    assert isinstance(long, BadRow) and (long.raw, long.size) == (b"x" * KEPT_BYTES, (1 << 20) + 2)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'[\n{"a": 1},\n{"a": 2}\n]\n', "one JSON array"),
        (b'\xef\xbb\xbf [{"a": 1}]', "one JSON array"),
        (b'{\n  "a": 1\n}\n', "JSON spread over several lines"),
    ],
)
def test_a_json_file_that_is_no_json_lines_says_so(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(DataError, match=rf"a\.json: holds {what}, not JSON lines[\s\S]*jq -c") as caught:
        read(write(tmp_path / "a.json", data))
    assert caught.value.fix.endswith("a.json > a.jsonl")
    assert read(write(tmp_path / "b.json", b'{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_csv_by_rfc_4180(tmp_path: Path) -> None:
    data = (
        b"\xef\xbb\xbfprompt, completion,note\r\n"
        b'007,"a ""b"", c",\r\n'
        b'"two\r\nlines\n",x,""\r\n'
        b"\r\n"
        b'size 5" x,"","[1]"\n'
        b'"last",y,z'
    )
    expected = [
        (2, {"prompt": "007", "completion": 'a "b", c'}),
        (3, {"prompt": "two\r\nlines\n", "completion": "x", "note": ""}),
        (7, {"prompt": 'size 5" x', "completion": "", "note": "[1]"}),
        (8, {"prompt": "last", "completion": "y", "note": "z"}),
    ]
    assert read(write(tmp_path / "a.csv", data)) == expected
    assert read(write(tmp_path / "a.csv.gz", gzip.compress(data))) == expected
    assert read(tmp_path / "a.csv", json_columns={"note"})[2][1]["note"] == [1]


def test_each_bad_csv_record_by_its_line(tmp_path: Path) -> None:
    data = (
        b"a,b\n"
        b"1,2,3\n"  # 2
        b"one\n"  # 3
        b'"x"y,2\n'  # 4
        b"good,5\n"  # 5
        b"\xff,6\n"  # 6
        b'good,"7\n8"\n'  # 7
        b'm,"[1, NaN]"\n'  # 9
        b'"never closed,10\n'  # 10
        b"good,11\n"  # 11
        b'good,"1""2"\n'  # 12
        b"good,13\n"
    )
    assert read(write(tmp_path / "a.csv", data), json_columns={"b"}) == [
        "2: : has 3 fields; the header names 2",
        "3: : has 1 field; the header names 2",
        f"4: : {AFTER_QUOTE}",
        (5, {"a": "good", "b": "5"}),
        "6: a: not valid UTF-8 at byte 0",
        (7, {"a": "good", "b": "7\n8"}),
        "9: b: not valid JSON: NaN is not a JSON number",
        f"10: : {AFTER_QUOTE} (in line 12)",  # what it swallowed is in the quarantine with it
        (13, {"a": "good", "b": "13"}),
    ]
    *_, bad, _ = read_rows(tmp_path / "a.csv", 1)
    assert isinstance(bad, BadRow) and bad.raw == b'"never closed,10\ngood,11\ngood,"1""2"\n'


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("count", [2_000, 150_000])  # within the limit of a row, and beyond it
def test_a_quote_that_is_never_closed_takes_no_other_row_along(tmp_path: Path, name: str, count: int) -> None:
    data = b'a,b\n"open,2\n' + b"".join(b"good,%d\n" % number for number in range(3, count))
    path = write(tmp_path / name, gzip.compress(data, 1) if name.endswith("gz") else data)
    bad, *good = read_rows(path, 1)
    assert isinstance(bad, BadRow)
    assert (bad.record.line, bad.record.reason, bad.raw, bad.size) == (2, NEVER_CLOSED, b'"open,2\n', 8)
    assert [(row.line, row.value) for row in good if isinstance(row, Row)] == [
        (number, {"a": "good", "b": str(number)}) for number in range(3, count)
    ]


def test_a_csv_record_that_is_too_long_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.write(b"a,b\n")
        for start, end in ((b'"', b'",x\n'), (b"", b",x\n"), (b'"', b'""\n",x\n')):
            file.write(start)
            for _ in range(20):
                file.write(b"y" * 999_999 + (b"\n" if start and end[1:2] == b"," else b"y"))
            file.write(end)
        file.write(b"good,1\n")
    tracemalloc.start()
    found = read(path)
    assert tracemalloc.get_traced_memory()[1] < 12 << 20
    tracemalloc.stop()
    assert found == [
        "2: : longer than max_document_mib (1 MiB)",
        "23: : longer than max_document_mib (1 MiB)",
        "24: : longer than max_document_mib (1 MiB)",
        (26, {"a": "good", "b": "1"}),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b,a\n1,2,3\n", "the header names 'a' twice"),
        (b"a,\xff\n", r"a\.csv:1: the header cannot be read"),
        (b'a,"b\n1,2\n', r"a\.csv:1: the header cannot be read"),
        (b"", "the file is empty"),
    ],
)
def test_an_unusable_csv_file(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.csv", data))


def test_a_column_without_a_name_is_numbered(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", b",text\n0,x\n")) == [(2, {"column_1": "0", "text": "x"})]


def test_csv_agrees_with_the_standard_library_on_random_cells(tmp_path: Path) -> None:
    choose = random.Random(7)
    rows = [
        [
            "".join(choose.choices(['"', ",", "\n", "\r\n", "a", "ü", " ", "\t"], k=choose.randint(1, 8)))
            for _ in "abc"
        ]
        for _ in range(500)
    ]
    theirs = io.StringIO(newline="")
    csv.writer(theirs, quoting=csv.QUOTE_ALL).writerows([list("abc"), *rows])
    ours = b"".join(csv_line(row) for row in [list("abc"), *rows])
    for data in (theirs.getvalue().encode(), ours):
        found = [list(row.values()) for _, row in read(write(tmp_path / "a.csv", data))]
        assert found == rows
    assert list(csv.reader(io.StringIO(ours.decode(), newline="")))[1:] == rows


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_rows_as_json_has_them(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {
            "text": ["a", None, "c"],
            "turns": [[{"role": "user", "thinking": None}, {"role": "x", "thinking": "y"}], [], None],
            "when": [datetime.datetime(2024, 2, 29, 1, 2, 3), None, None],
            "score": [0.5, float("nan"), 2.0],
            "raw": [b"\xff", None, None],
            "day": [datetime.date(2024, 1, 1)] * 3,
        },
    )
    assert read(path) == [
        (
            1,
            {
                "text": "a",
                "turns": [{"role": "user"}, {"role": "x", "thinking": "y"}],
                "when": "2024-02-29T01:02:03",
                "score": 0.5,
                "raw": "/w==",
                "day": "2024-01-01",
            },
        ),
        (2, {"turns": [], "day": "2024-01-01"}),
        (3, {"text": "c", "score": 2.0, "day": "2024-01-01"}),
    ]


def test_bad_parquet_rows_by_their_number(tmp_path: Path) -> None:
    texts = pa.array([b"ok", b"\xff", b"fine"] * 200).cast(pa.binary()).view(pa.string())
    numbers = [1.0] * 599 + [float("inf")]
    path = parquet(tmp_path / "a.parquet", {"text": texts, "n": numbers}, row_group_size=100)
    found = read(path)
    expected: list[Any] = []
    for number in range(1, 601):
        if number % 3 == 2:
            expected.append(f"{number}: text: not valid UTF-8 at byte 0")
        elif number == 600:
            expected.append("600: n: is infinite, which JSON cannot say")
        else:
            expected.append((number, {"text": "ok" if number % 3 == 1 else "fine", "n": 1.0}))
    assert found == expected


def test_damaged_parquet_files(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["x" * 100 + str(i) for i in range(5000)]})
    data = path.read_bytes()
    middle = len(data) // 2
    for damaged in (data[:middle], b"text", data[:200] + bytes(1000) + data[1200:]):
        with pytest.raises(
            DataError, match=r"a\.parquet: (truncated or corrupt Parquet file|cannot be read as)"
        ):
            read(write(path, damaged))
    with pytest.raises(DataError, match="the file is empty"):
        read(write(path, b""))
    with pytest.raises(DataError, match="the file is empty"):
        read(parquet(path, {"text": pa.array([], pa.string())}))


def test_documents_from_csv_and_parquet(tmp_path: Path) -> None:
    def documents(path: Path, config: DataConfig) -> list[Any]:
        return [
            (item.text, item.line) if isinstance(item, Document) else str(item).removeprefix(f"{path}:")
            for item in read_documents(path, config)
        ]

    body = DataConfig(text_field="body", max_document_mib=1)
    table = write(tmp_path / "a.csv", b'id,body\n1,"one\r\ntwo"\n2,\n3,c,d\n4,e\n')
    expected = [("one\ntwo", 2), "4: field 'body': empty", "5: has 3 fields; the header names 2", ("e", 6)]
    assert documents(table, body) == expected
    texts = ["one\r\ntwo", None, "a\0", "é" * (1 << 20), "x" * (2 << 20)]
    assert documents(parquet(tmp_path / "a.parquet", {"id": [1] * 5, "body": texts}), body) == [
        ("one\ntwo", 1),
        "2: field 'body': empty",
        "3: field 'body': holds a NUL character at character 1",
        ("é" * (1 << 20), 4),
        "5: longer than max_document_mib (1 MiB)",
    ]
    for path in (table, tmp_path / "a.parquet"):
        with pytest.raises(DataError, match=r"has no column 'text'\nits columns are: id, body"):
            documents(path, DataConfig())
