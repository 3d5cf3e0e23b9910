"""Which characters of a rendered conversation are trained: the template's own marks, or what the assistant says."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from trainway.data.chat_marks import THINK_CLOSERS, THINK_OPENERS, Regions, Renderer
from trainway.data.chat_template import ChatTemplate, Messages, Span
from trainway.data.rows import MalformedError

TrainOn = Literal["assistant", "completion", "all"]

_KEPT = 4096
"""Literal texts between turns, and patterns of roles, that are remembered."""
_PROBE = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})


class Rendered(NamedTuple):
    """A conversation as text, and its trained parts, in order."""

    text: str
    spans: list[Span]


class SpanFinder:
    """Renders conversations and finds what is trained in them; remembers the texts between turns that it has seen.

    Where a template has {% generation %} marks, they decide. Elsewhere the text is rendered once more with marks
    around each message; a turn of the assistant begins where the header ends that the template writes for the
    assistant's next turn, and ends with what it writes when the conversation stops there.

    special_tokens: the literal special tokens of the vocabulary. `prompt` is the header that asks for the assistant's
    turn, `end_of_turn` what ends that turn in a conversation's last place (None: not known), `exchange` a question and
    its answer as rendered.
    """

    def __init__(self, template: ChatTemplate, special_tokens: frozenset[str]) -> None:
        self.template = template
        self.renderer = Renderer(template)
        self.warnings: list[str] = []
        self._special = tuple(special_tokens)
        self._starts: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        # behind a turn with calls: its end with the header of the next turn, and the length of that header
        self._call_ends: dict[str, int] = {}
        self._patterns: set[tuple[Any, ...]] = set()
        self.exchange = ""
        self.prompt, self.end_of_turn = self._learn_exchange()

    def render(self, messages: Messages, tools: list[Any] | None, train_on: TrainOn) -> Rendered:
        """Raises MalformedError where the template refuses or drops a message, or what is trained cannot be told.

        Its field is empty, or the path of a message's field within the conversation: `[1].content`.
        """
        if tools and not self.template.takes_tools:
            raise MalformedError("tools", "the chat template has no place for it")
        self._check_calls(messages, tools)
        if train_on == "all":
            text = self.renderer.render(messages, tools)
            self._check_arrived(messages, tools, text)
            return Rendered(text, [(0, len(text))])
        if self.template.marked:
            text, spans = self.template.render_marked(self.renderer.shaped(messages), tools)
            regions = self._check_arrived(messages, tools, text, needed=train_on == "completion")
            if train_on == "completion":
                spans = self._last_marked(messages, spans, regions)
            return Rendered(text, [span for span in spans if span[0] < span[1]])
        text = self.renderer.render(messages, tools)
        regions = self.renderer.locate(messages, tools, text)
        self._note(regions)
        answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        if train_on == "completion":
            answers = answers[-1:]
        if regions is None:
            return Rendered(text, [self._by_prefix(messages, tools, text, index) for index in answers])
        return Rendered(text, [self._span(messages, tools, regions, index) for index in answers])

    def _learn_exchange(self) -> tuple[str, str | None]:
        """The header that asks for the assistant's turn, and what ends that turn in a conversation's last place."""
        probe = list(_PROBE)
        try:
            asked = self.renderer.render(probe[:1], None, prompt=True)
            plain = self.renderer.render(probe[:1], None)
            whole = self.renderer.render(probe, None)
            regions = self.renderer.locate(probe, None, whole)
        except MalformedError:
            return "", None
        self.exchange = whole
        prompt = asked[self._common(asked, plain) :]
        return _cut_thinking(prompt, 0), whole[regions.last[1] :] if regions else None

    def _check_calls(self, messages: Messages, tools: list[Any] | None) -> None:
        if not any("tool_calls" in turn for turn in messages):
            return
        pattern = ("calls", *_pattern(messages))
        if pattern not in self._patterns:
            dropped = self.renderer.dropped_calls(messages, tools)
            if dropped is not None:
                raise MalformedError(f"[{dropped}].tool_calls", "the chat template drops it")
            self._remember(pattern)

    def _check_arrived(
        self, messages: Messages, tools: list[Any] | None, text: str, *, needed: bool = False
    ) -> Regions | None:
        """Raises MalformedError when the text of a message is not in the rendered one; regions where they are needed.

        A pattern of roles is looked into once: then it is enough that each text is there.
        """
        pattern = _pattern(messages)
        there = all(_words(turn) in text for turn in messages)
        if there and pattern in self._patterns and not needed:
            return None
        regions = self.renderer.locate(messages, tools, text)
        if regions is None and not there:
            at = next(index for index, turn in enumerate(messages) if _words(turn) not in text)
            raise MalformedError(f"[{at}].content", "the chat template drops or changes it")
        self._note(regions)
        if there:
            self._remember(pattern)
        return regions

    def _note(self, regions: Regions | None) -> None:
        if regions is not None and regions.reasoning_left_out:
            warning = (
                f"{self.template.origin} leaves out the reasoning of turns (reasoning_content, thinking)"
            )
            if warning not in self.warnings:
                self.warnings.append(warning)

    def _remember(self, pattern: tuple[Any, ...]) -> None:
        if len(self._patterns) < _KEPT:
            self._patterns.add(pattern)

    def _last_marked(self, messages: Messages, spans: list[Span], regions: Regions | None) -> list[Span]:
        answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        if len(answers) < 2:
            return spans
        if regions is None:
            return spans[-1:]
        begin = regions.before[answers[-1]]
        return [span for span in spans if span[0] >= begin]

    def _span(self, messages: Messages, tools: list[Any] | None, regions: Regions, index: int) -> Span:
        text, begin, after = regions.text, regions.before[index], regions.after[index]
        first, last = regions.first[index], regions.last[index]
        lead = text[begin : first if first >= 0 else after]
        skipped = self._starts.get(lead) if first >= 0 else None
        if skipped is None:
            skipped = self._learn_start(messages, tools, index, lead)
            if first >= 0 and len(self._starts) < _KEPT:
                self._starts[lead] = skipped
        start = begin + skipped
        from_ = max(last, start)
        if index == len(messages) - 1:
            end = len(text)
        else:
            end = from_ + self._end(messages, tools, regions, index, start, text[from_:after])
        # white space behind the end of the turn is the template's, not the model's
        end = max(from_, start + len(text[start:end].rstrip()))
        if (
            self.end_of_turn is not None and not self.end_of_turn.strip()
        ):  # what stops the turn then is the token that begins the next one (GLM)
            end = self._past_special(text, end)
        return start, end

    def _learn_start(self, messages: Messages, tools: list[Any] | None, index: int, lead: str) -> int:
        """How much of `lead`, the text before the assistant's words, is the end of the turn before and a header."""
        if index > 0:
            asked = self._tail(messages[:index], tools, prompt=True)
            plain = self._tail(messages[:index], tools, prompt=False)
            if asked is not None:
                known = _shared(asked, asked if plain is None else plain)
                header = _cut_thinking(asked, known)
                unasked = asked == plain and self.prompt.strip() and self.prompt.rstrip() in lead
                if header.strip() and lead.startswith(header.rstrip()) and not unasked:
                    if self.prompt:
                        return _shared(lead, header)
                    # a template that never asks for a turn: what it writes before the words is its header
                    return len(_cut_thinking(lead, 0).rstrip())
        at = lead.find(self.prompt.rstrip())
        if self.prompt.strip() and at >= 0:
            return at + _shared(lead[at:], self.prompt)
        raise _unclear(index, "begins")

    def _end(
        self,
        messages: Messages,
        tools: list[Any] | None,
        regions: Regions,
        index: int,
        start: int,
        tail: str,
    ) -> int:
        """How much of `tail`, the text from the assistant's last words to the next message's, is the assistant's."""
        literal = (
            regions.last[index] >= 0
            and not messages[index].get("tool_calls")
            and self._next_marked(regions, index)
        )
        if literal and tail in self._ends:
            return self._ends[tail]
        if not literal:
            known = max((text for text in self._call_ends if tail.endswith(text)), key=len, default=None)
            if known is not None:
                return len(tail) - self._call_ends[known]
        end = self._learn_end(messages, tools, regions, index, start, tail)
        if literal and len(self._ends) < _KEPT:
            self._ends[tail] = end
        elif not literal and self._next_marked(regions, index) and len(self._call_ends) < 64:
            special = max((tail.rfind(token, 0, end) for token in self._special), default=-1)
            if special >= 0 and tail[end:].strip():
                self._call_ends[tail[special:]] = len(tail) - end
        return end

    def _next_marked(self, regions: Regions, index: int) -> bool:
        return index + 1 < len(regions.first) and regions.first[index + 1] >= 0

    def _learn_end(
        self,
        messages: Messages,
        tools: list[Any] | None,
        regions: Regions,
        index: int,
        start: int,
        tail: str,
    ) -> int:
        last = regions.last[index]
        header = "" if last >= start else regions.text[regions.before[index] : start]
        for prompt in (True, False):
            ended = self._tail(messages[: index + 1], tools, prompt=prompt)
            if ended is None or not ended.startswith(header):
                continue
            ended = ended[len(header) :]
            if prompt:
                asked = ended.rfind(self.prompt.rstrip()) if self.prompt.strip() else -1
                if asked < 0:
                    continue
                ended = ended[:asked]
            for said in _with_and_without_thinking(ended):
                inner = tail if said is ended else tail.lstrip()
                if inner.startswith(said.rstrip()) and (said.strip() or said is ended):
                    return len(tail) - len(inner) + _shared(inner, said)
        # the last turn ends otherwise (gpt-oss, Phi): the turn ends with the first special token
        special = [(at, -len(token)) for token in self._special if (at := tail.find(token)) >= 0]
        if self.end_of_turn and self.end_of_turn.strip() and special:
            at, size = min(special)
            if not tail[:at].strip():
                return at - size
        raise _unclear(index, "ends")

    def _tail(self, messages: Messages, tools: list[Any] | None, *, prompt: bool) -> str | None:
        """What the template writes behind the last words of a conversation; None where it refuses or hides that."""
        try:
            text = self.renderer.render(messages, tools, prompt=prompt)
            regions = self.renderer.locate(messages, tools, text, prompt=prompt)
        except MalformedError:
            return None
        return None if regions is None else text[max(0, *regions.last) :]

    def _common(self, one: str, other: str) -> int:
        """The length of the common beginning of two texts, never within a special token of the first."""
        size = _shared(one, other)
        if size == len(other) or size == len(one):
            return size
        for token in self._special:
            at = one.find(token, max(0, size - len(token) + 1), size + len(token) - 1)
            if 0 <= at < size:
                return at
        return size

    def _past_special(self, text: str, end: int) -> int:
        skipped = end + len(text[end:]) - len(text[end:].lstrip())
        size = max((len(token) for token in self._special if text.startswith(token, skipped)), default=0)
        return skipped + size if size else end

    def _by_prefix(self, messages: Messages, tools: list[Any] | None, text: str, index: int) -> Span:
        """The span of a turn by rendering the conversation up to it: for templates that marks would lead astray."""
        for at, turn in enumerate(messages):
            if turn["role"] != "assistant" and turn["content"].strip() not in text:
                raise MalformedError(f"[{at}].content", "the chat template drops or changes it")
        asked = self.renderer.render(messages[:index], tools, prompt=True)
        plain = self.renderer.render(messages[:index], tools)
        header = _cut_thinking(asked, _shared(asked, plain))
        start = _shared(text, header)
        whole = self.renderer.render(messages[: index + 1], tools)
        end = len(whole.rstrip())
        if not text.startswith(header.rstrip()) or not self.prompt.strip():
            raise _unclear(index, "begins")
        if not text.startswith(whole.rstrip()):
            raise _unclear(index, "ends")
        if messages[index]["content"].strip() not in text[start:end]:
            raise MalformedError(f"[{index}].content", "the chat template drops or changes it")
        return start, end


