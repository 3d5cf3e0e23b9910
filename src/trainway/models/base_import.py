"""Whether a model's files are laid out as the model in memory, and the one-time import of those that are not."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from trainway.checkpoint.weights import INDEX_FILE, write_shards
from trainway.data.turns import Progress, turn
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.files import atomic_directory
from trainway.models.base_files import CONFIG, ModelFiles, Stored, read_directory

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights are trained in, by their names in safetensors."""

_DEQUANTIZED = {
    "mxfp4": lambda: Mxfp4Config(dequantize=True),
    "fp8": lambda: FineGrainedFP8Config(dequantize=True),
}
"""Quantised weights that transformers turns back into plain ones on any machine."""
_COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
"""Tensors in old files that models compute themselves."""


@dataclass(frozen=True)
class Layout:
    """How stored tensors relate to those of a model, and what does not fit."""

    names: Mapping[str, str]
    """Of each parameter and persistent buffer: which stored tensor it is. A tied weight appears once."""
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    converted: tuple[str, ...]
    """Stored tensors that transformers puts together otherwise in memory, or that are no plain numbers."""
    tied: tuple[tuple[str, str], ...]
    """Pairs of stored tensors that are one weight in memory."""
    extra: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        return not (self.missing or self.misshapen or self.converted)


def compare(model: PreTrainedModel, stored: Mapping[str, Stored]) -> Layout:
    """How the tensors of files fit `model` on the meta device; of tied weights one is enough.

    Names may differ where transformers itself renames them; it knows what older files or other libraries call them.
    """
    tensors = model.state_dict(keep_vars=True)
    owners = {id(tensor): name for name, tensor in owned_tensors(model)}
    places, converted = _renamed(model, stored)
    found = {name: places[name] for name in tensors if name in places}
    names: dict[str, str] = {}
    tied = []
    for name, place in sorted(found.items(), key=lambda item: owners[id(tensors[item[0]])] != item[0]):
        if names.setdefault(owners[id(tensors[name])], place) != place:
            tied.append((names[owners[id(tensors[name])]], place))
    misshapen = [
        f"{place} is {list(stored[place].shape)} instead of {list(tensors[name].shape)}"
        for name, place in found.items()
        if stored[place].shape != tuple(tensors[name].shape)
    ]
    converted += [place for place in found.values() if stored[place].dtype not in DTYPES]
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *map(re.escape, _COMPUTED)]
    return Layout(
        names,
        missing=tuple(name for name, _ in owned_tensors(model) if name not in names),
        misshapen=tuple(misshapen),
        converted=tuple(converted),
        tied=tuple(tied),
        extra=tuple(
            place
            for name, place in places.items()
            if name not in tensors and not any(re.search(pattern, place) for pattern in ignored)
        ),
    )


def owned_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then persistent buffers, each once and by its first name."""
    yield from model.named_parameters()
    stored = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _renamed(model: PreTrainedModel, stored: Mapping[str, Stored]) -> tuple[dict[str, str], list[str]]:
    """({name in memory: stored name} of tensors that are taken as they are, stored names of those that are converted)."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    tensors = model.state_dict()
    places, converted = {}, []
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, tensors)
        if pattern is not None:  # be it under the same name and of the same shape
            converted.append(name)
        elif renamed not in stored or renamed == name:
            places[renamed] = name
    return places, converted


