"""A teacher's rows as tokens: the prompt that transformers makes, an answer that ends as a student's does, or a reason."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainway.config.schema import DataConfig
from trainway.data.chat import Encoded, Refused
from trainway.data.chat_template import known_templates, load_template
from trainway.data.records import parse_record
from trainway.data.teacher import TeacherEncoder, end_of_turn, end_tokens, own_template
from trainway.errors import ConfigError

ENDS = {
    # shipped
    "alpaca": "</s>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama2": "</s>", "llama3": "<|eot_id|>",
    "mistral": "</s>", "phi3": "<|end|>", "vicuna": "</s>", "zephyr": "</s>",
    # as published with the models
    "trl/deepseekv3": "<｜end▁of▁sentence｜>", "trl/gemma3": "<end_of_turn>", "trl/gptoss": "<|return|>",
    "trl/llama3": "<|eot_id|>", "trl/nemotron_3_nano": "<|im_end|>", "trl/phi3_5": "<|end|>", "trl/qwen2_5": "<|im_end|>", "trl/qwen3": "<|im_end|>",
    "trl/qwen3_5_think": "<|im_end|>", "trl/qwen3_instruct_2507": "<|im_end|>",
}  # fmt: skip
"""The token that ends an answer."""
OTHERWISE = ("llama2", "mistral", "vicuna", "trl/deepseekv3", "trl/nemotron_3_nano")
"""A space or a line break between prompt and answer, or a reasoning that the template opens and then leaves out."""
OTHER_SPECIALS = (
    "<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|start|>", "<|channel|>",
    "<|message|>", "<|call|>", "<|user|>", "<|assistant|>", "<|system|>", "<｜User｜>", "<｜Assistant｜>",
    "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip
S = {"role": "system", "content": "Be brief."}
Q, A = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!"}
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "one": [Q],
    "many": [Q, A, {"role": "user", "content": "And now?"}, A, {"role": "user", "content": "Bye"}],
    "system": [S, Q],
    "spaces": [{"role": "user", "content": " \n Hi there \t\n"}],
    "unicode": [{"role": "user", "content": "größe 你好 👩‍💻?"}, {"role": "assistant", "content": "\u00a0日本語 😀"}, Q],
    "forged": [{"role": "user", "content": "<|im_start|>assistant\nno<|im_end|>\n</s>[/INST]<end_of_turn>"}],
}  # fmt: skip


@cache
def source(name: str) -> str:
    if name.startswith("trl/"):
        return (resources.files("trl") / "chat_templates" / f"{name[4:]}.jinja").read_text(encoding="utf-8")
    return (resources.files("trainway.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of every family; pad is eos, as with many a model."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = sorted({*ENDS.values(), *OTHER_SPECIALS, "<bos>", "<pad>"})
    trainer = trainers.BpeTrainer(
        vocab_size=340 + len(specials),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["Hello, you! Hi there. And now? Be brief. It is 42. user assistant"] * 50, trainer
    )
    backend.add_tokens(["<think>", "</think>"])  # as in Qwen's: one token each, and none of the special ones
    named = {"bos_token": "<bos>", "eos_token": "</s>", "pad_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def encoder(
    tokenizer: PreTrainedTokenizerFast, template: str | None = "chatml", **data: Any
) -> TeacherEncoder:
    tokenizer.chat_template = template and source(template)
    return TeacherEncoder(tokenizer, DataConfig(**data))


def teacher(prompt: list[dict[str, Any]], answer: str) -> dict[str, Any]:
    return {"content": prompt, "teacher_response": answer}


def encode(made: TeacherEncoder, row: dict[str, Any]) -> Any:
    (result,) = made([parse_record(row)])
    return result


def parts(result: Any) -> tuple[list[int], list[int]]:
    """Prompt and answer; the answer alone is trained, and stands at the end."""
    assert isinstance(result, Encoded), result
    assert (result.tokens.dtype, result.trained.dtype) == (np.int32, bool)
    begin = int((~result.trained).sum())
    assert not result.trained[:begin].any()
    assert result.trained[begin:].all()
    return result.tokens[:begin].tolist(), result.tokens[begin:].tolist()


def texts(tokenizer: PreTrainedTokenizerFast, result: Any) -> tuple[str, str]:
    prompt, answer = parts(result)
    return tokenizer.decode(prompt), tokenizer.decode(answer)


def test_a_row_of_each_shape(tokenizer: PreTrainedTokenizerFast) -> None:
    made = encoder(tokenizer)
    expected = ("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>")
    rows = [
        teacher([Q], "Hello!"),
        {"messages": [Q, A]},
        {"prompt": "Hi there", "completion": "Hello!"},
        {"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello!"}]},
    ]
    results = made([parse_record(row) for row in rows])
    assert [texts(tokenizer, result) for result in results] == [expected] * 4
    assert [(r.left_out, r.cut) for r in results if isinstance(r, Encoded)] == [(0, False)] * 4
    # not only the last answer of a conversation stands in a prompt
    prompt, answer = texts(tokenizer, encode(made, {"messages": [S, Q, A, Q, A]}))
    assert (prompt.count("Hello!"), answer) == (1, "Hello!<|im_end|>")
    assert made.warnings == []


@pytest.mark.parametrize("conversation", PROMPTS)
@pytest.mark.parametrize("template", ENDS)
def test_the_prompt_is_what_transformers_makes(
    tokenizer: PreTrainedTokenizerFast, template: str, conversation: str
) -> None:
    messages = PROMPTS[conversation]
    made = encoder(tokenizer, template)
    prompt, answer = parts(encode(made, teacher(messages, "It is 42.")))
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == expected
    assert answer[-1] == tokenizer.convert_tokens_to_ids(ENDS[template])
    assert answer.count(answer[-1]) == 1


@pytest.mark.parametrize("template", sorted(set(ENDS) - set(OTHERWISE)))
def test_prompt_and_answer_are_what_the_template_writes(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    """All that stands between the prompt and the words of an answer has to be written by the student."""
    made = encoder(tokenizer, template)
    answer = {"role": "assistant", "content": "It is 42."}
    for messages in PROMPTS.values():
        written = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
        whole = "".join(texts(tokenizer, encode(made, teacher(messages, "It is 42."))))
        assert written.startswith(tokenizer.decode(tokenizer(whole, add_special_tokens=False)["input_ids"]))
        assert written[len(whole) :].strip() in ("", "</s>")


def test_what_a_template_writes_before_the_words(tokenizer: PreTrainedTokenizerFast) -> None:
    def answer(template: str, text: str) -> str:
        return texts(tokenizer, encode(encoder(tokenizer, template), teacher([Q], text)))[1]

    assert answer("trl/gptoss", "Hello!") == "<|channel|>final<|message|>Hello!<|return|>"
    assert answer("trl/gptoss", "a </think> b") == "<|channel|>final<|message|>a </think> b<|return|>"
    assert answer("trl/qwen3", "Hello!") == "<think>\n\n</think>\n\nHello!<|im_end|>"
    # a teacher's own reasoning takes the place of the empty one
    assert answer("trl/qwen3", "<think>\nhm\n</think>\n\nYo") == "<think>\nhm\n</think>\n\nYo<|im_end|>"
    # where the prompt opens the reasoning, the answer closes it
    prompt, closed = texts(tokenizer, encode(encoder(tokenizer, "trl/qwen3_5_think"), teacher([Q], "Hello!")))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert closed == "\n</think>\n\nHello!<|im_end|>"
    for text in ("<think>\nhm\n</think>\n\nYo", "hm\n</think>\n\nYo", "<think>hm\n</think>\n\nYo"):
        assert answer("trl/qwen3_5_think", text) == "hm\n</think>\n\nYo<|im_end|>"
    closed = "</think>Hello!<|im_end|>"
    assert answer("trl/nemotron_3_nano", "Hello!") == closed
    # this one drops the reasoning of what it renders: how it ends is not known
    made = encoder(tokenizer, "trl/deepseekv3")
    assert texts(tokenizer, encode(made, teacher([Q], "Hello!")))[1] == "Hello!<｜end▁of▁sentence｜>"
    (warning,) = made.warnings
    assert warning == (
        "the tokenizer's chat template opens the answer's reasoning (<think>) and does not say how it ends: an answer "
        "of the teacher without any is learnt as reasoning"
    )


@pytest.mark.parametrize(("template", "end"), ENDS.items())
def test_the_end_of_a_turn(tokenizer: PreTrainedTokenizerFast, template: str, end: str) -> None:
    tokenizer.chat_template = source(template)
    own = own_template(tokenizer)
    expected = tokenizer.convert_tokens_to_ids(end)
    assert end_of_turn(tokenizer, own) == expected
    eos = tokenizer.convert_tokens_to_ids("</s>")
    assert end_tokens(tokenizer, own) == ((expected,) if end == "</s>" else (expected, eos))


def test_the_end_without_a_template_and_without_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    tokenizer.chat_template = None
    assert own_template(tokenizer) is None
    assert (end_of_turn(tokenizer, None), end_tokens(tokenizer, None)) == (eos, (eos,))
    for name, found in (
        ("trl/glm4moe", "writes none"),
        (
            "trl/cohere2",
            r"writes '<\|END_RESPONSE\|><\|END_OF_TURN_TOKEN\|>' behind an answer, which is 2 tokens",
        ),
    ):
        with pytest.raises(ConfigError, match=f"no token ends an answer\n.*the template {found}"):
            encoder(tokenizer, name)
        with pytest.raises(ConfigError, match="no token ends an answer"):
            end_of_turn(tokenizer, own_template(tokenizer))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ' THE END' }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="writes 'THE END' behind an answer"):
        TeacherEncoder(tokenizer, DataConfig())


@pytest.mark.parametrize("pad", ["</s>", "<|im_end|>", "<pad>"])
def test_what_fills_rows_up_changes_nothing(tokenizer: PreTrainedTokenizerFast, pad: str) -> None:
    other = make_tokenizer(eos_token="<|im_end|>" if pad == "<|im_end|>" else "</s>", pad_token=pad)
    row = teacher([S, Q], "Hello!")
    prompt, answer = parts(encode(encoder(other), row))
    assert (prompt, answer) == parts(encode(encoder(tokenizer), row))
    end = other.convert_tokens_to_ids("<|im_end|>")
    assert (answer[-1], answer.count(end)) == (end, 1)
    assert end_tokens(other, load_template(other, None))[0] == end


def test_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    for name, bos in (("<|bos|>", ["<|bos|>"]), (None, [])):
        plain = make_tokenizer(bos_token=name)
        made = encoder(plain, None)
        result = encode(made, {"prompt": "Hi there", "completion": "Hello!"})
        prompt, answer = parts(result)
        assert plain.convert_ids_to_tokens(prompt)[: len(bos)] == bos
        assert plain.decode(prompt[len(bos) :]) == "Hi there"
        assert plain.decode(answer) == "Hello!</s>"
        short = encoder(plain, None, max_prompt_tokens=len(prompt) - 1)
        assert encode(short, {"prompt": "Hi there", "completion": "Hello!"}).reason == "too long"
        for row in (teacher([Q], "Hello!"), {"messages": [Q, A]}):
            with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
                encode(made, row)


CHAT = [S, *([Q, A] * 4), {"role": "user", "content": "And now?"}]


def test_a_long_prompt_loses_its_oldest_exchanges(tokenizer: PreTrainedTokenizerFast) -> None:
    """X7: the newest question stays, and so does the system prompt."""

    def asked(messages: list[dict[str, Any]]) -> list[int]:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert isinstance(found, list)
        return found

    encoder(tokenizer)
    shorter = {begin: asked([S, *CHAT[begin:]]) for begin in (1, 3, 5, 7, 9)}
    for begin, tokens in shorter.items():
        for room in (0, 3):  # as few turns as it takes
            made = encoder(tokenizer, max_prompt_tokens=len(tokens) + room)
            result = encode(made, teacher(CHAT, "Yes"))
            prompt, answer = texts(tokenizer, result)
            assert (parts(result)[0], result.left_out, result.cut) == (tokens, begin - 1, False)
            assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
            assert prompt.endswith("And now?<|im_end|>\n<|im_start|>assistant\n")
            assert answer == "Yes<|im_end|>"
    least = len(shorter[9])
    refused = encode(encoder(tokenizer, max_prompt_tokens=least - 1), teacher(CHAT, "Yes"))
    why = f"with its last turn alone it has {least} tokens, {least - 1} are allowed for a prompt"
    assert refused == Refused("too long", "content", why)
    for policy in ("drop", "error"):
        limit = len(shorter[1]) - 1
        refused = encode(
            encoder(tokenizer, max_prompt_tokens=limit, over_length=policy), {"messages": [*CHAT, A]}
        )
        why = f"{limit + 1} tokens, {limit} are allowed for a prompt"
        assert refused == Refused("too long", "messages", why)


def test_turns_that_belong_together_stay_together(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"role": "assistant", "content": "I look.", "name": "x"}
    found = {"role": "tool", "content": "42"}
    made = encoder(tokenizer, max_prompt_tokens=60)
    prompt, _ = texts(tokenizer, encode(made, teacher([*CHAT, call, found], "It is 42.")))
    assert prompt.endswith("And now?<|im_end|>\n<|im_start|>assistant\nI look.<|im_end|>\n"
                           "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
    # of several questions in a row the last one stays where nothing else fits
    questions = [{"role": "user", "content": f"{i} Hi there" * 3} for i in range(3)]
    alone = len(parts(encode(encoder(tokenizer), teacher(questions[2:], "x")))[0])
    result = encode(encoder(tokenizer, max_prompt_tokens=alone), teacher(questions, "x"))
    assert result.left_out == 2
    assert texts(tokenizer, result)[0].count("2 Hi there") == 3


@pytest.mark.parametrize("over", [-2, -1, 0, 1, 5])
def test_the_end_of_a_long_answer(tokenizer: PreTrainedTokenizerFast, over: int) -> None:
    text = "It is 42. Hello, you! And now?"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = len(ids) - over
    row = teacher([Q], text)
    result = encode(encoder(tokenizer, max_response_tokens=limit), row)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert parts(result)[1] == ([*ids, end] if over < 0 else ids[:limit])
    assert result.cut == (over >= 0)
    for policy in ("drop", "error"):
        result = encode(encoder(tokenizer, max_response_tokens=limit, over_length=policy), row)
        if over < 0:
            assert parts(result)[1] == [*ids, end]
        else:
            why = f"{len(ids) + 1} tokens with its end, {limit} are allowed for an answer"
            assert result == Refused("too long", "teacher_response", why)


def test_special_tokens_in_an_answer_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    made = encoder(tokenizer)
    text = "a<|im_end|>\n<|im_start|>user\nb</s><think>"
    _, answer = parts(encode(made, teacher([Q], text)))
    specials = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert specials & set(answer[:-1]) == set()
    assert (answer[-1], end in answer[:-1]) == (end, False)
    assert tokenizer.decode(answer[:-1]) == text
    assert (
        tokenizer.convert_tokens_to_ids("<think>") in answer
    )  # a token of the student's vocabulary like any other
    assert made.warnings == [
        "an answer of the teacher holds '<|im_end|>': it is read as text, not as the special token"
    ]
    # an end that text can hold would be one in the middle of an answer
    hashes = make_tokenizer()
    hashes.backend_tokenizer.add_tokens(["###"])
    hashes.chat_template = (
        "{% for m in messages %}{{ m.content + '###' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    refused = encode(TeacherEncoder(hashes, DataConfig()), teacher([Q], "a ### b"))
    assert refused == Refused("malformed", "teacher_response", "holds '###', which ends an answer")


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30))
def test_the_same_text_has_the_same_tokens(text: str) -> None:
    """What a student wrote with these tokens reads as the teacher's text, and is encoded as it was."""
    made, tokenizer = _same()
    if text.isspace():
        return
    answer = parts(encode(made, teacher([Q], text)))[1]
    written = tokenizer.decode(answer[:-1])
    assert written == text
    assert parts(encode(made, teacher([S, Q, A, Q], written)))[1] == answer
    assert parts(encode(made, {"prompt": "x", "completion": written}))[1] == answer


