"""Where each message's text stands in a rendered conversation, found by rendering it once more with marks in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from trainway.data.chat_template import REASONING, ChatTemplate, Messages
from trainway.data.rows import MalformedError

THINK_OPENERS = ("<think>", "<seed:think>", "[THINK]", "<|START_THINKING|>", "<|channel|>", "<|channel>")
"""What opens reasoning. A header that ends in one is cut before it: the model says it as well."""
THINK_CLOSERS = ("</think>", "</seed:think>", "[/THINK]", "<|END_THINKING|>", "<|message|>", "<channel|>")
_LEADING_THINK = re.compile(r"\s*(?:<think>\s*)?")

_BEGIN, _END, _REASON_BEGIN, _REASON_END = range(4)
_KINDS = 4
_RANGE = 32
# Noncharacters come first: no text has them. Then private use, for text that has them all the same.
_BASES = (0xFDD0, *range(0xE000, 0xF8E0, _RANGE))


class Regions(NamedTuple):
    """Of each message the first and the last character of its texts in the rendered one, -1 where it has none.

    before: where the text of the messages before it ends; after: where that of the messages after it begins.
    """

    text: str
    first: list[int]
    last: list[int]
    before: list[int]
    after: list[int]
    reasoning_left_out: bool


class Renderer:
    """Renders conversations, plain or with marks, in the form of content that the template reads."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.in_parts = self._wants_parts()

    def render(self, messages: Messages, tools: list[Any] | None, *, prompt: bool = False) -> str:
        """As ChatTemplate.render."""
        return self.template.render(self.shaped(messages), tools, prompt=prompt)

    def shaped(self, messages: Messages) -> Messages:
        """The messages with their content as the template reads it: text, or a list with a part of text."""
        if not self.in_parts:
            return messages
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]

    def locate(
        self, messages: Messages, tools: list[Any] | None, text: str, *, prompt: bool = False
    ) -> Regions | None:
        """The regions of the messages in `text`, their plain rendering; None where marks would change the rendering.

        Raises MalformedError, with a path such as `[1].content`, when the template drops the text of a message.
        """
        base = _unused_base(text)
        for around in (True, False):
            marked = _with_marks(messages, base, around=around)
            try:
                found = self.render(marked, tools, prompt=prompt)
            except MalformedError:
                continue
            plain, marks = _read_marks(found, base)
            if plain == text:
                return _regions(messages, text, marks, around=around)
        return None

    def dropped_calls(self, messages: Messages, tools: list[Any] | None) -> int | None:
        """The index of an assistant turn whose tool calls do not reach the rendered text, or None."""
        callers = [
            at for at, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("tool_calls")
        ]
        if not callers:
            return None
        renamed = [dict(turn) for turn in messages]
        for at in callers:
            renamed[at]["tool_calls"] = [
                _renamed(call, f"trainwaycall{at}x") for call in messages[at]["tool_calls"]
            ]
        try:
            text = self.render(renamed, tools)
        except MalformedError:
            return None  # the template knows the names
        return next((at for at in callers if f"trainwaycall{at}x" not in text), None)

    def _wants_parts(self) -> bool:
        probe = [{"role": "user", "content": "Qprobe"}, {"role": "assistant", "content": "Aprobe"}]
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in probe]
        try:
            text = self.template.render(probe)
        except MalformedError:
            text = ""
        if "Qprobe" in text and "Aprobe" in text:
            return False
        try:
            text = self.template.render(parts)
        except MalformedError:
            return False
        return "Qprobe" in text and "Aprobe" in text and "{" not in text


def _unused_base(text: str) -> int:
    if text.isascii():
        return _BASES[0]
    for base in _BASES:
        if not re.search(f"[{chr(base)}-{chr(base + _RANGE - 1)}]", text):
            return base
    raise MalformedError("", "holds characters of every range for private use")


def _mark(base: int, index: int, kind: int) -> str:
    digits = f"{index * _KINDS + kind:x}"
    return chr(base) + "".join([chr(base + 2 + int(digit, 16)) for digit in digits]) + chr(base + 1)


