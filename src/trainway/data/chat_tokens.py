"""From characters to tokens: which tokens a span of the text covers, and what a tokenizer lacks for a template."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trainway.data.chat_spans import SpanFinder
from trainway.data.chat_template import Span
from trainway.data.tokenizer import BOS

_CONTROL = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|</?[a-z]+(?:_[a-z]+)+>")
"""What is meant to be one token wherever a template writes it."""


def trained_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """[T] bool: the tokens from the one that holds a span's first character to the last one that holds its last.

    As transformers' char_to_token finds them, but for a character of several tokens at the end of a span: all of
    them count, and a span that ends in characters without a token ends there.
    """
    trained = np.zeros(len(offsets), dtype=bool)
    for begin, end in spans:
        first = bisect_right(offsets, begin, key=itemgetter(1))
        trained[first : bisect_left(offsets, end, lo=first, key=itemgetter(0))] = True
    return trained


def backend_copy(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer's backend for rendered conversations: special tokens are read, nothing is padded or cut."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = False
    backend.no_padding()
    backend.no_truncation()
    return backend


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether plain texts begin with the bos token: the tokenizer puts it there, or is one of ours."""
    if tokenizer.bos_token_id is None:
        return False
    begin = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]
    return bool(begin == [tokenizer.bos_token_id] or tokenizer.bos_token == BOS)


def template_warnings(finder: SpanFinder, backend: Tokenizer) -> list[str]:
    """What of the template's control texts is no single token, and a turn of the assistant that never ends."""
    warnings = []
    origin = finder.template.origin
    for text in dict.fromkeys(_CONTROL.findall(finder.exchange)):
        if (count := len(backend.encode(text, add_special_tokens=False).ids)) > 1:
            warnings.append(
                f"{origin} writes {text!r}, which is no single token of this tokenizer: it becomes {count}"
            )
    if finder.end_of_turn is None:
        return warnings
    if not (end := finder.end_of_turn.strip()):
        warnings.append(
            f"{origin} writes nothing behind the last answer: the model will not learn to stop there"
        )
    elif not _CONTROL.search(end) and not any(
        token.content in end for token in backend.get_added_tokens_decoder().values()
    ):
        count = len(backend.encode(end, add_special_tokens=False).ids)
        warnings.append(
            f"{origin} ends answers with {end!r}, which holds no special token: it becomes {count}"
        )
    return warnings