def _cut_thinking(header: str, known: int) -> str:
    """A header without the tag that opens reasoning, and what follows it; its first `known` characters stay."""
    found = [at for tag in THINK_OPENERS if (at := header.find(tag, known)) >= 0]
    return header[: min(found)] if found else header


def _with_and_without_thinking(text: str) -> list[str]:
    """A turn's text, and what follows its reasoning, which templates leave out of turns that are not the last."""
    rests = [rest.lstrip() for tag in THINK_CLOSERS if (rest := text.partition(tag)[2])]
    return [text, *rests]


def _pattern(messages: Messages) -> tuple[Any, ...]:
    return tuple(
        [
            (turn["role"], len(turn) > 2 and frozenset(turn), "</think>" in turn["content"])
            for turn in messages
        ]
    )


def _words(turn: dict[str, Any]) -> str:
    """What of a turn's content must be in the rendered text: not the reasoning of an earlier answer."""
    content: str = turn["content"]
    if turn["role"] == "assistant":
        for closer in THINK_CLOSERS:
            content = content.rpartition(closer)[2]
    return content.strip()


def _shared(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _unclear(index: int, verb: str) -> MalformedError:
    why = f"cannot tell where this turn {verb} in the text that the chat template makes"
    return MalformedError(
        f"[{index}].content", f"{why}; mark it with {{% generation %}} in a template of your own"
    )