def _with_marks(messages: Messages, base: int, *, around: bool) -> Messages:
    """The messages with marks inside the white space at both ends of their texts, where trimming leaves them.

    around=False: those of texts that are not the assistant's stand in their middle, for templates that look at how
    such a text begins or ends.
    """
    result = []
    for index, turn in enumerate(messages):
        copy = dict(turn)
        begin, end = _mark(base, index, _BEGIN), _mark(base, index, _END)
        content = turn["content"]
        if content.strip():
            lead = len(content) - len(content.lstrip())
            tail = len(content.rstrip())
            if turn["role"] == "assistant":
                # behind an opening <think>, which a template that takes the reasoning out would drop with the mark
                if (skipped := _LEADING_THINK.match(content)) and skipped.end() < tail:
                    lead = skipped.end()
            elif not around:
                lead = tail = (lead + tail) // 2
            copy["content"] = content[:lead] + begin + content[lead:tail] + end + content[tail:]
        if turn["role"] == "assistant":
            for name in REASONING:
                value = turn.get(name)
                if isinstance(value, str) and value.strip():
                    lead, tail = len(value) - len(value.lstrip()), len(value.rstrip())
                    first, last = _mark(base, index, _REASON_BEGIN), _mark(base, index, _REASON_END)
                    copy[name] = value[:lead] + first + value[lead:tail] + last + value[tail:]
        result.append(copy)
    return result


def _read_marks(text: str, base: int) -> tuple[str, list[tuple[int, int, int]]]:
    """The text without marks, and (index of the message, kind, place in the text without marks) of each, in order."""
    digits = f"{chr(base + 2)}-{chr(base + 17)}"
    pieces = re.split(f"{chr(base)}([{digits}]+){chr(base + 1)}", text)
    marks = []
    place = len(pieces[0])
    for at in range(1, len(pieces), 2):
        number = int("".join([f"{ord(char) - base - 2:x}" for char in pieces[at]]), 16)
        marks.append((*divmod(number, _KINDS), place))
        place += len(pieces[at + 1])
    return "".join(pieces[::2]), marks


def _regions(
    messages: Messages, text: str, marks: Sequence[tuple[int, int, int]], *, around: bool
) -> Regions | None:
    first, last = [-1] * len(messages), [-1] * len(messages)
    seen: list[set[int]] = [set() for _ in messages]
    for index, kind, place in marks:
        seen[index].add(kind)
        if first[index] < 0:
            first[index] = place
        last[index] = place
    left_out = False
    for index, turn in enumerate(messages):
        _check_arrived(turn, index, seen[index], around=around)
        if index == len(messages) - 1 and turn["role"] == "assistant":
            named = any(isinstance(turn.get(name), str) and turn[name].strip() for name in REASONING)
            in_content = bool(turn["content"].strip()) and _BEGIN not in seen[index]
            left_out = (named and _REASON_BEGIN not in seen[index]) or in_content
        if not around and turn["role"] != "assistant" and first[index] >= 0:
            content = turn["content"]
            lead, tail = len(content) - len(content.lstrip()), len(content.rstrip())
            middle = (lead + tail) // 2
            begin, end = first[index] - (middle - lead), last[index] + (tail - middle)
            if text[begin:end] != content[lead:tail]:
                return None
            first[index], last[index] = begin, end
    order = sorted((index for index in range(len(messages)) if first[index] >= 0), key=first.__getitem__)
    if any(last[one] > first[other] for one, other in pairwise(order)):
        return None  # a text that is written twice: whose is what stands between?
    answers = [index for index in order if messages[index]["role"] == "assistant"]
    if answers != sorted(answers):
        return None
    return Regions(text, first, last, *_neighbours(order, first, last, len(text)), left_out)


def _neighbours(
    order: Sequence[int], first: list[int], last: list[int], end: int
) -> tuple[list[int], list[int]]:
    """Of each message where the text before it ends, and where the text after it begins."""
    before, after = [0] * len(first), [end] * len(first)
    for one, other in pairwise(order):
        before[other], after[one] = last[one], first[other]
    for index in range(1, len(first)):  # a message without text stands between those around it
        if first[index] < 0:
            before[index] = last[index - 1] if first[index - 1] >= 0 else before[index - 1]
    for index in range(len(first) - 2, -1, -1):
        if first[index] < 0:
            after[index] = first[index + 1] if first[index + 1] >= 0 else after[index + 1]
    return before, after


def _check_arrived(turn: dict[str, Any], index: int, seen: set[int], *, around: bool) -> None:
    if not turn["content"].strip():
        return
    missing = {_BEGIN, _END} - seen
    if not missing:
        return
    content = turn["content"]
    if missing == {_BEGIN} and turn["role"] == "assistant" and any(tag in content for tag in THINK_CLOSERS):
        return  # the reasoning of an earlier turn, which many templates leave out
    if not around and turn["role"] != "assistant":
        raise MalformedError(f"[{index}].content", "the chat template drops it, or a part of it")
    what = "it" if len(missing) == 2 else "the beginning of it" if _BEGIN in missing else "the end of it"
    raise MalformedError(f"[{index}].content", f"the chat template drops {what}")


def _renamed(call: object, name: str) -> object:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}