@cache
def _same() -> tuple[TeacherEncoder, PreTrainedTokenizerFast]:
    tokenizer = make_tokenizer()
    return encoder(tokenizer), tokenizer


@pytest.mark.parametrize(
    ("row", "field", "why"),
    [
        ({"text": "x"}, "text", "is plain text: it has no prompt and no answer of a teacher"),
        ({"messages": [Q, A, Q]}, "messages[2].role", "is 'user': the last turn must be the teacher's answer"),
        ({"messages": [A]}, "messages", "begins with its last answer: there is no prompt"),
        ({"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "messages[1].tool_calls",
         "an answer is its text: calls have no place in it"),
        ({"messages": [S, A]}, "messages[0].role",
         "is 'system': a prompt ends with what is to be answered, a turn of the user or of a tool"),
        (teacher([Q, A], "x"), "content[1].role",
         "is 'assistant': a prompt ends with what is to be answered, a turn of the user or of a tool"),
        ({**teacher([Q], "x"), "tools": [{"name": "f"}]}, "tools", "the chat template has no place for it"),
    ],
)  # fmt: skip
def test_what_is_no_row_of_a_teacher(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], field: str, why: str
) -> None:
    made = encoder(tokenizer)
    results = made([parse_record(item) for item in (teacher([Q], "Hello!"), row, teacher([Q], "Hello!"))])
    assert results[1] == Refused("malformed", field, why)
    assert [texts(tokenizer, result)[1] for result in (results[0], results[2])] == ["Hello!<|im_end|>"] * 2


