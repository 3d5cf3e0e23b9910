"""What counts as a word where texts are compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_LATIN = re.compile("[a-z0-9]+")
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts that are written without spaces, as the names of their characters begin."""


def word_splitter(reference: str) -> Callable[[str], list[str]]:
    """How texts are split into words where they are compared with `reference`, which alone decides.

    Where at least half of its words consist of a-z and 0-9: runs of those in lower case, as Google's rouge_score does
    without its stemmer, whatever the others are. Else, since that would leave next to nothing of it: runs of letters,
    digits and marks, and in scripts without spaces each character. Without any letter or digit: each character.
    """
    words = _words(reference)
    if not words:
        return _characters
    latin = sum(_LATIN.fullmatch(word) is not None for word in words)
    return _latin_words if 2 * latin >= len(words) else _words


def _latin_words(text: str) -> list[str]:
    return _LATIN.findall(text.lower())


def _words(text: str) -> list[str]:
    return text.lower().translate(_SPACED).split()


def _characters(text: str) -> list[str]:
    return [char for char in text if not char.isspace()]


class _Spaced(dict[int, str]):
    """Characters as they stand between words: a letter as it is, one of an unspaced script in spaces, others a space."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if not (char.isalnum() or unicodedata.category(char).startswith("M")):
            text = " "
        elif unicodedata.name(char, "").startswith(_UNSPACED):
            text = f" {char} "
        else:
            text = char
        self[code] = text
        return text


_SPACED = _Spaced()
