"""The model that training starts from: found, checked, built without weights, and its weights for whoever holds which."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from trainway.checkpoint.pieces import Piece, open_tensors
from trainway.checkpoint.weights import copy_piece
from trainway.data.hash_memory import remembered_hashes
from trainway.data.turns import Progress, turn
from trainway.errors import ConfigError, DataError
from trainway.models.base_config import check_trust, read_config
from trainway.models.base_files import CONFIG, ModelFiles, find_local, read_directory
from trainway.models.base_hub import fetch_model
from trainway.models.base_import import (
    Layout,
    compare,
    dominant_dtype,
    import_model,
    lacking_weights,
    quantization,
    quiet_transformers,
)

_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseModel:
    """A model on disk whose tensors are those of the model in memory."""

    directory: Path
    """Plain safetensors, config.json, the tokenizer; the files of an import where the source's are laid out otherwise."""
    config: PreTrainedConfig
    source: str
    """What the user wrote."""
    revision: str | None
    """The commit of a model on the Hub."""
    identity: str
    """A hash of the source's config.json and weights."""
    notes: tuple[str, ...]
    """What the user should know, for the log."""
    names: Mapping[str, str]
    """Of each parameter and persistent buffer in memory: its name in the files. A tied weight appears once."""
    files: tuple[Path, ...]
    """The weight files."""
    dtype: torch.dtype
    """The type that most of the weights are stored in."""
    trust_remote_code: bool = False


def find_base(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: Path,
    needs_tokenizer: bool = True,
    report: Progress = lambda label, done, total: None,
) -> BaseModel:
    """The causal language model that `path` names: a local directory in Hugging Face's format, or an id of the Hub.

    Processes of one machine that ask together take turns, and the first one downloads and imports. Ranks should all
    ask for the commit that the main one found (`revision`): a branch may move meanwhile.

    Args:
        path: an existing directory goes before a Hub id.
        revision: commit, tag or branch on the Hub; empty means its newest commit.
        trust_remote_code: run the Python code of the repository; a model on the Hub then needs a commit of 40 digits.
        cache: directory that keeps imports (weights that are quantised or laid out otherwise) and hashes.
        needs_tokenizer: off where another tokenizer is used.
        report: told (label, bytes done, bytes in all) while it downloads or imports.

    Raises:
        ConfigError: no such path, no causal language model, code that is not trusted, weights that cannot be trained.
        DataError: files are missing (each is named), damaged, or do not hold every weight.
        EnvironmentFault: no network, access or room.
    """
    store = cache / "models"
    notes: list[str] = []
    directory, commit = _directory(path, revision, trust_remote_code, needs_tokenizer, store, report, notes)
    files = read_directory(directory, path, needs_tokenizer=needs_tokenizer)
    config, note = read_config(directory, path, trust_remote_code)
    notes += [note] if note else []
    identity = _identity(files, trust_remote_code, store, report)
    model = meta_model(config, torch.float32, trust_remote_code)
    layout = compare(model, files.tensors)
    if quantization(config) is not None or not layout.is_plain:
        files, note = import_model(
            model, files, config, path,
            identity=identity, cache=store, trust_remote_code=trust_remote_code, report=report,
        )  # fmt: skip
        notes.append(note)
        config, _ = read_config(files.directory, path, trust_remote_code)
        layout = compare(model, files.tensors)
        if not layout.is_plain:
            raise lacking_weights(path, [*layout.missing, *layout.misshapen, *layout.converted])
    _check_ties(files, layout, path)
    notes += _unused(layout, type(model).__name__)
    return BaseModel(
        directory=files.directory,
        config=config,
        source=path,
        revision=commit,
        identity=identity,
        notes=tuple(notes),
        names=layout.names,
        files=files.weights,
        dtype=dominant_dtype(files) or torch.float32,
        trust_remote_code=trust_remote_code,
    )


