"""Records of every shape to tokens, with the mask of those that are trained, and the policy for rows too long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trainway.config.schema import DataConfig
from trainway.data.chat_fit import exchanges, least_left_out
from trainway.data.chat_spans import Rendered, SpanFinder
from trainway.data.chat_template import (
    ChatTemplate,
    Span,
    conversation,
    has_template,
    load_template,
    parse_tools,
)
from trainway.data.chat_tokens import adds_bos, backend_copy, template_warnings, trained_tokens
from trainway.data.records import Record
from trainway.data.rows import MalformedError
from trainway.data.tokenizer import text_encoder
from trainway.errors import ConfigError

VERSION = 1
"""Grows when the same row and settings give other tokens or another mask."""
UNLIMITED = 1 << 40
"""For max_tokens: nothing is too long."""


class Encoded(NamedTuple):
    """A row as tokens.

    tokens: [T] int32. trained: [T] bool, whether the token at that position is a target. left_out: turns left out to
    make it fit. cut: a text's end is missing.
    """

    tokens: np.ndarray
    trained: np.ndarray
    left_out: int = 0
    cut: bool = False


class Refused(NamedTuple):
    """Why a row has no tokens; `field` is a path such as `messages[1].content`, or empty for the whole row."""

    reason: Literal["malformed", "too long"]
    field: str
    why: str


class ChatEncoder:
    """Turns records into tokens by the tokenizer's chat template or the configured one.

    `template` is None where there is none: then a prompt and its completion are plain text with an end, and
    conversations cannot be encoded. `warnings` holds what the user should know; reading rows may add to it.

    Raises ConfigError for a template that cannot be had, and a tokenizer without an end-of-document token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, data: DataConfig, max_tokens: int) -> None:
        _check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._data = data
        self._max_tokens = max_tokens
        self._backend = backend_copy(tokenizer)
        self.template: ChatTemplate | None = None
        self.warnings: list[str] = []
        self._finder: SpanFinder | None = None
        if data.chat_template or has_template(tokenizer):
            self.template = load_template(tokenizer, data.chat_template)
            added = frozenset(token.content for token in self._backend.get_added_tokens_decoder().values())
            self._finder = SpanFinder(self.template, added)
            self.warnings += template_warnings(self._finder, self._backend)
            self._finder.warnings = self.warnings
        if tokenizer.pad_token_id is None:
            self.warnings.append(
                f"the tokenizer has no pad token: rows are padded with {tokenizer.eos_token!r}"
            )

    def identity(self) -> dict[str, Any]:
        """JSON values on which the output depends, beside the tokenizer and the records."""
        return {
            "version": VERSION,
            "template": self.template.text if self.template else None,
            "special_tokens": {
                name: str(token) for name, token in self._tokenizer.special_tokens_map.items()
            },
            "train_on": self._data.train_on,
            "over_length": self._data.over_length,
            "max_tokens": self._max_tokens,
        }

    def __call__(self, records: Sequence[Record]) -> list[Encoded | Refused]:
        """The tokens of each record, or why it has none, in the same order.

        Raises ConfigError at the first conversation where there is no chat template.
        """
        results: list[Encoded | Refused | None] = [None] * len(records)
        rendered: list[tuple[int, Rendered]] = []
        for index, record in enumerate(records):
            if record.shape == "text":
                results[index] = self._text(record)
            elif record.shape == "prompt" and self._finder is None:
                results[index] = self._plain_exchange(record)
            else:
                try:
                    rendered.append((index, self._render(record)))
                except MalformedError as error:
                    results[index] = _refused(record, error)
        encodings = self._backend.encode_batch([item.text for _, item in rendered], add_special_tokens=False)
        for (index, item), encoding in zip(rendered, encodings, strict=True):
            record = records[index]
            if len(encoding.ids) > self._max_tokens:
                results[index] = self._fitted(record, len(encoding.ids))
            else:
                results[index] = _encoded(record, encoding, item.spans)
        return [result for result in results if result is not None]

    def _render(self, record: Record, begin: int = 0, kept: int = 0) -> Rendered:
        """A conversation as text: the first `kept` turns, and those from `begin` on."""
        finder = self._need_finder()
        turns, tools = self._conversation(record)
        try:
            return finder.render(turns[:kept] + turns[begin:], tools, self._data.train_on)
        except MalformedError as error:
            if begin > kept and (path := re.match(r"\[(\d+)\](.*)", error.field)):
                index = int(path[1]) + (begin - kept if int(path[1]) >= kept else 0)
                raise MalformedError(f"[{index}]{path[2]}", error.reason) from None
            raise

    def _need_finder(self) -> SpanFinder:
        if self._finder is None:
            load_template(self._tokenizer, self._data.chat_template)  # says what is missing
            raise AssertionError("the tokenizer got its template after the encoder was made")
        return self._finder

    def _conversation(self, record: Record) -> tuple[list[dict[str, Any]], list[Any] | None]:
        return conversation([turn.as_dict() for turn in record.turns()]), parse_tools(record.row.get("tools"))

    def _fitted(self, record: Record, length: int) -> Encoded | Refused:
        """A conversation without its oldest exchanges, as few as makes it fit. A system prompt and the last exchange
        stay: what is cut off must never be the newest question."""
        field = record.names[0]
        if self._data.over_length != "truncate":
            return Refused("too long", field, f"{length:,} tokens, {self._max_tokens:,} are allowed")
        finder = self._need_finder()
        turns, tools = self._conversation(record)
        kept, starts = exchanges([turn["role"] for turn in turns])
        sizes: dict[int, int] = {}

        def fits(begin: int) -> bool:
            text = finder.renderer.render(turns[:kept] + turns[begin:], tools)
            sizes[begin] = len(self._backend.encode(text, add_special_tokens=False).ids)
            return sizes[begin] <= self._max_tokens

        try:
            begin = least_left_out(starts, fits)
            if begin is None:
                size = sizes[starts[-1]] if sizes else length
                what = "its last exchange alone has " if sizes else ""
                return Refused("too long", field, f"{what}{size:,} tokens, {self._max_tokens:,} are allowed")
            item = self._render(record, begin, kept)
        except MalformedError as error:
            return _refused(record, error)
        result = _encoded(record, self._backend.encode(item.text, add_special_tokens=False), item.spans)
        return result._replace(left_out=begin - kept) if isinstance(result, Encoded) else result

    @cached_property
    def _plain(self) -> Tokenizer:
        return text_encoder(self._tokenizer)

    @cached_property
    def _before(self) -> list[int]:
        return [self._tokenizer.bos_token_id] if adds_bos(self._tokenizer) else []

    def _text(self, record: Record) -> Encoded | Refused:
        self._look_for_special_tokens(record.text)
        ids = self._plain.encode(record.text, add_special_tokens=False).ids
        tokens = np.array([*self._before, *ids, self._tokenizer.eos_token_id], dtype=np.int32)
        cut = len(tokens) > self._max_tokens
        if cut and self._data.over_length != "truncate":
            why = f"{len(tokens):,} tokens, {self._max_tokens:,} are allowed"
            return Refused("too long", record.names[0], why)
        tokens = tokens[: self._max_tokens]
        return Encoded(tokens, np.ones(len(tokens), dtype=bool), cut=cut)

    def _plain_exchange(self, record: Record) -> Encoded | Refused:
        # apart, not as one text: so the model meets the prompt's tokens as it does when it is asked to go on
        prompt = [*self._before, *self._plain.encode(record.prompt, add_special_tokens=False).ids]
        answer = [
            *self._plain.encode(record.answer, add_special_tokens=False).ids,
            self._tokenizer.eos_token_id,
        ]
        tokens = np.array(prompt + answer, dtype=np.int32)
        if len(tokens) > self._max_tokens:
            why = f"{len(tokens):,} tokens, {self._max_tokens:,} are allowed"
            return Refused("too long", record.names[0], why)
        trained = np.ones(len(tokens), dtype=bool)
        if self._data.train_on != "all":
            trained[: len(prompt)] = False
        return Encoded(tokens, trained)

    def _look_for_special_tokens(self, text: str) -> None:
        pattern = self._special_pattern  # read once: another thread may have said it meanwhile
        if pattern is not None and (found := pattern.search(text)):
            self._special_pattern = None  # once is enough
            self.warnings.append(
                f"a text row holds {found[0]!r}: in rows of plain text it is read as text, not as the special token"
            )

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        tokens = [
            token.content for token in self._backend.get_added_tokens_decoder().values() if token.special
        ]
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the tokenizer has no fast version",
            "which characters a token stands for is known to those of the tokenizers library alone",
            "convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...) with its tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-document token",
            "texts end with one, and answers are trained to stop with one",
            'name one as "eos_token" in its tokenizer_config.json',
        )


def _encoded(record: Record, encoding: Any, spans: Sequence[Span]) -> Encoded | Refused:
    tokens = np.array(encoding.ids, dtype=np.int32)
    trained = trained_tokens(encoding.offsets, spans)
    if not trained.any():
        return Refused(
            "malformed", record.names[0], "no token of it is trained: the assistant says nothing in it"
        )
    return Encoded(tokens, trained)


def _refused(record: Record, error: MalformedError) -> Refused:
    """The error's path within the conversation as one in the row."""
    path = re.match(r"\[(\d+)\](.*)", error.field)
    if path is None:
        return Refused("malformed", error.field or record.names[0], error.reason)
    index, rest = int(path[1]), path[2]
    if record.shape == "prompt":
        return Refused("malformed", record.names[index], error.reason)
    if record.shape == "teacher" and index == len(record.messages):
        return Refused("malformed", record.names[1], error.reason)
    return Refused("malformed", f"{record.names[0]}[{index}]{rest}", error.reason)
