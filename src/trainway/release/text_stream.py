"""Text from tokens as they come: no half characters, and nothing of a text that ends the answer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what bytes that are no whole character yet are decoded to


class TextStream:
    """Turns tokens into pieces of text whose sum is the text of all tokens, cut before the first of `stop`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._before = self._shown = (
            0  # the tokens that decoding begins with, and those that are text already
        )
        self._held = ""
        self.stopped = False
        """A text of `stop` has come; nothing more does."""

    def push(self, token: int) -> str:
        """The text that is certain with one more token; often empty."""
        self._ids.append(token)
        # a tokenizer may write a token otherwise at the beginning: the ones before it go along
        known, text = self._decode(self._shown), self._decode(len(self._ids))
        if len(text) <= len(known) or text.endswith(_HALF):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return self._released(text[len(known) :])

    def flush(self) -> str:
        """What is left at the end, half characters too."""
        rest = self._decode(len(self._ids))[len(self._decode(self._shown)) :]
        self._shown = len(self._ids)
        text = self._released(rest)
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _decode(self, end: int) -> str:
        ids = self._ids[self._before : end]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _released(self, new: str) -> str:
        """What of the held and the new text cannot be the beginning of a text of `stop`."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0
    )