def build_base(
    base: BaseModel, *, dtype: torch.dtype, device: torch.device | str = "cpu", attention: str | None = None
) -> PreTrainedModel:
    """The model on the meta device, every parameter of type `dtype`, in evaluation mode; buffers are real.

    `allocate` gives it room and `BaseWeights` its weights. Experts of a mixture are computed one after the other on a
    CPU, and in grouped matrix products on the `device` "cuda". attention: one of transformers' own, its choice if empty.
    """
    model = meta_model(
        base.config,
        dtype,
        base.trust_remote_code,
        attention=attention,
        experts=experts_on(torch.device(device)),
    )
    restore_buffers(model, base)
    if model.can_generate() and (base.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(base.directory)
    return model.eval()


def restore_buffers(model: PreTrainedModel, base: BaseModel) -> None:
    """Give a model with the body of `base` the persistent buffers of its files, such as the biases of routers."""
    buffers = [name for name, _ in model.named_buffers() if name in base.names]
    if not buffers:
        return
    with open_tensors(base.files) as stored:
        for name in buffers:
            owner, _, own = name.rpartition(".")
            # in the stored type: routers' biases are kept more exact than the weights
            model.get_submodule(owner).register_buffer(own, stored.read(base.names[name]).clone())


def experts_on(device: torch.device) -> Literal["eager", "grouped_mm"]:
    """How transformers computes the experts of a mixture best on a device, with gradients."""
    return "grouped_mm" if device.type == "cuda" else "eager"


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base model for any pieces of its parameters: only the rows that they need are read."""

    base: BaseModel

    @torch.no_grad()
    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        """Fill the pieces, converted to their type. Raises DataError when the files cannot be read any more."""
        with open_tensors(self.base.files) as stored:
            for name, piece in pieces:
                found = self.base.names[name]
                if stored.shapes[found] != piece.shape:
                    raise DataError(
                        f"the weights of {self.base.source} do not fit the model",
                        f"{name} is {list(stored.shapes[found])} instead of {list(piece.shape)}",
                        "start again: its files have changed since",
                    )
                copy_piece(stored, found, piece)


def _directory(
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    needs_tokenizer: bool,
    store: Path,
    report: Progress,
    notes: list[str],
) -> tuple[Path, str | None]:
    """Where the files are, and the commit of a model on the Hub."""
    local = find_local(path)
    if local is not None:
        if revision is not None:
            raise ConfigError(
                f"model.revision {revision!r} is set, and {path} is a local directory",
                "a directory holds one version",
                "leave model.revision out",
            )
        return local, None
    check_trust(path, revision, trust_remote_code)
    with turn(store / f"{xxhash.xxh3_64_hexdigest(path.encode())}.lock", report):
        snapshot = fetch_model(
            path, revision, with_code=trust_remote_code, needs_tokenizer=needs_tokenizer, report=report
        )
    notes += [snapshot.note] if snapshot.note else []
    return snapshot.directory, snapshot.commit


def meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    *,
    attention: str | None = None,
    experts: str = "eager",
) -> PreTrainedModel:
    """The model of a configuration, all parameters on the meta device and of type `dtype`.

    It is the causal language model, or the sequence classifier where the configuration names one.
    """
    config = copy.deepcopy(config)
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # buffers are real: no file restores those that a model computes
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model: PreTrainedModel = auto.from_config(
            config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            experts_implementation=experts,
            **({"attn_implementation": attention} if attention else {}),
        )
    model.tie_weights()  # the context above has cut the ties
    for parameter in model.parameters():
        if parameter.dtype != dtype:  # a layer that asks for a type of its own
            parameter.data = parameter.data.to(dtype)
    return model


def _identity(files: ModelFiles, trust_remote_code: bool, store: Path, report: Progress) -> str:
    wanted = [files.directory / CONFIG, *files.weights]
    if trust_remote_code:
        wanted += sorted(files.directory.glob("*.py"))
    # a file in the cache of the Hub is a link to a blob that is named by its hash
    known = {file: _blob(file) for file in wanted}
    rest = [file for file in wanted if known[file] is None]
    total, done = sum(file.stat().st_size for file in rest), 0

    def hashed(size: int) -> None:
        nonlocal done
        done += size
        report("hashing the model", done, total)

    computed = dict(zip(rest, remembered_hashes(rest, store / "hashes.json", hashed), strict=True))
    lines = [f"{file.name} {known[file] or computed[file]}" for file in wanted]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def _blob(file: Path) -> str | None:
    if not file.is_symlink():
        return None
    name = file.readlink().name
    return name if _BLOB.fullmatch(name) and file.parent.parent.name == "snapshots" else None


def _unused(layout: Layout, architecture: str) -> list[str]:
    count = len(layout.extra)
    if not count:
        return []
    shown = ", ".join(layout.extra[:3]) + (", ..." if count > 3 else "")
    return [
        f"{count} {'tensor' if count == 1 else 'tensors'} in the files of no use to {architecture}: {shown}"
    ]


def _check_ties(files: ModelFiles, layout: Layout, source: str) -> None:
    """Of two weights that the configuration ties, files may hold both: then they must be the same."""
    if not layout.tied:
        return
    with open_tensors(files.weights) as stored:
        for name, other in layout.tied:
            rows = stored.shapes[name][0]
            for start in range(0, rows, 8192):  # a part at a time: embeddings are large
                count = min(8192, rows - start)
                if not torch.equal(stored.read(name, start, count), stored.read(other, start, count)):
                    raise ConfigError(
                        f"{source}: {name} and {other} differ, and config.json ties them",
                        "one matrix in memory cannot be both",
                        'set "tie_word_embeddings": false in its config.json if both are meant',
                    )
