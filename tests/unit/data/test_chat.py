"""Records to tokens: where the template comes from, the four shapes, what is done with rows that are too long."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from trainway.config.schema import DataConfig, TokenizerConfig
from trainway.data.chat import ChatEncoder, Encoded, Refused
from trainway.data.chat_fit import exchanges, least_left_out
from trainway.data.chat_template import known_templates
from trainway.data.records import parse_record
from trainway.data.show import inspect_rows, render
from trainway.data.stats import measure
from trainway.data.tokenizer import save_tokenizer, train_tokenizer
from trainway.errors import ConfigError

SPECIALS = ("<|im_start|>", "<|im_end|>")
USER, ASSISTANT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello world"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bundle"
    train_tokenizer(
        ["hello hello world"] * 20, TokenizerConfig(vocab_size=280, special_tokens=SPECIALS), path
    )
    return path


@pytest.fixture
def tokenizer(bundle: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(bundle)


def encode(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], max_tokens: int = 1000, **data: Any
) -> Any:
    (result,) = ChatEncoder(tokenizer, DataConfig(**data), max_tokens)([parse_record(row)])
    return result


def text(tokenizer: PreTrainedTokenizerFast, result: Any) -> tuple[str, str]:
    """All that a row is, and what is trained of it."""
    assert isinstance(result, Encoded), result
    assert result.tokens.dtype == np.int32
    assert result.trained.dtype == bool
    return tokenizer.decode(result.tokens), tokenizer.decode(result.tokens[result.trained])


def chat(*pairs: tuple[str, str], system: str = "") -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def test_the_four_shapes_with_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello world<|im_end|>\n"
    for row in (
        {"messages": [USER, ASSISTANT], "id": 3},
        {"prompt": "hello", "completion": "hello world"},
        {"content": [USER], "teacher_response": "hello world"},
    ):
        found = text(tokenizer, encode(tokenizer, row, chat_template="chatml"))
        assert found == (rendered, "hello world<|im_end|>")
    whole, trained = text(tokenizer, encode(tokenizer, {"text": "hello <|im_end|>"}, chat_template="chatml"))
    assert whole == trained == "<|bos|>hello <|im_end|><|eos|>"


def test_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": "hello", "completion": " world"}
    assert text(tokenizer, encode(tokenizer, pair)) == ("<|bos|>hello world<|eos|>", " world<|eos|>")
    whole, trained = text(tokenizer, encode(tokenizer, pair, train_on="all"))
    assert whole == trained == "<|bos|>hello world<|eos|>"
    assert encode(tokenizer, pair, 3).reason == "too long"
    # special tokens that stand in plain text are text
    encoder = ChatEncoder(tokenizer, DataConfig(), 100)
    (result,) = encoder([parse_record({"text": "a<|im_end|>"})])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in result.tokens
    assert encoder.warnings == [
        "a text row holds '<|im_end|>': in rows of plain text it is read as text, not as the special token"
    ]
    with pytest.raises(ConfigError) as caught:
        encode(tokenizer, {"messages": [USER, ASSISTANT]})
    assert str(caught.value) == (
        "the tokenizer has no chat template\nconversations become text through one\n"
        f"set data.chat_template to a .jinja file or a known name: {', '.join(known_templates())}"
    )


def test_no_bos_is_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}"
    result = encode(tokenizer, {"messages": [USER, ASSISTANT]})
    assert result.tokens.tolist().count(tokenizer.bos_token_id) == 1


def test_the_template_that_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer.chat_template = own
    row = {"messages": [USER, ASSISTANT]}
    assert (
        text(tokenizer, encode(tokenizer, row, train_on="all"))[0]
        == "<|im_start|>hello<|im_end|><|im_start|>hello world<|im_end|>"
    )
    tokenizer.chat_template = {"default": own, "tool_use": "nothing"}
    encoder = ChatEncoder(tokenizer, DataConfig(), 10)
    assert encoder.identity()["template"] == own
    tokenizer.chat_template = {"rag": own, "tool_use": own}
    with pytest.raises(
        ConfigError, match=r"several chat templates and none is its default\nthey are named 'rag', 'tool_use'"
    ):
        ChatEncoder(tokenizer, DataConfig(), 10)
    path = tmp_path / "my.jinja"
    path.write_text("{% for m in messages %}\n{% if %}\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"my\.jinja, line 2: not a valid template\nExpected an expression"):
        ChatEncoder(tokenizer, DataConfig(chat_template=str(path)), 10)
    with pytest.raises(ConfigError, match=r"no\.jinja cannot be read\nNo such file"):
        ChatEncoder(tokenizer, DataConfig(chat_template=str(tmp_path / "no.jinja")), 10)
    with pytest.raises(
        ConfigError, match=r"no known template is named 'chat-ml'\nknown: alpaca, .*\ndid you mean 'chatml'\?"
    ):
        ChatEncoder(tokenizer, DataConfig(chat_template="chat-ml"), 10)
    assert encode(tokenizer, row, chat_template="chatml").trained.any()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only two turns') }}", "the chat template refuses it: only two turns"),
        ("{{ messages[0].absent.deeper }}", "the chat template refuses it: 'dict object' has no attribute 'absent'"),
        ("{{ 'a' + messages[0]['absent'] }}", "the chat template refuses it: 'dict object' has no attribute 'absent'"),
        ("{{ 'a' + 1 }}", "the chat template fails on it: TypeError: can only concatenate str (not \"int\") to str"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses it: access to attribute '__class__' of 'list' object is unsafe."),
        ("{{ messages[0]['content'][1:] }}", "the chat template drops or changes it"),
        ("nothing", "the chat template drops it"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "cannot tell where this turn begins in the text that the chat template makes; mark it with {% generation %} in a template of your own"),
    ],
)  # fmt: skip
def test_what_a_template_refuses_or_drops(
    tokenizer: PreTrainedTokenizerFast, template: str, why: str
) -> None:
    tokenizer.chat_template = template
    result = encode(tokenizer, {"messages": [USER, ASSISTANT]})
    assert (result.reason, result.why) == ("malformed", why)
    assert result.field.startswith("messages")


def test_a_refusal_names_the_field_of_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% endfor %}"
    )
    for row, field in (
        ({"conversations": [USER, ASSISTANT]}, "conversations[1].content"),
        ({"input": "hello", "output": "yo"}, "output"),
        ({"content": [USER], "teacher_response": "yo"}, "teacher_response"),
        ({"content": [USER, ASSISTANT, USER], "teacher_response": "yo"}, "content[1].content"),
    ):
        assert encode(tokenizer, row, train_on="all") == Refused(
            "malformed", field, "the chat template drops it"
        )
    silent = "{% for m in messages %}{{ m['content'] }}{% if false %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    tokenizer.chat_template = silent
    assert encode(tokenizer, {"messages": [USER, ASSISTANT]}) == Refused(
        "malformed", "messages", "no token of it is trained: the assistant says nothing in it"
    )


def test_a_bad_row_harms_no_other(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ChatEncoder(tokenizer, DataConfig(chat_template="gemma"), 100)
    rows = [chat(("a", "b")), {"messages": [ASSISTANT, USER]}, {"text": "x"}, chat(("c", "d"))]
    results = encoder([parse_record(row) for row in rows])
    assert [type(result).__name__ for result in results] == ["Encoded", "Refused", "Encoded", "Encoded"]
    assert results[1].field == "messages"


def test_oldest_exchanges_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [(f"hello {n}", f"world {n}") for n in range(10)]
    row = chat(*pairs, system="hello")
    whole = encode(tokenizer, row, chat_template="chatml")
    exact = encode(tokenizer, row, len(whole.tokens), chat_template="chatml")
    assert exact.left_out == 0
    found = encode(tokenizer, row, len(whole.tokens) - 1, chat_template="chatml")
    assert found.left_out == 2
    for limit in range(60, len(whole.tokens), 17):
        found = encode(tokenizer, row, limit, chat_template="chatml")
        left = found.left_out // 2
        assert len(found.tokens) <= limit
        expected = encode(tokenizer, chat(*pairs[left:], system="hello"), chat_template="chatml")
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.trained, expected.trained)
        longer = encode(tokenizer, chat(*pairs[left - 1 :], system="hello"), chat_template="chatml")
        assert len(longer.tokens) > limit  # none was left out that had room
    shortest = len(encode(tokenizer, chat(pairs[-1], system="hello"), chat_template="chatml").tokens)
    assert encode(tokenizer, row, shortest, chat_template="chatml").left_out == 18
    refused = encode(tokenizer, row, shortest - 1, chat_template="chatml")
    assert refused == Refused(
        "too long", "messages", f"its last exchange alone has {shortest} tokens, {shortest - 1} are allowed"
    )
    for policy in ("drop", "error"):
        refused = encode(tokenizer, row, 100, chat_template="chatml", over_length=policy)
        assert refused == Refused("too long", "messages", f"{len(whole.tokens)} tokens, 100 are allowed")


def test_texts_are_cut_and_pairs_are_not(tokenizer: PreTrainedTokenizerFast) -> None:
    found = encode(tokenizer, {"text": "hello " * 50}, 10)
    assert (len(found.tokens), found.cut, found.trained.all()) == (10, True, True)
    assert tokenizer.eos_token_id not in found.tokens
    assert encode(tokenizer, {"text": "hello " * 50}, 10, over_length="drop").reason == "too long"
    assert not encode(tokenizer, {"text": "hello"}, 10).cut
    for data in ({}, {"chat_template": "chatml"}):
        assert (
            encode(tokenizer, {"prompt": "hello " * 50, "completion": "x"}, 30, **data).reason == "too long"
        )


def test_where_a_conversation_may_begin() -> None:
    def starts(roles: str) -> tuple[int, list[int]]:
        names = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
        return exchanges([names[role] for role in roles])

    assert starts("sdauauaua") == (2, [3, 5, 7])  # an answer without a question goes first
    assert starts("uaua") == (0, [2])
    assert starts("uatatauata") == (0, [6])
    assert starts("uuauua") == (0, [3])
    assert starts("uauau") == (0, [2])  # the last one with an answer stays
    assert starts("sua") == (1, [])
    calls: list[int] = []

    def fits(begin: int) -> bool:
        calls.append(begin)
        return begin >= 700

    assert least_left_out(range(1000), fits) == 700
    assert len(calls) <= 12
    assert least_left_out([1, 2], lambda begin: False) is None


def test_a_thousand_turns_are_cut_in_a_moment(tokenizer: PreTrainedTokenizerFast) -> None:
    row = parse_record(chat(*((f"hello {n}", f"world {n}") for n in range(1000)), system="hello"))
    stock = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    tokenizer.chat_template = stock
    encoder = ChatEncoder(tokenizer, DataConfig(), 10_000)
    began = time.process_time()
    (result,) = encoder([row])
    assert time.process_time() - began < 10  # some 0.2 s where nothing else runs
    assert isinstance(result, Encoded)
    assert 9_900 < len(result.tokens) <= 10_000
    assert result.left_out > 0


def test_what_a_tokenizer_lacks(bundle: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def warnings(**data: Any) -> list[str]:
        return ChatEncoder(tokenizer, DataConfig(**data), 10).warnings

    assert warnings(chat_template="chatml") == []
    assert warnings(chat_template="phi3") == [
        "the known template 'phi3' writes '<|user|>', which is no single token of this tokenizer: it becomes 8",
        "the known template 'phi3' writes '<|end|>', which is no single token of this tokenizer: it becomes 7",
        "the known template 'phi3' writes '<|assistant|>', which is no single token of this tokenizer: it becomes 13",
    ]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    assert warnings() == [
        "the tokenizer's chat template writes nothing behind the last answer: the model will not learn to stop there"
    ]
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    assert warnings() == ["the tokenizer has no pad token: rows are padded with '<|eos|>'"]
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no end-of-document token"):
        warnings()


def test_reasoning_that_a_template_leaves_out_is_said_once(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ChatEncoder(tokenizer, DataConfig(chat_template="chatml"), 100)
    row = parse_record({"messages": [USER, {**ASSISTANT, "thinking": "hm"}]})
    assert isinstance(encoder([row, row])[0], Encoded)
    assert encoder.warnings == [
        "the known template 'chatml' leaves out the reasoning of turns (reasoning_content, thinking)"
    ]


def test_the_identity_changes_with_what_changes_the_output(tokenizer: PreTrainedTokenizerFast) -> None:
    def identity(max_tokens: int = 100, **data: Any) -> str:
        return json.dumps(ChatEncoder(tokenizer, DataConfig(**data), max_tokens).identity(), sort_keys=True)

    variants = [
        identity(),
        identity(50),
        identity(chat_template="chatml"),
        identity(chat_template="chatml", train_on="completion"),
        identity(chat_template="chatml", over_length="drop"),
    ]
    assert len(set(variants)) == 5
    assert identity() == variants[0]


def test_tools_that_are_none(tokenizer: PreTrainedTokenizerFast) -> None:
    for tools, why in (
        (
            "{",
            "is text that is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ([1], "is not a list of objects, nor JSON text of one"),
        ({"name": "f"}, "is not a list of objects, nor JSON text of one"),
    ):
        row = {"messages": [USER, ASSISTANT], "tools": tools}
        assert encode(tokenizer, row, chat_template="chatml") == Refused("malformed", "tools", why)
    for tools in (None, [], "", "[]"):
        assert encode(
            tokenizer, {"messages": [USER, ASSISTANT], "tools": tools}, chat_template="chatml"
        ).trained.any()


def test_inspection_shows_what_is_trained(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "hello\n😀"}], "id": 1},
        {"messages": [ASSISTANT, USER]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = inspect_rows(str(path), tokenizer=bundle, config=DataConfig(chat_template="chatml"))
    assert row.rendered is not None
    assert "".join(piece for piece, _ in row.rendered) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello\n😀<|im_end|>\n"
    )
    lines = list(render(row))
    assert lines[0] == f"{path}:1  messages, 2 turns, 12 characters, {len(row.rendered)} tokens, 7 trained"
    assert lines[1].startswith("<|im_start|>│u")
    assert "⟦hello│⏎\n│😀│││" in lines[1]
    assert lines[1].endswith("<|im_end|>⟧⏎\n")
    assert lines[2] == "id: 1"
    coloured = "\n".join(render(row, colour=True))
    assert "\x1b[1;32mhello\x1b[0m" in coloured
    assert "⟦" not in coloured
    (bad,) = inspect_rows(str(path), line=2, tokenizer=bundle, config=DataConfig(chat_template="gemma"))
    assert bad.error == (
        "field 'messages': the chat template refuses it: user and assistant must take turns, after one system message at most"
    )
    (long,) = inspect_rows(
        str(path), tokenizer=bundle, config=DataConfig(chat_template="chatml"), max_tokens=5
    )
    assert long.error.startswith("field 'messages': too long: ")


def test_statistics_of_rendered_rows(
    bundle: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [chat(*[("hello", "world")] * count) for count in (1, 1, 2, 4)] + [{"messages": [ASSISTANT]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [len(encode(tokenizer, row, chat_template="gemma").tokens) for row in rows[:4]]
    found = measure(
        [str(path)], tokenizer=bundle, config=DataConfig(chat_template="gemma"), max_length=sizes[0]
    ).as_dict()
    assert (found["rows"], found["tokens"], found["max_length"], found["too_long"]) == (
        4,
        sum(sizes),
        sizes[0],
        2,
    )
    assert list(found["quantiles"].values())[-1] == sizes[3]
    assert dict(found["refused"]) == {
        "the chat template refuses it: user and assistant must take turns, after one system message at most": 1
    }
    save_tokenizer(tokenizer, tmp_path / "t")
    without = measure([str(path)], tokenizer=tmp_path / "t").as_dict()
    assert "refused" not in without
    assert without["rows"] == 5
