"""A teacher's rows as a user brings them: every malformed one is named and nothing is stored; shapes are converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_config
from trainway.cli.app import main
from trainway.config.schema import TokenizerConfig
from trainway.data.store import TokenStore
from trainway.data.tokenizer import train_tokenizer

Capture = pytest.CaptureFixture[str]
U = '{"role": "user", "content": "What is 6 times 7?"}'
GOOD = f'{{"content": [{U}], "teacher_response": "It is 42."}}'
ROLES = "known roles: system, developer, user, assistant, tool"
OBJECT = "not an object with 'role' and 'content'"
ANSWERED = "a prompt ends with what is to be answered, a turn of the user or of a tool"


def asks(*turns: str, answer: str = '"It is 42."') -> str:
    return f'{{"content": [{", ".join(turns)}], "teacher_response": {answer}}}'


class Case(NamedTuple):
    row: str
    field: str
    reason: str
    in_table: bool = False
    """Whether columns of the usual types, a list of (role, content) and a text, can hold it."""


BY_VALIDATION = {
    "cut off": Case('{"content": [', "", "not valid JSON: Expecting value at column 14"),
    "a list": Case(f"[{U}]", "", "the line holds a list, not an object: one JSON object per line is needed"),
    "NaN": Case(f'{{"content": [{U}], "teacher_response": NaN}}', "", "not valid JSON: NaN is not a JSON number"),
    "answer twice": Case(
        f'{{"content": [{U}], "teacher_response": "a", "teacher_response": "b"}}', "teacher_response",
        "the key occurs twice in one object",
    ),
    "no answer": Case(f'{{"content": [{U}]}}', "teacher_response", "missing; the row has 'content'", True),
    "no prompt": Case('{"teacher_response": "x"}', "content", "missing; the row has 'teacher_response'", True),
    "misspelt": Case(
        f'{{"content": [{U}], "teacher_respons": "x"}}', "teacher_response",
        "missing; the row has 'content', 'teacher_respons'; did you mean 'teacher_respons'?",
    ),
    "answer null": Case(asks(U, answer="null"), "teacher_response", "is null"),
    "answer empty": Case(asks(U, answer='""'), "teacher_response", "empty", True),
    "answer blank": Case(asks(U, answer='" \\n\\t\\u00a0"'), "teacher_response", "empty", True),
    "answer a number": Case(asks(U, answer="42"), "teacher_response", "is a number, not a string"),
    "answer a list": Case(asks(U, answer='["x"]'), "teacher_response", "is a list, not a string"),
    "answer a turn": Case(
        asks(U, answer='{"role": "assistant", "content": "x"}'), "teacher_response", "is an object, not a string"
    ),
    "answer with NUL": Case(
        asks(U, answer='"a\\u0000b"'), "teacher_response", "holds a NUL character at character 1", True
    ),
    "answer with half a pair": Case(
        asks(U, answer='"x\\ud83d"'), "teacher_response", "holds a lone surrogate U+D83D at character 1"
    ),
    "prompt a text": Case(
        '{"content": "What?", "teacher_response": "x"}', "content", "is a string, not a list of messages"
    ),
    "prompt empty": Case(asks(), "content", "is an empty list", True),
    "turn null": Case(asks("null"), "content[0]", f"is null, {OBJECT}", True),
    "turn a text": Case(asks('"hi"'), "content[0]", f"is a string, {OBJECT}"),
    "turn without a role": Case(
        asks(U, '{"content": "x"}'), "content[1].role", "missing; the message has 'content'", True
    ),
    "unknown role": Case(asks('{"role": "human", "content": "x"}'), "content[0].role", f"is 'human'; {ROLES}", True),
    "role a number": Case(asks('{"role": 1, "content": "x"}'), "content[0].role", "is a number, not a string"),
    "turn without content": Case(
        asks('{"role": "user"}'), "content[0].content", "missing; the message has 'role'", True
    ),
    "turn empty": Case(asks(U, '{"role": "user", "content": ""}'), "content[1].content", "empty", True),
    "a picture": Case(
        asks('{"role": "user", "content": [{"type": "image"}]}'), "content[0].content[0].type",
        "is 'image'; only parts of 'text' are read",
    ),
}  # fmt: skip
"""What every reader of the shape refuses."""
BY_ENCODING = {
    "answered already": Case(
        asks(U, '{"role": "assistant", "content": "42"}'), "content[1].role", f"is 'assistant': {ANSWERED}", True
    ),
    "instructions alone": Case(
        asks('{"role": "system", "content": "s"}'), "content[0].role", f"is 'system': {ANSWERED}", True
    ),
    "refused by the template": Case(
        asks('{"role": "tool", "content": "42"}'), "content", "the chat template refuses it: who asked for 42?", True
    ),
}  # fmt: skip
"""What the preparation refuses beside it."""
OTHER_SHAPES = {
    "plain text": Case('{"text": "x"}', "text", "is plain text: it has no prompt and no answer of a teacher"),
    "conversation without an answer": Case(
        f'{{"messages": [{U}, {{"role": "assistant", "content": "x"}}, {U}]}}', "messages[2].role",
        "is 'user': the last turn must be the teacher's answer",
    ),
}  # fmt: skip
TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('who asked for ' + messages[0].content + '?') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "bundle"
    specials = ("<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer([GOOD] * 9, TokenizerConfig(vocab_size=300, special_tokens=specials), path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def gad(tmp_path: Path, bundle: Path, **data: Any) -> Path:
    config: dict[str, object] = {
        "recipe": "gad",
        "model": {"path": str(bundle)},
        "tokenizer": {"path": str(bundle)},
        "data": {"store_dir": str(tmp_path / "cache"), **data},
        "train": {"global_batch_size": 4},
    }
    return write_config(tmp_path / "gad.yaml", config)


def write_lines(path: Path, cases: dict[str, Case]) -> dict[int, Case]:
    """Good rows and malformed ones in turns; the cases by their lines."""
    lines, expected = [], {}
    for case in cases.values():
        lines += [GOOD, case.row]
        expected[len(lines)] = case
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return expected


def write_table(path: Path, cases: dict[str, Case]) -> dict[int, Case]:
    """The same in a table of the usual types, of those that it can hold."""
    kept = [case for case in cases.values() if case.in_table]
    schema = pa.schema(
        {
            "content": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "teacher_response": pa.string(),
        }
    )
    rows = [json.loads(row) for case in kept for row in (GOOD, case.row)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return {2 * index + 2: case for index, case in enumerate(kept)}


WRITERS = {"jsonl": write_lines, "parquet": write_table}


@pytest.mark.parametrize("suffix", WRITERS)
def test_validation_names_every_malformed_row(tmp_path: Path, capsys: Capture, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    expected = WRITERS[suffix](path, BY_VALIDATION)
    assert len(expected) == {"jsonl": 25, "parquet": 11}[suffix]
    assert main(["data", "validate", str(path), "--kind", "teacher", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["bad"]) == (2 * len(expected), len(expected))
    assert report["errors"] == [
        {"source": str(path), "line": line, "field": case.field, "reason": case.reason}
        for line, case in expected.items()
    ]
    # the shapes of other recipes are none of a teacher's
    write_lines(tmp_path / "other.jsonl", OTHER_SHAPES)
    assert main(["data", "validate", str(tmp_path / "other.jsonl"), "--kind", "teacher"]) == 3
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{tmp_path / 'other.jsonl'}:2: field 'content': missing; the row has 'text'"


@pytest.mark.parametrize("suffix", WRITERS)
def test_preparation_refuses_every_malformed_row(
    tmp_path: Path, bundle: Path, capsys: Capture, suffix: str
) -> None:
    path = tmp_path / f"rows.{suffix}"
    cases = {**BY_VALIDATION, **BY_ENCODING, **OTHER_SHAPES}
    expected = WRITERS[suffix](path, cases)
    assert main(["prepare", str(gad(tmp_path, bundle, train=[str(path)]))]) == 3
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"error: {len(expected)} malformed records in the data"
    named = [
        f"{path}:{line}: " + (f"field {case.field!r}: " if case.field else "") + case.reason
        for line, case in expected.items()
    ]
    assert [line.removeprefix("why: ").strip() for line in told[1 : len(named[:20]) + 1]] == named[:20]
    listing = tmp_path / "cache" / "bad-records.jsonl"
    assert [json.loads(line) for line in listing.read_text().splitlines()] == [
        {"source": str(path), "line": line, "field": case.field, "reason": case.reason}
        for line, case in expected.items()
    ]
    # nothing was stored
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.suffix in (".bin", ".mask")] == []
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    # set aside, the good rows are prepared
    config = gad(tmp_path, bundle, train=[str(path)], on_bad_record="quarantine", validation=[str(path)])
    assert main(["prepare", str(config), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["manifest"]["quarantined"] == 2 * len(expected)
    store = TokenStore.open(done["store_dir"])
    assert store.split("train").num_documents == len(expected)


def test_what_a_user_reads_of_a_preparation(tmp_path: Path, bundle: Path, capsys: Capture) -> None:
    rows = [GOOD.replace("6", str(number)) for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    assert (
        main(["prepare", str(gad(tmp_path, bundle, train=[str(tmp_path / "rows.jsonl")], val_ratio=0.2))])
        == 0
    )
    told = capsys.readouterr().out.splitlines()
    assert " prompts of " in told[-2]
    assert "their answers of " in told[-2]
    assert told[-1].startswith("ok: ")


def test_shapes_come_back_byte_for_byte(tmp_path: Path, capsys: Capture) -> None:
    turns = [
        {"role": "system", "content": "Kürze!"},
        {"role": "user", "content": 'größe 😀\n\t"x" '},
        {"role": "assistant", "content": " 1 \\ 2 "},
        {"role": "user", "content": "And\r\nnow?\u2028"},
    ]
    answers = ["It is 42.\n", " ", "", "日本語", '{"a": [1]}', "007"]
    messages = [
        {
            "id": f"0{number}",
            "messages": [*turns, {"role": "assistant", "content": f"{answer}x"}],
        }
        for number, answer in enumerate(answers)
    ]
    source = tmp_path / "messages.jsonl"
    source.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in messages), encoding="utf-8"
    )
    expected = [
        {"id": row["id"], "content": turns, "teacher_response": f"{answer}x"}
        for row, answer in zip(messages, answers, strict=True)
    ]
    for table in ("teacher.jsonl", "teacher.parquet", "teacher.csv"):
        out, back = tmp_path / table, tmp_path / f"{table}.back.jsonl"
        assert main(["data", "convert", str(source), str(out), "--to-shape", "teacher"]) == 0
        if table.endswith("jsonl"):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in expected)
            assert out.read_text(encoding="utf-8") == lines
        if table.endswith("parquet"):
            schema = pq.read_schema(out)
            assert str(schema.field("content").type) == "list<element: struct<role: string, content: string>>"
            assert str(schema.field("teacher_response").type) == "string"
            assert pq.read_table(out).to_pylist() == expected
        assert main(["data", "convert", str(out), str(back), "--to-shape", "messages"]) == 0
        assert back.read_bytes() == source.read_bytes()
    # what ends with a question has no answer to take: it loses that turn, which is said
    open_end = {"messages": [*turns[1:3], turns[3]]}
    (tmp_path / "open.jsonl").write_text(json.dumps(open_end) + "\n")
    capsys.readouterr()
    convert = [
        "data",
        "convert",
        str(tmp_path / "open.jsonl"),
        str(tmp_path / "o.jsonl"),
        "--to-shape",
        "teacher",
    ]
    assert main(convert) == 0
    assert capsys.readouterr().out == f"ok: {tmp_path / 'o.jsonl'}, 1 row; turns after the last answer: 1\n"
    assert json.loads((tmp_path / "o.jsonl").read_text()) == {
        "content": turns[1:2],
        "teacher_response": turns[2]["content"],
    }
