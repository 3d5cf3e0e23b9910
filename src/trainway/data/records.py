"""The shapes of a training row (messages, prompt and completion, text, content and teacher's response), checked."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from trainway.data.formats import read_rows
from trainway.data.rows import BadRecord, BadRow, MalformedError, check_text, type_name

Shape = Literal["messages", "prompt", "text", "teacher"]
Kind = Literal["auto", "messages", "prompt", "text", "teacher"]
_Shapes = tuple[tuple[Shape, tuple[tuple[str, ...], ...]], ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
FROM_ROLES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Roles of ShareGPT's `from`, in our words."""


class Message(NamedTuple):
    """One turn. `extra` holds its further fields, such as `thinking`, `name` or `tool_calls`.

    A tuple, not a dataclass: validation makes one for every turn.
    """

    role: str
    content: str
    extra: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


class Record(NamedTuple):
    """A row that was checked.

    `messages`: the turns of a messages row, or those before the answer of a teacher row; empty in other shapes.
    `prompt` and `text` are empty in the shapes that have none; `answer` is the completion or the teacher's
    response. `row` is the row as it was read, further fields and all; `names` are its fields that make the shape.
    """

    shape: Shape
    row: dict[str, Any]
    names: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    answer: str = ""
    text: str = ""

    def turns(self) -> tuple[Message, ...]:
        """The conversation, answer included; of a text row there is none."""
        match self.shape:
            case "prompt":
                return Message("user", self.prompt, {}), Message("assistant", self.answer, {})
            case "teacher":
                return (*self.messages, Message("assistant", self.answer, {}))
            case _:
                return self.messages

    def texts(self) -> list[tuple[str, str]]:
        """(label, text) of everything that is trained on or read as context, in order."""
        if self.shape == "text":
            return [("text", self.text)]
        return [(turn.role, turn.content) for turn in self.turns()]

    def content_key(self) -> bytes:
        """What makes two rows duplicates: the same conversation or text, in whatever shape; other fields set aside."""
        if self.shape == "text":
            return self.text.encode("utf-8")
        turns = [[turn.role, turn.content, turn.extra] for turn in self.turns()]
        return json.dumps(turns, ensure_ascii=False, sort_keys=True).encode("utf-8")


@dataclass(frozen=True)
class FieldNames:
    """The fields that make a shape; of several names, the first that a row has counts."""

    messages: tuple[str, ...] = ("messages", "conversations")
    prompt: tuple[str, ...] = ("prompt", "input")
    completion: tuple[str, ...] = ("completion", "output")
    text: tuple[str, ...] = ("text",)
    content: tuple[str, ...] = ("content",)
    teacher_response: tuple[str, ...] = ("teacher_response",)

    def named(self, **names: str | None) -> Self:
        """A copy in which each field that is given has that one name."""
        return replace(self, **{field: (name,) for field, name in names.items() if name})

    @cached_property
    def harmless(self) -> set[str]:
        """Names that were met beside these, and are neither one of them nor like one."""
        return set()

    def lists(self) -> frozenset[str]:
        """The fields that hold lists of turns: in CSV, as JSON."""
        return frozenset(self.messages + self.content)


def parse_record(row: dict[str, Any], names: FieldNames | None = None, kind: Kind = "auto") -> Record:
    """Check one row. kind: the shape it must have; auto takes any, of which it must have the fields of one alone.

    Raises MalformedError with the path of the field, such as `messages[2].content`.
    """
    names = names or _NAMES
    shape, found = _shape(row, names, kind)
    match shape:
        case "messages":
            messages = _messages(row[found[0]], found[0])
            if not any(message.role == "assistant" for message in messages):
                raise MalformedError(found[0], "has no assistant turn: there is nothing to learn from it")
            return Record(shape, row, found, messages)
        case "teacher":
            messages = _messages(row[found[0]], found[0])
            return Record(shape, row, found, messages, answer=check_text(row[found[1]], found[1]))
        case "prompt":
            prompt, answer = check_text(row[found[0]], found[0]), check_text(row[found[1]], found[1])
            return Record(shape, row, found, prompt=prompt, answer=answer)
        case _:
            return Record(shape, row, found, text=check_text(row[found[0]], found[0]))


class Located(NamedTuple):
    """A record, where it stands, and its bytes in the file (None in Parquet)."""

    record: Record
    source: Path
    line: int
    raw: bytes | None


def read_records(
    path: Path, max_mib: int, *, names: FieldNames | None = None, kind: Kind = "auto"
) -> Iterator[Located | BadRow]:
    """Stream the checked rows of one file, and a BadRow for each that is none; see `formats.read_rows`."""
    names = names or _NAMES
    for row in read_rows(path, max_mib, json_columns=names.lists()):
        if isinstance(row, BadRow):
            yield row
            continue
        value, line, raw = row
        try:
            yield Located(parse_record(value, names, kind), path, line, raw)
        except MalformedError as bad:
            yield bad_row(value, path, line, raw, bad)