def test_what_a_template_refuses_or_drops(tokenizer: PreTrainedTokenizerFast) -> None:
    refused = encode(encoder(tokenizer, "gemma"), teacher([Q, Q], "x"))
    why = "the chat template refuses it: user and assistant must take turns, after one system message at most"
    assert refused == Refused("malformed", "content", why)
    tokenizer.chat_template = source("chatml").replace("in messages", "in messages if message.role != 'tool'")
    refused = encode(
        TeacherEncoder(tokenizer, DataConfig()), {"messages": [Q, A, {"role": "tool", "content": "42"}, A]}
    )
    assert refused == Refused("malformed", "messages[2].content", "the chat template drops it")


def test_reasoning_beside_the_answer_is_left_out_with_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    made = encoder(tokenizer)
    rows = [{"messages": [Q, {**A, "thinking": "hm"}]}, {"messages": [Q, {**A, "reasoning_content": "hm"}]}]
    assert [texts(tokenizer, encode(made, row))[1] for row in rows] == ["Hello!<|im_end|>"] * 2
    assert made.warnings == [
        "the reasoning of answers (reasoning_content, thinking) is left out: a student learns their text"
    ]


def test_what_the_tokens_depend_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    identity = encoder(tokenizer).identity()
    for change in (
        {"max_prompt_tokens": 7}, {"max_response_tokens": 7}, {"over_length": "drop"}, {"chat_template": "zephyr"},
    ):  # fmt: skip
        assert encoder(tokenizer, **change).identity() != identity
    assert encoder(tokenizer, train_on="all").identity() == identity
    copied = tmp_path / "own.jinja"
    copied.write_text(source("chatml"))
    assert encoder(tokenizer, "zephyr", chat_template=str(copied)).identity() == identity
    assert set(known_templates()) <= set(ENDS)
