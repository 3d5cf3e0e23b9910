"""A conversation with a model: in a terminal as it is written, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from trainway.data.printable import printable
from trainway.errors import ConfigError
from trainway.release.generate import Answer, Decoding, Dtype, Speaker, load_speaker

_HELP = "/reset forgets what was said, /quit ends"


def chat(
    model: str | Path,
    decoding: Decoding,
    *,
    system: str | None = None,
    dtype: Dtype = "float32",
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
) -> None:
    """Answer each of `lines` (standard input, if none are given) with all that was said before it, to `out`.

    Empty lines are passed over. `/reset` forgets the conversation, `/quit` ends it.

    Raises:
        ConfigError: no model there, one without a chat template, or a conversation that became too long.
    """
    out = out or sys.stdout
    speaker = load_speaker(model, dtype)
    if not speaker.can_chat:
        raise ConfigError(
            f"{model} has no chat template",
            "it was trained to continue text, not to answer",
            f"use `trainway generate {model} PROMPT`",
        )
    person = lines is None and sys.stdin.isatty()
    if person:
        print(_HELP, file=sys.stderr)
    first = [{"role": "system", "content": system}] if system else []
    said: list[dict[str, Any]] = list(first)
    for line in _typed() if person else (sys.stdin if lines is None else lines):
        text = line.rstrip("\r\n")
        if text.strip() == "/quit":
            return
        if text.strip() == "/reset":
            said = list(first)
        elif text.strip():
            said.append({"role": "user", "content": text})
            said.append({"role": "assistant", "content": _answer(speaker, said, decoding, out)})


def _answer(speaker: Speaker, said: list[dict[str, Any]], decoding: Decoding, out: TextIO) -> str:
    shown = printable if out.isatty() else str  # what a model says is not to steer a terminal
    stream = speaker.stream(speaker.chat(said), decoding)
    answer = ""
    try:
        for piece in stream:
            if isinstance(piece, Answer):
                answer = piece.text
                continue
            answer += piece
            out.write(shown(piece))
            out.flush()
    except KeyboardInterrupt:  # enough of this answer
        if not out.isatty():
            raise
    finally:
        stream.close()
        out.write("\n")
        out.flush()
    return answer


def _typed() -> Iterator[str]:
    """Lines of a person, with the history and keys of readline where Python has it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` uses it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
