"""Rows of a teacher as tokens: the prompt as the student meets it, the answer as the student would have to write it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from trainway.config.schema import DataConfig
from trainway.data.chat import ChatEncoder, Encoded, Refused
from trainway.data.chat_fit import exchanges, least_left_out
from trainway.data.chat_marks import THINK_CLOSERS, THINK_OPENERS
from trainway.data.chat_spans import SpanFinder
from trainway.data.chat_template import REASONING, ChatTemplate, has_template, load_template
from trainway.data.records import Message, Record
from trainway.data.rows import MalformedError, check_text
from trainway.errors import ConfigError

VERSION = 1
"""Grows when the same row and settings give other tokens."""
_PROBE = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})


class TeacherEncoder(ChatEncoder):
    """Turns records into p + t, of which t is trained: a prompt and what the teacher answered to it.

    p is what `apply_chat_template(messages, add_generation_prompt=True)` gives for the turns before the answer, or
    without a template bos and the plain prompt. t is the answer's text, then the token that ends the turn, so that
    a teacher ends as a student does; an answer of data.max_response_tokens or more is cut there and has no end.

    The answer is encoded apart from the prompt, and special tokens that its text holds are read as text. A student
    goes on behind exactly p, and its answer is over at the first end: were one read in the middle of t, t would be
    an answer that no student can give, and a discriminator would need to look at nothing else. What the template
    puts between p and the words of an answer (gpt-oss: the final channel, Qwen3: an empty reasoning) belongs to t,
    as a student has to write it.

    Raises ConfigError as ChatEncoder does, and for a template whose answers do not end with one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> None:
        super().__init__(tokenizer, data, data.max_prompt_tokens + data.max_response_tokens)
        self._end = _end_id(tokenizer, self._finder)
        self._lead = self._opened = ""
        if self._finder is not None:
            self._lead, self._opened = self._learn_lead(self._finder)
        self._lead_ids: list[int] = self._backend.encode(self._lead, add_special_tokens=False).ids
        # those with which an answer may close a reasoning of its own, which it then brings along
        added = self._backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        self._closers = [
            tag for tag in THINK_CLOSERS if tag not in special and (self._opened or tag in self._lead)
        ]

    def identity(self) -> dict[str, Any]:
        """JSON values on which the output depends, beside the tokenizer and the records."""
        shared = super().identity()
        return {
            "teacher": VERSION,
            **{name: shared[name] for name in ("version", "template", "special_tokens", "over_length")},
            "max_prompt_tokens": self._data.max_prompt_tokens,
            "max_response_tokens": self._data.max_response_tokens,
        }

    def __call__(self, records: Sequence[Record]) -> list[Encoded | Refused]:
        """The tokens of each record, or why it has none, in the same order.

        Raises ConfigError at the first conversation where there is no chat template.
        """
        results: list[Encoded | Refused | None] = [None] * len(records)
        rows: list[tuple[int, _Row]] = []
        for index, record in enumerate(records):
            try:
                rows.append((index, self._read(record)))
            except MalformedError as error:
                results[index] = _refused(record, error)
        reader = self._plain if self._finder is None else self._backend
        prompts = reader.encode_batch([row.asked for _, row in rows], add_special_tokens=False)
        answers = self._plain.encode_batch([row.answer for _, row in rows], add_special_tokens=False)
        before = self._before if self._finder is None else []
        for (index, row), prompt, answer in zip(rows, prompts, answers, strict=True):
            results[index] = self._joined(row, before + prompt.ids, answer.ids)
        return [result for result in results if result is not None]

    def _read(self, record: Record) -> _Row:
        """Raises MalformedError, its field the path of a turn such as `[1].content`, or one of the row."""
        turns, answer, field = _prompt_and_answer(record)
        self._note(record, answer)
        if self._finder is None and record.shape == "prompt":
            return _Row(record.names[0], field, [], None, record.prompt, answer)
        finder = self._need_finder()
        messages, tools = self._conversation(record)
        messages = messages[: len(turns)]
        finder.render(messages, tools, "all")  # refuses what the template drops
        asked = finder.renderer.render(messages, tools, prompt=True)
        reasons = any(closer in answer for closer in self._closers)
        tag = self._opened.rstrip()
        if reasons and tag and answer.lstrip().startswith(tag):  # p holds it already
            answer = answer.lstrip().removeprefix(tag).removeprefix(self._opened.removeprefix(tag))
        return _Row(record.names[0], field, messages, tools, asked, answer, reasons)

    def _joined(self, row: _Row, prompt: list[int], answer: list[int]) -> Encoded | Refused:
        left_out = 0
        if len(prompt) > self._data.max_prompt_tokens:
            fitted = self._fitted_prompt(row, len(prompt))
            if isinstance(fitted, Refused):
                return fitted
            prompt, left_out = fitted
        if not prompt or not answer:
            return Refused("malformed", row.answer_field if prompt else row.field, "has no token")
        if self._end in answer:
            why = f"holds {self._tokenizer.convert_ids_to_tokens(self._end)!r}, which ends an answer"
            return Refused("malformed", row.answer_field, why)
        response = answer if row.reasons else self._lead_ids + answer
        limit = self._data.max_response_tokens
        cut = len(response) >= limit
        if cut and self._data.over_length != "truncate":
            why = f"{len(response) + 1:,} tokens with its end, {limit:,} are allowed for an answer"
            return Refused("too long", row.answer_field, why)
        response = response[:limit] if cut else [*response, self._end]
        tokens = np.array(prompt + response, dtype=np.int32)
        return Encoded(tokens, np.arange(len(tokens)) >= len(prompt), left_out, cut)

    def _fitted_prompt(self, row: _Row, length: int) -> tuple[list[int], int] | Refused:
        """The prompt without its oldest exchanges, as few as makes it fit, and how many turns it lost. The system
        prompt stays, and so does the newest turn: it is the question."""
        limit = self._data.max_prompt_tokens
        allowed = f"{limit:,} are allowed for a prompt"
        if self._data.over_length != "truncate" or not row.messages:
            return Refused("too long", row.field, f"{length:,} tokens, {allowed}")
        renderer = self._need_finder().renderer
        roles = [turn["role"] for turn in row.messages]
        kept, starts = exchanges([*roles, "assistant"])
        if roles[-1] == "user" and len(roles) - 1 not in (kept, *starts):
            starts.append(len(roles) - 1)  # of several questions in a row the newest alone
        found: dict[int, list[int]] = {}

        def fits(begin: int) -> bool:
            text = renderer.render([*row.messages[:kept], *row.messages[begin:]], row.tools, prompt=True)
            found[begin] = self._backend.encode(text, add_special_tokens=False).ids
            return len(found[begin]) <= limit

        try:
            begin = least_left_out(starts, fits)
        except MalformedError as error:
            return Refused("malformed", row.field, error.reason)
        if begin is None:
            size = len(found[starts[-1]]) if starts else length
            why = f"with its last turn alone it has {size:,} tokens, {allowed}"
            return Refused("too long", row.field, why)
        return found[begin], begin - kept

    def _learn_lead(self, finder: SpanFinder) -> tuple[str, str]:
        """What the template writes between the prompt and the words of an answer, white space alone left aside; and
        the tag with which the prompt ends where it opens reasoning."""
        probe = list(_PROBE)
        asked = finder.renderer.render(probe[:1], None, prompt=True)
        tag = next((tag for tag in THINK_OPENERS if asked.rstrip().endswith(tag)), "")
        opened = asked[asked.rindex(tag) :] if tag else ""
        regions = finder.renderer.locate(probe, None, finder.exchange)
        for known in (asked, asked.rstrip()):  # Nemotron closes a reasoning in the line in which it opens it
            if regions is not None and finder.exchange.startswith(known):
                lead = finder.exchange[len(known) : regions.first[1]]
                # a space is left to the tokenizer: those that want one put it before the first word themselves
                return (lead if lead.strip() else ""), opened
        if opened:
            self._warn(
                f"{finder.template.origin} opens the answer's reasoning ({tag}) and does not say how it ends: an "
                "answer of the teacher without any is learnt as reasoning"
            )
        return "", opened

    def _note(self, record: Record, answer: str) -> None:
        """Say once what of answers is not what it seems to be."""
        pattern = self._special_pattern  # read once: another thread may have found one meanwhile
        if pattern is not None and (found := pattern.search(answer)):
            self._special_pattern = None  # once is enough
            self._warn(
                f"an answer of the teacher holds {found[0]!r}: it is read as text, not as the special token"
            )
        if record.shape == "messages" and any(record.messages[-1].extra.get(name) for name in REASONING):
            self._warn(
                "the reasoning of answers (reasoning_content, thinking) is left out: a student learns their text"
            )

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)


