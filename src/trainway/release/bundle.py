"""A run's checkpoint → a directory that plain transformers loads, or plain peft where it is an adapter."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from transformers import AutoTokenizer

from trainway.checkpoint.adapter import ADAPTER_CONFIG, is_adapter
from trainway.checkpoint.snapshot import MODEL_DIR
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import (
    DISCRIMINATOR_DIR,
    MAX_SHARD_SIZE,
    assemble,
    is_in_pieces,
    write_model,
)
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, DataError, UserError
from trainway.files import atomic_directory
from trainway.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainway.models.base import BaseModel
    from trainway.models.load import InitialWeights
    from trainway.release.gguf import GgufType

Part = Literal["model", "discriminator"]
MergeInto = Literal["published", "dequantized"]
Say = Callable[[str], None]
SIZE = re.compile(r"[0-9]+(\.[0-9]+)?(KB|MB|GB|TB)")


@dataclass(frozen=True)
class Merge:
    """What an adapter is added to: its base, with these weights instead of its own where there are some."""

    base: BaseModel
    weights: InitialWeights | None = None


def export(
    run: str | Path,
    out: str | Path,
    *,
    which: str | int = "best",
    merge: bool = False,
    part: Part = "model",
    merge_into: MergeInto | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    gguf: GgufType | None = None,
    verify: bool | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Write the model and tokenizer of a verified checkpoint into the new directory `out`, with SHA256SUMS.

    What is written is loaded again by plain transformers (and peft) and compared with the checkpoint as Trainway loads
    it, before `out` appears: an export that fails leaves nothing.

    Args:
        run: a run, or one of its checkpoints; then `which` says nothing more.
        which: `best`, `latest`, or a step.
        merge: write one plain model, the adapter of the run merged into its base, instead of the adapter.
        part: what the run is for, or its discriminator: a reward model for `AutoModelForSequenceClassification`, or an
            adapter for peft; there the base model's pad_token_id is to be set to the tokenizer's.
        merge_into: merge, and for an adapter that was trained on a base in 4 bits say into what: the base as it was
            published, or that base rounded to 4 bits and back, which is what was trained.
        max_shard_size: of a weight file: 5GB, 500MB.
        gguf: also write a GGUF file of this type, for llama.cpp.
        verify: None compares where that is possible and says where it is not; True insists.
        say: told, line by line, what was checked.

    Raises:
        ConfigError: no run or no such checkpoint there (the message lists those that exist), `out` exists, there is
            nothing to merge, or no discriminator.
        DataError: the checkpoint is damaged, or what was written differs from it.
        EnvironmentFault: too little memory to verify, or a package is missing.
    """
    run, out = Path(run), Path(out)
    _check_arguments(out, max_shard_size, part, gguf)
    source = _source(run, which, part)
    merged = _merge(source, merge_into) if merge or merge_into else None
    if gguf:
        from trainway.release.gguf import check_family, write_gguf

        check_family(source, merged)
    obstacle = _obstacle(source, merged) if verify is not False else None
    if obstacle and verify:
        raise obstacle
    with atomic_directory(out) as partial:
        if merged:
            write_merged(source, partial, merged, max_shard_size=max_shard_size)
        else:
            publish(source, partial, max_shard_size=max_shard_size)
        if part == "model":
            complete(source, partial)
        if obstacle:
            say(f"not verified: {obstacle.what}; {obstacle.why}")
        elif verify is not False:
            from trainway.release.verify import verify_export

            for line in verify_export(source, partial, merged).lines:
                say(line)
        if gguf:
            say(
                write_gguf(
                    partial,
                    partial / f"{out.name}-{gguf}.gguf",
                    gguf,
                    verify=verify is not False and not obstacle,
                )
            )
        from trainway.release.sums import SUMS, write_sums

        say(f"{SUMS}: {write_sums(partial)} files")
    return out


