"""OpenAI's requests and answers: what of a request is understood, and what the answers look like."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainway.release.generate import Answer, Decoding, Speaker

_ROLES = ("system", "developer", "user", "assistant", "tool")
# what asks for nothing, so that leaving it out changes nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_ASIDE = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
"""Says who asks, and nothing about the answer."""
_READ = {
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stream",
    "stream_options",
}
_COMPLETION_TOKENS = 16  # of a completion that does not say how long; OpenAI's number
_MAX_STOPS = 16


class ApiError(Exception):
    """Why a request is not answered: an HTTP status, a sentence, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    kind: Literal["chat", "text"]
    prompts: tuple[tuple[int, ...], ...]
    decoding: Decoding
    stream: bool
    include_usage: bool


def read_request(kind: Literal["chat", "text"], body: object, speaker: Speaker, name: str) -> Asked:
    """Raises ApiError for what is malformed, and for what would be ignored; ConfigError where the template refuses."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    _refuse_unread(body)
    if body.get("model") != name:
        known = f"the model {body.get('model')!r:.200} is not served here; {name!r} is"
        raise ApiError(404, known, "model", "model_not_found")
    prompts = _conversation(body, speaker) if kind == "chat" else _texts(body, speaker)
    longest = max(map(len, prompts))
    room = speaker.context - longest
    if room <= 0:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens, the model takes {speaker.context}, the answer's included",
            "messages" if kind == "chat" else "prompt",
            "context_length_exceeded",
        )
    default = room if kind == "chat" else _COMPLETION_TOKENS
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    seed = _number(body, "seed", None, whole=True)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options is no object", "stream_options")
    decoding = Decoding(
        max_new_tokens=int(_number(body, limit, default, 1, whole=True) or 1),
        temperature=float(_number(body, "temperature", 1.0, 0.0, 2.0) or 0.0),
        top_p=float(_number(body, "top_p", 1.0, 1e-6, 1.0) or 1.0),
        top_k=max(0, int(_number(body, "top_k", 0, -1, whole=True) or 0)),
        # torch takes 64 bits
        seed=secrets.randbits(31) if seed is None else int(seed) % 2**63,
        stop=_stops(body.get("stop")),
    )
    return Asked(kind, prompts, decoding, _flag(body, "stream"), _flag(options, "include_usage"))


class Reply:
    """The answers to one request in OpenAI's words."""

    def __init__(self, asked: Asked, name: str) -> None:
        self._asked = asked
        self._name = name
        self._id = ("chatcmpl-" if asked.kind == "chat" else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [
            {**self._said(answer.text), "index": index, "logprobs": None, "finish_reason": answer.finish}
            for index, answer in enumerate(answers)
        ]
        return {**self._head(streamed=False), "choices": choices, "usage": _usage(answers)}

    def opening(self) -> dict[str, Any] | None:
        """The first event of a streamed turn, which says whose it is."""
        if self._asked.kind == "text":
            return None
        return self._event(0, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self._asked.kind == "chat" else {"text": text}
        return self._event(index, said, None)

    def ending(self, index: int, answer: Answer) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self._asked.kind == "chat" else {"text": ""}
        return self._event(index, said, answer.finish)

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {**self._head(streamed=True), "choices": [], "usage": _usage(answers)}

    def _event(self, index: int, said: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        return {**self._head(streamed=True), "choices": [choice]}

    def _said(self, text: str) -> dict[str, Any]:
        if self._asked.kind == "text":
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._asked.kind == "chat":
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}


def model_list(name: str, created: int, context: int) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [model_entry(name, created, context)]}


def model_entry(name: str, created: int, context: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "trainway",
        "max_model_len": context,
    }


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _refuse_unread(body: Mapping[str, Any]) -> None:
    for field, value in body.items():
        if field in _READ or field in _ASIDE or value is None:
            continue
        if field not in _NEUTRAL:
            raise ApiError(400, f"{field} is not known here", field, "unknown_parameter")
        if value not in _NEUTRAL[field]:
            raise ApiError(
                400, f"{field} is not supported by this server; vLLM's does", field, "unsupported_parameter"
            )


def _conversation(body: Mapping[str, Any], speaker: Speaker) -> tuple[tuple[int, ...], ...]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is no list of messages", "messages")
    return (tuple(speaker.chat([_message(index, value) for index, value in enumerate(messages)])),)


def _message(index: int, value: object) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise ApiError(400, f"{where} has no role that is one of {', '.join(_ROLES)}", where)
    content = value.get("content")
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ApiError(400, f"{where}.content holds a part that is no text", where)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content is no text", where)
    if value.get("tool_calls"):
        raise ApiError(400, f"{where}.tool_calls is not supported by this server; vLLM's does", where)
    extra = {"name": value["name"]} if isinstance(value.get("name"), str) else {}
    return {"role": value["role"], "content": content, **extra}


def _texts(body: Mapping[str, Any], speaker: Speaker) -> tuple[tuple[int, ...], ...]:
    prompt = body.get("prompt", "")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return tuple(_text(one, speaker) for one in (prompt if several else [prompt]))


def _text(prompt: object, speaker: Speaker) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(speaker.raw(prompt))
    words = speaker.model.get_input_embeddings().weight.shape[0]
    if isinstance(prompt, list) and prompt and all(type(one) is int and 0 <= one < words for one in prompt):
        return tuple(prompt)
    raise ApiError(400, "prompt is neither a text, nor a list of texts, nor one of tokens", "prompt")


def _number(
    body: Mapping[str, Any],
    field: str,
    default: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    whole: bool = False,
) -> float | None:
    value = body.get(field)
    if value is None:
        return default
    wrong = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
    if wrong or (low is not None and not value >= low) or (high is not None and not value <= high):
        kind = "a whole number" if whole else "a number"
        bounds = "".join(
            f" {word} {bound:g}" for word, bound in (("from", low), ("to", high)) if bound is not None
        )
        raise ApiError(400, f"{field} is not {kind}{bounds}", field)
    return value


def _flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{field} is neither true nor false", field)
    return bool(value)


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(stops, list)
        or len(stops) > _MAX_STOPS
        or not all(isinstance(one, str) and one for one in stops)
    ):
        raise ApiError(400, f"stop is neither a text nor a list of up to {_MAX_STOPS}", "stop")
    return tuple(stops)
