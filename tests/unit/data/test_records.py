"""Records: which rows are of which shape, and the path and reason of every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainway.data.records import FieldNames, Located, Message, parse_record, read_records
from trainway.data.rows import MalformedError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def fault(row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(MalformedError) as caught:
        parse_record(row, **options)
    return f"{caught.value.field}: {caught.value.reason}"


def test_the_four_shapes() -> None:
    record = parse_record({"id": 1, "messages": [USER, {**ASSISTANT, "thinking": "hm", "name": None}]})
    assert (record.shape, record.names, record.row["id"]) == ("messages", ("messages",), 1)
    assert record.turns() == (Message("user", "hi", {}), Message("assistant", "yo", {"thinking": "hm"}))

    record = parse_record({"completion": " b", "prompt": "a"})
    assert (record.shape, record.names, record.prompt, record.answer) == (
        "prompt",
        ("prompt", "completion"),
        "a",
        " b",
    )
    assert record.texts() == [("user", "a"), ("assistant", " b")]

    record = parse_record({"content": [USER], "teacher_response": "yo"})
    assert (record.shape, record.messages, record.answer) == ("teacher", (Message("user", "hi", {}),), "yo")
    assert [turn.as_dict() for turn in record.turns()] == [USER, ASSISTANT]

    record = parse_record({"text": "a\r\nb"})
    assert (record.shape, record.text, record.turns(), record.texts()) == (
        "text",
        "a\r\nb",
        (),
        [("text", "a\r\nb")],
    )


def test_aliases_and_sharegpt() -> None:
    record = parse_record({"input": "a", "output": "b"})
    assert (record.names, record.prompt, record.answer) == (("input", "output"), "a", "b")
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": role, "value": text, "weight": 1} for role, text in turns]}
    assert [(turn.role, turn.content, turn.extra) for turn in parse_record(row).messages] == [
        (role, text, {"weight": 1})
        for role, text in zip(("system", "user", "assistant", "tool", "assistant"), "sabcd", strict=True)
    ]
    assert parse_record({"conversations": [USER, ASSISTANT]}).turns()[1].content == "yo"


def test_configured_names() -> None:
    names = FieldNames().named(
        prompt="question", completion=None, teacher_response="target", content="history"
    )
    assert parse_record({"question": "a", "output": "b", "prompt": 3}, names).prompt == "a"
    assert parse_record({"history": [USER], "target": "x"}, names).shape == "teacher"
    assert fault({"prompt": "a", "completion": "b"}, names=names) == (
        "question: missing; the row has 'prompt', 'completion'"
    )


def test_a_row_has_one_shape() -> None:
    messages, pair = {"messages": [USER, ASSISTANT]}, {"prompt": "a", "completion": "b"}
    assert fault({"text": "x", **pair, **messages}) == (
        "prompt: a second shape in one row: it has messages and prompt + completion; --kind says which counts"
    )
    assert fault({"text": "x", **pair}) == (
        "text: a second shape in one row: it has prompt + completion and text; --kind says which counts"
    )
    assert parse_record({"text": "x", "prompt": "a"}).shape == "text"
    assert parse_record({"messages": None, **pair}).shape == "prompt"
    assert parse_record({"text": "x", **pair, **messages}, kind="text").text == "x"


def test_a_field_that_looks_misspelt() -> None:
    for name, meant in (
        ("mesages", "messages"), ("messgaes", "messages"), ("Messages", "messages"), ("promt", "prompt"),
        ("completiom", "completion"), ("ouput", "output"), ("teacher_reponse", "teacher_response"),
    ):  # fmt: skip
        assert (
            fault({"text": "x", name: "y"})
            == f"{name}: looks like {meant!r}, misspelt; the row is read as text"
        )
    for name in (
        "message",
        "prompts",
        "outputs",
        "context",
        "test",
        "next",
        "inputs",
        "prompt_id",
        "id",
        "",
        "Content",
    ):
        assert parse_record({"text": "x", name: "y"}).shape == "text"
    assert parse_record({"text": "x", "mesages": None}).shape == "text"


def test_content_in_parts_and_tool_calls() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    record = parse_record({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert record.messages[0].content == "a b"
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    record = parse_record({"messages": [USER, call, {"role": "tool", "content": "3"}, ASSISTANT]})
    assert record.messages[1] == Message("assistant", "", {"tool_calls": [{"id": 1}]})


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, ASSISTANT, {"role": "user", "content": "x", **fields}]}


KNOWN = "messages|conversations, content + teacher_response, prompt|input + completion|output, text"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, f": of no known shape: it has no field; known shapes: {KNOWN}"),
        ({"a": 1, "b": 2}, f": of no known shape: it has 'a', 'b'; known shapes: {KNOWN}"),
        ({"prompt": "a", "compleetion": "b"}, "completion: missing; the row has 'prompt', 'compleetion'; did you mean 'compleetion'?"),
        ({"output": "b"}, "prompt: missing; the row has 'output'"),
        ({"content": [USER]}, "teacher_response: missing; the row has 'content'"),
        ({"prompt": "a", "completion": None}, "completion: is null"),
        ({"messages": None}, "messages: is null"),
        ({"prompt": 1, "completion": "b"}, "prompt: is a number, not a string"),
        ({"prompt": "a", "completion": [1]}, "completion: is a list, not a string"),
        ({"prompt": " \n", "completion": "b"}, "prompt: empty"),
        ({"prompt": "a", "completion": ""}, "completion: empty"),
        ({"text": True}, "text: is a boolean, not a string"),
        ({"text": "a\0b"}, "text: holds a NUL character at character 1"),
        ({"text": "é\ud800"}, "text: holds a lone surrogate U+D800 at character 1"),
        ({"instruction": "a", "input": "", "output": "c"}, "instruction: beside 'input' and 'output' there is 'instruction': say which field is the prompt"),
        ({"messages": "hi"}, "messages: is a string, not a list of messages"),
        ({"messages": {}}, "messages: is an object, not a list of messages"),
        ({"messages": []}, "messages: is an empty list"),
        ({"messages": [USER]}, "messages: has no assistant turn: there is nothing to learn from it"),
        ({"messages": [USER, "yo"]}, "messages[1]: is a string, not an object with 'role' and 'content'"),
        ({"messages": [USER, None]}, "messages[1]: is null, not an object with 'role' and 'content'"),
        (turn(role="bot"), "messages[2].role: is 'bot'; known roles: system, developer, user, assistant, tool"),
        (turn(role=["user"]), "messages[2].role: is a list, not a string"),
        (turn(role=None), "messages[2].role: is null, not a string"),
        ({"messages": [{"content": "x"}]}, "messages[0].role: missing; the message has 'content'"),
        ({"messages": [{"role": "user", "text": "x"}]}, "messages[0].content: missing; the message has 'role', 'text'"),
        (turn(content=3), "messages[2].content: is a number, not a string"),
        (turn(content=None), "messages[2].content: is null, not a string"),
        (turn(content="\t"), "messages[2].content: empty"),
        (turn(content=[]), "messages[2].content: empty"),
        (turn(content=["x"]), "messages[2].content[0]: is a string, not an object with 'type' and 'text'"),
        (turn(content=[{"type": "image"}]), "messages[2].content[0].type: is 'image'; only parts of 'text' are read"),
        (turn(content=[{"type": "text"}]), "messages[2].content[0].text: is null, not a string"),
        (turn(content="", tool_calls=[1]), "messages[2].content: empty"),
        ({"conversations": [{"from": "me", "value": "x"}]}, "conversations[0].from: is 'me'; known roles: system, developer, human, user, gpt, assistant, tool, function, observation"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value: missing; the message has 'from'"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "conversations[0].value: is a number, not a string"),
        ({"content": "q", "teacher_response": "r"}, "content: is a string, not a list of messages"),
        ({"content": [USER], "teacher_response": ""}, "teacher_response: empty"),
        ({"content": [], "teacher_response": "r"}, "content: is an empty list"),
    ],
)  # fmt: skip
def test_every_fault_has_its_path_and_reason(row: dict[str, Any], expected: str) -> None:
    assert fault(row) == expected


def test_a_required_shape_is_required() -> None:
    assert fault({"text": "x"}, kind="messages") == "messages: missing; the row has 'text'"
    assert fault({"prompt": "x", "completion": "y"}, kind="text") == (
        "text: missing; the row has 'prompt', 'completion'"
    )


def test_the_same_conversation_has_the_same_key_in_every_shape() -> None:
    rows = [
        {"messages": [USER, ASSISTANT], "id": 1},
        {"output": "yo", "input": "hi"},
        {"content": [USER], "teacher_response": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"value": "yo", "from": "gpt"}]},
    ]
    assert len({parse_record(row).content_key() for row in rows}) == 1
    for one, other in (({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"a": 1}, {"a": 1, "b": None})):
        keys = {
            parse_record({"messages": [USER, {**ASSISTANT, **extra}]}).content_key() for extra in (one, other)
        }
        assert len(keys) == 1
    others = [
        {"messages": [USER, {**ASSISTANT, "thinking": "x"}]},
        {"prompt": "hi", "completion": "yo "},
        {"prompt": "hiyo", "completion": "yo"},
        {"text": "hi"},
    ]
    assert len({parse_record(row).content_key() for row in rows + others}) == 5


def test_reading_a_mixed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"prompt": "a"}\n\n{"input": "a", "output": "b"}\n')
    found = [
        (row.line, row.record.shape) if isinstance(row, Located) else str(row.record)
        for row in read_records(path, 1)
    ]
    assert found == [
        (1, "text"),
        f"{path}:2: field 'completion': missing; the row has 'prompt'",
        (4, "prompt"),
    ]


def test_messages_in_a_csv_cell(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('turns,messages\n"[{""role"": ""assistant"", ""content"": ""é""}]",\n')
    names = FieldNames().named(messages="turns")
    (row,) = read_records(path, 1, names=names)
    assert isinstance(row, Located)
    assert row.record.messages == (Message("assistant", "é", {}),)
