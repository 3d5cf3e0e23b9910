"""`trainway generate`, `chat` and `export`: what a trained model says, and leaves as."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from trainway.cli.terminal import emit, emit_json, is_terminal

Model = Annotated[Path, typer.Argument(help="A run, a checkpoint, or a model directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this probability together.")
]
TopK = Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest tokens; 0: all.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text before which the answer ends; may stand again.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16"], typer.Option("--dtype", help="What the model computes in.")
]

Part = Literal["model", "discriminator"]
MergeInto = Literal["published", "dequantized"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)
    app.command("chat")(chat)
    app.command("export")(export)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue, or a user's turn with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation, in tokens.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Stop = None,
    seed: Seed = 42,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Ask by the chat template, or continue the text as it is.")
    ] = False,
    dtype: DtypeOption = "float32",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, or answer it.

    Example: trainway generate runs/my-run "def main(" --temperature 0.8 --top-p 0.95
    """
    from trainway.data.printable import printable
    from trainway.release.generate import Decoding, generate_answer

    decoding = Decoding(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    answer = generate_answer(model, prompt, decoding, chat=chat, dtype=dtype)
    if as_json:
        emit_json({"prompt": prompt, **asdict(answer)})
        return
    text = answer.text if chat else prompt + answer.text
    emit(printable(text) if is_terminal() else text)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="Text of the system's turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Stop = None,
    seed: Seed = 42,
    dtype: DtypeOption = "float32",
) -> None:
    """Talk to a model by its chat template: /reset forgets what was said, /quit ends; a pipe is read line by line.

    Example: trainway chat runs/my-run --system "Answer in one sentence."
    """
    from trainway.release.chat import chat as talk
    from trainway.release.generate import Decoding

    decoding = Decoding(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    talk(model, decoding, system=system, dtype=dtype)


def export(
    run: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="New directory for the model.")],
    which: Annotated[str, typer.Option(help="best, latest, or a step.")] = "best",
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA run's adapter into its base.")] = False,
    merge_into: Annotated[
        MergeInto | None,
        typer.Option(help="Merge an adapter that was trained on a base in 4 bits: into which base."),
    ] = None,
    part: Annotated[
        Part, typer.Option(help="The model, or a gad run's discriminator: a reward model.")
    ] = "model",
    max_shard_size: Annotated[str, typer.Option(help="Size of a weight file: 5GB, 500MB.")] = "5GB",
    gguf: Annotated[
        GgufType | None, typer.Option(help="Also write a GGUF file of this type, for llama.cpp.")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Load the export again and compare it; unsaid: where that is possible.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's model and tokenizer as a directory that transformers loads; of a LoRA run the adapter.

    Example: trainway export runs/my-run --out my-model
    """
    from trainway.cli.arguments import parse_which
    from trainway.release.bundle import export as export_run

    checked: list[str] = []
    place = export_run(
        run,
        out,
        which=parse_which(which),
        merge=merge,
        merge_into=merge_into,
        part=part,
        max_shard_size=max_shard_size,
        gguf=gguf,
        verify=verify,
        say=checked.append,
    )
    if as_json:
        emit_json({"out": place, "checked": checked})
        return
    emit("\n".join([*checked, f"ok: {place}"]))
