"""Malformed conversations: each by file, line, field and reason, in one pass of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainway.cli.app import main
from trainway.config.schema import TokenizerConfig
from trainway.data.tokenizer import train_tokenizer

U = '{"role": "user", "content": "hi"}'
A = '{"role": "assistant", "content": "yo"}'
ROLES = "known roles: system, developer, user, assistant, tool"
OBJECT = "not an object with 'role' and 'content'"


def chat(*turns: str, rest: str = "") -> str:
    return f'{{"messages": [{", ".join(turns)}]{rest}}}'


def turn(fields: str) -> str:
    """A good exchange, then a turn with these fields."""
    return chat(U, A, f"{{{fields}}}")


def says(fields: str) -> str:
    """A question, then an answer with these fields."""
    return chat(U, f'{{"role": "assistant", {fields}}}')


# (row, field, reason)
MALFORMED: list[tuple[str, str, str]] = [
    # who speaks
    (turn('"role": "USER", "content": "x"'), "messages[2].role", f"is 'USER'; {ROLES}"),
    (turn('"role": "Assistant", "content": "x"'), "messages[2].role", f"is 'Assistant'; {ROLES}"),
    (turn('"role": "", "content": "x"'), "messages[2].role", f"is ''; {ROLES}"),
    (turn('"role": "user ", "content": "x"'), "messages[2].role", f"is 'user '; {ROLES}"),
    (turn('"role": "model", "content": "x"'), "messages[2].role", f"is 'model'; {ROLES}"),
    (turn('"role": "human", "content": "x"'), "messages[2].role", f"is 'human'; {ROLES}"),
    (turn('"role": 1, "content": "x"'), "messages[2].role", "is a number, not a string"),
    (turn('"role": true, "content": "x"'), "messages[2].role", "is a boolean, not a string"),
    (turn('"role": {"name": "user"}, "content": "x"'), "messages[2].role", "is an object, not a string"),
    (turn('"speaker": "user", "content": "x"'), "messages[2].role", "missing; the message has 'speaker', 'content'"),
    (turn('"Role": "user", "content": "x"'), "messages[2].role", "missing; the message has 'Role', 'content'"),
    ('{"conversations": [{"from": "human", "value": "x"}, {"from": "bot", "value": "y"}]}', "conversations[1].from",
     "is 'bot'; known roles: system, developer, human, user, gpt, assistant, tool, function, observation"),
    ('{"conversations": [{"from": 0, "value": "x"}]}', "conversations[0].from", "is a number, not a string"),
    ('{"conversations": [{"from": "gpt", "content": "x"}]}', "conversations[0].value", "missing; the message has 'from', 'content'"),
    # what is said
    (turn('"role": "user", "content": ""'), "messages[2].content", "empty"),
    (turn('"role": "user", "content": " \\n\\t\\u00a0"'), "messages[2].content", "empty"),
    (turn('"role": "user", "content": null'), "messages[2].content", "is null, not a string"),
    (turn('"role": "user", "content": 12'), "messages[2].content", "is a number, not a string"),
    (turn('"role": "user", "content": false'), "messages[2].content", "is a boolean, not a string"),
    (turn('"role": "user", "content": {"text": "x"}'), "messages[2].content", "is an object, not a string"),
    (turn('"role": "user"'), "messages[2].content", "missing; the message has 'role'"),
    (turn('"role": "user", "value": "x"'), "messages[2].content", "missing; the message has 'role', 'value'"),
    (turn('"role": "user", "content": ["x", "y"]'), "messages[2].content[0]", "is a string, not an object with 'type' and 'text'"),
    (turn('"role": "user", "content": [[{"type": "text", "text": "x"}]]'), "messages[2].content[0]", "is a list, not an object with 'type' and 'text'"),
    (turn('"role": "user", "content": [{"type": "text", "text": ""}]'), "messages[2].content", "empty"),
    (turn('"role": "user", "content": [{"type": "text", "text": 5}]'), "messages[2].content[0].text", "is a number, not a string"),
    (turn('"role": "user", "content": [{"text": "x"}]'), "messages[2].content[0].type", "is None; only parts of 'text' are read"),
    (turn('"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "u"}]'), "messages[2].content[1].type",
     "is 'image_url'; only parts of 'text' are read"),
    (turn('"role": "user", "content": "a\\u0000b"'), "messages[2].content", "holds a NUL character at character 1"),
    (turn('"role": "user", "content": "x\\ud83d"'), "messages[2].content", "holds a lone surrogate U+D83D at character 1"),
    (turn('"role": "user", "content": "\\ude00\\ud83d"'), "messages[2].content", "holds a lone surrogate U+DE00 at character 0"),
    (turn('"role": "user", "content": "x", "name": "\\udfff"'), "messages[2].name", "holds a lone surrogate U+DFFF at character 0"),
    (turn('"role": "user", "content": "x", "content": "y"'), "messages[2].content", "the key occurs twice in one object"),
    (turn('"role": "user", "role": "user", "content": "x"'), "messages[2].role", "the key occurs twice in one object"),
    # what the assistant says besides
    (says('"content": ""'), "messages[1].content", "empty"),
    (says('"content": null, "tool_calls": []'), "messages[1].content", "is null, not a string"),
    (says('"content": "x", "tool_calls": {"name": "f"}'), "messages[1].tool_calls", "is an object, not a list of calls"),
    (says('"content": "x", "tool_calls": "f()"'), "messages[1].tool_calls", "is a string, not a list of calls"),
    (says('"content": "x", "tool_calls": [{"name": "f"}, "g"]'), "messages[1].tool_calls[1]", "is a string, not an object"),
    (says('"content": "x", "thinking": ["a"]'), "messages[1].thinking", "is a list, not a string"),
    (says('"content": "x", "thinking": "a\\u0000"'), "messages[1].thinking", "holds a NUL character at character 1"),
    (says('"content": "x", "reasoning_content": 3'), "messages[1].reasoning_content", "is a number, not a string"),
    (says('"thinking": "x"'), "messages[1].content", "missing; the message has 'role', 'thinking'"),
    # the list of turns
    (chat(), "messages", "is an empty list"),
    (chat(U), "messages", "has no assistant turn: there is nothing to learn from it"),
    (chat('{"role": "system", "content": "s"}', U, U), "messages", "has no assistant turn: there is nothing to learn from it"),
    (chat(U, "null"), "messages[1]", f"is null, {OBJECT}"),
    (chat(U, '"yo"'), "messages[1]", f"is a string, {OBJECT}"),
    (chat(f"[{U}, {A}]"), "messages[0]", f"is a list, {OBJECT}"),
    (chat(U, A, "{}"), "messages[2].role", "missing; the message has no field"),
    ('{"messages": {"0": "hi"}}', "messages", "is an object, not a list of messages"),
    ('{"messages": 7}', "messages", "is a number, not a list of messages"),
    ('{"messages": "[]"}', "messages", "is a string, not a list of messages"),
    ('{"messages": false}', "messages", "is a boolean, not a list of messages"),
    (f'{{"messages": [{U}, {A}], "messages": []}}', "messages", "the key occurs twice in one object"),
    # pairs and teacher's rows
    ('{"prompt": ["x"], "completion": "y"}', "prompt", "is a list, not a string"),
    ('{"prompt": "x", "completion": {"text": "y"}}', "completion", "is an object, not a string"),
    ('{"prompt": "x", "completion": "\\n"}', "completion", "empty"),
    ('{"prompt": "x", "compleiton": "y"}', "completion", "missing; the row has 'prompt', 'compleiton'; did you mean 'compleiton'?"),
    ('{"instruction": "x", "input": "y", "output": "z"}', "instruction",
     "beside 'input' and 'output' there is 'instruction': say which field is the prompt"),
    (f'{{"content": [{U}], "teacher_response": ["y"]}}', "teacher_response", "is a list, not a string"),
    (f'{{"content": [{U}, 1], "teacher_response": "y"}}', "content[1]", f"is a number, {OBJECT}"),
    (f'{{"content": [{U}], "teacher_respons": "y"}}', "teacher_response",
     "missing; the row has 'content', 'teacher_respons'; did you mean 'teacher_respons'?"),
    # two shapes, and fields that look like one of a shape
    (chat(U, A, rest=', "text": "x"'), "text", "a second shape in one row: it has messages and text; --kind says which counts"),
    (chat(U, A, rest=', "prompt": "x", "completion": "y"'), "prompt",
     "a second shape in one row: it has messages and prompt + completion; --kind says which counts"),
    ('{"prompt": "x", "completion": "y", "text": "xy"}', "text", "a second shape in one row: it has prompt + completion and text; --kind says which counts"),
    (f'{{"content": [{U}], "teacher_response": "y", "input": "a", "output": "b"}}', "input",
     "a second shape in one row: it has content + teacher_response and input + output; --kind says which counts"),
    ('{"text": "x", "mesages": []}', "mesages", "looks like 'messages', misspelt; the row is read as text"),
    ('{"text": "x", "conversatoins": []}', "conversatoins", "looks like 'conversations', misspelt; the row is read as text"),
    (chat(U, A, rest=', "Messages": []'), "Messages", "looks like 'messages', misspelt; the row is read as messages"),
    ('{"text": "x", "pormpt": "y"}', "pormpt", "looks like 'prompt', misspelt; the row is read as text"),
    # what only the chat template and the tokenizer can tell
    (chat(U, f'{A[:-1]}, "tool_calls": [{{"function": {{"name": "f", "arguments": {{}}}}}}]}}'), "messages[1].tool_calls", "the chat template drops it"),
    (chat(A, U), "messages", "the chat template refuses it: the user begins"),
    (chat(U, A, '{"role": "tool", "content": "3"}'), "messages[2].content", "the chat template drops it"),
    ('{"content": [{"role": "developer", "content": "d"}, {"role": "user", "content": "q"}], "teacher_response": "r"}', "content",
     "the chat template refuses it: the user begins"),
    (chat(U, A, rest=', "tools": [{"name": "f"}]'), "tools", "the chat template has no place for it"),
    (chat(U, A, rest=', "tools": "f"'), "tools", "is text that is no JSON: Expecting value: line 1 column 1 (char 0)"),
    ('{"prompt": "hi", "completion": "' + "word " * 300 + '"}', "prompt", "too long: {tokens} tokens, 300 are allowed"),
    (chat(U, '{"role": "assistant", "content": "' + "word " * 300 + '"}'), "messages", "too long: {tokens} tokens, 300 are allowed"),
]  # fmt: skip

GOOD = [
    chat(U, A),
    chat(U, A, rest=', "id": 1, "message": "m", "context": "c", "prompts": [], "text": null, "prompt": "x"'),
    chat('{"role": "system", "content": "s"}', U, A, U, A),
    '{"prompt": "x", "completion": "y", "output": "z"}',
    '{"text": "x", "test": "y", "prompt_id": 3, "Content": 4}',
    chat(U, '{"role": "assistant", "content": "x", "thinking": "hm", "weight": 1}'),
    chat(*[U, A] * 40),
]
TEMPLATE = """{%- if messages[0].role not in ('user', 'system') %}{{ raise_exception('the user begins') }}{% endif %}
{%- for m in messages if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_every_malformed_row_is_named_in_one_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, template, path = tmp_path / "t", tmp_path / "c.jinja", tmp_path / "rows.jsonl"
    specials = ("<|im_start|>", "<|im_end|>")
    train_tokenizer(["word words"] * 9, TokenizerConfig(vocab_size=280, special_tokens=specials), bundle)
    template.write_text(TEMPLATE)
    lines, expected = [], {}
    for index, (row, field, reason) in enumerate(MALFORMED):
        lines += [GOOD[index % len(GOOD)], row]
        expected[len(lines)] = (field, reason)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(expected) >= 60

    options = ["--tokenizer", str(bundle), "--chat-template", str(template), "--max-length", "300"]
    assert main(["data", "validate", str(path), "--json", *options]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["bad"]) == (len(lines), len(MALFORMED))
    with capsys.disabled():
        print("\nmalformed rows: line, field, reason")
        for error in report["errors"]:
            print(f"  {error['line']:4} {error['field']:32} {error['reason']}")
    for error, (line, (field, reason)) in zip(report["errors"], expected.items(), strict=True):
        tokens = error["reason"].split()[2] if error["reason"].startswith("too long") else ""
        assert error == {
            "source": str(path), "line": line, "field": field, "reason": reason.replace("{tokens}", tokens)
        }  # fmt: skip

    # the same in plain words, and nothing where all is well
    assert main(["data", "validate", str(path), *options]) == 3
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == f"{path}:2: field 'messages[2].role': is 'USER'; {ROLES}"
    assert told.err.splitlines()[0] == f"error: {len(MALFORMED)} of {len(lines)} rows are malformed"
    path.write_text("\n".join(GOOD) + "\n")
    assert main(["data", "validate", str(path), *options]) == 0


def test_what_a_template_refuses_goes_to_the_quarantine(tmp_path: Path) -> None:
    path, aside = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    train_tokenizer(["word"] * 9, TokenizerConfig(vocab_size=260), tmp_path / "t")
    path.write_text(chat(A, U) + "\n" + chat(U, A) + "\n")
    options = ["--tokenizer", str(tmp_path / "t"), "--chat-template", "gemma", "--quarantine", str(aside)]
    assert main(["data", "validate", str(path), *options]) == 3
    (entry,) = map(json.loads, aside.read_text().splitlines())
    assert (entry["line"], entry["field"], entry["raw"]) == (1, "messages", chat(A, U))


def test_options_about_tokens_need_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(chat(U, A) + "\n")
    for verb in ("validate", "stats", "inspect"):
        assert main(["data", verb, str(tmp_path / "a.jsonl"), "--chat-template", "chatml"]) == 2
        assert capsys.readouterr().err.startswith(
            "error: --chat-template needs --tokenizer\nwhy: it is about tokens"
        )


def test_the_verbs_that_show_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, bundle = tmp_path / "a.jsonl", str(tmp_path / "t")
    specials = ("<|im_start|>", "<|im_end|>")
    train_tokenizer(["hi yo"] * 9, TokenizerConfig(vocab_size=280, special_tokens=specials), tmp_path / "t")
    path.write_text(chat(U, A) + "\n" + chat(U, A, U, A) + "\n")
    options = [str(path), "--tokenizer", bundle, "--chat-template", "chatml"]
    assert main(["data", "inspect", *options, "--line", "2", "--train-on", "completion"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path}:2  messages, 4 turns, 8 characters, ")
    assert (shown.count("⟦"), shown.count("⟧")) == (1, 1)  # piped: no colours
    assert shown.rstrip().endswith("⟦yo│<|im_end|>⟧⏎")
    assert main(["data", "inspect", *options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert [piece for piece, trained in row["rendered"] if trained] == ["yo", "<|im_end|>"]
    assert main(["data", "stats", *options, "--max-length", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["too_long"], found["refused"]) == (2, 1, {})
    assert main(["data", "stats", *options, "--max-length", "40"]) == 0
    assert "over 40      1 rows\n" in capsys.readouterr().out
