"""Where the chat template comes from, and conversations rendered with it, as transformers renders them."""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from trainway.data.rows import MalformedError
from trainway.errors import ConfigError

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]
"""First character, and the one after the last."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names that a turn's reasoning goes by; a template is given it under each of them."""
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """A compiled template. `origin` says where it came from; `marked`: it has {% generation %} marks.

    Raises ConfigError when the template is no valid Jinja, with its line.
    """

    def __init__(self, text: str, origin: str, special_tokens: dict[str, Any]) -> None:
        self.text = text
        self.origin = origin
        self.marked = _MARK.search(text) is not None
        self._special_tokens = special_tokens
        self._compiled = _compile(text, origin)
        syntax = self._compiled.environment.parse(text)
        self._variables = jinja2.meta.find_undeclared_variables(syntax)
        # the tracker of marks is one for all threads; rendering holds the interpreter anyway
        self._lock = threading.Lock()

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for descriptions of tools."""
        return "tools" in self._variables

    def render(self, messages: Messages, tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation; prompt: with the header of the assistant's next turn.

        Raises MalformedError with the template's own reason where it refuses the conversation.
        """
        return self._guarded(lambda: self._compiled.render(**self._context(messages, tools, prompt)))

    def render_marked(self, messages: Messages, tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The text of a conversation and its {% generation %} parts. Raises MalformedError as `render` does."""
        blocks: list[str] = []
        spans: list[Span] = []

        def run() -> str:
            environment = self._compiled.environment
            with environment.activate_tracker(blocks, spans):  # type: ignore[attr-defined]
                for block in self._compiled.generate(**self._context(messages, tools, False)):
                    blocks.append(block)
            return "".join(blocks)

        return self._guarded(run), spans

    def _context(self, messages: Messages, tools: list[Any] | None, prompt: bool) -> dict[str, Any]:
        return {
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
        }

    def _guarded(self, run: Callable[[], str]) -> str:
        with self._lock:
            try:
                return run()
            except jinja2.TemplateError as error:
                raise MalformedError("", f"the chat template refuses it: {_reason(error)}") from None
            # what an expression of the template raises: a sum of a text and a null, say
            except (
                TypeError,
                ValueError,
                LookupError,
                AttributeError,
                ArithmeticError,
                RecursionError,
            ) as error:
                why = f"the chat template fails on it: {type(error).__name__}: {_reason(error)}"
                raise MalformedError("", why) from None


def load_template(tokenizer: PreTrainedTokenizerFast, setting: str | None) -> ChatTemplate:
    """The template that `data.chat_template` names: a .jinja file, a known name, or empty for the tokenizer's own.

    Raises ConfigError when there is none of that name, the file cannot be read, or it is no valid Jinja.
    """
    text, origin = _find(tokenizer, setting)
    return ChatTemplate(text, origin, dict(tokenizer.special_tokens_map))


def has_template(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer brings a chat template along."""
    return bool(tokenizer.chat_template)


def known_templates() -> list[str]:
    """The names of the templates that are shipped."""
    return sorted(
        path.name.removesuffix(".jinja") for path in _shipped().iterdir() if path.name.endswith(".jinja")
    )


def conversation(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns as templates want them: no field that is null, and reasoning under each of its usual names."""
    result = []
    for turn in turns:
        message = {key: value for key, value in turn.items() if value is not None}
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        result.append(message)
    return result


def _find(tokenizer: PreTrainedTokenizerFast, setting: str | None) -> tuple[str, str]:
    if not setting:
        return _own(tokenizer), "the tokenizer's chat template"
    if setting.endswith(".jinja"):
        path = Path(setting).expanduser()
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except OSError as error:
            raise ConfigError(
                f"data.chat_template: {path} cannot be read",
                str(error.strerror or error),
                f"correct the path, or name a known template: {', '.join(known_templates())}",
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data.chat_template: {path} is not valid UTF-8", str(error), "save it as UTF-8"
            ) from None
    known = known_templates()
    if setting not in known:
        near = difflib.get_close_matches(setting.lower(), known, n=2, cutoff=0.5)
        raise ConfigError(
            f"data.chat_template: no known template is named {setting!r}",
            f"known: {', '.join(known)}; a file's name ends with .jinja",
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else "name one of these, or a .jinja file",
        )
    return (_shipped() / f"{setting}.jinja").read_text(encoding="utf-8"), f"the known template {setting!r}"


def _own(tokenizer: PreTrainedTokenizerFast) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigError(
                "the tokenizer has several chat templates and none is its default",
                f"they are named {', '.join(map(repr, template))}",
                "save one as a .jinja file and set data.chat_template to it",
            )
        template = template["default"]
    if not template:
        raise ConfigError(
            "the tokenizer has no chat template",
            "conversations become text through one",
            f"set data.chat_template to a .jinja file or a known name: {', '.join(known_templates())}",
        )
    return cast(str, template)


def _shipped() -> Any:
    return resources.files("trainway.data") / "templates"


def _compile(text: str, origin: str) -> jinja2.Template:
    # past the cache: a tracker of our own, so that other users of the same template do not disturb it
    compile_template = getattr(
        chat_template_utils._compile_jinja_template,
        "__wrapped__",
        chat_template_utils._compile_jinja_template,
    )
    uncached = getattr(chat_template_utils, "_cached_compile_jinja_template", compile_template)
    try:
        return cast(jinja2.Template, uncached(text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{origin}, line {error.lineno}: not a valid template", str(error.message), "correct it"
        ) from None
    except jinja2.TemplateError as error:
        raise ConfigError(f"{origin}: not a valid template", str(error), "correct it") from None


def _reason(error: Exception) -> str:
    text = " ".join((getattr(error, "message", None) or str(error)).split())
    return text if len(text) <= 300 else text[:300] + "…"


def parse_tools(value: object) -> list[Any] | None:
    """A row's `tools`: a list of descriptions, or JSON text of one. Raises MalformedError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise MalformedError("tools", f"is text that is no JSON: {error}") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise MalformedError("tools", "is not a list of objects, nor JSON text of one")
    return value
