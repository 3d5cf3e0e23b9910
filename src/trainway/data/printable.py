"""Text from data made safe for a terminal: nothing in it is obeyed, and nothing hides."""

from __future__ import annotations

from unicodedata import category

_HARMLESS = "\n\t\u200c\u200d"
"""The last two are invisible, but hold emoji and the letters of many scripts together."""


def printable(text: str) -> str:
    """The text with everything a terminal would obey, or hide, written as an escape; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in _HARMLESS or category(char) == "Zs" else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