def _conversions(model: PreTrainedModel) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def quantization(config: PreTrainedConfig) -> str | None:
    """The method by which the weights are quantised, such as "mxfp4"; None for plain ones."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = (
        settings.get("quant_method")
        if isinstance(settings, dict)
        else getattr(settings, "quant_method", None)
    )
    return str(getattr(method, "value", method)).lower()


def import_model(
    model: PreTrainedModel,
    files: ModelFiles,
    config: PreTrainedConfig,
    source: str,
    *,
    identity: str,
    cache: Path,
    trust_remote_code: bool,
    report: Progress,
) -> tuple[ModelFiles, str]:
    """A copy of the model in `cache` whose tensors are those of `model` (on the meta device), and a line about it.

    Made once, by one process, through transformers' own loading on the CPU; it holds the whole model in memory.

    Raises:
        ConfigError: weights quantised in a way that cannot be undone.
        DataError: the files do not hold every weight of the model.
        EnvironmentFault: too little memory or disk.
    """
    method = quantization(config)
    if method is not None and method not in _DEQUANTIZED:
        raise ConfigError(
            f"the weights of {source} are quantised ({method})",
            f"Trainway can undo {' and '.join(sorted(_DEQUANTIZED))} only, and trains plain weights",
            "name the model that it was quantised from",
        )
    dtype = _import_dtype(files, config, method)
    tensors = dict(owned_tensors(model))
    # another version of transformers may lay the same model out in another way
    layout = sorted((name, list(tensor.shape)) for name, tensor in tensors.items())
    target = cache / xxhash.xxh3_128_hexdigest(json.dumps([identity, layout, str(dtype)]).encode())
    num_bytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    how = f"{method.upper()} weights dequantised" if method else "weights laid out as transformers holds them"
    label = f"importing {source}: {how}"
    with turn(cache / f"{target.name}.lock", report):
        if not target.exists():
            _refuse_lacking(model, files, source, method)
            _check_room(source, cache, num_bytes)
            report(label, 0, num_bytes)
            for left in cache.glob(f"{target.name}.tmp-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with atomic_directory(target) as directory:
                _write_import(directory, model, files, config, source, method, dtype, trust_remote_code)
            report(label, num_bytes, num_bytes)
    imported = read_directory(target, str(target), needs_tokenizer=False)
    before, after = files.num_bytes / 1e9, imported.num_bytes / 1e9
    return imported, f"{how}, {_short(dtype)}: {before:.1f} -> {after:.1f} GB, in {target}"


def dominant_dtype(files: ModelFiles) -> torch.dtype | None:
    """The floating type of most bytes of the weights; None if none is one that weights are trained in."""
    sizes: Counter[str] = Counter()
    for tensor in files.tensors.values():
        sizes[tensor.dtype] += tensor.num_bytes
    found = next((name for name, _ in sizes.most_common() if name in DTYPES), None)
    return DTYPES[found] if found else None


def _write_import(
    directory: Path,
    model: PreTrainedModel,
    files: ModelFiles,
    config: PreTrainedConfig,
    source: str,
    method: str | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> None:
    try:
        with quiet_transformers():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                str(files.directory),
                config=copy.deepcopy(config),
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **({"quantization_config": _DEQUANTIZED[method]()} if method else {}),
            )
    except (RuntimeError, ValueError, KeyError, IndexError, AssertionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise lacking_weights(source, _unpublished(model, files) or [why[:300]]) from error
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{key[0]} is {list(key[1])} instead of {list(key[2])}" for key in info["mismatched_keys"]]
    state = dict(owned_tensors(loaded))
    problems += [f"{name} was not loaded" for name, _ in owned_tensors(model) if name not in state]
    if problems:
        raise lacking_weights(source, problems)
    write_shards(directory, state)
    suffixes = {".json", ".jinja", ".txt", ".model", *([".py"] if trust_remote_code else [])}
    for path in files.directory.iterdir():
        if path.suffix in suffixes and path.name not in (CONFIG, INDEX_FILE) and path.is_file():
            shutil.copyfile(path, directory / path.name)
    plain = copy.deepcopy(config)
    for setting in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(plain, setting):
            delattr(plain, setting)
    plain.dtype = dtype
    plain.architectures = [type(loaded).__name__]
    plain.save_pretrained(directory)


def lacking_weights(source: str, problems: list[str]) -> DataError:
    """The error for files that do not hold all that the model needs."""
    rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return DataError(
        f"the weights of {source} do not fit its config.json",
        "; ".join(problems[:8]) + rest,
        "check that the files belong together, and that it is a causal language model",
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own warnings and bars: what they would say is checked here and said in our words."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _unpublished(model: PreTrainedModel, files: ModelFiles) -> list[str]:
    """What the files lack of the layout that transformers itself would write."""
    from transformers.core_model_loading import revert_weight_conversion

    published = revert_weight_conversion(model, dict(owned_tensors(model)))
    return [f"{name} is missing" for name in published if name not in files.tensors]


def _refuse_lacking(model: PreTrainedModel, files: ModelFiles, source: str, method: str | None) -> None:
    """Say before a long load that weights are missing, where names alone can tell."""
    from transformers.core_model_loading import WeightConverter

    layout = compare(model, files.tensors)
    if method is None and not any(isinstance(entry, WeightConverter) for entry in _conversions(model)):
        problems = [f"{name} is missing" for name in layout.missing] + [*layout.misshapen]
        if problems:
            raise lacking_weights(source, problems)


def _import_dtype(files: ModelFiles, config: PreTrainedConfig, method: str | None) -> torch.dtype:
    if method is None and (found := dominant_dtype(files)) is not None:
        return found
    named = getattr(torch, config.dtype, None) if isinstance(config.dtype, str) else config.dtype
    return next((dtype for dtype in DTYPES.values() if dtype == named), torch.bfloat16)


def _check_room(source: str, cache: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(cache).free
    if num_bytes > free:
        raise EnvironmentFault(
            f"no room to import {source}",
            f"its plain weights take {num_bytes / 1e9:.1f} GB, and {cache} has {free / 1e9:.1f} GB free",
            "free some space, or set data.store_dir to a directory on a larger disk",
        )
    memory = psutil.virtual_memory().available
    if num_bytes > memory:
        raise EnvironmentFault(
            f"too little memory to import {source}",
            f"its plain weights take {num_bytes / 1e9:.1f} GB, and {memory / 1e9:.1f} GB are free",
            "import it on a machine with more memory: the copy in the cache directory works everywhere",
        )


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))
