"""Conversion: rows come back byte for byte through Parquet and CSV, and each shape becomes another."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainway.data.columns import Columns
from trainway.data.convert import convert, open_writer, reshape
from trainway.data.dedup import Deduplicator
from trainway.data.formats import read_rows
from trainway.data.records import FieldNames, parse_record
from trainway.data.rows import MalformedError, Row
from trainway.errors import ConfigError, DataError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(lines(*rows), encoding="utf-8", newline="")
    return path


def through(source: Path, *names: str, **options: Any) -> Path:
    """Convert from file to file; returns the last one."""
    for name in names:
        out = source.parent / name
        convert(str(source), out, force=True, **options)
        source = out
    return source


def test_prompts_are_byte_identical_after_parquet_and_csv(tmp_path: Path) -> None:
    choose = random.Random(3)
    alphabet = [
        '"',
        "'",
        ",",
        ";",
        "\n",
        "\r",
        "\r\n",
        "\t",
        "\\",
        "a",
        "Z",
        "0",
        "é",
        "你",
        "😀",
        "\u2028",
        "\ufeff",
        " ",
    ]
    rows: list[dict[str, Any]] = [
        {"completion": "007", "prompt": "00", "note": "", "zero": "0.10"},
        {"completion": "1e5", "prompt": "true"},
        {"completion": "null", "prompt": " lead and trail ", "zero": "NaN"},
        {"completion": "[1]", "prompt": '{"a": 1}', "note": " "},
        {"completion": "-", "prompt": "=1+1", "note": "None"},
    ]
    for _ in range(300):
        prompt, completion = ("x" + "".join(choose.choices(alphabet, k=choose.randint(1, 12))) for _ in "pc")
        row: dict[str, Any] = {"completion": completion, "prompt": prompt}
        if choose.random() < 0.5:
            row["note"] = "".join(choose.choices(alphabet, k=choose.randint(0, 3)))
        rows.append(row)
    source = write(tmp_path / "a.jsonl", *rows)
    original = source.read_bytes()
    assert through(source, "b.parquet", "c.csv", "d.jsonl").read_bytes() == original
    assert through(source, "b.csv.gz", "c.parquet", "d.jsonl.gz", "e.jsonl").read_bytes() == original
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0] == ["completion", "prompt", "note", "zero"]
    assert [row[:2] for row in table[1:]] == [[row["completion"], row["prompt"]] for row in rows]
    assert pq.read_table(tmp_path / "b.parquet").num_rows == len(rows)


def test_every_shape_is_the_same_after_parquet_and_csv(tmp_path: Path) -> None:
    rows = [
        {"messages": [U, {**A, "thinking": "hm\n", "n": 2}]},
        {"messages": [{"role": "system", "content": "s"}, U, {**A, "calls": [{"a": 1}, {"b": "x"}]}]},
        {"content": [U, A, U], "teacher_response": "r"},
        {"text": "t\r\n"},
        {"prompt": "p", "completion": "c"},
    ]
    source = write(tmp_path / "a.jsonl", *rows)
    assert through(source, "b.parquet", "c.csv", "d.jsonl").read_bytes() == source.read_bytes()
    schema = pq.read_schema(tmp_path / "b.parquet")
    assert str(schema.field("content").type) == "list<element: struct<role: string, content: string>>"
    assert str(schema.field("messages").type.value_type.field("n").type) == "int64"


def test_fields_of_every_type_come_back_from_parquet(tmp_path: Path) -> None:
    many = {f"k{number}": number for number in range(100)}
    rows = [
        {"text": "a", "n": 1, "f": 0.5, "b": True, "mixed": 1, "o": {"x": 1, "y": {"z": "q"}}, "l": [1, None], "big": 1},
        {"text": "b", "n": -5, "f": 1e300, "mixed": 0.5, "o": {"w": [], "x": 2}, "l": [], "big": 2**70, "many": many},
        {"text": "c", "mixed": "s", "o": {"y": {"z": 5}}, "e": {}, "ll": [[{"a": 1}], [{"a": "x"}, {}]]},
    ]  # fmt: skip
    source = write(tmp_path / "a.jsonl", *rows)
    found = [json.loads(line) for line in through(source, "b.parquet", "d.jsonl").read_text().splitlines()]
    assert found == rows
    assert [type(row["mixed"]) for row in found] == [int, float, str]
    schema = pq.read_schema(tmp_path / "b.parquet")
    kinds = {name: str(schema.field(name).type) for name in ("n", "f", "b", "mixed", "big", "many", "l")}
    assert kinds == {
        "n": "int64",
        "f": "double",
        "b": "bool",
        "mixed": "string",
        "big": "string",
        "many": "string",
        "l": "list<element: int64>",
    }


TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUE = st.recursive(
    LEAF, lambda child: st.lists(child, max_size=3) | st.dictionaries(TEXT, child, max_size=3), max_leaves=8
)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(TEXT, VALUE, min_size=1, max_size=4), min_size=1, max_size=4))
def test_any_json_comes_back_from_parquet(rows: list[dict[str, Any]]) -> None:
    columns = Columns()
    for row in rows:
        columns.add(row)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        with open_writer(path, columns.result()) as put:
            for row in rows:
                put(row)
        found = [row.value for row in read_rows(path, 1) if isinstance(row, Row)]
    # as text, so that 1, 1.0 and true differ
    assert [json.dumps(without_nulls(row), sort_keys=True) for row in found] == [
        json.dumps(without_nulls(row), sort_keys=True) for row in rows
    ]


def test_columns_keep_the_order_of_the_fields() -> None:
    columns = Columns()
    for row in ({"a": "", "c": ""}, {"z": 1}, {"a": "", "b": "", "c": ""}, {"x": None, "c": ""}):
        columns.add(row)
    assert [column.name for column in columns.result()] == ["a", "b", "x", "c", "z"]


def test_names_are_the_usual_ones_afterwards(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('id,input,output\n01,"a\nb",c\n')
    assert through(table, "b.jsonl").read_text() == '{"id": "01", "prompt": "a\\nb", "completion": "c"}\n'
    source = write(tmp_path / "q.jsonl", {"answer": "c", "prompt": "?", "question": "p"})
    names = FieldNames().named(prompt="question", completion="answer")
    done = convert(str(source), tmp_path / "c.jsonl", names=names)
    assert (tmp_path / "c.jsonl").read_text() == lines({"completion": "c", "prompt": "p"})
    assert done.left_out == Counter({"another field named prompt": 1})
    share = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 7}
    source = write(tmp_path / "s.jsonl", share)
    assert through(source, "m.jsonl").read_text() == lines({"messages": [U, A], "id": 7})


S = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        ({"id": 1, "prompt": "q", "completion": "a"}, "messages", {"id": 1, "messages": [U, A]}),
        (
            {"id": 1, "messages": [U, A], "z": 0},
            "prompt",
            {"id": 1, "prompt": "q", "completion": "a", "z": 0},
        ),
        ({"messages": [S, U, A, U, A]}, "teacher", {"content": [S, U, A, U], "teacher_response": "a"}),
        ({"content": [S, U], "teacher_response": "a", "k": 1}, "messages", {"messages": [S, U, A], "k": 1}),
        ({"content": [U], "teacher_response": "a"}, "prompt", {"prompt": "q", "completion": "a"}),
        ({"output": "a", "input": "q"}, "teacher", {"content": [U], "teacher_response": "a"}),
        ({"text": "t"}, "text", {"text": "t"}),
    ],
)
def test_each_shape_becomes_another(row: dict[str, Any], shape: Any, expected: dict[str, Any]) -> None:
    left_out: Counter[str] = Counter()
    found = reshape(parse_record(row), shape, left_out)
    assert found == expected
    assert list(found) == list(expected)
    assert not left_out


def test_what_a_shape_has_no_place_for_is_counted() -> None:
    left_out: Counter[str] = Counter()
    turns = [U, {**A, "thinking": "hm"}, U]
    assert reshape(parse_record({"messages": turns, "content": 1}), "teacher", left_out) == {
        "content": [U],
        "teacher_response": "a",
    }
    assert left_out == {
        "turns after the last answer": 1,
        "thinking of the answer": 1,
        "another field named content": 1,
    }


@pytest.mark.parametrize(
    ("row", "shape", "message"),
    [
        (
            {"messages": [S, U, A]},
            "prompt",
            "prompt and completion are one turn each; it has system, user, assistant",
        ),
        ({"messages": [U, A, U, A]}, "prompt", "one turn each; it has user, assistant, user, assistant"),
        ({"messages": [A]}, "teacher", "begins with its last answer: there is no prompt"),
        ({"messages": [U, A]}, "text", "a row of messages has no form as text"),
        ({"text": "t"}, "messages", "a row of text has no form as messages"),
        ({"messages": [U, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "teacher", "empty"),
    ],
)
def test_what_cannot_become_another_shape(row: dict[str, Any], shape: Any, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        reshape(parse_record(row), shape)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv"])
def test_a_bad_row_ends_it_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "x"}, {"text": ""}, {"text": "y"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'text': empty"):
        convert(str(source), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    aside = tmp_path / "bad.jsonl"
    done = convert(str(source), tmp_path / name, quarantine=aside)
    assert (done.rows, done.bad) == (2, 1)
    assert json.loads(aside.read_text())["raw"] == '{"text": ""}'
    assert through(tmp_path / name, "back.jsonl").read_text() == lines({"text": "x"}, {"text": "y"})


def test_when_every_row_is_bad_the_quarantine_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": ""})
    for name in ("out.jsonl", "out.parquet"):
        with pytest.raises(DataError, match=r"1 of 1 rows is malformed[\s\S]*bad\.jsonl holds them"):
            convert(str(source), tmp_path / name, quarantine=tmp_path / "bad.jsonl", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "bad.jsonl"]


def test_an_output_is_never_replaced_unasked(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(ConfigError, match="would replace the data that it is made from"):
        convert(str(source), source, force=True)
    (tmp_path / "b.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match=r"b\.jsonl exists already[\s\S]*--force"):
        convert(str(source), tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text() == "kept"
    convert(str(source), tmp_path / "b.jsonl", force=True)
    assert (tmp_path / "b.jsonl").read_text() == lines({"text": "x"})
    for name, message in (("b.txt", "of an unknown format"), ("no/b.jsonl", "does not exist")):
        with pytest.raises(ConfigError, match=message):
            convert(str(source), tmp_path / name)


def test_duplicates_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b"}, {"text": "a", "id": 2}, {"prompt": "q", "completion": "a"}]
    source = write(tmp_path / "a.jsonl", *rows, {"messages": [U, A]})
    for name in ("out.jsonl", "out.csv"):
        done = convert(str(source), tmp_path / name, dedup=True)
        assert (done.rows, done.duplicates) == (3, 2)
    assert (tmp_path / "out.jsonl").read_text() == lines(rows[0], rows[1], rows[3])


def test_the_same_rows_give_the_same_bytes_compressed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "é"})
    first, second = (through(source, name).read_bytes() for name in ("b.jsonl.gz", "c.jsonl.gz"))
    assert first == second
    assert first[4:8] == bytes(4)  # no time of making
    assert gzip.decompress(first) == source.read_bytes()


def test_a_directory_becomes_one_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "1.jsonl", {"text": "a"})
    (tmp_path / "d" / "2.csv").write_text("text\nb\n")
    convert(str(tmp_path / "d"), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == lines({"text": "a"}, {"text": "b"})


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    with source.open("w") as file:
        for number in range(4_000):
            file.write(json.dumps({"prompt": f"{number} " + "p" * 15_000, "completion": "c" * 15_000}) + "\n")
    assert source.stat().st_size > 110 << 20
    tracemalloc.start()
    for name in ("b.parquet", "c.csv", "d.jsonl"):
        through(source, name)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_the_deduplicator_is_exact_and_small() -> None:
    seen = Deduplicator()
    choose = random.Random(0)
    numbers = [choose.randrange(4_000) for _ in range(100_000)]
    known: set[int] = set()
    for number in numbers:
        assert seen.is_new(str(number).encode()) == (number not in known)
        known.add(number)
    assert (seen.distinct, seen.duplicates) == (len(known), len(numbers) - len(known))
    assert seen.num_bytes / seen.distinct < 34