def bad_row(row: dict[str, Any], source: Path, line: int, raw: bytes | None, fault: MalformedError) -> BadRow:
    """A row that was read, and turned out to be no record; without bytes of its own, it is written as JSON."""
    data = json.dumps(row, ensure_ascii=False).encode("utf-8") if raw is None else raw
    return BadRow(BadRecord(source, line, fault.field, fault.reason), data, len(data))


def _shape(row: dict[str, Any], names: FieldNames, kind: Kind) -> tuple[Shape, tuple[str, ...]]:
    shapes = _shapes(names)
    for shape, fields in shapes:
        if kind not in ("auto", shape):
            continue
        found = tuple([_present(row, aliases) for aliases in fields])
        if "" not in found:
            if kind == "auto" and len(row) > len(found):
                _check_others(row, names, shapes, shape, found)
            if shape == "prompt" and kind == "auto" and found == ("input", "output") and "instruction" in row:
                why = "beside 'input' and 'output' there is 'instruction': say which field is the prompt"
                raise MalformedError("instruction", why)
            return shape, found
    raise _unknown(row, names, kind)


def _check_others(
    row: dict[str, Any], names: FieldNames, shapes: _Shapes, shape: Shape, found: tuple[str, ...]
) -> None:
    """Raises MalformedError for a second shape in a row, and for a field that looks like one of a shape, misspelt."""
    if len(row.keys() - names.harmless) == len(found):
        return
    for other, fields in shapes:
        if other != shape and all(_present(row, aliases) for aliases in fields):
            present = [_present(row, aliases) for aliases in fields]
            both = f"{' + '.join(found)} and {' + '.join(present)}"
            raise MalformedError(
                present[0], f"a second shape in one row: it has {both}; --kind says which counts"
            )
    for name, value in row.items():
        if name in found or value is None:
            continue
        if meant := _misspelt(name, shapes):
            raise MalformedError(
                name, f"looks like {meant!r}, misspelt; the row is read as {' + '.join(found)}"
            )
        if len(names.harmless) < 10_000 and not any(
            name in aliases for _, fields in shapes for aliases in fields
        ):
            names.harmless.add(name)


def _misspelt(name: str, shapes: _Shapes) -> str:
    """The field of a shape that a name is one letter away from, or two swapped; empty where there is none.

    Short names and `content` are left alone (test, context), and so is a name that only adds or lacks an s.
    """
    fields = [alias for _, groups in shapes for aliases in groups for alias in aliases]
    lower = name.lower()
    if name in fields or lower == "content":
        return ""
    for field in fields:
        if len(field) < 6 or field == "content" or lower in (field + "s", field.removesuffix("s")):
            continue
        if lower == field or _is_one_slip(lower, field):
            return field
    return ""


def _is_one_slip(one: str, other: str) -> bool:
    """Whether two words differ by a letter too many, missing or wrong, or by two neighbours swapped."""
    short, long = sorted((one, other), key=len)
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(long) == len(short) + 1:
        return short[at:] == long[at + 1 :]
    swapped = short[at + 1 : at + 2] + short[at : at + 1] + short[at + 2 :]
    return len(long) == len(short) and (short[at + 1 :] == long[at + 1 :] or swapped == long[at:])


def _shapes(names: FieldNames) -> _Shapes:
    """The shapes and their fields, the most telling first."""
    return (
        ("messages", (names.messages,)),
        ("teacher", (names.content, names.teacher_response)),
        ("prompt", (names.prompt, names.completion)),
        ("text", (names.text,)),
    )


def _present(row: dict[str, Any], aliases: tuple[str, ...]) -> str:
    for name in aliases:
        # null is absent: a table of several shapes has nulls where a row is of another one
        if row.get(name) is not None:
            return name
    return ""


