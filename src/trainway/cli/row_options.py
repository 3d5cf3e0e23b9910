"""The options that the verbs on rows share: files, shapes, names of fields, limits."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainway.config.schema import DataConfig
    from trainway.data.records import FieldNames


class Shape(StrEnum):
    messages = "messages"
    prompt = "prompt"
    text = "text"
    teacher = "teacher"


class Kind(StrEnum):
    auto = "auto"
    messages = "messages"
    prompt = "prompt"
    text = "text"
    teacher = "teacher"


class MessagesKey(StrEnum):
    messages = "messages"
    conversations = "conversations"


class TreePaths(StrEnum):
    best = "best"
    all = "all"


class TrainOn(StrEnum):
    assistant = "assistant"
    completion = "completion"
    all = "all"


def _field(name: str, shape: str) -> Any:
    return typer.Option(f"--{name}-field", metavar="NAME", help=f"Field that holds the {shape}.")


Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="JSON lines, CSV or Parquet; directories and patterns too."),
]
OneFile = Annotated[str, typer.Argument(metavar="FILE", help="JSON lines, CSV or Parquet.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AnyKind = Annotated[Kind, typer.Option("--kind", help="Shape that every row must have; auto: any, mixed.")]
MessagesField = Annotated[str | None, _field("messages", "messages")]
PromptField = Annotated[str | None, _field("prompt", "prompt")]
CompletionField = Annotated[str | None, _field("completion", "completion")]
TextField = Annotated[str | None, _field("text", "text")]
ContentField = Annotated[str | None, _field("content", "messages before the teacher's response")]
TeacherField = Annotated[str | None, _field("teacher", "teacher's response")]
MaxMib = Annotated[
    int | None,
    typer.Option(
        "--max-document-mib", min=1, help="A longer row is malformed. [default: data.max_document_mib]"
    ),
]
QuarantineFile = Annotated[
    Path | None,
    typer.Option("--quarantine", metavar="OUT", help="Write bad rows, with reasons, to this file."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Dedup = Annotated[
    bool, typer.Option("--dedup", help="Find rows with the same content; the first one counts.")
]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="PATH", help="A bundle's directory or a tokenizer.json.")
]
ChatTemplateName = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="T",
        help="A .jinja file or a known name, such as chatml. [default: the tokenizer's own]",
    ),
]
TrainOnChoice = Annotated[
    TrainOn | None, typer.Option("--train-on", help="What counts as trained. [default: assistant]")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", min=1, help="Tokens that a row may have: train.seq_len."),
]


def row_config(max_mib: int | None, **settings: Any) -> DataConfig:
    """The settings of data that the options stand for; those that are None keep their defaults."""
    from trainway.config.schema import DataConfig

    settings["max_document_mib"] = max_mib
    return DataConfig(**{name: value for name, value in settings.items() if value is not None})


def require_tokenizer(tokenizer: Path | None, **options: object) -> None:
    """Raises ConfigError where an option is given that says nothing without a tokenizer."""
    from trainway.errors import ConfigError

    for name, value in options.items():
        if value is not None and tokenizer is None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} needs --tokenizer", "it is about tokens", "give both, or neither")


def field_names(
    messages: str | None,
    prompt: str | None,
    completion: str | None,
    text: str | None,
    content: str | None,
    teacher: str | None,
) -> FieldNames:
    from trainway.data.records import FieldNames

    return FieldNames().named(
        messages=messages,
        prompt=prompt,
        completion=completion,
        text=text,
        content=content,
        teacher_response=teacher,
    )