def end_of_turn(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate | None) -> int:
    """The token that ends an answer: the one that the template writes behind it, or eos without a template.

    Raises ConfigError for a template that writes none, or something that is no single token.
    """
    return _end_id(tokenizer, None if template is None else _finder(tokenizer, template))


def end_tokens(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate | None) -> tuple[int, ...]:
    """What ends a student's answer: `end_of_turn`, then the end of a document where that is another token."""
    end = end_of_turn(tokenizer, template)
    return (end,) if tokenizer.eos_token_id in (end, None) else (end, int(tokenizer.eos_token_id))


def own_template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
    """The template that a tokenizer brings along, as a store's own does; None without one."""
    return load_template(tokenizer, None) if has_template(tokenizer) else None


class _Row(NamedTuple):
    """A row on its way to tokens."""

    field: str  # of its prompt
    answer_field: str
    messages: list[dict[str, Any]]  # before the answer; empty for plain text
    tools: list[Any] | None
    asked: str  # the prompt's text
    answer: str
    reasons: bool = False  # the answer begins with a reasoning of its own


def _prompt_and_answer(record: Record) -> tuple[Sequence[Message], str, str]:
    """The turns before the answer, the answer's text and its field. Raises MalformedError for a row without either."""
    match record.shape:
        case "text":
            raise MalformedError("", "is plain text: it has no prompt and no answer of a teacher")
        case "prompt":
            return (Message("user", record.prompt, {}),), record.answer, record.names[1]
        case "teacher":
            turns, answer, field = record.messages, record.answer, record.names[1]
        case _:
            *before, last = record.messages
            at = f"[{len(before)}]"
            if last.role != "assistant":
                raise MalformedError(
                    f"{at}.role", f"is {last.role!r}: the last turn must be the teacher's answer"
                )
            if last.extra.get("tool_calls"):
                raise MalformedError(f"{at}.tool_calls", "an answer is its text: calls have no place in it")
            if not before:
                raise MalformedError("", "begins with its last answer: there is no prompt")
            field = f"{record.names[0]}{at}.content"
            turns, answer = tuple(before), check_text(last.content, f"{at}.content")
    if turns[-1].role not in ("user", "tool"):
        why = f"is {turns[-1].role!r}: a prompt ends with what is to be answered, a turn of the user or of a tool"
        raise MalformedError(f"[{len(turns) - 1}].role", why)
    return turns, answer, field


def _refused(record: Record, error: MalformedError) -> Refused:
    """The error's path within the conversation as one in the row."""
    path = re.match(r"\[\d+\]", error.field)
    if path is not None and record.shape != "prompt":
        return Refused("malformed", f"{record.names[0]}{error.field}", error.reason)
    return Refused("malformed", record.names[0] if path else error.field or record.names[0], error.reason)


def _finder(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> SpanFinder:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return SpanFinder(template, frozenset(token.content for token in added))


def _end_id(tokenizer: PreTrainedTokenizerFast, finder: SpanFinder | None) -> int:
    if finder is None:
        return int(tokenizer.eos_token_id)
    text = (finder.end_of_turn or "").strip()
    # Phi-3.5 writes the end of the document behind that of the turn
    text = text.removesuffix(str(tokenizer.eos_token)).strip() or text
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    if len(ids) != 1:
        known = f"writes {text!r} behind an answer, which is {len(ids)} tokens" if text else "writes none"
        raise ConfigError(
            f"{finder.template.origin}: no token ends an answer",
            f"a student's answer is over at one token, and the template {known}",
            "end the assistant's turns with one special token of the tokenizer, in a .jinja file for data.chat_template",
        )
    return int(ids[0])