def _unknown(row: dict[str, Any], names: FieldNames, kind: Kind) -> MalformedError:
    shapes = [(shape, fields) for shape, fields in _shapes(names) if kind in ("auto", shape)]
    for _, fields in shapes:
        missing = [aliases for aliases in fields if not _present(row, aliases)]
        null = [name for aliases in missing for name in aliases if name in row]
        if null:
            return MalformedError(null[0], "is null")
        if len(missing) < len(fields) or kind != "auto":
            near = difflib.get_close_matches(missing[0][0], [name for name in row if name], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return MalformedError(missing[0][0], f"missing; the row has {_listed(row)}{hint}")
    known = ", ".join(" + ".join("|".join(aliases) for aliases in fields) for _, fields in shapes)
    return MalformedError("", f"of no known shape: it has {_listed(row)}; known shapes: {known}")


def _listed(row: dict[str, Any]) -> str:
    names = [repr(name if len(name) <= 40 else name[:40] + "…") for name in list(row)[:10]]
    return ", ".join(names) + (f" and {len(row) - 10} more" if len(row) > 10 else "") or "no field"


def _messages(value: object, field: str) -> tuple[Message, ...]:
    if type(value) is not list:
        raise MalformedError(field, f"is {type_name(value)}, not a list of messages")
    if not value:
        raise MalformedError(field, "is an empty list")
    return tuple([_message(item, field, index) for index, item in enumerate(value)])


def _message(item: object, field: str, index: int) -> Message:
    if type(item) is not dict:
        reason = f"is {type_name(item)}, not an object with 'role' and 'content'"
        raise MalformedError(f"{field}[{index}]", reason)
    role = item.get("role")
    if role is None and "from" in item and "role" not in item:
        return _sharegpt_message(item, f"{field}[{index}]")
    if type(role) is not str or role not in _ROLES:
        raise _bad_role(item, f"{field}[{index}]", "role", ROLES)
    content = item.get("content")
    extra = _NOTHING
    if len(item) > 2 or "content" not in item:
        extra = {key: v for key, v in item.items() if key not in ("role", "content") and v is not None}
        if extra and role == "assistant":
            _check_said(extra, f"{field}[{index}]")
    if (
        type(content) is not str
        or not content
        or content.isspace()
        or "\0" in content
        or not content.isascii()
    ):
        content = _content(item, content, extra, f"{field}[{index}]")
    return Message(role, content, extra)


def _check_said(extra: dict[str, Any], path: str) -> None:
    """Raises MalformedError for reasoning that is no text and calls that are no list of objects: they are learnt too."""
    for name in ("reasoning_content", "thinking"):
        value = extra.get(name, "")
        if type(value) is not str:
            raise MalformedError(f"{path}.{name}", f"is {type_name(value)}, not a string")
        if "\0" in value:
            raise MalformedError(
                f"{path}.{name}", f"holds a NUL character at character {value.index(chr(0))}"
            )
    calls = extra.get("tool_calls", [])
    if type(calls) is not list:
        raise MalformedError(f"{path}.tool_calls", f"is {type_name(calls)}, not a list of calls")
    for index, call in enumerate(calls):
        if type(call) is not dict:
            raise MalformedError(f"{path}.tool_calls[{index}]", f"is {type_name(call)}, not an object")


def _sharegpt_message(item: dict[str, Any], path: str) -> Message:
    role = item["from"]
    if not isinstance(role, str) or role not in FROM_ROLES:
        raise _bad_role(item, path, "from", tuple(FROM_ROLES))
    extra = {key: v for key, v in item.items() if key not in ("from", "value") and v is not None}
    if "value" not in item:
        raise MalformedError(f"{path}.value", f"missing; the message has {_listed(item)}")
    return Message(FROM_ROLES[role], check_text(item["value"], f"{path}.value"), extra)


def _content(item: dict[str, Any], content: object, extra: dict[str, Any], path: str) -> str:
    """The text of a turn whose content is not plainly fine."""
    if not content and item["role"] == "assistant" and extra.get("tool_calls"):
        return ""  # a turn that calls tools may say nothing
    if "content" not in item:
        raise MalformedError(f"{path}.content", f"missing; the message has {_listed(item)}")
    if isinstance(content, list):
        parts = [_part(part, f"{path}.content[{index}]") for index, part in enumerate(content)]
        return check_text("".join(parts), f"{path}.content")
    return check_text(content, f"{path}.content")


def _part(part: object, path: str) -> str:
    if not isinstance(part, dict):
        raise MalformedError(path, f"is {type_name(part)}, not an object with 'type' and 'text'")
    if part.get("type") != "text":
        raise MalformedError(f"{path}.type", f"is {_shown(part.get('type'))}; only parts of 'text' are read")
    text = part.get("text")
    if not isinstance(text, str):
        raise MalformedError(f"{path}.text", f"is {type_name(text)}, not a string")
    return text


def _bad_role(item: dict[str, Any], path: str, key: str, known: Sequence[str]) -> MalformedError:
    path = f"{path}.{key}"
    if key not in item:
        return MalformedError(path, f"missing; the message has {_listed(item)}")
    role = item[key]
    if not isinstance(role, str):
        return MalformedError(path, f"is {type_name(role)}, not a string")
    return MalformedError(path, f"is {_shown(role)}; known roles: {', '.join(known)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


_NAMES = FieldNames()
_ROLES = frozenset(ROLES)
_NOTHING: dict[str, Any] = {}