def publish(source: Path, out: Path, *, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Copy a checkpoint's model directory into `out`, in one piece and by the names of its family.

    Raises DataError for damaged weights, OSError of the disk; `out` is half written then.
    """
    from trainway.models.published import publish_names  # transformers takes its time

    anew = is_in_pieces(source) or (max_shard_size != MAX_SHARD_SIZE and not is_adapter(source))
    weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json") if anew else None
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=weights)
    if anew:
        assemble(source, out, max_shard_size=max_shard_size)
    publish_names(out, max_shard_size=max_shard_size)


def model_directory(target: str | Path) -> Path:
    """Where the model of a run directory (its best checkpoint), a checkpoint, or a model directory lies.

    Raises:
        ConfigError: none of these is there.
    """
    target = Path(target)
    for directory in (target, target / MODEL_DIR):
        if any((directory / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
            return directory
    if RunDir(target).checkpoints.is_dir():
        checkpoints = CheckpointStore(RunDir(target).checkpoints, keep_last=1)
        which = "best" if (checkpoints.directory / "best").exists() else "latest"
        return checkpoints.resolve(which) / MODEL_DIR
    raise ConfigError(
        f"{target} holds no model",
        "it is neither a run directory, nor a checkpoint, nor a directory with a config.json",
        "`trainway runs` lists the runs",
    )


def run_config(directory: Path) -> RunConfig | None:
    """The settings of the run whose checkpoint the model directory is part of; None for any other directory."""
    place = directory.resolve()
    depth = 3 if place.parent.name == DISCRIMINATOR_DIR else 2
    run = place.parents[depth : depth + 1]  # run/checkpoints/step-N/[discriminator/]model
    found = RunDir(run[0]).config if run and directory.name == MODEL_DIR else None
    if found is None or not found.exists():
        return None
    return RunConfig.model_validate(yaml.safe_load(found.read_text()))


def adapter_base(directory: Path) -> BaseModel:
    """The base of the adapter in `directory`, which may be part of a run: its settings say where imports are kept.

    Raises:
        ConfigError, DataError, EnvironmentFault: the base was not found, or is damaged.
    """
    from trainway.models.merge import find_adapter_base  # peft takes its time

    config = run_config(directory) or RunConfig()
    cache, trusted = Path(config.data.store_dir), config.model.trust_remote_code
    return find_adapter_base(directory, cache=cache, trust_remote_code=trusted)


# ---- what is exported


def _check_arguments(out: Path, max_shard_size: str, part: Part, gguf: GgufType | None) -> None:
    if out.exists():
        raise ConfigError(
            f"{out} exists already", "an export never overwrites", "choose another --out, or remove it first"
        )
    if not SIZE.fullmatch(max_shard_size):
        raise ConfigError(
            f"--max-shard-size is {max_shard_size!r}", "it is a number and a unit", "e.g. 5GB or 500MB"
        )
    if gguf and part == "discriminator":
        raise ConfigError(
            "--gguf is for the model",
            "llama.cpp takes no discriminator",
            "leave one of --gguf and --part out",
        )


def _source(run: Path, which: str | int, part: Part) -> Path:
    """The model directory within a checkpoint that has been verified."""
    if run.parent.name == RunDir(Path()).checkpoints.name and (run / MODEL_DIR).is_dir():
        step = re.fullmatch(r"step-([0-9]+)", run.name)
        run, which = run.parent.parent, int(step[1]) if step else run.name
    checkpoints = RunDir(run).checkpoints
    if not checkpoints.is_dir():
        raise ConfigError(
            f"{run} holds no checkpoints",
            "it is not a run directory, or nothing was saved yet",
            "`trainway runs` lists the runs",
        )
    checkpoint = CheckpointStore(checkpoints, keep_last=1).resolve(which)
    if part == "model":
        return checkpoint / MODEL_DIR
    source = checkpoint / DISCRIMINATOR_DIR / MODEL_DIR
    if not source.is_dir():
        raise ConfigError(
            f"{checkpoint} holds no discriminator",
            "recipe gad alone trains one, and not in its stage seqkd",
            "export the model, or choose another run",
        )
    return source


def _merge(source: Path, into: MergeInto | None) -> Merge:
    """What the adapter in `source` is merged into. Raises ConfigError where that has to be said, and is not."""
    run = source.parents[3] if source.parent.name == DISCRIMINATOR_DIR else source.parents[2]
    if not is_adapter(source):
        raise ConfigError(f"{run} has no adapter to merge", "it trained the whole model", "leave --merge out")
    config = run_config(source)
    quantized = config is not None and config.lora.quantize != "none"
    quantized = quantized and source.parent.name != DISCRIMINATOR_DIR  # whose base is never quantised
    if quantized and into is None:
        raise ConfigError(
            f"the adapter of {run} was trained on its base in 4 bits",
            "it made up for their rounding; added to the base as it was published it is another model than the one "
            "that was trained and validated",
            "say which you mean: --merge-into dequantized (the 4 bits as plain numbers: what was trained), "
            "--merge-into published (the base as it was; evaluate it again), or export the adapter",
        )
    if into == "dequantized" and not quantized:
        raise ConfigError(
            f"--merge-into is dequantized, and {run} did not quantise its base",
            "the adapter belongs to the base as it was published",
            "use --merge alone",
        )
    base = adapter_base(source)
    if into != "dequantized":
        return Merge(base)
    from trainway.models.qlora import dequantized_weights

    return Merge(base, dequantized_weights(base))


def _obstacle(source: Path, merge: Merge | None) -> UserError | None:
    """Why an export could not be compared with its checkpoint on this machine."""
    from trainway.release.verify import check_possible

    try:
        base = merge.base if merge else adapter_base(source) if is_adapter(source) else None
        check_possible(base.directory if base else source)
    except UserError as error:
        if isinstance(error, DataError):
            raise
        return error
    return None


# ---- how it is written


def write_merged(source: Path, out: Path, merge: Merge, *, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Merge the adapter in `source` and write the plain model. Raises DataError for damaged or unusable weights."""
    from trainway.models.merge import load_adapted, merge_adapters
    from trainway.models.published import publish_names

    model = load_adapted(source, merge.base, merge.base.dtype, merge.weights)
    merge_adapters(model)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if source.parent.name == DISCRIMINATOR_DIR:
        # by which transformers finds a sequence's last token
        model.config.pad_token_id = tokenizer.pad_token_id
    write_model(model, out, tokenizer, max_shard_size=max_shard_size)
    publish_names(out, max_shard_size=max_shard_size)


def complete(source: Path, out: Path) -> None:
    """Write into `out`, made from the model directory `source`, what others need to use the model as it was trained: where texts begin, and where answers end."""
    from trainway.data.tokenise import has_bos
    from trainway.release.endings import begin_with_bos, write_ends

    if not (out / "tokenizer_config.json").exists():
        return
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(out, local_files_only=True)
    config = run_config(source)
    if config is not None and config.recipe == "pretrain" and has_bos(tokenizer):
        begin_with_bos(tokenizer, out)
    if not is_adapter(out):
        write_ends(tokenizer, out)
