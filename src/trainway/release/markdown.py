"""Values in Markdown, so that they show as they are and nothing in them is obeyed."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 300

_MARKS = re.compile(r"([\\`*_\[\]|~$])")
"""What means something within a line; a value never begins one."""


def plain(value: object) -> str:
    """A value as text of one line: no HTML, no Markdown, no link of it is alive."""
    text = "" if value is None else str(value)
    text = text.encode("utf-8", "replace").decode()  # lone surrogates have no UTF-8
    text = "".join(char if char.isprintable() else " " for char in text)
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = text[: LONGEST - 1] + "…"
    text = _MARKS.sub(r"\\\1", text)
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("@", "&#64;"), ("://", "&#58;//")):
        text = text.replace(char, entity)
    # what looks like an address is made a link by itself
    return re.sub(r"(?i)\bwww\.", "www&#46;", text)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of values; `head` is ours."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
